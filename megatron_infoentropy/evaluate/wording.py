"""Numbers as the report writes them, in tables, figures and sentences alike.

Every function here is a filter of the page's template, by its name.
"""

import math

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
PERCENT = "\N{NO-BREAK SPACE}%"


def nats(value: float | None) -> str:
    """Write nats per token with four decimals, from 10 on with two."""
    return NOTHING if value is None else f"{value:.{4 if value < 10 else 2}f}"


def p_value(value: float | None) -> str:
    """Write two digits, as far as they mean something."""
    if value is None:
        return NOTHING
    if value < 1e-4:
        return "< 0.0001"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def signed(value: float | None) -> str:
    """Write a difference in nats with its sign, from 1 on with two decimals; a true minus."""
    if value is None:
        return NOTHING
    return f"{value:+.{4 if abs(value) < 1 else 2}f}".replace("-", MINUS)


def perplexity(value: float | None) -> str:
    """Write four digits; from 1000 on all before the point, from a million on three."""
    if value is None:
        return NOTHING
    if value >= 1e6:
        return compact(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}"


def count(value: int) -> str:
    """Write a whole number with thousands separated."""
    return f"{value:,}"


def compact(value: float) -> str:
    """Write a count in three digits, as 3.21M."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def plural(number: int, noun: str) -> str:
    """Write `1 seed`, `2 seeds`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: list[str]) -> str:
    """Write `a`, `a and b`, `a, b and c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def relative(difference: float) -> str:
    """Write what a difference in nats means for the perplexity: in percent, or how many times."""
    if difference > math.log(1e15):
        return f"{TIMES} e^{difference:.0f}"
    if difference > math.log(10):
        return f"{TIMES} {compact(math.exp(difference))}"
    return f"{100 * math.expm1(difference):+.2f}{PERCENT}".replace("-", MINUS)


def sentence(text: str) -> str:
    """Write a phrase as a sentence."""
    return f"{text[:1].upper()}{text[1:]}."
