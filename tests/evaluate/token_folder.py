"""Writes small token datasets of documents that are given."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_infoentropy.data.manifest import Manifest, TokenizerFacts
from megatron_infoentropy.data.tokenizer import tokenizer_digest
from megatron_infoentropy.data.writer import DatasetWriter

VOCAB = 61
EOD = 0


def tokenizer_json(vocab_size: int) -> bytes:
    """A tokenizer of whole words, w1, w2, ..."""
    content = {
        "version": "1.0",
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {
            "type": "WordLevel",
            "vocab": {"<|endoftext|>": 0} | {f"\u0120w{i}": i for i in range(1, vocab_size)},
            "unk_token": "<|endoftext|>",
        },
    }  # fmt: skip
    return json.dumps(content).encode()


TOKENIZER = tokenizer_json(VOCAB)


def write_token_folder(
    folder: Path,
    domains: dict[str, list[np.ndarray]],
    start_ids: tuple[int, ...] = (),
    vocab_size: int = VOCAB,
) -> Path:
    """Write a dataset as `preprocess` does, of three bytes of text a token; return its folder."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(tokenizer_json(vocab_size))
    facts, counts = {}, []
    for row, (name, documents) in enumerate(domains.items()):
        prefix, lengths = folder / f"domain_{row}", folder / "lengths"
        writer = DatasetWriter(prefix, vocab_size=vocab_size, lengths=lengths)
        tokens = np.concatenate([np.zeros(0, int), *documents])
        writer.add(tokens, np.array([len(document) for document in documents], dtype=int))
        facts[name] = replace(writer.finish(), bytes=3 * len(tokens))
        counts.append(writer.counts)
    np.save(folder / "token_counts.npy", counts)
    tokenizer = TokenizerFacts(tokenizer_digest(folder), vocab_size, EOD, start_ids)
    made = Manifest(
        folder=folder, tokenizer=tokenizer, dtype="uint16", append_eod=True, domains=facts
    )
    made.save()
    return folder


def random_documents(seed: int, lengths: list[int]) -> list[np.ndarray]:
    """Documents of token ids with a Zipf-like distribution, each closed by end-of-document."""
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, VOCAB)
    bodies = [
        generator.choice(np.arange(1, VOCAB), size=length - 1, p=share / share.sum())
        for length in lengths
    ]
    return [np.append(body, EOD) for body in bodies]
