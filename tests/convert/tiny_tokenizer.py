"""A tokenizer of a few words, as a Hugging Face folder."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers


def write_tokenizer(folder: Path, size: int) -> Path:
    folder.mkdir()
    vocab = {f"t{token}": token for token in range(size - 1)} | {"<|endoftext|>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "notes.txt").write_text("not part of a tokenizer")
    return folder
