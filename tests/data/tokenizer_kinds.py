"""Tokenizer folders in which other files than tokenizer.json decide about ids."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

END = "</s>"
TEXT = ["the cat sat 1234 on   the mat.\n\nIt's IT'S DON'T \xe9t\xe9 \u6f22\u5b57 x.\n"] * 50


def byte_level(special: Iterable[str] = (END, "<s>")) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def like_llama_2() -> Tokenizer:
    """SentencePiece's rules as the file of Llama 2 says them: a blank before everything."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    special = ["<unk>", "<s>", END]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([line.replace(" ", "\u2581") for line in TEXT], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def with_own_rules_for_added_tokens() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("mat sat"), AddedToken("x.", single_word=True)])
    return tokenizer


def with_padding_by_a_new_token() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_padding(pad_token="mat sat", pad_id=330)
    return tokenizer


def with_truncation() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    return tokenizer


def described(**flags: bool) -> dict[str, Any]:
    """What version 4 of transformers says of the tokens in its settings."""
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    plain["special"] = True
    return {"0": {"content": END} | plain, "1": {"content": "<s>"} | plain | flags}


GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}
STARTING = GENERIC | {"add_bos_token": True, "bos_token": "<s>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "unk_token": "<unk>"}
Files = dict[str, dict[str, Any]]
# name -> (tokenizer.json, settings in tokenizer_config.json, the other files)
KINDS: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any], Files]] = {
    "no class": (byte_level, {}, {}),
    "GPT-2's class": (byte_level, {"tokenizer_class": "GPT2Tokenizer"}, {}),
    "a blank before texts": (
        byte_level,
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        {},
    ),
    "Qwen2's class": (byte_level, {"tokenizer_class": "Qwen2Tokenizer"}, {}),
    "a model's class": (byte_level, GENERIC, {"config.json": {"model_type": "qwen2"}}),
    "a start token asked for": (byte_level, STARTING, {}),
    "Llama 2": (like_llama_2, LLAMA | {"legacy": False}, {}),
    "Llama 2, legacy": (like_llama_2, LLAMA | {"legacy": True}, {}),
    "Llama 2, generic class": (like_llama_2, GENERIC, {}),
    "Llama 2 of a model": (like_llama_2, LLAMA, {"config.json": {"model_type": "llama"}}),
    "rules for added tokens": (with_own_rules_for_added_tokens, GENERIC, {}),
    "tokens in the settings": (byte_level, GENERIC | {"extra_special_tokens": ["mat sat"]}, {}),
    "tokens in another file": (byte_level, GENERIC, {"added_tokens.json": {"mat sat": 330}}),
    "an end token without an id": (
        byte_level,
        GENERIC | {"eos_token": {"__type": "AddedToken", "content": "<end>"}},
        {},
    ),
    "special tokens are text": (byte_level, GENERIC | {"split_special_tokens": True}, {}),
    "saved by version 4": (
        byte_level,
        GENERIC | {"added_tokens_decoder": described(), "additional_special_tokens": ["<s>"]},
        {"special_tokens_map.json": {"eos_token": "the"}},
    ),
    "tokens described otherwise": (
        byte_level,
        GENERIC | {"added_tokens_decoder": described(lstrip=True)},
        {},
    ),
    "padding by a new token": (with_padding_by_a_new_token, GENERIC, {}),
    "texts cut short": (with_truncation, GENERIC, {}),
    "the end token elsewhere": (
        byte_level,
        GENERIC | {"eos_token": None},
        {"special_tokens_map.json": {"eos_token": {"content": END, "lstrip": False}}},
    ),
    "a separator for an end token": (byte_level, {"eos_token": None, "sep_token": END}, {}),
}


def write_tokenizer(folder: Path, kind: str) -> Path:
    make, settings, files = KINDS[kind]
    folder.mkdir(parents=True)
    make().save(str(folder / "tokenizer.json"))
    settings = {key: value for key, value in ({"eos_token": END} | settings).items() if value}
    for name, content in {"tokenizer_config.json": settings, **files}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
