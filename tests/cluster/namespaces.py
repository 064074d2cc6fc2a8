"""Hosts on one machine: network namespaces with addresses of their own, joined by a bridge.

Nothing leaves the machine: the bridge has no uplink and no address.
"""

import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_number = itertools.count()


@dataclass(frozen=True)
class Host:
    """A namespace; `link` is the end of its cable that stays outside."""

    name: str
    address: str
    link: str

    def cut_off(self) -> None:
        ip("link", "set", self.link, "down")

    def plug_in(self) -> None:
        ip("link", "set", self.link, "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def why_not() -> str:
    """Why this process may not make namespaces; "" if it may."""
    try:
        with hosts(1):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces cannot be made here: {error}"


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts on one bridge; everything is removed in the end, also after a failure."""
    _remove_what_killed_tests_left()
    mark = f"ie{os.getpid()}x{next(_number)}"  # interface names have 15 characters
    bridge = f"{mark}b"
    with ExitStack() as undo:

        def make(*words: str, otherwise: tuple[str, ...]) -> None:
            ip(*words)
            undo.callback(subprocess.run, ["ip", *otherwise], capture_output=True)

        make("link", "add", bridge, "type", "bridge", otherwise=("link", "del", bridge))
        ip("link", "set", bridge, "up")
        found = []
        for number in range(count):
            host = Host(f"{mark}n{number}", f"10.213.7.{number + 1}", f"{mark}v{number}")
            make("netns", "add", host.name, otherwise=("netns", "del", host.name))
            pair = ("link", "add", host.link, "type", "veth", "peer", "name", "eth0")
            make(*pair, "netns", host.name, otherwise=("link", "del", host.link))
            ip("link", "set", host.link, "master", bridge, "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
            ip("-n", host.name, "link", "set", "lo", "up")
            found.append(host)
        yield found


def _remove_what_killed_tests_left() -> None:
    """Namespaces and links named by a process that is no more."""
    spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout.splitlines()
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout.splitlines()
    for kind, lines, at in (("netns", spaces, 0), ("link", links, 1)):
        for line in lines:
            name = line.split()[at].partition("@")[0].rstrip(":")
            owner = re.match(r"ie(\d+)x\d+[bnv]", name)
            if owner and not Path(f"/proc/{owner[1]}").exists():
                subprocess.run(["ip", kind, "del", name], capture_output=True)


# ssh, as far as hosts.sh needs it: HOST COMMAND, behind options; HOSTS is "address=namespace ...".
# A host without a cable is not reached.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do shift 2; done
for pair in $HOSTS; do
  inside="ip netns exec ${pair#*=}"
  if [ "${pair%%=*}" = "$1" ] && $inside ip link show eth0 | grep -q LOWER_UP; then
    exec $inside bash -c "$2"
  fi
done
echo "ssh: connect to host $1 port 22: No route to host" >&2
exit 255
"""
