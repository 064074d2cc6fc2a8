"""New inputs from old ones, for where no coverage-guided fuzzer is installed."""

import random

WORDS = [
    *(
        b"\0",
        b"\xff" * 8,
        b"\x7f" + b"\xff" * 7,
        b"\0" * 8,
        b"\x80",
        b"-1",
        b"1e999",
        b"NaN",
        b"null",
    ),
    *(b"{", b"}", b"[", b"]", b'"', b"\\u0000", b"\\ud800", b"\n", b"../", b"&a ", b"*a", b"!!x "),
    *(b"(", b"t", b"R", b"b", b".", b"\x94", b"c\n\n", b"\x8e", b"0" * 40),
]


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One of the seeds after one to six changes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 40)))
        change = rng.randrange(6)
        if change == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at:end] = rng.choice(WORDS)
        elif change == 2:
            data[at:at] = rng.choice(WORDS)
        elif change == 3:
            del data[at:end]
        elif change == 4:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[at:at] = other[start : start + rng.randint(0, 60)]
        else:
            del data[at:]
    return bytes(data)
