"""The cases that are measured: shapes of logits, and the grids of `make bench` and `make gpu`."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

HEADLINE = (8192, 128256)  # the full grid's shape that every provider runs at, compiled ones too
PUBLISHED = (8192, 151936)  # for which the authors of "trl" publish a time


@dataclass(frozen=True)
class Case:
    """Logits [tokens, vocabulary / (tensor_parallel shard_of)] on every rank."""

    tokens: int
    vocabulary: int
    dtype: Dtype = "float32"
    tensor_parallel: int = 1  # ranks that hold a shard each and talk to one another
    shard_of: int = 1  # one rank's shard out of so many, measured alone: nothing is communicated
    compiled: bool = True  # whether providers that torch.compile makes take part

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if min(self.tokens, self.vocabulary, self.tensor_parallel, self.shard_of) < 1:
            raise ValueError(f"tokens, vocabulary and numbers of ranks must be positive: {self}")
        if self.vocabulary % self.ranks:
            raise ValueError(
                f"a vocabulary of {self.vocabulary} does not split evenly over {self.ranks} ranks; "
                "choose a multiple"
            )

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.shard_of

    @property
    def columns(self) -> int:
        """Return the number of columns of one rank's logits."""
        return self.vocabulary // self.ranks

    def __str__(self) -> str:
        words = f"{self.tokens} x {self.vocabulary} {self.dtype}"
        if self.shard_of > 1:
            words += f", one shard of {self.shard_of}"
        return words + (f", TP {self.tensor_parallel}" if self.tensor_parallel > 1 else "")


def grid(name: str) -> list[Case]:
    """The cases of a grid, the headline first.

    small: 2048 x 32000 in fp32, in bf16, and in fp32 over two ranks: for any machine.
    headline: 8192 x 128256 and 8192 x 151936 in bf16, whole: what one GPU shows first.
    full: 4096, 8192 and 16384 tokens x 32000, 128256 and 262144 entries, bf16 and fp32, whole and
    as one rank's shard out of eight: for one large GPU. Compiling takes seconds a provider and a
    shape, so compiled providers run at the headline shape only, whole.
    """
    if name == "small":
        return [
            Case(2048, 32000),
            Case(2048, 32000, "bfloat16"),
            Case(2048, 32000, tensor_parallel=2),
        ]
    if name == "headline":
        return [Case(*shape, "bfloat16") for shape in (HEADLINE, PUBLISHED)]
    if name == "full":
        shapes = product((1, 8), DTYPES[::-1], (4096, 8192, 16384), (32000, 128256, 262144))
        cases = [
            Case(
                *(tokens, size, dtype),
                shard_of=shard_of,
                compiled=(tokens, size, shard_of) == (*HEADLINE, 1),
            )
            for shard_of, dtype, tokens, size in shapes
        ]
        return sorted(cases, key=lambda case: not case.compiled)
    raise ValueError(f"grid must be small, headline or full, got {name!r}")


def adapt(cases: list[Case], *, tiny: bool, compiled: bool) -> list[Case]:
    """Return the same cases; where `tiny` at about 1/128 of the tokens and 1/32 of the vocabulary,
    and where not `compiled` without compiled providers."""
    return [
        replace(
            case,
            tokens=max(8, case.tokens // 128) if tiny else case.tokens,
            vocabulary=max(1, case.columns // 32) * case.ranks if tiny else case.vocabulary,
            compiled=compiled and case.compiled,
        )
        for case in cases
    ]
