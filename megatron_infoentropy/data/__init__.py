"""From raw text to Megatron datasets, without torch.

corpus -> `.jsonl.zst` in the Pile's format -> tokenizer -> preprocess -> `.bin/.idx` per domain.

No module here imports torch, transformers or megatron: preparing data starts at once and runs on a
machine that has none of them. `tests/data` holds the comparisons with those packages.
"""
