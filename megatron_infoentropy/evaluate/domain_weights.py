"""In what shares domains enter the weighted average.

auto        the training data's tokens, where the counts' folder tells them; else as scored
scored      the scored tokens: the weighted average is that over all tokens
paper       the sampling rates published with the paper's code
FILE.json   {"domain": weight, ...}, any scale
"""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_infoentropy.data.blend import PAPER_WEIGHTS, shares_of
from megatron_infoentropy.data.manifest import MANIFEST, load_manifest
from megatron_infoentropy.evaluate.errors import DomainWeightsError


def domain_weights(
    kind: str, scored: Mapping[str, int], token_counts: Path
) -> tuple[dict[str, float], str]:
    """Weights of the domains scored, on any scale, with a finite sum, and what they are in words.

    Args:
        kind: see above.
        scored: the domains and their scored tokens.
        token_counts: the training data's counts, beside which its manifest may lie.

    Raises:
        DomainWeightsError: weights of no known kind, negative, all 0, or that lack a domain.
    """
    as_scored = {name: float(tokens) for name, tokens in scored.items()}
    if kind == "scored":
        return as_scored, "the scored tokens"
    if kind == "auto":
        trained = _training_tokens(token_counts)
        if scored.keys() <= trained.keys():
            return _checked(trained, scored, kind), "tokens of the training data"
        return as_scored, "the scored tokens (the training data's domains are not known)"
    if kind == "paper":
        return _checked(PAPER_WEIGHTS, scored, kind), "sampling rates of the paper's code"
    if not kind.endswith(".json"):
        raise DomainWeightsError(
            f"domain weights must be auto, scored, paper or a .json file, got {kind!r}"
        )
    try:
        found = json.loads(Path(kind).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DomainWeightsError(f"no readable domain weights in {kind}: {error}") from error
    return _checked(found, scored, kind), Path(kind).name


def _training_tokens(token_counts: Path) -> dict[str, float]:
    if not (token_counts.parent / MANIFEST).is_file():
        return {}
    domains = load_manifest(token_counts.parent).domains
    return {name: float(facts.tokens) for name, facts in domains.items()}


def _checked(found: object, scored: Mapping[str, int], kind: str) -> dict[str, float]:
    if not isinstance(found, Mapping) or any(name not in found for name in scored):
        raise DomainWeightsError(
            f"the weights of {kind!r} must be an object with a number for each of {sorted(scored)}"
        )
    try:
        return shares_of({name: found[name] for name in scored})
    except ValueError as error:
        raise DomainWeightsError(str(error)) from None
