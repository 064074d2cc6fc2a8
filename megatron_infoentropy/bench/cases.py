"""The cases that are measured: shapes of logits, and grids of them by name."""

from dataclasses import dataclass
from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

HEADLINE = (8192, 128256)  # the shape that targets for a GPU are stated for


@dataclass(frozen=True)
class Case:
    """Logits [tokens, vocabulary / tensor_parallel] on every rank."""

    tokens: int
    vocabulary: int
    dtype: Dtype = "float32"
    tensor_parallel: int = 1  # ranks that hold a shard each and talk to one another

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if min(self.tokens, self.vocabulary, self.tensor_parallel) < 1:
            raise ValueError(f"tokens, vocabulary and number of ranks must be positive: {self}")
        if self.vocabulary % self.tensor_parallel:
            raise ValueError(
                f"a vocabulary of {self.vocabulary} does not split evenly over "
                f"{self.tensor_parallel} ranks; choose a multiple"
            )

    @property
    def columns(self) -> int:
        """Return the number of columns of one rank's logits."""
        return self.vocabulary // self.tensor_parallel

    def __str__(self) -> str:
        words = f"{self.tokens} x {self.vocabulary} {self.dtype}"
        return words + (f", TP {self.tensor_parallel}" if self.tensor_parallel > 1 else "")


HEADLINE_CASE = Case(*HEADLINE, "bfloat16")
FULL = [
    Case(tokens, vocabulary, dtype)
    for dtype in DTYPES[::-1]
    for tokens in (4096, 8192, 16384)
    for vocabulary in (32000, 128256, 262144)
]
GRIDS = {
    "small": [Case(2048, 32000), Case(2048, 32000, "bfloat16"), Case(2048, 32000, "float32", 2)],
    # For one large GPU; the second is the shape for which the authors of "trl" publish a time.
    "headline": [HEADLINE_CASE, Case(8192, 151936, "bfloat16")],
    "full": sorted(FULL, key=lambda case: case != HEADLINE_CASE),  # of one large GPU too
    "tiny": [Case(64, 4008, "bfloat16"), Case(64, 4748, "bfloat16")],  # to see that it runs
}


def grid(name: str) -> list[Case]:
    """Return the cases of a grid, its headline first."""
    if name not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {name!r}")
    return GRIDS[name]
