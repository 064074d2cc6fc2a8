"""What the doctor says of NVIDIA Apex, of the package that has its name, and of this machine."""

import pytest

from megatron_infoentropy import doctor
from megatron_infoentropy.doctor import examine, find_apex
from megatron_infoentropy.kernels import dispatch
from megatron_infoentropy.runtime.device import Device

CPU, GPU = Device("cpu", "gloo", 1), Device("cuda", "nccl", 8)


NVIDIAS = ("apex/optimizers", "apex/normalization")


@pytest.mark.parametrize(
    ("parts", "compiled", "verdict", "found", "advice"),
    [
        ((), False, "optional", "not found", "not on the package registry"),
        (NVIDIAS, True, "ok", "found", ""),
        (NVIDIAS, False, "missing", "found, without its compiled parts", "rebuild"),
        (("apex/lib",), False, "missing", "not NVIDIA's", "pip uninstall apex"),
    ],
    ids=["none", "whole", "not compiled", "another package of that name"],
)
def test_apex_is_found_without_being_imported(tmp_path, parts, compiled, verdict, found, advice):
    for part in parts:
        (tmp_path / part).mkdir(parents=True)
        for folder in ("apex", part):
            code = "raise SystemExit('must not be imported')\n"
            (tmp_path / folder / "__init__.py").write_text(code)
    if compiled:
        (tmp_path / "amp_C.py").write_text("")
    fact = find_apex([str(tmp_path)])
    assert fact.verdict == verdict
    assert found in fact.found
    assert advice in fact.advice
    assert bool(fact.advice) == (verdict != "ok")


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
