"""What the ranks' facts mean: one sentence for every trouble, with what to do. Nothing is measured
here, so every trouble can be told from facts alone."""

from collections import Counter
from collections.abc import Callable
from functools import partial

from megatron_infoentropy.doctor.collectives import Measured
from megatron_infoentropy.doctor.facts import Facts

CLOCK_S = 1.0  # apart; logs and Slurm's limits are compared by eye, certificates by machines
DISK_BYTES = 20 * 2**30
ON_TOP = 1.1  # of the counted memory: workspaces, communication buffers, fragmentation


def troubles(
    facts: list[Facts],
    measured: list[Measured],
    *,
    memory_needed: int | None = None,
    disk_needed: int = DISK_BYTES,
) -> list[str]:
    """Everything that would end the job, or spoil it; an empty list for healthy ranks."""
    return [
        *_versions(facts),
        *_odd_ones(facts, "device", lambda one: one.device.partition(",")[0]),
        *_clocks(facts),
        *_disks(facts, disk_needed),
        *_data(facts),
        *_memory(facts, memory_needed),
        *_transfers(measured),
    ]


def _who(facts: list[Facts]) -> str:
    """ "rank 3 (host b)" or "ranks 2, 3 (host b)"."""
    ranks = ", ".join(str(one.rank) for one in facts)
    hosts = ", ".join(sorted({one.host for one in facts}))
    return f"rank{'s' if len(facts) > 1 else ''} {ranks} ({hosts})"


def _versions(facts: list[Facts]) -> list[str]:
    return [
        f"{trouble}: install the same version on every host"
        for name in facts[0].versions
        for trouble in _odd_ones(facts, name, partial(_version, name))
    ]


def _version(name: str, one: Facts) -> str:
    return one.versions.get(name, "none")


def _odd_ones(facts: list[Facts], what: str, of: Callable[[Facts], str]) -> list[str]:
    """Ranks that differ from what most have."""
    if not facts:
        return []
    usual = Counter(of(one) for one in facts).most_common(1)[0][0]
    values = sorted({of(one) for one in facts} - {usual})
    return [
        f"{_who([one for one in facts if of(one) == value])}: {what} {value}, elsewhere {usual}"
        for value in values
    ]


def _clocks(facts: list[Facts]) -> list[str]:
    return [
        f"{_who([one])}: its clock is {abs(one.clock_s):.1f} s "
        f"{'ahead of' if one.clock_s > 0 else 'behind'} rank 0's: synchronise the hosts "
        "(chrony or ntpd)"
        for one in facts
        if abs(one.clock_s) > CLOCK_S
    ]


def _disks(facts: list[Facts], needed: int) -> list[str]:
    full = [one for one in facts if one.disk < needed]
    if not full:
        return []
    least = min(one.disk for one in full)
    return [
        f"{_who(full)}: {least / 2**30:.1f} GiB are free for the run folder, wanted are "
        f"{needed / 2**30:.1f}: make room, or name another --run"
    ]


def _data(facts: list[Facts]) -> list[str]:
    sentences = sorted({problem for one in facts for problem in one.problems})
    found = [
        f"{_who([one for one in facts if sentence in one.problems])}: {sentence}"
        for sentence in sentences
    ]
    whole = [one for one in facts if one.data and one.data.manifests]
    found += [
        f"{other}: each host must have the same data: copy them again"
        for other in _odd_ones(whole, "data with the manifests", _manifests)
    ]
    other = [
        one
        for one in facts
        if one.data and one.tokenizer and one.data.tokenizer not in ("", one.tokenizer)
    ]
    if other:
        theirs, here = (f"SHA-256 {sha256[:12]}..." for sha256 in _tokenizers(other[0]))
        found.append(
            f"{_who(other)}: the data were made with another tokenizer ({theirs}, here {here}): "
            "name theirs, or preprocess the text again"
        )
    return found


def _manifests(one: Facts) -> str:
    return one.data.manifests[:12] if one.data else "none"


def _tokenizers(one: Facts) -> tuple[str, str]:
    """(of the data, of the rank)"""
    return one.data.tokenizer if one.data else "", one.tokenizer


def _memory(facts: list[Facts], needed: int | None) -> list[str]:
    short = [one for one in facts if needed is not None and one.memory < needed * ON_TOP]
    if not short or needed is None:
        return []
    least = min(one.memory for one in short)
    return [
        f"{_who(short)}: {least / 2**30:.1f} GiB of memory are free, the recipe takes "
        f"{needed / 2**30:.1f} and a tenth on top: end what runs there, or choose a smaller "
        "micro-batch or more parallelism; `infoentropy train RECIPE --dry-run` counts"
    ]


def _transfers(measured: list[Measured]) -> list[str]:
    return [
        f"{one.transfer.name}: wrong results on ranks {', '.join(map(str, one.wrong_ranks))}: "
        "a network or a GPU is broken there; leave the host out"
        for one in measured
        if one.wrong_ranks
    ]
