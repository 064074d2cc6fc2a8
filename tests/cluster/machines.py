"""A cluster on one machine: a head and two nodes, with a real Slurm and a real sshd.

Each has a network, host name, /etc/hosts and processes of its own (Linux namespaces), joined by a
bridge without an uplink; files are shared, as on a cluster. Nothing of the system is changed, no
port is taken, and nothing outlives the tests: a machine ends when the pipe to its first process
does, and with that process the kernel ends all others there.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

SERVERS = ("slurmctld", "slurmd", "munged", "sshd")
TOOLS = ("ip", "unshare", "nsenter", "sbatch", "ssh", "ssh-keygen")
ADDRESSES = {"head": "10.213.7.254", "n1": "10.213.7.1", "n2": "10.213.7.2"}
NODES = ("n1", "n2")
USER, PORT = "trainer", 2222  # a second user and port that every sshd takes
SPACES = ("--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc")
SYSTEM_PATH = f"{os.defpath}:/usr/sbin:/sbin:/usr/local/sbin"
PATIENCE_S = 60

INIT = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /run
mkdir /run/sshd
touch /run/machine
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/passwd" /etc/passwd
ip link set lo up
echo ready
read -r _ || : # until who has started this is gone
"""
# Found first on PATH: outside of the machines a program runs on the head.
PROGRAM = """#!/bin/sh
[ -e /run/machine ] && exec {real} "$@"
export SLURM_CONF={base}/slurm.conf
exec nsenter --target={head} --net --mount --uts --wd="$PWD" -- {real} "$@"
"""
PROGRAMS = ("sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo", "ssh")


