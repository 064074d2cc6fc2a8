"""Checkpoints of Megatron's FSDP, of FP8 runs, and of ranks that cut tensors in other ways."""

import argparse
import pickle
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_checkpoint import (
    FAMILIES,
    TOKENS,
    tiny_args,
    tiny_tensors,
    unstacked,
    write_checkpoint,
)
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader

from megatron_infoentropy.convert import (
    ConversionError,
    convert_checkpoint,
    verify_conversion,
)
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.distcp import DistcpReader, Part, write_distcp


def write_fsdp(folder: Path, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """As Megatron-FSDP saves: wrapped names, one entry a layer, halves apart, no metadata.json."""
    state = {}
    for name, tensor in unstacked(tiny_tensors(args)).items():
        if args.swiglu and "mlp.linear_fc1.weight" in name:
            gate, up = (half.clone() for half in tensor.chunk(2))
            state |= {f"module.{name}_w": gate, f"module.{name}_v": up}
        else:
            state[f"module.{name}"] = tensor
    everything = {
        "model": state,
        "args": args,
        "iteration": 9,
        "checkpoint_version": 3.0,
        "optimizer": {"state": {"module.output_layer.weight": {"exp_avg": torch.zeros(3)}}},
    }
    dcp.save(everything, checkpoint_id=folder, planner=DefaultSavePlanner(), no_dist=True)
    return state


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_megatron_fsdp_is_the_same_model(tmp_path: Path, family: str) -> None:
    args = tiny_args(**FAMILIES[family])
    write_fsdp(tmp_path / "iter_0000009", args)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("9")
    summary = convert_checkpoint(tmp_path, tmp_path / "hf")
    assert (MegatronCheckpoint(tmp_path).iteration, summary.family) == (9, family)
    verification = verify_conversion(tmp_path, tmp_path / "hf", TOKENS)
    assert verification.passed, verification


def test_the_state_of_fp8_layers_is_left_out(tmp_path: Path) -> None:
    """With FP8 the parameters are saved in 16 or 32 bits; scales lie beside them as extra state."""
    args = tiny_args(fp8="hybrid", fp8_recipe="delayed")
    tensors = tiny_tensors(args, torch.bfloat16)
    extra = {
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_1_2": torch.ones(4),
        "decoder.layers.1.mlp.linear_fc1._extra_state": torch.ones(4),
    }
    write_checkpoint(tmp_path / "save", args, tensors | extra)
    assert convert_checkpoint(tmp_path / "save", tmp_path / "hf").dtype == "bfloat16"
    assert verify_conversion(tmp_path / "save", tmp_path / "hf", TOKENS).passed


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_quantised_parameters_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    args = tiny_args()
    tensors = tiny_tensors(args)
    name = "decoder.layers.mlp.linear_fc2.weight"
    tensors[name] = tensors[name].to(dtype)
    write_checkpoint(tmp_path / "save", args, tensors)
    with pytest.raises(ConversionError, match=rf"{name} in {dtype}"):
        convert_checkpoint(tmp_path / "save", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


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
