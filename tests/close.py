"""Comparisons that say where and by how much they fail."""

import torch


def assert_within(
    got: torch.Tensor, truth: torch.Tensor, *, rtol: float = 0.0, atol: float | torch.Tensor = 0.0
) -> None:
    """|got - truth| <= atol + rtol |truth| everywhere; NaN and inf must match."""
    got = got.detach().double()  # compared where it lies: a GPU's numbers are many
    truth = truth.detach().to(got)
    atol = atol.to(got) if isinstance(atol, torch.Tensor) else atol
    assert got.shape == truth.shape, f"shape {list(got.shape)} != {list(truth.shape)}"
    finite = truth.isfinite()
    odd = torch.where(finite, 0, torch.nan_to_num(truth, nan=2, posinf=1, neginf=-1))
    odd_got = torch.where(got.isfinite(), 0, torch.nan_to_num(got, nan=2, posinf=1, neginf=-1))
    assert torch.equal(odd, odd_got), f"non-finite values differ at {(odd != odd_got).nonzero()[0]}"
    error = torch.where(finite, got - truth, 0).abs()
    excess = error - (atol + rtol * torch.where(finite, truth, 0).abs())
    if excess.numel() and excess.max() > 0:
        worst = [int(i) for i in torch.unravel_index(excess.argmax(), excess.shape)]
        raise AssertionError(
            f"worst at {worst}: got {got[tuple(worst)]:.9g}, expected {truth[tuple(worst)]:.9g}, "
            f"error {error[tuple(worst)]:.3g} exceeds the bound by {excess.max():.3g}"
        )


def assert_within_bf16_ulp(got: torch.Tensor, truth: torch.Tensor, ulps: float = 1.0) -> None:
    """Each bf16 value lies within `ulps` units in the last place of the float64 truth."""
    truth = truth.double()
    exponent = torch.frexp(truth)[1].clamp_min(-125)
    # bf16 keeps 8 significant bits; its smallest step is 2^-133.
    assert_within(got, truth, atol=ulps * torch.ldexp(torch.ones_like(truth), exponent - 8))
