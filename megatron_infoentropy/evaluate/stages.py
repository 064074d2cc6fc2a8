"""What a run was trained with, from first step to last, in words: one objective, or a lineage.

run.json holds `lineage` where a training went on with another objective or seed: a list, oldest
first, of {"from_step", "objective", "gamma", "sigma", "normalization", "seed", "loss"}.
"""

from dataclasses import dataclass
from typing import Any

from megatron_infoentropy.config import COMMON, InfoEntropyConfig

GAMMA = "\N{GREEK SMALL LETTER GAMMA}"
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"

_OBJECTIVE = ("objective", "gamma", "sigma", "normalization", "detach_weight")


@dataclass(frozen=True)
class Stage:
    """Steps that were trained alike, the ones after `from_step`."""

    from_step: int
    loss: InfoEntropyConfig
    seed: int


def loss_of(facts: dict[str, Any]) -> InfoEntropyConfig:
    """What was minimised. Where run.json is of an earlier version the rest had defaults."""
    first = {name: facts[name] for name in _OBJECTIVE if name in facts}
    return InfoEntropyConfig(**(first | facts.get("loss", {}))).effective()


def stages_of(info: dict[str, Any]) -> list[Stage]:
    """The stages of a training, oldest first; one, where nothing was changed on the way."""
    entries = info.get("lineage") or [info | {"from_step": 0}]
    return [Stage(int(one["from_step"]), loss_of(one), int(one["seed"])) for one in entries]


def in_words(stages: list[Stage]) -> str:
    """`cross entropy`, or `cross entropy then InfoEntropy from step 16`; what changed is named."""
    seeds = len({stage.seed for stage in stages}) > 1
    common = [n for n in COMMON if len({getattr(stage.loss, n) for stage in stages}) > 1]
    words: list[str] = []
    for stage in stages:
        text = objective_in_words(stage.loss)
        text += "".join(f" {name} {getattr(stage.loss, name):g}" for name in common)
        text += f" seed {stage.seed}" if seeds else ""
        words.append(f"{text} from step {stage.from_step}" if words else text)
    return " then ".join(words)


def objective_in_words(loss: InfoEntropyConfig) -> str:
    """The objective with every setting that is not the published one; `loss` is effective."""
    if loss.objective == "cross_entropy":
        return "cross entropy"
    label = {"infoentropy": "InfoEntropy"}.get(loss.objective, str(loss.objective))
    label += f" {loss.weighting}" if loss.weighting else f" {GAMMA}={loss.gamma:g}"
    if loss.gamma_schedule != "constant":
        label += f" to {loss.gamma_end:g}, {loss.gamma_schedule} in {loss.gamma_samples:,}"
    if loss.sigma != 1:
        label += f" {SIGMA}={loss.sigma:g}"
    if loss.blend:
        label += f", blended by {loss.blend:g}"
    if loss.normalization != "paper":
        label += f", {loss.normalization} normalization"
    return label if loss.detach_weight else f"{label}, weight differentiated"
