"""What the loss can be told, in one place for the Python API, the training flags and the logs.

This module imports nothing but the standard library, so that argument parsing stays fast.
"""

import dataclasses
import math
import numbers
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

Objective = Literal[
    "infoentropy",
    "focal",
    "lin_focal",
    "eaft",
    "dft",
    "deft",
    "eslm",
    "entrodrop",
    "cross_entropy",
    "custom",
]
Schedule = Literal["constant", "linear", "cosine"]
Normalization = Literal["auto", "paper", "global", "none"]
HeadLoss = Literal["megatron", "weighted"]
Backend = Literal["auto", "triton", "cuda", "native", "reference"]
Collective = Literal["gather", "all_reduce"]

LARGEST_ENTROPY = 12.5  # nats, of a vocabulary of 260 000
# Weights between 2^-48 and 2^48 leave fp32, which ends at 2^128, room for a batch's sums and for
# the gradient of their inverse.
WEIGHT_BITS = 48


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


# Objectives whose publications take the mean of w ce over all tokens: what "auto" normalizes by.
UNNORMALIZED = ("lin_focal", "eaft", "dft", "deft")
# Objectives whose weight of a token depends on the other tokens, so that all must be seen at once.
COMPARING = ("eslm", "entrodrop", "custom")
# Objectives that have no use for gamma.
WITHOUT_GAMMA = ("deft", "eslm", "custom")

# Fields that say how gamma changes.
OF_A_SCHEDULE = ("gamma_schedule", "gamma_end", "gamma_samples")

# Fields that say how the loss is computed, not what it is.
MEANS = ("backend", "collective", "fused_linear", "chunk_tokens", "skip_masked")
# Fields that change every objective alike, plain cross entropy too.
COMMON = ("label_smoothing", "z_loss", "entropy_bonus", "softcap", "temperature", "ignore_target")
# Those of them that are a part of the model: no Hugging Face class has them, so no export.
OF_THE_MODEL = ("softcap", "temperature")
NO_EXPORT = "infoentropy-no-export"  # the flag of a training whose model need not be exported


