"""The package as a wheel outside the clone: with a compiler, without one, and with one demanded."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
import torch
from megatron_infoentropy import __file__, infoentropy_loss
from megatron_infoentropy.kernels import native
for _ in range(2):
    infoentropy_loss(torch.randn(3, 50, requires_grad=True), torch.arange(3)).backward()
print(__file__, native._C is not None)
"""


def build(tmp_path, **environment):
    """(exit code, output, folder of the wheel), built from a copy of the tracked files."""
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    tracked = subprocess.run(
        [
            "git",
            "ls-files",
            "megatron_infoentropy",
            "csrc",
            "*.toml",
            "setup.py",
            "README.md",
            "LICENSE",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    # What the caller demands of this installation (CI does) is not what a test demands; and CUDA
    # kernels take a minute to compile, which this installation has done where it could.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("INFOENTROPY_")}
    clean["INFOENTROPY_BUILD_CUDA"] = "0"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", str(source), "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", str(wheels)),
        ],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, wheels


def use(tmp_path, wheels):
    """(where the package lies, whether it has compiled kernels, what it said) outside the clone."""
    (wheel,) = wheels.glob("*.whl")
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")  # a pure copy of files: what pip would do
    # -S: without the import hook of this environment's editable installation, which would find the
    # clone's own extension.
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    done = subprocess.run(
        [sys.executable, "-S", "-c", USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    place, compiled = done.stdout.split()
    assert Path(place).is_relative_to(site)
    return site, compiled == "True", done.stderr


def test_a_wheel_has_compiled_kernels_and_all_its_files(tmp_path):
    # How fast its kernels are is not asked here: optimizing them takes half a minute.
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    unoptimized = {"CC": str(compiler), "CXX": str(compiler)}
    code, output, wheels = build(tmp_path, INFOENTROPY_REQUIRE_EXT="1", **unoptimized)
    assert code == 0, output[-3000:]
    site, compiled, said = use(tmp_path, wheels)
    assert compiled
    assert "InfoEntropy kernels" not in said
    scripts = ("launch/node.sh", "launch/hosts.sh", "launch/job.slurm")
    for name in ("py.typed", "_C.pyi", "evaluate/report.html.jinja", *scripts):
        assert (site / "megatron_infoentropy" / name).exists(), name


def test_without_a_compiler_it_installs_and_says_once_what_it_uses(tmp_path):
    code, output, wheels = build(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert code == 0, output[-3000:]
    _, compiled, said = use(tmp_path, wheels)
    assert not compiled
    assert said.count("InfoEntropy kernels: reference, plain PyTorch (not native") == 1


def test_a_demanded_extension_that_does_not_build_is_an_error(tmp_path):
    code, _, _ = build(tmp_path, CC="/bin/false", CXX="/bin/false", INFOENTROPY_REQUIRE_EXT="1")
    assert code != 0


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("", "names no LIBRARIES: set CUDA_HOME to a whole toolkit"),
        ("echo '#$ LIBRARIES=-L.'", "knows none of sm_80, sm_90, sm_100: put a CUDA toolkit"),
    ],
)
def test_a_toolkit_that_cannot_build_the_kernels_says_what_would(tmp_path, says, message):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n{says}\n")
    nvcc.chmod(0o755)
    demand = {"INFOENTROPY_BUILD_CUDA": "1", "INFOENTROPY_REQUIRE_CUDA": "1"}
    code, output, _ = build(tmp_path, CUDA_HOME=str(tmp_path), **demand)
    assert code != 0
    assert message in output


def test_every_dependency_is_pinned_for_the_tests():
    """A dependency without a pin would make two installs differ."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(line for extra, lines in extras.items() if extra != "gpu" for line in lines),
    ]
    names = {w.split(">")[0].split("[")[0].split(";")[0].strip().lower() for w in wanted}
    names.discard(project["name"])
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].strip().lower() for line in pins if "==" in line}
    assert names <= pinned
