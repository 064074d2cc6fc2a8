"""What the doctor says of NVIDIA Apex, of the package that has its name, and of this machine."""

import pytest

from megatron_infoentropy import doctor
from megatron_infoentropy.doctor import examine, find_apex
from megatron_infoentropy.kernels import dispatch
from megatron_infoentropy.runtime.device import Device

CPU, GPU = Device("cpu", "gloo", 1), Device("cuda", "nccl", 8)


def make_package(folder, *parts):
    for part in parts:
        (folder / part).mkdir(parents=True)
        (folder / part / "__init__.py").write_text("raise SystemExit('must not be imported')\n")


def test_without_apex(tmp_path):
    finding = find_apex([str(tmp_path)])
    assert (finding.found, finding.verdict) == ("not found", "optional")
    assert "not on the package registry" in finding.advice


def test_nvidia_apex_whole(tmp_path):
    make_package(tmp_path, "apex", "apex/optimizers", "apex/normalization")
    (tmp_path / "amp_C.py").write_text("")
    finding = find_apex([str(tmp_path)])
    assert (finding.found, finding.verdict, finding.advice) == ("found", "ok", "")


def test_nvidia_apex_without_its_compiled_parts(tmp_path):
    make_package(tmp_path, "apex", "apex/optimizers", "apex/normalization")
    finding = find_apex([str(tmp_path)])
    assert finding.verdict == "missing"
    assert "rebuild" in finding.advice


def test_the_unrelated_package_of_that_name(tmp_path):
    make_package(tmp_path, "apex", "apex/lib")
    finding = find_apex([str(tmp_path)])
    assert finding.verdict == "missing"
    assert "not NVIDIA's" in finding.found
    assert "pip uninstall apex" in finding.advice


def test_the_report_covers_what_training_depends_on():
    findings = {finding.subject: finding for finding in examine()}
    assert findings["megatron-core"].found.startswith("0.19")
    assert "native" in findings["InfoEntropy kernels"].found
    for subject in ("GPU", "Transformer Engine", "NVIDIA Apex"):
        assert findings[subject].found
    assert all(f.advice for f in findings.values() if f.verdict == "missing")


@pytest.mark.parametrize(
    ("device", "lacking", "found", "verdict"),
    [
        (GPU, {"native": "it runs on the CPU"}, "triton", "ok"),
        (GPU, {"native": "no", "triton": "not installed"}, "cuda", "ok"),
        (
            GPU,
            {"native": "no", "triton": "not installed", "cuda": "built without"},
            "PyTorch reference (not triton, since not installed; not cuda, since built without)",
            "optional",
        ),
        (
            CPU,
            {"native": "not built", "triton": "no", "cuda": "no"},
            "PyTorch reference (not native, since not built)",
            "optional",
        ),
    ],
)
def test_the_doctor_names_the_kernels_that_are_chosen(monkeypatch, device, lacking, found, verdict):
    asked = []

    def unavailable(device, dtype):
        asked.append(device.type)
        return {name: lacking.get(name) for name in dispatch.BACKENDS}

    monkeypatch.setattr(dispatch, "unavailable", unavailable)
    monkeypatch.setattr(doctor, "find_device", lambda: device)
    kernels = doctor._kernels()
    assert (kernels.found, kernels.verdict, asked) == (found, verdict, [device.type])
    assert bool(kernels.advice) == (verdict != "ok")
