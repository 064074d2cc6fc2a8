"""What is written here, read by Megatron's own training datasets."""

from itertools import pairwise

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.tokenizers import MegatronTokenizer
from text_files import line, write

from megatron_infoentropy.data.blend import blend, data_path
from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.data.rewrite import merge

SEQUENCE = 32


def test_a_merged_dataset_is_blended_and_sampled_by_megatron(prepare, tokenizer_folder, tmp_path):
    """Every sample is a run of the tokens of one domain, and domains come as often as weighed."""
    files = []
    for number in range(2):
        lines = [line(f"{'AB'[i % 2]}{i} in {number} " * (i % 9), "AB"[i % 2]) for i in range(400)]
        files.append(write(tmp_path / f"{number}.jsonl.zst", lines))
    for index in range(2):
        prepare(files, "shards", shard=(index, 2))
    manifest = merge([tmp_path / "shards"], tmp_path / "data")
    shares = blend(tmp_path / "data", "temperature:3")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE,
        blend=get_blend_from_list(data_path(shares).split()),
        split="100,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=MegatronTokenizer.from_pretrained(
            str(tokenizer_folder), {"library": "huggingface"}
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [100, 0, 0], lambda: True, config
    ).build()
    texts = {}
    for name in manifest.domains:
        reader = IndexedReader(manifest.prefix(name))
        documents = [reader[i].tolist() for i in range(len(reader)) if len(reader[i])]
        texts[name] = {tuple(document) for document in documents}
    drawn = np.bincount([train[i]["dataset_id"] for i in range(100)], minlength=2)
    assert np.abs(drawn / 100 - [share.weight for share in shares]).max() < 0.03
    eod = manifest.tokenizer.eod_id
    for index in range(100):
        sample = train[index]
        tokens = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
        assert sample["labels"].tolist() == tokens[1:]
        ends = [i for i, token in enumerate(tokens) if token == eod]
        domain = shares[int(sample["dataset_id"])].domain
        for first, last in pairwise(ends):  # the documents that are whole
            assert tuple(tokens[first + 1 : last + 1]) in texts[domain]