@cache
def why_not() -> str:
    """Why there can be no such cluster here; "" if there can."""
    missing = [name for name in (*SERVERS, *TOOLS) if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"no real Slurm and sshd here ({', '.join(missing)} not installed)"
    needed = "mount -t tmpfs tmpfs /run && ip link add name b0 type bridge"
    needed += " && ip link add name v0 type veth peer name v1"
    words = ["unshare", *SPACES, "sh", "-c", needed]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        return f"no real Slurm and sshd here (they need root: {done.stderr.strip()})"
    return ""


class Machine:
    """A host; `address` is its place on the bridge."""

    def __init__(self, base: Path, name: str, head: "Machine | None") -> None:
        self.base, self.name, self.address = base, name, ADDRESSES[name]
        self._head = head or self
        self.power_on()

    def power_on(self) -> None:
        """Start it, with its network and without its servers."""
        errors = self.base / "log" / f"{self.name}.err"
        with errors.open("a") as file:
            self._shell = subprocess.Popen(
                ["unshare", *SPACES, "bash", "-c", INIT, "bash", self.name, self.base],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        assert self._shell.stdout is not None
        if self._shell.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the machine {self.name} did not start: {errors.read_text()}")
        shell = self._shell.pid
        self.pid = int(Path(f"/proc/{shell}/task/{shell}/children").read_text())
        self._network = Path(f"/proc/{self.pid}/ns/net").readlink()
        if self._head is self:
            self.check("ip", "link", "add", "bridge", "type", "bridge")
            self.check("ip", "addr", "add", f"{self.address}/24", "dev", "bridge")
            self.check("ip", "link", "set", "bridge", "up")
            return
        pair = ("type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        inside = ["nsenter", f"--target={self._head.pid}", "--net", "ip", "link"]
        subprocess.run([*inside, "add", self.name, *pair], check=True)
        subprocess.run([*inside, "set", self.name, "master", "bridge", "up"], check=True)
        self.check("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.check("ip", "link", "set", "eth0", "up")

    def power_off(self) -> None:
        """End it at once, as a power cut does: no process says goodbye, no connection is closed."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._shell.communicate()

    def cut_off(self) -> None:
        """Pull its cable."""
        self._head.check("ip", "link", "set", self.name, "down")

    def plug_in(self) -> None:
        self._head.check("ip", "link", "set", self.name, "up")

    def words(self, *words: str | Path) -> list[str]:
        """The command line that runs words there."""
        spaces = ("--net", "--mount", "--uts", "--pid")
        return ["nsenter", f"--target={self.pid}", *spaces, "--wd=/", "--", *map(str, words)]

    def start(self, *words: str | Path, log: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a server in the background."""
        environment = {"PATH": SYSTEM_PATH, "SLURM_CONF": str(self.base / "slurm.conf")}
        with (log or Path(os.devnull)).open("a") as output:
            return subprocess.Popen(
                self.words(*words),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def check(self, *words: str | Path) -> str:
        """Run words there to their end; what they said."""
        done = subprocess.run(self.words(*words), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(map(str, words))}: {done.stderr}")
        return done.stdout

    def processes(self) -> list[int]:
        """All that live there, but for its first process, by their numbers here."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                is_there = (path / "ns/net").readlink() == self._network
                if is_there and int(path.name) != self.pid and not ended(int(path.name)):
                    found.append(int(path.name))
        return found


def ended(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


class Machines:
    """The head, the nodes, and their servers; `programs` is a folder for PATH."""

    def __init__(self, base: Path, environment: dict[str, str]) -> None:
        """`environment`: of every command that sshd starts."""
        self.base, self.programs = base, base / "bin"
        _write_accounts(base)
        _write_sshd(base, environment)
        self.head = Machine(base, "head", None)
        self.nodes = {name: Machine(base, name, self.head) for name in NODES}
        self._write_programs()
        for name in NODES:
            self.serve_ssh(name)

    def _write_programs(self) -> None:
        self.programs.mkdir()
        for name in PROGRAMS:
            program, real = self.programs / name, shutil.which(name, path=SYSTEM_PATH)
            program.write_text(PROGRAM.format(real=real, base=self.base, head=self.head.pid))
            program.chmod(0o755)

    @contextmanager
    def on_path(self) -> Iterator[None]:
        """Have what is started meanwhile find the programs of the head."""
        before = os.environ["PATH"]
        os.environ["PATH"] = f"{self.programs}:{before}"
        try:
            yield
        finally:
            os.environ["PATH"] = before

    def serve_ssh(self, name: str) -> None:
        sshd = shutil.which("sshd", path=SYSTEM_PATH)  # it wants its whole path
        log = self.base / "log" / f"sshd.{name}.log"
        self.nodes[name].start(sshd, "-D", "-e", "-f", self.base / "sshd_config", log=log)

    def serve_slurm(self) -> None:
        log = self.base / "log"
        for folder in ("state", "spool"):
            (self.base / folder).mkdir()
        (self.base / "munge.key").write_bytes(os.urandom(128))
        (self.base / "munge.key").chmod(0o600)
        _write_slurm(self.base, {})
        files = ("key-file", "socket", "pid-file", "seed-file", "log-file")
        munge = [f"--{name}={self.base}/munge.{name.partition('-')[0]}" for name in files]
        self.head.start("munged", "--foreground", "--force", *munge, log=log / "munged.out")
        self.start_controller()
        for name in NODES:
            self.start_slurmd(name)
        self.wait_for_nodes()

    def start_controller(self) -> None:
        self.controller = self.head.start(
            "slurmctld", "-D", log=self.base / "log" / "slurmctld.out"
        )

    def stop_controller(self) -> None:
        """It answers nobody until it is started again, from the state that it has saved."""
        for pid in self.head.processes():
            if Path(f"/proc/{pid}/comm").read_text() == "slurmctld\n":
                os.kill(pid, signal.SIGTERM)
        self.controller.wait()

    def reconfigure(self, **settings: str) -> None:
        """Have Slurm go on with these lines of slurm.conf beside, or in the place of, ours."""
        _write_slurm(self.base, settings)
        subprocess.run([self.programs / "scontrol", "reconfigure"], check=True)

    def start_slurmd(self, name: str) -> None:
        (self.base / "spool" / name).mkdir(parents=True, exist_ok=True)
        self.nodes[name].start("slurmd", "-D", log=self.base / "log" / f"slurmd.{name}.out")

    def wait_for_nodes(self) -> None:
        """Wait until Slurm has no node that it cannot use."""
        deadline = time.monotonic() + PATIENCE_S
        while self.sinfo() != sorted(NODES):
            if time.monotonic() > deadline:
                logs = [path.read_text()[-1500:] for path in (self.base / "log").iterdir()]
                raise RuntimeError("Slurm did not start:\n" + "\n".join(logs))
            time.sleep(0.05)

    def sinfo(self) -> list[str]:
        words = f"{self.programs}/sinfo -hN -p low -t idle,mix,alloc -o %N".split()
        done = subprocess.run(words, capture_output=True, text=True)
        return sorted(done.stdout.split())

    def end(self) -> None:
        for machine in (*self.nodes.values(), self.head):
            machine.power_off()


@contextmanager
def machines(environment: dict[str, str]) -> Iterator[Machines]:
    """A cluster whose sshd answers; Slurm is to be started."""
    with ExitStack() as undo:
        base = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="cluster-")))
        base.chmod(0o755)
        (base / "log").mkdir()
        made = Machines(base, environment)
        undo.callback(made.end)
        yield made


def _write_accounts(base: Path) -> None:
    """Names of the machines; root, and a second name for it, with a home of their own."""
    names = (f"{address} {name}" for name, address in ADDRESSES.items())
    (base / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
    home = base / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    others = [line for line in Path("/etc/passwd").read_text().splitlines() if line[:5] != "root:"]
    ours = [f"{name}:x:0:0::{home}:/bin/bash" for name in ("root", USER)]
    (base / "passwd").write_text("\n".join([*ours, *others, ""]))


def _write_sshd(base: Path, environment: dict[str, str]) -> None:
    """sshd's configuration, keys, and what a user has in ~/.ssh."""
    ssh = base / "home" / ".ssh"
    for key in (base / "host_key", ssh / "id_ed25519", base / "wrong_key"):
        words = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tests", "-f", key)
        subprocess.run(words, check=True)
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    public = (base / "host_key.pub").read_text()
    (ssh / "known_hosts").write_text("".join(f"{name} {public}" for name in ("n?", "10.*", "[*")))
    (ssh / "config").write_text(
        f"Host first\n HostName n1\n Port {PORT}\n User {USER}\n"
        "Host second\n HostName n2\n HostKeyAlias n2\n"
        f"Host wrong-key\n HostName n2\n IdentitiesOnly yes\n IdentityFile {base}/wrong_key\n"
    )
    given = " ".join(f'"{name}={value}"' for name, value in environment.items())
    (base / "sshd_config").write_text(
        f"Port 22\nPort {PORT}\nHostKey {base}/host_key\nPidFile none\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nLogLevel VERBOSE\n"
        "MaxStartups 50\n" + (f"SetEnv {given}\n" if given else "")
    )


def _write_slurm(base: Path, settings: dict[str, str]) -> None:
    chosen = {
        "ClusterName": "tests",
        "SlurmctldHost": f"head({ADDRESSES['head']})",
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={base}/munge.socket",
        "StateSaveLocation": f"{base}/state",
        "SlurmdSpoolDir": f"{base}/spool/%n",
        "SlurmctldPidFile": "/run/slurmctld.pid",
        "SlurmdPidFile": "/run/slurmd.pid",
        "SlurmctldLogFile": f"{base}/log/slurmctld.log",
        "SlurmdLogFile": f"{base}/log/slurmd.%n.log",
        "MpiDefault": "none",
        "SwitchType": "switch/none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/affinity",
        "TaskPluginParam": "autobind=threads",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SlurmdParameters": "config_overrides",
        "SchedulerParameters": "bf_interval=1,sched_interval=2,batch_sched_delay=0",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmdTimeout": "10",
        "MessageTimeout": "4",
        "MinJobAge": "3600",
        "ReturnToService": "2",
        "MailProg": "/bin/true",
        **settings,
    }
    lines = [f"{name}={value}" for name, value in chosen.items()]
    lines += [
        *(f"NodeName={n} NodeAddr={ADDRESSES[n]} CPUs=2 RealMemory=8000" for n in NODES),
        # Of preemption with a time of grace, and of preemption at once.
        "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60",
        "PartitionName=hard Nodes=ALL PriorityTier=1 GraceTime=0",
        "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
    ]
    (base / "slurm.conf").write_text("\n".join([*lines, ""]))
    (base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


if __name__ == "__main__":  # for make
    if reason := why_not():
        sys.exit(f"{reason}: as root on Debian, `make test-cluster INSTALL=1` installs them")
