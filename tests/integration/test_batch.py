"""Packed pieces as sequences, and targets left out, as the published code has them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_infoentropy.integration.batch import PieceDataset, _leave_out

PIECES = torch.arange(1, 8 * 6 + 1).view(6, 8)  # six pieces of eight different ids


def piece_dataset(folder, sequence_length):
    prefix = str(folder / "pieces")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for piece in PIECES:
        builder.add_document(piece, [len(piece)])
    builder.finalize(f"{prefix}.idx")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        split="1",
        tokenizer=SimpleNamespace(eod=0, pad=-1, vocab_size=99, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=False,
    )
    documents = np.arange(len(PIECES), dtype=np.int32)
    return PieceDataset(IndexedDataset(prefix), prefix, documents, 12, Split.train, config)


def test_every_sequence_is_one_piece_whose_last_token_has_no_target(tmp_path):
    dataset = piece_dataset(tmp_path, 8)
    samples = [dataset[i] for i in range(12)]
    for sample in samples:
        piece = PIECES[(sample["tokens"][0] - 1) // 8]
        assert sample["tokens"].tolist() == piece.tolist()
        assert sample["labels"][:-1].tolist() == piece[1:].tolist()
        assert sample["loss_mask"].tolist() == [1.0] * 7 + [0.0]
    seen = [int(sample["tokens"][0]) for sample in samples]
    assert sorted(seen) == sorted(PIECES[:, 0].tolist() * 2), "not two epochs"
    assert seen != PIECES[:, 0].tolist() * 2, "not shuffled"


def test_pieces_of_another_length_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"pieces to hold pieces of 4 tokens .* got 8 to 8; make"):
        piece_dataset(tmp_path, 4)


def test_a_target_is_left_out_where_there_are_targets():
    labels, mask = torch.tensor([[3, 0, 5]]), torch.tensor([[1.0, 1.0, 0.0]])
    batch = {"labels": labels, "loss_mask": mask}
    _leave_out(batch, 0)
    assert batch["loss_mask"].tolist() == [[1.0, 0.0, 0.0]]
    batch = {"labels": labels, "loss_mask": mask}
    _leave_out(batch, None)
    assert batch["loss_mask"] is mask
    first_stage = {"labels": None, "loss_mask": None}
    _leave_out(first_stage, 0)
    assert first_stage["loss_mask"] is None