@dataclass(frozen=True)
class InfoEntropyConfig:
    """How per-token cross entropies become one objective.

    Every field is also a training flag, `--infoentropy-<field>`, with the same meaning.

    Raises:
        ValueError: a value that no objective could use, naming the field, the value and what to do.
    """

    objective: Objective = _setting(
        "infoentropy",
        "what is minimised, by each token's weight, with H the entropy of the predicted "
        "distribution and p the target's probability: infoentropy (sigma + H)^gamma; focal "
        "(1 - p)^gamma; lin_focal the same, differentiated too; eaft (H / ln 20)^gamma; dft "
        "p^gamma; deft p^S with S the sum of all squared probabilities; eslm 0 for the `quantile` "
        "of tokens with the lowest entropy, 1 for the others; entrodrop 0 for each of those with "
        "probability gamma; cross_entropy 1; custom what `weighting` names",
    )
    gamma: float = _setting(
        1.0,
        "exponent of the weight (entrodrop: probability, 0 to 1); 0 is plain cross entropy",
    )
    gamma_schedule: Schedule = _setting(
        "constant", "how gamma changes over the first gamma_samples training samples"
    )
    gamma_end: float = _setting(1.0, "gamma at the end of a linear or cosine schedule and after")
    gamma_samples: int = _setting(0, "samples (sequences) that a gamma schedule lasts")
    sigma: float = _setting(1.0, "added to the entropy (nats) before the power; infoentropy only")
    quantile: float = _setting(
        0.1,
        "eslm and entrodrop only: the share of a rank's tokens in a micro-batch, those of lowest "
        "entropy, that can lose their weight; in [0, 1)",
    )
    normalization: Normalization = _setting(
        "auto",
        "paper: alpha = mean over data-parallel ranks of 1/mean(w), per micro-batch, as published; "
        "global: sum(w ce)/sum(w) over everything, so that it does not depend on how a batch is "
        "cut; none: alpha = 1; auto: none for lin_focal, eaft, dft and deft, as published, paper "
        "for all others",
    )
    detach_weight: bool = _setting(
        True, "treat the weight as a constant in the backward pass, as published"
    )
    blend: float = _setting(
        0.0, "mixes plain cross entropy in: the weight is (1 - blend) w + blend, blend in [0, 1]"
    )
    weighting: str = _setting(
        "",
        "objective custom: package.module:function that takes a TokenBatch (every token's cross "
        "entropy, entropy, target, ...), or these two alone, and returns their weights >= 0",
    )
    label_smoothing: float = _setting(
        0.0,
        "share of the target's probability that is spread evenly over the true vocabulary, in [0, "
        "1): a token's loss is (1 - s) ce + s u, u the cross entropy of the uniform distribution",
    )
    z_loss: float = _setting(
        0.0, "adds this times the squared log-sum-exp to every token's loss; keeps logits small"
    )
    entropy_bonus: float = _setting(
        0.0, "subtracts this times the entropy (nats) from every token's loss"
    )
    softcap: float = _setting(
        0.0, "bounds every logit z by c tanh(z / c), as a part of the model; 0 is no bound"
    )
    temperature: float = _setting(1.0, "divides the (capped) logits, as a part of the model")
    ignore_target: int = _setting(
        -1,
        "targets of this id take no part in the loss (the published code: 0); -1 is none; the "
        "trainer's, functions have ignore_index",
    )
    mtp_loss: HeadLoss = _setting(
        "megatron",
        "of multi-token-prediction heads, which the trainer alone serves: Megatron's own cross "
        "entropy, or this objective (weighted), each head's alpha over its own tokens; "
        "--mtp-loss-scaling-factor multiplies either",
    )
    backend: Backend = _setting(
        "auto",
        "kernels: triton or cuda (GPU), native (C++ on the CPU), reference (PyTorch, anywhere), or "
        "auto, the best that runs",
    )
    collective: Collective = _setting(
        "gather",
        "how vocabulary shards are joined: gather is one all-gather of 16 bytes a token, folded in "
        "rank order and bitwise equal on all ranks; all_reduce is a MAX and a packed SUM",
    )
    fused_linear: bool = _setting(
        False,
        "training only: fuse the output layer with the loss, so that logits exist for few tokens "
        "at a time; they are computed once more in the backward pass",
    )
    chunk_tokens: int = _setting(
        4096,
        "the most tokens whose logits exist at a time with fused_linear; fewer take less memory "
        "and more time",
    )
    skip_masked: bool = _setting(
        True,
        "with fused_linear: tokens that the loss mask leaves out are not multiplied by the output "
        "weight; a GPU waits for their number once a micro-batch, and shapes depend on it",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal:
                _require_choice(field.name, value, get_args(field.type))
            elif field.type is float:
                object.__setattr__(self, field.name, _finite(field.name, value))
            elif field.type is int:
                object.__setattr__(self, field.name, _integer(field.name, value))
        if self.normalization == "auto":
            published = "none" if self.objective in UNNORMALIZED else "paper"
            object.__setattr__(self, "normalization", published)
        if self.objective == "lin_focal":
            object.__setattr__(self, "detach_weight", False)
        self._check_ranges()
        self._check_exponents()
        self._check_schedule()
        if (self.objective == "custom") != bool(self.weighting):
            raise ValueError(
                f"objective='custom' and weighting belong together, got {self.objective!r} and "
                f"{self.weighting!r}; weighting names a function, package.module:function"
            )
        if self.weighting and not all(self.weighting.partition(":")):
            raise ValueError(
                f"weighting must look like package.module:function, got {self.weighting!r}"
            )

    def _check_ranges(self) -> None:
        if self.sigma < 0:
            raise ValueError(
                f"sigma must be at least 0, got {self.sigma}: sigma + entropy would be negative "
                "for confident tokens and its power undefined; use sigma=1.0 as published"
            )
        if not 0 <= self.quantile < 1:
            raise ValueError(
                f"quantile must be at least 0 and below 1, got {self.quantile}: it is the share of "
                "tokens that can lose their weight, 0.1 for example"
            )
        if self.objective in ("eslm", "entrodrop") and not self.detach_weight:
            raise ValueError(
                f"objective={self.objective!r} gives weights of 0 and 1, which have no gradient; "
                "leave detach_weight at True"
            )
        if not 0 <= self.blend <= 1:
            raise ValueError(
                f"blend must be in [0, 1], got {self.blend}: 0 is the weighted loss alone, 1 plain "
                "cross entropy"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}: it "
                "is the share taken from the target, 0.1 for example"
            )
        for name in ("z_loss", "softcap"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must be at least 0, got {getattr(self, name)}; 0 switches it off"
                )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}; 1 leaves logits as they are"
            )
        if self.ignore_target < -1:
            raise ValueError(
                f"ignore_target must be a token's id, or -1 for none, got {self.ignore_target}"
            )
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}")

    def _check_exponents(self) -> None:
        changes = self.gamma_schedule != "constant"
        for name, gamma in [("gamma", self.gamma), *[("gamma_end", self.gamma_end)] * changes]:
            if self.objective == "infoentropy":
                self._check_range_of_weights(name, gamma)
            if self.objective == "entrodrop" and not 0 <= gamma <= 1:
                raise ValueError(
                    f"objective='entrodrop' needs {name} in [0, 1], got {gamma}: it is the "
                    "probability that a token of low entropy is left out"
                )
            if gamma < 0 and self.objective in ("focal", "lin_focal", "eaft", "dft"):
                infinite = "nearly impossible" if self.objective == "dft" else "certain"
                raise ValueError(
                    f"objective={self.objective!r} needs {name} >= 0, got {gamma}: the weight of a "
                    f"token that was predicted as {infinite} would be infinite"
                )
            if self.objective == "eaft":
                self._check_range_of_weights(name, gamma)

    def _check_range_of_weights(self, name: str, gamma: float) -> None:
        """Refuse weights (sigma + H)^gamma beyond fp32; eaft's are smaller, and tiny at H = 0."""
        if gamma < 0 and self.sigma == 0:
            raise ValueError(
                f"{name}={gamma} with sigma=0 gives confident tokens (entropy 0) an infinite "
                "weight; use gamma >= 0 or sigma > 0"
            )
        certain = gamma * math.log2(self.sigma) if self.sigma else 0.0
        clueless = gamma * math.log2(self.sigma + LARGEST_ENTROPY)
        if certain > WEIGHT_BITS or abs(clueless) > WEIGHT_BITS:
            raise ValueError(
                f"{name}={gamma:g} with sigma={self.sigma:g} gives weights up to 2^{certain:.0f} "
                f"(certain tokens) and 2^{clueless:.0f} (without an idea), more than fp32 can sum "
                f"and invert (2^{WEIGHT_BITS}): bring gamma nearer to 0, or sigma to 1"
            )

    def _check_schedule(self) -> None:
        if self.gamma_schedule != "constant" and self.objective in WITHOUT_GAMMA:
            raise ValueError(
                f"gamma_schedule={self.gamma_schedule!r} has no effect on "
                f"objective={self.objective!r}, whose weight has no gamma; leave it out"
            )
        if self.gamma_schedule != "constant" and self.gamma_samples < 1:
            raise ValueError(
                f"gamma_schedule={self.gamma_schedule!r} needs gamma_samples of at least 1, got "
                f"{self.gamma_samples}: how many samples it takes gamma to become gamma_end"
            )
        for name in ("gamma_samples", "gamma_end"):
            value = getattr(self, name)
            if self.gamma_schedule == "constant" and value != getattr(InfoEntropyConfig, name):
                raise ValueError(
                    f"{name}={value} has no effect on a constant gamma; set gamma_schedule to "
                    "'linear' or 'cosine', or leave it out"
                )

    def effective(self) -> "InfoEntropyConfig":
        """The same objective: what has no effect on it, or on its cost alone, at its default."""
        plain = InfoEntropyConfig()
        idle = list(MEANS)
        objective = self.objective
        if self.gamma_schedule == "constant" and not self.is_weighted:
            objective = "cross_entropy"
            idle += ["gamma", "blend", "weighting", "normalization", "detach_weight"]
        if objective not in ("eslm", "entrodrop"):
            idle.append("quantile")
        if objective != "infoentropy":
            idle.append("sigma")
        if objective in WITHOUT_GAMMA:
            idle.append("gamma")
        reset = {name: getattr(plain, name) for name in idle}
        return dataclasses.replace(self, **reset, objective=objective)

    @property
    def is_weighted(self) -> bool:
        """Whether tokens get different weights at all (with gamma 0 every objective is plain)."""
        if self.objective == "cross_entropy" or self.blend == 1:
            return False
        if self.objective in ("eslm", "entrodrop") and self.quantile == 0:
            return False
        return self.objective in WITHOUT_GAMMA or self.gamma != 0

    @property
    def needs_sum_p_squared(self) -> bool:
        """Whether the weight takes sum p^2, which costs 4 bytes a token in the collective."""
        return self.is_weighted and self.objective == "deft"

    @property
    def compares_tokens(self) -> bool:
        """Whether a token's weight depends on other tokens, so that all must be known first."""
        return self.is_weighted and self.objective in COMPARING

    def require_export(self, flags: Collection[str]) -> None:
        """Refuse, before a training, a model that could not be exported afterwards.

        flags: those that the training is given, without dashes; `NO_EXPORT` among them permits it.

        Raises:
            ValueError: a setting that no Hugging Face class has.
        """
        for name in OF_THE_MODEL:
            value = getattr(self, name)
            if value != getattr(InfoEntropyConfig, name) and NO_EXPORT not in flags:
                raise ValueError(
                    f"--infoentropy-{name} {value:g} becomes a part of the model, and no Hugging "
                    "Face class has it: the model could be trained further here, but never be "
                    f"exported or evaluated; leave it out, or give --{NO_EXPORT} too if it need "
                    "not be"
                )

    def require_no_trainer(self) -> None:
        """For functions that see neither training samples go by nor prediction heads.

        Raises:
            ValueError: gamma is scheduled, or a setting that the trainer alone obeys.
        """
        if self.gamma_schedule != "constant":
            raise ValueError(
                f"gamma_schedule={self.gamma_schedule!r} needs to know how far training is, which "
                "only the trainer does: pass config.at(samples)"
            )
        for name, instead in (("ignore_target", "pass ignore_index"), ("mtp_loss", "leave it out")):
            if getattr(self, name) != getattr(InfoEntropyConfig, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for megatron_infoentropy.pretrain alone: "
                    f"{instead}"
                )

    def at(self, samples: int) -> "InfoEntropyConfig":
        """The configuration after so many training samples, its gamma no longer scheduled."""
        if self.gamma_schedule == "constant":
            return self
        done = min(samples / self.gamma_samples, 1.0)
        if self.gamma_schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        gamma = self.gamma + (self.gamma_end - self.gamma) * done
        constant = {name: getattr(InfoEntropyConfig, name) for name in OF_A_SCHEDULE}
        return dataclasses.replace(self, **constant | {"gamma": gamma})


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return int(value)
