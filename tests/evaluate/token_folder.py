"""Writes small token datasets by the byte format's description, independently of the data room."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np

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


def tokenizer_sha256(vocab_size: int) -> str:
    """The digest of a folder that has this tokenizer, and no other file that changes ids."""
    rules = json.loads(tokenizer_json(vocab_size)) | {"truncation": None, "padding": None}
    content = json.dumps([[rules], {}, {}], sort_keys=True)
    return f"{hashlib.sha256(content.encode()).hexdigest()}:folder"


def write_token_folder(
    folder: Path,
    domains: dict[str, list[np.ndarray]],
    bytes_per_token: int = 3,
    start_ids: list[int] | None = None,
    vocab_size: int = VOCAB,
) -> Path:
    """One .bin/.idx a domain, manifest.json and token_counts.npy; returns the folder."""
    folder.mkdir(parents=True)
    manifest: dict = {
        "format": 3,
        "versions": {},
        "engine": "hf",
        "options": {"split_by": "meta.pile_set_name"},
        "shard": None,
        "shards_of": "",
        "inputs": [],
        "left_out": {},
        "token_counts_sha256": "",
        "tokenizer": {
            "sha256": tokenizer_sha256(vocab_size),
            "vocab_size": vocab_size,
            "eod_id": EOD,
            **({"start_ids": start_ids} if start_ids else {}),
        },
        "dtype": "uint16",
        "append_eod": True,
        "domains": {},
        "token_counts": "token_counts.npy",
    }
    counts = np.zeros((len(domains), vocab_size), dtype=np.int64)
    for row, (name, documents) in enumerate(domains.items()):
        prefix = f"domain_{row}"
        lengths = np.array([len(document) for document in documents], dtype="<i4")
        tokens = np.concatenate([np.zeros(0, int), *documents]).astype("<u2")
        offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * 2
        header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
        index = np.arange(len(lengths) + 1, dtype="<i8")
        body = lengths.tobytes() + offsets.astype("<i8").tobytes() + index.tobytes()
        (folder / f"{prefix}.idx").write_bytes(header + body)
        (folder / f"{prefix}.bin").write_bytes(tokens.tobytes())
        counts[row] = np.bincount(tokens, minlength=vocab_size)
        manifest["domains"][name] = {
            "prefix": prefix,
            "documents": len(documents),
            "tokens": len(tokens),
            "bytes": len(tokens) * bytes_per_token,
            "bin_spans": [[2 * len(tokens), hashlib.sha256(tokens.tobytes()).hexdigest()]],
        }
    np.save(folder / "token_counts.npy", counts)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
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
