"""Blends say how much of each domain a training run sees: Megatron's list for --data-path.

    natural          every token once: weight in proportion to the domain's tokens
    temperature:T    in proportion to tokens^(1/T); T > 1 raises the small domains
    paper            the weights that the paper's authors published with their code
    FILE.json        {"domain": weight, ...}, any scale

Weights are shares of the run's tokens, as Megatron understands them.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infoentropy.data.manifest import load_manifest

MOST_WEIGHT = 1e30  # beyond it a weight is a slip
# From pile_sampling_rates.json of the published code, normalised, in percent; they are not the
# proportions of the Pile, and their origin is not stated there.
PAPER_WEIGHTS = {
    "ArXiv": 11.75,
    "BookCorpus2": 0.59,
    "Books3": 9.65,
    "DM Mathematics": 2.95,
    "Enron Emails": 0.17,
    "EuroParl": 0.92,
    "FreeLaw": 5.27,
    "Github": 5.66,
    "Gutenberg (PG-19)": 2.83,
    "HackerNews": 0.69,
    "NIH ExPorter": 0.28,
    "OpenSubtitles": 1.40,
    "OpenWebText2": 10.21,
    "PhilPapers": 0.43,
    "Pile-CC": 9.12,
    "PubMed Abstracts": 3.15,
    "PubMed Central": 16.61,
    "StackExchange": 6.04,
    "USPTO Backgrounds": 3.45,
    "Ubuntu IRC": 1.35,
    "Wikipedia (en)": 6.60,
    "YoutubeSubtitles": 0.89,
}


@dataclass(frozen=True)
class Share:
    """One domain in a blend: `weight` is its share of the run's tokens, `tokens` what it has."""

    domain: str
    prefix: Path
    weight: float
    tokens: int

    def epochs(self, run_tokens: float) -> float:
        """Return how often a run of so many tokens goes through the domain."""
        return run_tokens * self.weight / self.tokens


def blend(dataset: Path, weights: str = "natural") -> list[Share]:
    """Return the shares of a preprocessed dataset's domains, largest first; their weights sum to 1.

    Raises:
        ValueError: weights of no known kind, of which no shares can be made, for a domain without
            a token, or that name other domains than the dataset has. (The paper's may name more.)
    """
    manifest = load_manifest(dataset.resolve())
    sizes = {name: facts.tokens for name, facts in manifest.domains.items()}
    raw = _weights(weights, sizes)
    unknown = sorted(sizes.keys() - raw.keys())
    if unknown:
        raise ValueError(
            f"the weights {weights!r} do not name the domain {unknown[0]!r} of {dataset}; choose "
            "natural, temperature:T or a .json file that names all its domains (in a recipe: "
            f"data-weights); {weights!r} names {sorted(raw)}"
        )
    fractions = shares_of({name: raw[name] for name in sizes})
    shares = [
        Share(name, manifest.prefix(name), fractions[name], size)
        for name, size in sizes.items()
        if fractions[name] > 0
    ]
    for share in shares:
        if not share.tokens:
            raise ValueError(
                f"the domain {share.domain!r} of {dataset}, which is one shard, has no token, and "
                "Megatron can not open it: merge the shards first, or weigh it 0"
            )
    return sorted(shares, key=lambda share: (-share.weight, share.domain))


def shares_of(weights: Mapping[str, object]) -> dict[str, float]:
    """Return weights of any scale as shares: their sum is 1, and only what weighs 0 gets 0.

    Raises:
        ValueError: a weight that is no number from 0 to 1e30 (a slip: their sum must be a number),
            only such of 0, or one that is nothing (below 1e-30 of all) beside the others.
    """
    for name, weight in weights.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight <= MOST_WEIGHT:  # type: ignore[operator]
            raise ValueError(f"expected a weight from 0 to 1e30 for {name!r}, got {weight!r}")
    numbers = {name: float(weight) for name, weight in weights.items()}  # type: ignore[arg-type]
    largest = max(numbers.values(), default=0.0)
    if largest == 0:
        raise ValueError(f"expected weights of 0 or more, not all 0, got {numbers}")
    total = math.fsum(numbers.values())
    shares = {name: number / total for name, number in numbers.items()}
    for name, share in shares.items():
        if numbers[name] and share < 1 / MOST_WEIGHT:
            raise ValueError(
                f"the weight of {name!r}, {numbers[name]}, is nothing beside the largest, "
                f"{largest}: name 0 to leave it out, or weights that are nearer to each other"
            )
    return shares


def data_path(shares: list[Share]) -> str:
    """Return the value of Megatron's --data-path, one domain a line; a file for --data-args-path.

    Raises:
        ValueError: a path with white space, at which Megatron would split.
    """
    for share in shares:
        if len(str(share.prefix).split()) != 1:
            raise ValueError(
                f"Megatron splits its data list at white space: move {share.prefix} to a path "
                "without any"
            )
    return "".join(f"{share.weight!r} {share.prefix}\n" for share in shares)


def _weights(kind: str, sizes: dict[str, int]) -> Mapping[str, Any]:
    if kind == "natural":
        return sizes
    if kind == "paper":
        return PAPER_WEIGHTS
    if kind.startswith("temperature:"):
        return _tempered(kind.removeprefix("temperature:"), sizes)
    if kind.endswith(".json"):
        return _from_file(Path(kind), sizes)
    raise ValueError(f"weights must be natural, paper, temperature:T or a .json file, got {kind!r}")


def _tempered(text: str, sizes: dict[str, int]) -> dict[str, float]:
    """Return sizes to the power of 1 / temperature, as fractions of the largest."""
    try:
        temperature = float(text)
    except ValueError:
        temperature = 0.0
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be a number above 0, got {text!r}")
    largest = max(sizes.values(), default=0)
    weights = {
        name: math.exp(math.log(size / largest) / temperature) if size else 0.0
        for name, size in sizes.items()
    }
    for name, weight in weights.items():
        if sizes[name] and not weight:
            raise ValueError(
                f"at temperature {text} the domain {name!r} would get no token: choose a higher "
                "one, or a .json file with 0 for what is to be left out"
            )
    return weights


def _from_file(path: Path, sizes: dict[str, int]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no such file of weights: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object of domains and numbers")
    foreign = sorted(content.keys() - sizes.keys())
    if foreign:
        raise ValueError(
            f"{path} weighs {foreign[0]!r}, which the dataset does not have; it has {sorted(sizes)}"
        )
    return content
