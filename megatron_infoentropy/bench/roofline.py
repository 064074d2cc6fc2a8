"""What this CPU can do at best, measured with the kernels' own instructions and threads.

Statistics read every logit and take one exponential of it, so they cannot take less time than
either: max(bytes / read bandwidth, logits / exponential rate). The gradient also writes every
logit, elsewhere ("copy", around the caches) or in place ("change"). Measure in the same run as what
is compared: on a shared machine both move together.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from megatron_infoentropy.kernels import native


@dataclass(frozen=True)
class Roofline:
    """Bandwidths count bytes read plus bytes written; rates are exponentials a second."""

    threads: int
    read_gb_per_s: float
    copy_gb_per_s: float
    change_gb_per_s: float
    exponentials_per_s: dict[torch.dtype, float]

    def statistics_ms(self, dtype: torch.dtype, logits: int) -> float:
        """The least time for statistics of so many logits."""
        return self._bound_ms(dtype, logits, 1, self.read_gb_per_s)

    def gradient_ms(self, dtype: torch.dtype, logits: int, *, in_place: bool) -> float:
        """The least time for the gradient of so many logits, into memory already touched."""
        rate = self.change_gb_per_s if in_place else self.copy_gb_per_s
        return self._bound_ms(dtype, logits, 2, rate)

    def _bound_ms(self, dtype: torch.dtype, logits: int, moves: int, gb_per_s: float) -> float:
        memory = moves * logits * dtype.itemsize / gb_per_s / 1e6
        return max(memory, logits / self.exponentials_per_s[dtype] * 1e3)


def measure_roofline(threads: int, nbytes: int = 1 << 28, *, repeats: int = 10) -> Roofline:
    """The best of `repeats` turns of every pass.

    Args:
        threads: as the kernels are given (`torch.get_num_threads()`).
        nbytes: of the memory read and written; several times the last-level cache.
        repeats: each turn takes some tens of milliseconds.

    Raises:
        RuntimeError: the C++ extension is not built.
    """
    reason = native.why_unavailable(torch.device("cpu"), torch.float32)
    if reason is not None:
        raise RuntimeError(f"the roofline is measured by the native kernels: {reason}")
    data = torch.ones(nbytes, dtype=torch.uint8)
    out = torch.ones_like(data)
    count = 1 << 24
    turns: dict[object, Callable[[], object]] = {
        "read": partial(native.read_pass, data, threads),
        "copy": partial(native.copy_pass, data, out, threads),
        "change": partial(native.change_pass, out, threads),
    }
    for dtype in native.DTYPES:
        turns[dtype] = partial(native.exponentials_pass, dtype, count, threads)
    seconds = _best_of(turns, repeats)
    return Roofline(
        threads=threads,
        read_gb_per_s=nbytes / seconds["read"] / 1e9,
        copy_gb_per_s=2 * nbytes / seconds["copy"] / 1e9,
        change_gb_per_s=2 * nbytes / seconds["change"] / 1e9,
        exponentials_per_s={dtype: count / seconds[dtype] for dtype in native.DTYPES},
    )


def _best_of(turns: dict[object, Callable[[], object]], repeats: int) -> dict[object, float]:
    """Seconds of the fastest call of each, called in turn."""
    best = dict.fromkeys(turns, float("inf"))
    for _ in range(repeats):
        for name, call in turns.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best
