"""The loss bound to real models of megatron-core 0.17, 0.18 and 0.19, against dense float64.

0.17 and 0.18 lie beside the environment's packages, in folders that tools/install.sh fills; the
same torch runs all three.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from close import assert_within
from dense_gpt import DenseGPT
from launch import ENVIRONMENT, run_trainer
from oracle import dense_statistics, dense_weight

HERE = Path(__file__).parent
INSTALLED = "0.19"
VERSIONS = ("0.17", "0.18", INSTALLED)
VOCAB, LAYERS, GAMMA = 64, 2, 2.0  # as in probe_versions.py, whose import would import Megatron


@pytest.fixture(scope="module", params=VERSIONS)
def seen(request, tmp_path_factory):
    """What each rank of one launch wrote down: {(tensor ranks, rank): values}."""
    folder = tmp_path_factory.mktemp(f"megatron-core-{request.param}")
    if request.param == INSTALLED:
        run_trainer(2, run_probe, (folder,), [], folder)
    else:
        run_beside(request.param, folder)
    found = {(tp, rank): torch.load(folder / f"{tp}-{rank}.pt") for tp in (1, 2) for rank in (0, 1)}
    assert found[2, 0]["version"].startswith(request.param)
    return found


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


def test_gamma_zero_and_evaluation_are_the_versions_own_loss(seen):
    for found in seen.values():
        assert_within(found["gamma 0"], found["own"], rtol=2e-6)
        assert_within(found["evaluation"], found["own"], rtol=2e-6)
        assert found["calls"] == 1


def test_losses_and_gradients_equal_dense_float64_at_two_tensor_ranks(seen):
    shards = {
        (0, rank): {n: p.double().requires_grad_() for n, p in seen[2, rank]["parameters"].items()}
        for rank in (0, 1)
    }
    losses, valid = dense_losses(shards, seen[2, 0], alpha=None)
    (losses.sum() / valid.sum()).backward()
    for rank in (0, 1):
        assert_within(seen[2, rank]["losses"], losses, rtol=1e-5)
        assert_gradients(seen[2, rank]["gradients"], shards[0, rank], replicated=shards[0, 0])


def test_alpha_is_taken_over_the_data_parallel_group_and_unmasked_tokens(seen):
    inverse = []
    for rank in (0, 1):
        weight, valid, _ = dense_weights(doubled(seen[1, rank]), seen[1, rank])
        inverse.append(valid.sum() / (weight * valid).sum())
    alpha = sum(inverse) / 2
    assert abs(inverse[0] - inverse[1]) > 1e-3 * alpha, "alike ranks would show nothing"
    for rank in (0, 1):
        shards = doubled(seen[1, rank])
        losses, valid = dense_losses(shards, seen[1, rank], alpha=alpha.detach())
        (losses.sum() / valid.sum()).backward()
        assert_within(seen[1, rank]["losses"], losses, rtol=1e-5)
        assert_gradients(seen[1, rank]["gradients"], shards[0, 0], replicated={})


def test_hybrid_t5_and_bert_models_take_the_loss_too(seen):
    hybrid = "MambaModel" if seen[2, 0]["version"].startswith("0.17") else "HybridModel"
    names = [name for name, *_ in seen[2, 0]["other"]]
    assert names == [hybrid, "T5Model", "BertModel"]
    for rank in (0, 1):
        for name, plain, objective, gradient in seen[2, rank]["other"]:
            assert plain < 2e-6, name
            assert abs(objective) < 5e-6, name
            assert gradient < 1e-5, name


def test_a_forward_that_would_skip_the_loss_is_an_error(seen):
    for found in seen.values():
        by_processor, by_rebinding = found["bypass"]
        known = seen[2, 0]["version"].startswith("0.17")  # has no output processor
        expected = "unexpected keyword argument" if known else "an output_processor, which took its"
        assert expected in by_processor
        assert "was bound to something else afterwards" in by_rebinding


def doubled(found):
    return {(0, 0): {n: p.double().requires_grad_() for n, p in found["parameters"].items()}}


def dense_weights(shards, found):
    """(weight, valid, cross entropy) of every token, by the published formulas."""
    tokens, labels = found["tokens"], found["labels"]
    valid = (found["mask"] * (labels != -100)).double()
    logits = DenseGPT(shards, LAYERS).logits(tokens)
    ce, entropy, _ = dense_statistics(logits, labels)
    weight = dense_weight(ce, entropy, "infoentropy", GAMMA, 1.0).detach()
    return weight, valid, ce


def dense_losses(shards, found, alpha):
    """alpha w ce, 0 for tokens that take no part; alpha of this batch alone where it is None."""
    weight, valid, ce = dense_weights(shards, found)
    alpha = valid.sum() / (weight * valid).sum() if alpha is None else alpha
    return alpha * weight * ce * valid, valid


def assert_gradients(got, shard, replicated):
    """Replicated parameters are joined from tensor rank 0, so its gradient is everyone's."""
    for name, gradient in got.items():
        truth = shard[name].grad if shard[name].grad is not None else replicated[name].grad
        error, size = (gradient.double() - truth).abs().max(), truth.abs().max()
        assert error <= 1e-5 * size, f"{name}: error {error:.2e} of {size:.2e}"
