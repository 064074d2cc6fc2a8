"""An export holds a layer's tensor at a time, not the model."""

import subprocess
import sys
from pathlib import Path

from tiny_checkpoint import tiny_args, tiny_tensors, write_checkpoint

MEASURE = """
import sys
from pathlib import Path
from megatron_infoentropy.convert import convert_checkpoint
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
save, small, output = map(Path, sys.argv[1:])
convert_checkpoint(small, output / "small")
before = peak()
convert_checkpoint(save, output / "large")
sys.stdout.write(str(peak() - before))
"""


def test_a_model_of_90_mb_is_exported_in_half_of_that(tmp_path: Path) -> None:
    args = tiny_args(num_layers=5, hidden_size=256, ffn_hidden_size=6144)
    tensors = tiny_tensors(args)
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    write_checkpoint(tmp_path / "save", args, tensors)
    write_checkpoint(tmp_path / "small", tiny_args(), tiny_tensors(tiny_args()))
    (tmp_path / "hf").mkdir()
    words = [sys.executable, "-c", MEASURE, *map(str, (tmp_path / "save", tmp_path / "small"))]
    done = subprocess.run([*words, str(tmp_path / "hf")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert size > 90e6
    assert int(done.stdout) < 45e6
