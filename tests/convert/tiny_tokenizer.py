"""Tokenizers of a few words or letters, as Hugging Face folders."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

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


def write_gpt2_tokenizer(folder: Path) -> Path:
    """All bytes, and the number 12, which GPT-2's rules keep together and Qwen2's do not."""
    folder.mkdir()
    letters = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12"]
    vocab = {letter: token for token, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab, [("1", "2")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
