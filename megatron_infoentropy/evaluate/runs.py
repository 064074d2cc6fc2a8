"""Run folders, read back: what was trained, how training went, and how the model scored.

run.json holds `lineage` where a training went on with another objective or seed: a list, oldest
first, of {"from_step", "objective", "gamma", "sigma", "normalization", "seed", "loss"}.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_infoentropy.config import COMMON, InfoEntropyConfig
from megatron_infoentropy.evaluate.evaluation import (
    SUMMARY_FILE,
    Evaluation,
    load_evaluation,
)
from megatron_infoentropy.evaluate.runlog import TrainingLog, read_log
from megatron_infoentropy.tasks.results import TaskResult, load_results

GAMMA = "\N{GREEK SMALL LETTER GAMMA}"
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"

# Fields of the loss that run.json names beside `loss`; earlier versions named these alone.
FIRST_FIELDS = ("objective", "gamma", "sigma", "normalization", "detach_weight")


@dataclass(frozen=True)
class Stage:
    """Steps that were trained alike, the ones after `from_step`; `facts` is what run.json says."""

    from_step: int
    facts: dict[str, Any]

    @property
    def loss(self) -> InfoEntropyConfig:
        """Return what was minimised. Fields that an earlier version left out had their defaults."""
        first = {name: self.facts[name] for name in FIRST_FIELDS if name in self.facts}
        return InfoEntropyConfig(**(first | self.facts.get("loss", {}))).effective()

    @property
    def seed(self) -> int | None:
        return self.facts.get("seed")


def stage_of(facts: dict[str, Any], from_step: int = 0) -> Stage:
    """Return the stage that run.json, an entry of its lineage or a command line describes."""
    names = (*FIRST_FIELDS, "seed", "loss")
    return Stage(from_step, {name: facts[name] for name in names if name in facts})


def stages_of(info: dict[str, Any]) -> list[Stage]:
    """Return the stages of a run.json, oldest first; one, where nothing was changed on the way."""
    entries = info.get("lineage") or [info | {"from_step": 0}]
    return [stage_of(entry, int(entry["from_step"])) for entry in entries]


def in_words(stages: list[Stage]) -> str:
    """Name the stages: `cross entropy then InfoEntropy from step 16`, and what changed."""
    seeds = len({stage.seed for stage in stages}) > 1
    common = [n for n in COMMON if len({getattr(stage.loss, n) for stage in stages}) > 1]
    words: list[str] = []
    for stage in stages:
        text = objective_in_words(stage.loss)
        text += "".join(f" {name} {getattr(stage.loss, name):g}" for name in common)
        text += f" seed {stage.seed}" if seeds else ""
        words.append(f"{text} from step {stage.from_step}" if words else text)
    return " then ".join(words)


_SPELLED = {
    "infoentropy": "InfoEntropy",
    "lin_focal": "linear focal",
    "eaft": "EAFT",
    "dft": "DFT",
    "deft": "DEFT",
    "eslm": "ESLM",
    "entrodrop": "EntroDrop",
}


def objective_in_words(loss: InfoEntropyConfig) -> str:
    """Name the objective and every setting that is not the published one; `loss` is effective."""
    heads = ", of prediction heads too" if loss.mtp_loss == "weighted" else ""
    if loss.objective == "cross_entropy":
        return f"cross entropy{heads}"
    label = _SPELLED.get(loss.objective, str(loss.objective))
    if loss.weighting:
        label += f" {loss.weighting}"
    elif loss.objective not in ("eslm", "deft"):
        label += f" {GAMMA}={loss.gamma:g}"
    if loss.objective in ("eslm", "entrodrop"):
        label += f" quantile {loss.quantile:g}"
    if loss.gamma_schedule != "constant":
        label += f" to {loss.gamma_end:g}, {loss.gamma_schedule} in {loss.gamma_samples:,}"
    if loss.sigma != 1:
        label += f" {SIGMA}={loss.sigma:g}"
    if loss.blend:
        label += f", blended by {loss.blend:g}"
    if loss.normalization != replace(loss, normalization="auto").normalization:
        label += f", {loss.normalization} normalization"
    return label + ("" if loss.detach_weight else ", weight differentiated") + heads


SETUP_FIELDS = ("parameters", "train_iters", "global_batch_size", "seq_length")
_REQUIRED = ("name", "objective", "gamma", "sigma", "normalization", "seed", "command", "versions")


@dataclass(frozen=True)
class Run:
    """One training run; `info` is run.json, `log` is empty and `evaluation` None where absent.

    `tasks` are the answers to the questions that were put to it.
    """

    folder: Path
    info: dict[str, Any]
    log: TrainingLog
    evaluation: Evaluation | None
    tasks: dict[str, TaskResult] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.info["name"])

    @property
    def seed(self) -> int:
        return int(self.info["seed"])

    @property
    def loss(self) -> InfoEntropyConfig:
        """Return what was minimised, of several stages in the last."""
        return stage_of(self.info).loss

    @property
    def stages(self) -> list[Stage]:
        return stages_of(self.info)

    @property
    def is_baseline(self) -> bool:
        """Say whether the run weighted no token (any objective may, at gamma 0), in one stage."""
        return len(self.stages) == 1 and self.loss.objective == "cross_entropy"

    @property
    def tokens_seen(self) -> int:
        """Return the tokens trained on up to the last logged step, padding and masked ones too."""
        batch, sequence = self.info["global_batch_size"], self.info["seq_length"]
        return int(self.log.last_iteration * batch * sequence)

    @property
    def objective_label(self) -> str:
        """Return the objective in words, or the objectives of all stages."""
        return in_words(self.stages)

    @property
    def setup(self) -> tuple[tuple[str, Any], ...]:
        """Return what is equal in runs that differ in nothing but how tokens are weighted."""
        common = ((name, getattr(self.loss, name)) for name in COMMON)
        return (*((name, self.info[name]) for name in SETUP_FIELDS), *common)


def load_run(folder: Path) -> Run:
    """Read a run folder; the training log and the evaluation may be missing.

    Raises:
        ValueError: run.json is missing, unreadable or lacks a field.
        ValueError, TaskResultError: a result is there but cannot be read.
    """
    path = folder / "run.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(info, dict):
            raise ValueError(f"no JSON object but {info!r:.40}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable run description ({error}): expected a folder that "
            "`infoentropy train` wrote"
        ) from error
    missing = [field for field in (*_REQUIRED, *SETUP_FIELDS) if info.get(field) is None]
    if missing:
        raise ValueError(
            f"{path} does not say {', '.join(missing)}: train the run again, or add them"
        )
    log = folder / "train.log"
    run = Run(
        folder,
        info,
        read_log(log) if log.is_file() else TrainingLog(),
        load_evaluation(folder) if (folder / SUMMARY_FILE).is_file() else None,
        load_results(folder),
    )
    try:
        _ = run.loss, [(stage.loss, stage.facts["seed"]) for stage in run.stages]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no loss of this version: {error}") from error
    return run
