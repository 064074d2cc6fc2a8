"""The loss on one CUDA device: right, and without a stall. Skipped by name where there is none.

test_kernels_on_gpu.py has what every backend must do on any device.
"""

import pytest
import torch
from close import assert_within
from oracle import dense_statistics

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss, vocab_parallel_statistics
from megatron_infoentropy.kernels import unavailable

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "cuda", "reference"])
def backend(request):
    """Every backend for CUDA tensors; one that cannot run fails, since it should on a GPU."""
    reason = unavailable(torch.device("cuda"), torch.bfloat16)[request.param]
    assert reason is None, f"backend {request.param!r} cannot run: {reason}"
    return request.param


def random_case(n, v, dtype=torch.float32, scale=3.0):
    generator = torch.Generator("cuda").manual_seed(v)
    logits = (torch.randn(n, v, device="cuda", generator=generator) * scale).to(dtype)
    return logits, torch.randint(0, v, (n,), device="cuda", generator=generator)


def test_rows_lie_beyond_two_to_the_31_elements(backend):
    """17 000 x 131 072 bf16 logits are 4.2 GiB: an int32 offset would wrap in the last rows."""
    n, v = 17_000, 131_072
    logits = torch.zeros(n, v, device="cuda", dtype=torch.bfloat16)
    logits[-3:] = random_case(3, v, torch.bfloat16)[0]
    target = torch.arange(n, device="cuda")
    got = vocab_parallel_statistics(logits, target, backend=backend)
    truth = dense_statistics(logits[-3:], target[-3:])
    for part, value in zip(got[:3], truth, strict=True):
        assert_within(part[-3:], value, atol=1e-5, rtol=2.4e-7)


def test_forward_and_backward_never_wait_for_the_device(backend):
    logits = torch.randn(64, 5000, device="cuda", requires_grad=True)
    target = torch.randint(0, 5000, (64,), device="cuda")
    mask = torch.ones(64, device="cuda")
    config = InfoEntropyConfig(backend=backend)
    infoentropy_loss(logits, target, config, loss_mask=mask).backward()  # warm up
    torch.cuda.set_sync_debug_mode("error")
    try:
        infoentropy_loss(logits, target, config, loss_mask=mask).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_captures_forward_and_backward_and_replays_them(backend):
    config = InfoEntropyConfig(backend=backend, gamma=2.0)
    first, target = random_case(64, 5000, torch.bfloat16)
    second = random_case(64, 5000, torch.bfloat16, scale=1.0)[0]
    memory = first.clone().requires_grad_()

    def step():
        loss = infoentropy_loss(memory, target, config)
        return loss, torch.autograd.grad(loss, memory)[0]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    for logits in (second, first):
        with torch.no_grad():
            memory.copy_(logits)
        graph.replay()
        leaf = logits.clone().requires_grad_()
        expected = infoentropy_loss(leaf, target, config)
        expected.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(gradient, leaf.grad)


def test_results_are_the_same_from_run_to_run(backend):
    logits, target = random_case(3, 262144, torch.bfloat16)
    first, again = (vocab_parallel_statistics(logits, target, backend=backend) for _ in range(2))
    for a, b in zip(first[:4], again[:4], strict=True):
        assert torch.equal(a, b)


def test_a_full_graph_compiles(backend):
    config = InfoEntropyConfig(backend=backend)
    logits, target = random_case(64, 5000, torch.bfloat16)

    def loss(leaf):
        return infoentropy_loss(leaf * 1.5, target, config)

    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    for run, leaf in zip((loss, torch.compile(loss, fullgraph=True)), leaves, strict=True):
        run(leaf).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=8e-3, atol=1e-9)


def test_peak_memory_in_place_is_the_logits_and_64_bytes_a_token(backend):
    n, v = 4096, 32000
    hidden = torch.randn(n, v, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(n, device="cuda", dtype=torch.long)
    config = InfoEntropyConfig(backend=backend)
    for _ in range(2):  # the first also loads modules
        hidden.grad = None
        logits = hidden * 1.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = infoentropy_loss(logits, target, config, inplace_backward=True)
        (gradient,) = torch.autograd.grad(loss, logits)
        peak = torch.cuda.max_memory_allocated() - before
    assert gradient.data_ptr() == logits.data_ptr()
    temporaries = 1 << 28 if backend == "reference" else 1 << 20
    assert peak <= temporaries + 64 * n


def test_a_target_outside_the_vocabulary_is_loud(backend):
    got = vocab_parallel_statistics(
        torch.randn(3, 10, device="cuda"), torch.tensor([1, 10, -1], device="cuda"), backend=backend
    )
    assert got.cross_entropy.isnan().tolist() == [False, True, True]
