"""The loss bound to real models of megatron-core 0.17, 0.18 and 0.19, against dense float64.

0.17 and 0.18 lie beside the environment's packages, in folders that tools/install.sh fills; the
same torch runs all three.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import ENVIRONMENT, run_trainer

HERE = Path(__file__).parent
INSTALLED = "0.19"
VERSIONS = ("0.17", "0.18", INSTALLED)


@pytest.fixture(scope="module", params=VERSIONS)
def seen(request, tmp_path_factory):
    """What each rank of one launch wrote down: {(tensor ranks, rank): values}."""
    folder = tmp_path_factory.mktemp(f"megatron-core-{request.param}")
    if request.param == INSTALLED:
        run_trainer(2, run_probe, (folder,), [], folder)
    else:
        run_beside(request.param, folder)
    found = {
        (tp, rank): json.loads((folder / f"{tp}-{rank}.json").read_text())
        for tp in (1, 2)
        for rank in (0, 1)
    }
    assert found[2, 0]["version"].startswith(request.param)
    return request.param, {place: written["seen"] for place, written in found.items()}


def run_probe(folder):
    """Run on every rank."""
    torch.distributed.init_process_group("gloo")
    import probe_versions

    probe_versions.main(folder)


def run_beside(version, folder):
    side = Path(sys.prefix) / "side" / f"megatron-core-{version}"
    if not side.exists():
        missing = f"{side} is missing: tools/install.sh puts megatron-core {version} there"
        if os.environ.get("INFOENTROPY_REQUIRE_EXT") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    path = os.pathsep.join([str(side), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "probe_versions.py"), str(folder)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-5000:]


def test_the_loss_is_the_models_own_or_that_of_dense_float64(seen):
    version, found = seen
    hybrid = "MambaModel" if version == "0.17" else "HybridModel"
    for (tensor_ranks, _), models in found.items():
        others = [hybrid, "T5Model", "BertModel"] if tensor_ranks == 2 else []
        assert [each["model"] for each in models] == ["GPTModel", *others]
        for each in models:
            assert max(each["gamma 0"], each["evaluation"]) < 2e-6, each
            assert max(each["losses"], each["objective"], each["gradient"]) < 1e-5, each
            assert each["calls"] == 1


def test_data_ranks_are_unlike(seen):
    """Else alpha of one of them would pass for that of both."""
    one, other = (seen[1][1, rank][0]["inverse mean weight"] for rank in (0, 1))
    assert abs(one - other) > 1e-3 * one


def test_a_forward_that_would_skip_the_loss_is_an_error(seen):
    version, found = seen
    # 0.17 has no output processor.
    known = "an output_processor, which took its"
    expected = "unexpected keyword argument" if version == "0.17" else known
    for models in found.values():
        by_processor, by_rebinding = models[0]["bypass"]
        assert expected in by_processor
        assert "was bound to something else afterwards" in by_rebinding
