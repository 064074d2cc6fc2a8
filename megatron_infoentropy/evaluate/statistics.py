"""What is compared between evaluations: places, each with its sums per document."""

from itertools import combinations
from typing import Literal

import numpy as np

from megatron_infoentropy.evaluate.bootstrap import Sums
from megatron_infoentropy.evaluate.buckets import BANDS_OF, BUCKETS, DECILES
from megatron_infoentropy.evaluate.difficulty import difficulty_sums
from megatron_infoentropy.evaluate.errors import DifferentDataError
from megatron_infoentropy.evaluate.evaluation import Evaluation
from megatron_infoentropy.evaluate.tally import DIFFICULTY

Kind = Literal["total", "bucket", "decile", "difficulty", "domain"]
Place = tuple[Kind, str]


_SETTINGS = ("context_length", "stride", "mode")


def require_same_tokens(evaluations: list[Evaluation]) -> None:
    """Raises DifferentDataError where tokens or the way they were scored differ."""
    if len({evaluation.fingerprint for evaluation in evaluations}) > 1:
        raise DifferentDataError("the runs were evaluated on different tokens")
    for setting in _SETTINGS:
        found = {evaluation.summary["scoring"][setting] for evaluation in evaluations}
        if len(found) > 1:
            words = setting.replace("_", " ").replace("stride", "stride of windows")
            raise DifferentDataError(
                f"the runs were evaluated with a different {words}: "
                f"{' and '.join(sorted(map(str, found)))}"
            )


def way_of_scoring(evaluation: Evaluation) -> tuple[str, ...]:
    """Equal for evaluations that `require_same_tokens` lets be compared."""
    scoring = evaluation.summary["scoring"]
    return evaluation.fingerprint, *(str(scoring[setting]) for setting in _SETTINGS)


def statistics(
    evaluations: list[Evaluation], references: list[list[Evaluation]]
) -> tuple[list[Place], Sums]:
    """Every statistic that is compared, and its sums per document."""
    documents = evaluations[0].documents
    every = [documents.tokens.astype(np.float64), *(e.documents.ce for e in evaluations)]
    by_band = np.stack(every)
    in_domain = documents.domain[:, None] == np.arange(len(evaluations[0].domains))
    total = by_band.sum(axis=2, keepdims=True)
    parts = [total]
    parts += [by_band[:, :, BANDS_OF[n]].sum(axis=2, keepdims=True) for n in (*BUCKETS, *DECILES)]
    places: list[Place] = [("total", "all tokens"), *(("bucket", name) for name in BUCKETS)]
    places += [("decile", name) for name in DECILES]
    by_difficulty = difficulty_sums(evaluations, references)
    if by_difficulty is not None:
        parts.append(np.concatenate([by_difficulty[0][None], by_difficulty[1]]))
        places += [("difficulty", name) for name in DIFFICULTY]
    parts.append(total * in_domain)
    places += [("domain", name) for name in evaluations[0].domains]
    table = np.concatenate(parts, axis=2)
    return places, Sums(table[0], table[1:])


def seed_noise(
    same_objective: list[list[Evaluation]], references: list[list[Evaluation]]
) -> dict[Place, float]:
    """The largest gap between two evaluations of one objective, where there are two."""
    noise: dict[Place, float] = {}
    for evaluations in same_objective:
        places, sums = statistics(evaluations, references)
        for one, other in combinations(sums.nats(), 2):
            for place, gap in zip(places, np.abs(one - other), strict=True):
                noise[place] = max(noise.get(place, 0.0), float(gap))
    return noise
