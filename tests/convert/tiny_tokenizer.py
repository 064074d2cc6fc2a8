"""Tokenizers of a few words or letters, as Hugging Face folders."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

END = "<|endoftext|>"


def write_tokenizer(folder: Path, size: int) -> Path:
    folder.mkdir()
    vocab = {f"t{token}": token for token in range(size - 1)} | {END: size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "notes.txt").write_text("not part of a tokenizer")
    return folder


def write_gpt2_tokenizer(folder: Path, pair: str = "12") -> Path:
    """All bytes and a pair of them: the number 12 stays together by GPT-2's rules, not Qwen2's."""
    return _write_bytes(folder, pair, pre_tokenizers.ByteLevel(add_prefix_space=False))


def write_qwen2_tokenizer(folder: Path) -> Path:
    """All bytes and the pair ".\n", which stays together by Qwen2's rules, not GPT-2's."""
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    cut = pre_tokenizers.Split(Regex(words), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rules = pre_tokenizers.Sequence([cut, to_bytes])
    return _write_bytes(folder, ".\u010a", rules, normalizers.NFC())


def _write_bytes(
    folder: Path,
    pair: str,
    rules: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
) -> Path:
    folder.mkdir()
    letters = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), pair]
    vocab = {letter: token for token, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab, [(pair[0], pair[1])]))
    tokenizer.pre_tokenizer = rules
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
