"""Finding and reading a checkpoint."""

import argparse
import os
import pickle
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_checkpoint import Harmful, tiny_args, tiny_tensors, write_checkpoint, write_tiny
from torch.distributed.checkpoint import FileSystemReader

from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint, find_iteration
from megatron_infoentropy.convert.distcp import DistcpReader, Part, write_distcp


@pytest.mark.parametrize("legacy", [False, True])
def test_parameters_and_arguments_are_found_in_both_places_of_the_arguments(
    tmp_path: Path, legacy: bool
) -> None:
    args = tiny_args()
    tensors = tiny_tensors(args, torch.bfloat16)
    opened = MegatronCheckpoint(write_checkpoint(tmp_path, args, tensors, legacy=legacy))
    assert opened.args == args
    assert opened.iteration == 7
    assert set(opened.tensors) == set(tensors)  # no optimizer, no extra state
    for name, tensor in tensors.items():
        stored = opened.tensors[name]
        assert (stored.shape, stored.dtype) == (tensor.shape, torch.bfloat16)
        assert torch.equal(opened.read(name), tensor)


def test_arguments_of_older_versions_get_their_present_names(tmp_path: Path) -> None:
    args = tiny_args(norm_epsilon=1e-6, apply_layernorm_1p=True)
    del args.layernorm_epsilon, args.layernorm_zero_centered_gamma
    tensors = tiny_tensors(tiny_args())
    opened = MegatronCheckpoint(write_checkpoint(tmp_path, args, tensors, legacy=True))
    assert opened.args.layernorm_epsilon == 1e-6
    assert opened.args.layernorm_zero_centered_gamma is True


def test_an_iteration_is_found_by_the_tracker_by_number_and_by_its_own_folder(
    tmp_path: Path,
) -> None:
    folder = write_tiny(tmp_path / "save") / "iter_0000007"
    assert find_iteration(tmp_path / "save", None) == folder
    assert find_iteration(tmp_path / "save", 7) == folder
    assert find_iteration(folder, None) == folder
    with pytest.raises(ValueError, match=r"iter_0000008.*iter_0000007"):
        find_iteration(tmp_path / "save", 8)


@pytest.mark.parametrize("legacy", [False, True])
def test_arguments_that_call_a_function_do_not_get_to(tmp_path: Path, legacy: bool) -> None:
    args = tiny_args(data_path=Harmful(os.mkdir, str(tmp_path / "made")))
    opened = MegatronCheckpoint(
        write_checkpoint(tmp_path / "save", args, tiny_tensors(args), legacy=legacy)
    )
    assert opened.args.num_layers == 2
    assert not (tmp_path / "made").exists()


@pytest.mark.filterwarnings("ignore")
def test_every_way_of_cutting_a_tensor_gives_the_same_parts(tmp_path: Path) -> None:
    """Pieces by layer, by layer and row, and of whole tensors, read whole and in parts."""
    tensor = torch.arange(4 * 6 * 10, dtype=torch.float32).view(4, 6, 10)
    names = {"whole": 0, "layers": 1, "rows": 2}  # how many axes are cut
    parts: list[Part] = [
        (name, (4, 6, 10), place, partial(tensor.__getitem__, place))
        for name, axes in names.items()
        for place in product(*map(range, (4, 6)[:axes]))
    ]
    common = {"args": argparse.Namespace(), "iteration": 1}
    write_distcp(tmp_path, torch.float32, parts, {"common_state/shard_0_1": common})
    opened = MegatronCheckpoint(tmp_path)
    for name in names:
        assert torch.equal(opened.read(name), tensor)
        for layer in range(4):
            assert torch.equal(opened.read(name, (layer,)), tensor[layer])
            for row in range(6):
                assert torch.equal(opened.read(name, (layer, row)), tensor[layer, row])
    for reader in (FileSystemReader(tmp_path), DistcpReader(tmp_path)):
        by_torch = {name: torch.empty(4, 6, 10) for name in names}
        dcp.load(by_torch, storage_reader=reader, no_dist=True)
        assert all(torch.equal(loaded, tensor) for loaded in by_torch.values())
    index = pickle.loads((tmp_path / ".metadata").read_bytes())
    assert index.state_dict_metadata["layers"].size == torch.Size([4, 6, 10])
    assert len(index.state_dict_metadata["rows"].chunks) == 24
