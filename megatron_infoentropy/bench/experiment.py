"""One case as it is measured: where, on which logits, by which clock, how often."""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_infoentropy.bench.clock import Clock, clock_for
from megatron_infoentropy.bench.providers import Setting
from megatron_infoentropy.bench.results import Row, row_of_case

SCALE = 3.0  # standard deviation of the logits


@dataclass(frozen=True)
class Experiment:
    """What every provider of a case shares."""

    setting: Setting
    logits: torch.Tensor  # [tokens, columns], this rank's shard
    target: torch.Tensor  # [tokens], ids in the whole vocabulary
    clock: Clock
    repeats: int

    @property
    def logits_bytes(self) -> int:
        return self.logits.numel() * self.logits.element_size()

    def row(self, **fields: Any) -> Row:
        """A row with the columns of the case filled in."""
        threads, clock = torch.get_num_threads(), self.clock.name
        return row_of_case(self.setting.case, threads=threads, clock=clock, **fields)


def prepare(setting: Setting, *, repeats: int) -> Experiment:
    """The same numbers on every run: a shard of this rank's own, targets that all ranks share."""
    case, device = setting.case, setting.device
    generator = torch.Generator(device).manual_seed(1 + setting.group.rank())
    logits = torch.randn(case.tokens, case.columns, device=device, generator=generator)
    generator = torch.Generator(device).manual_seed(0)
    entries = case.columns * case.tensor_parallel
    target = torch.randint(entries, (case.tokens,), device=device, generator=generator)
    logits = logits.mul_(SCALE).to(setting.dtype)
    return Experiment(setting, logits, target, clock_for(device), repeats)
