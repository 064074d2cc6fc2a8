"""The streamed .safetensors file, read back by the safetensors library."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_infoentropy.convert.weights_file import write_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors_reads_back_what_was_streamed(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"b.weight": torch.randn(3, 5), "a": torch.randn(7), "view": torch.randn(4, 6).T}
    path = tmp_path / "model.safetensors"
    write_weights(path, {n: tuple(t.shape) for n, t in tensors.items()}, dtype, tensors.items())
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.to(dtype))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


@pytest.mark.parametrize("wrong", [("other", torch.zeros(2)), ("a", torch.zeros(3))])
def test_a_tensor_that_was_not_announced_is_an_error(
    tmp_path: Path, wrong: tuple[str, torch.Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"expected a \(2,\)"):
        write_weights(tmp_path / "file", {"a": (2,)}, torch.float32, [wrong])


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        write_weights(tmp_path / "file", {"a": (2,)}, torch.float32, [])
