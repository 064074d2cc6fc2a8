"""Counts in bins of fixed edges: what ranks and micro-batches can add up without seeing values."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Histogram:
    """`bins` equal bins from `low` to `high`; values beyond are counted in the outermost."""

    low: float
    high: float
    bins: int

    def count(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[bins] float64: how much of `mask` falls into each bin; NaN counts nowhere.

        values, mask: [N] float64. Counts of 0 and 1 are exact up to 2^53, whatever the order.
        """
        position = (values - self.low) * (self.bins / (self.high - self.low))
        bin_of = position.nan_to_num(0.0).clamp(0, self.bins - 1).long()
        counted = torch.where(values.isnan(), 0.0, mask)
        return torch.zeros(self.bins, dtype=torch.float64, device=values.device).index_add_(
            0, bin_of, counted
        )

    def edges(self) -> torch.Tensor:
        """[bins + 1] float64."""
        return torch.linspace(self.low, self.high, self.bins + 1, dtype=torch.float64)

    def quantile(self, counts: torch.Tensor, share: float) -> float:
        """The value below which `share` of the mass lies, to within a bin; `low` without mass.

        Linear inside a bin. With share 1.0 it is the upper edge of the last bin in use.
        """
        total = float(counts.sum())
        if total == 0:
            return self.low
        reached = counts.cumsum(0)
        index = int((reached < share * total).sum())
        before = float(reached[index] - counts[index])
        inside = (share * total - before) / max(float(counts[index]), 1e-300)
        return self.low + (index + inside) * (self.high - self.low) / self.bins

    def share_above(self, counts: torch.Tensor, value: float) -> float:
        """The share of the mass above `value`, linear inside its bin; 0 without mass."""
        total = float(counts.sum())
        if math.isnan(value):
            return math.nan
        position = (value - self.low) * self.bins / (self.high - self.low)
        position = min(max(position, 0.0), float(self.bins))
        whole = int(position)
        above = float(counts[whole + 1 :].sum())
        if whole < self.bins:
            above += float(counts[whole]) * (1 - (position - whole))
        return above / total if total else 0.0
