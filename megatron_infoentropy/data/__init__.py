"""From raw text to Megatron datasets, without torch.

corpus -> `.jsonl.zst` in the Pile's format -> tokenizer -> preprocess -> `.bin/.idx` per domain.

No module here imports torch or megatron: preparing data runs on a machine that has neither. Only to
load a tokenizer, once a run, is transformers imported, whose ids are promised. `tests/data` holds
the comparisons with those packages.
"""
