"""Which machines a training runs on, how its processes find each other, and what surrounds them."""

import re
import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_infoentropy.launch.job import require_layout
from megatron_infoentropy.launch.recipe import ranks_of_a_model, useful_ranks
from megatron_infoentropy.runtime.device import Device, find_device

ENGINES = ("pyxis", "apptainer")
PORT = 29500
CPU = Device("cpu", "gloo", 1)
# What the job script sets itself, from options of its own.
SET_BY_US = {
    *("--nodes", "-N", "--ntasks", "-n", "--ntasks-per-node", "--gpus-per-node", "--signal"),
    *("--output", "-o", "--error", "-e", "--open-mode", "--no-requeue", "--array", "-a"),
}
# Options of sbatch of which Slurm takes one at most, by the one that is an option of `launch` too.
ABOUT = {"--cpus-per-task": re.compile("--cpus-per-|-c"), "--mem": re.compile("--mem(-per-|=)")}

_LABEL = r"[\w-]{1,63}"
# A zone ("fe80::1%eth0") means something on one machine only.
_PLACE = re.compile(
    rf"(?:\[(?P<ipv6>[^\]%]+)\]|(?P<name>(?!-)(?:{_LABEL}\.)*{_LABEL}\.?))(?::(?P<port>\d{{1,5}}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Address:
    """A machine as ssh and torchrun are told of it."""

    host: str
    port: int | None = None
    user: str = ""

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read [USER@]HOST[:PORT]; an IPv6 address stands in brackets, or alone without a port.

        Raises:
            ValueError: it is no such address.
        """
        user, at, place = text.rpartition("@")
        with suppress(AddressValueError):
            place = f"[{IPv6Address(place)}]"
        parts = _PLACE.fullmatch(place)
        if parts is None or (at and not re.fullmatch(r"[^\s@:/-][^\s@:/]*", user)):
            raise ValueError(f"{text!r} is no host, alone or with a user and a port")
        port = None if parts["port"] is None else int(parts["port"])
        if port is not None and not 1 <= port < 2**16:
            raise ValueError(f"{port} is no port, which are 1 to {2**16 - 1}")
        if parts["ipv6"]:
            return cls(str(IPv6Address(parts["ipv6"])), port, user)
        is_number = re.fullmatch(r"[\d.]+", parts["name"])
        return cls(str(IPv4Address(parts["name"])) if is_number else parts["name"], port, user)

    def with_port(self, port: int) -> str:
        """HOST:PORT, without the user."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    def __str__(self) -> str:
        """Return the destination that ssh is given."""
        user = f"{self.user}@" if self.user else ""
        if self.port is None:
            return user + self.host
        return f"ssh://{quote(user, safe='@')}{self.with_port(self.port)}"


def parse_hosts(hosts: str) -> tuple[Address, ...]:
    """Return the machines of "HOST,USER@HOST,HOST:PORT,...".

    Raises:
        ValueError: names what is no machine that ssh could reach.
    """
    try:
        return tuple(Address.parse(host.strip()) for host in hosts.split(","))
    except ValueError as error:
        raise ValueError(
            "--hosts must be hosts with commas between, each HOST, USER@HOST or USER@HOST:PORT "
            f"with ssh's port, an IPv6 address with a port in brackets: {error}"
        ) from None


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal kind; `hosts` are reached by ssh, `slurm` are options for sbatch.

    Without `gpus_per_node` every node has as many as this machine, without `ranks_per_node` as many
    ranks as it has use for. They run inside `image`, if there is one, with `mounts` as its engine
    spells them. `address` is HOST:PORT of the rendezvous, "" for the first node's;
    `join_timeout_s` is how long nodes wait for each other, `store_timeout_s` for an answer of the
    first one, `save_s` how long before a Slurm time limit the training saves, `max_requeues` how
    often its job may start again, None for any number.
    """

    nodes: int = 1
    gpus_per_node: int | None = None
    ranks_per_node: int | None = None
    hosts: tuple[Address, ...] = ()
    slurm: tuple[str, ...] | None = None
    image: str | None = None
    engine: str = "apptainer"
    mounts: tuple[str, ...] = ()
    interface: str = ""
    address: str = ""
    max_restarts: int = 3
    join_timeout_s: int = 600
    store_timeout_s: int = 60
    save_s: int = 120
    max_requeues: int | None = None
    python: str = "python"

    def __post_init__(self) -> None:
        """Refuse what cannot be started.

        Raises:
            ValueError: says which option to change.
        """
        if self.slurm is not None and self.hosts:
            raise ValueError("--slurm and --hosts exclude each other: Slurm chooses the hosts")
        if self.hosts and len(self.hosts) != self.nodes:
            raise ValueError(
                f"--hosts names {len(self.hosts)} hosts for --nodes {self.nodes}: name one for "
                "each, or leave --nodes out"
            )
        places = [(host.host, host.port) for host in self.hosts]
        if len(set(places)) < len(places):
            raise ValueError(f"--hosts names a host twice: {', '.join(map(str, self.hosts))}")
        if self.nodes > 1 and self.slurm is None and not self.hosts and not self.address:
            raise ValueError(
                f"{self.nodes} nodes need --slurm, or --hosts, or the --rdzv-endpoint at which "
                "they meet: HOST:PORT of the first one"
            )
        if self.address:
            _require_endpoint(self.address)
        if self.engine not in ENGINES:
            raise ValueError(
                f"--container-engine must be {' or '.join(ENGINES)}, got {self.engine!r}"
            )
        if self.mounts and self.image is None:
            raise ValueError("--container-mount needs --container-image")
        if self.image is not None and self.engine == "pyxis" and self.slurm is None:
            raise ValueError("--container-engine pyxis is a part of Slurm: add --slurm, or use "
                             "apptainer")  # fmt: skip
        if self.max_requeues is not None and self.slurm is None:
            raise ValueError("--max-requeues is about a job of Slurm: add --slurm")

    @property
    def device(self) -> Device:
        """Return what a node's ranks compute on.

        Raises:
            ValueError: nobody has said what, and this machine, without a GPU, may be unlike them.
        """
        if self.gpus_per_node is None:
            device = find_device()
            if device.type == "cpu" and (self.nodes > 1 or self.hosts or self.slurm is not None):
                raise ValueError(
                    "this machine has no GPU, and the training is to run on others: say how many "
                    "a node has with --gpus-per-node, 0 to train on CPUs"
                )
            return device
        return Device("cuda", "nccl", self.gpus_per_node) if self.gpus_per_node else CPU

    def complete(self, facts: dict[str, Any]) -> "Cluster":
        """Return the same with a node's numbers of GPUs and ranks, which the flags' `facts` decide.

        Raises:
            ValueError: more ranks than GPUs, or a layout that the ranks cannot hold.
        """
        device = self.device
        gpus = device.count if device.type == "cuda" else 0
        ranks = self.ranks_per_node
        if ranks is None and self.nodes == 1:
            ranks = useful_ranks(facts, device.count)
        if ranks is None:
            ranks = gpus or ceil(ranks_of_a_model(facts) / self.nodes)
        if gpus and ranks > gpus:
            raise ValueError(
                f"{ranks} ranks on a node of {gpus} GPUs: every rank needs one; see "
                "--ranks-per-node, --gpus-per-node, --tensor-parallel and --pipeline-parallel"
            )
        require_layout(self.nodes * ranks, facts)
        return replace(self, gpus_per_node=gpus, ranks_per_node=ranks)

    @property
    def ranks(self) -> int:
        """Return the number of ranks of all nodes; known when complete."""
        assert self.ranks_per_node is not None
        return self.nodes * self.ranks_per_node

    @property
    def endpoint(self) -> str:
        """Return where the nodes meet, as far as it is known before they do."""
        if self.address or self.slurm is not None:
            return self.address
        if self.hosts:
            return self.hosts[0].with_port(PORT)
        return "localhost:0"  # any free port: nobody else comes


def _require_endpoint(text: str) -> None:
    try:
        address = Address.parse(text)
        reason = "it has a user" if address.user else ""
        reason = reason or ("it has no port" if address.port is None else "")
    except ValueError as error:
        reason = str(error)
    if reason:
        raise ValueError(
            "--rdzv-endpoint must be HOST:PORT of the first node, an IPv6 address in brackets, "
            f"got {text!r}: {reason}"
        )


def parse_slurm(text: str) -> tuple[str, ...]:
    """["--time=1:00:00", ...] of "--time 1:00:00 ..."; short options (-p gpu) too.

    Raises:
        ValueError: no options, or one that belongs to another option of ours.
    """
    options: list[str] = []
    for word in shlex.split(text):
        if "\n" in word:
            raise ValueError(f"--slurm may not hold a value of several lines: {word!r}")
        if word.startswith("-"):
            options.append(word)
        elif not options or "=" in options[-1]:
            raise ValueError(f"--slurm must be options of sbatch, such as '--time=8:00:00'; {word} "
                             "is none")  # fmt: skip
        else:
            options[-1] += ("=" if options[-1].startswith("--") else " ") + word
    for option in options:
        name = _set_by_us(option)
        if name in ("--array", "-a"):
            raise ValueError(
                f"--slurm may not hold {name}: the tasks would all train into one run folder; "
                "launch a run folder for each, or use `infoentropy study`"
            )
        if name is not None:
            raise ValueError(
                f"--slurm may not hold {name}: the job script sets it, from --nodes, "
                "--gpus-per-node, --run and --save-seconds; edit the script for more"
            )
    return tuple(options)


def sbatch_options(text: str | None, own: dict[str, int | str | None]) -> tuple[str, ...] | None:
    """Return the options in the `text` of --slurm, and those of sbatch that are options of ours.

    Raises:
        ValueError: what `parse_slurm` refuses, one that is given both ways, or no Slurm at all.
    """
    given = {name: value for name, value in own.items() if value is not None}
    if text is None and given:
        raise ValueError(f"{' and '.join(given)}: what a node of Slurm gives the job; add --slurm")
    mem = given.get("--mem", "0")
    if not re.fullmatch("[0-9]+[KMGT]?", str(mem), re.IGNORECASE):
        raise ValueError(
            "--mem must be a node's memory as sbatch takes it, a whole number of megabytes, or "
            f"with K, M, G or T behind it, and 0 for all of it; got {mem!r}"
        )
    if text is None:
        return None
    options = parse_slurm(text)
    for name in given:
        for option in options:
            if ABOUT[name].match(option):
                raise ValueError(f"--slurm may not hold {option} beside {name}: say one of them")
    return (*options, *(f"{name}={value}" for name, value in given.items()))


def _set_by_us(option: str) -> str | None:
    """Return the script's own option that sbatch takes this one for, also by its beginning."""
    if not option.startswith("--"):
        return option[:2] if option[:2] in SET_BY_US else None
    name = option.partition("=")[0]
    if name in SET_BY_US or name == "--gpus":  # an option of its own, and how another one begins
        return name if name in SET_BY_US else None
    return next((each for each in sorted(SET_BY_US) if each.startswith(name)), None)


def absolute(path: Path, cluster: Cluster) -> Path:
    """Return a path that every node can use, which works in another folder.

    Raises:
        ValueError: the scripts would not survive it.
    """
    path = path.resolve()
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", str(path)):
        raise ValueError(f"a script cannot hold the path {str(path)!r}: rename it")
    elsewhere = cluster.slurm is not None or cluster.hosts
    if elsewhere and any(character.isspace() for character in str(path)):
        raise ValueError(f"a path may not have white space in it on a cluster: {path}")
    return path
