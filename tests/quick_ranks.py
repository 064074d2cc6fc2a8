"""A python whose modules need not import torch or Megatron: forks of a server that has.

torchrun starts a rank as `$PYTHON_EXEC -u -m MODULE FLAGS`. Here that is a small program (`client`)
which has the server fork: the fork takes over its environment, folder, output, namespaces (the
machine it runs on) and signals, and runs the module as __main__. The client passes signals on and
ends as the fork does; if it is killed, so is the fork. Everything else (torchrun, rendezvous,
scripts) is real. As `sys.executable` it starts whatever `python -m` does so, torchrun too; all
else is real Python's.

`launch.serve_ranks` starts the server; this file run as a program is the client.
"""

import json
import os
import select
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# The numbers of processes first, by who forks; a process may change its others itself.
SPACES = {
    "pid": os.CLONE_NEWPID,
    "net": os.CLONE_NEWNET,
    "uts": os.CLONE_NEWUTS,
    "mnt": os.CLONE_NEWNS,
}


def client() -> None:
    words = [word for word in sys.argv[1:3] if word not in ("-u", "-P")]
    if words[:1] != ["-m"]:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["QUICK_RANKS"])
    ignored = [n for n in FORWARDED if signal.getsignal(n) == signal.SIG_IGN]
    module = sys.argv[sys.argv.index("-m") + 1 :]
    folder = os.getcwd()  # noqa: PTH109
    order = {"argv": module, "env": dict(os.environ), "cwd": folder, "ignored": ignored}
    spaces = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in SPACES]
    text = json.dumps(order).encode()
    socket.send_fds(connection, [len(text).to_bytes(8, "big")], [0, 1, 2, *spaces])
    connection.sendall(text)
    rank = int(connection.recv(16))

    def forward(number: int, frame: object) -> None:
        os.kill(rank, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    answer = connection.recv(16)
    code = int(answer) if answer else 1
    if code < 0:
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(listener: socket.socket) -> None:
    """Fork a rank for every client, until the process that has started this one is gone."""
    import multiprocessing

    os.setpgid(0, 0)
    starter = multiprocessing.parent_process().sentinel
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nannies need no burial
    while True:
        ready, _, _ = select.select([listener, starter], [], [])
        if starter in ready:
            os.killpg(0, signal.SIGKILL)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            nanny(connection)
        connection.close()


def nanny(connection: socket.socket) -> None:
    """Fork the rank and watch it: its end ends the client, the client's end kills it."""
    size, descriptors, _, _ = socket.recv_fds(connection, 8, 3 + len(SPACES))
    wanted = int.from_bytes(size, "big")
    text = b""
    while len(text) < wanted:
        text += connection.recv(wanted - len(text))
    order = json.loads(text)
    numbers, *others = descriptors[3:]
    enter("pid", numbers)
    rank = os.fork()
    if rank == 0:
        connection.close()
        become_rank(order, descriptors[:3], others)
    with open(f"/proc/{rank}/status") as status:  # noqa: PTH123
        there = next(line.split()[-1] for line in status if line.startswith("NSpid"))
    connection.sendall(there.encode().ljust(16))
    end = os.pidfd_open(rank)
    ready, _, _ = select.select([connection, end], [], [])
    if end not in ready:  # torchrun has killed the client
        os.kill(rank, signal.SIGKILL)
    _, status = os.waitpid(rank, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode().ljust(16))
    os._exit(0)


def enter(name: str, space: int) -> None:
    """Enter a namespace, for which it takes root unless it is this process's own."""
    if not os.path.sameopenfile(space, own := os.open(f"/proc/self/ns/{name}", os.O_RDONLY)):
        os.setns(space, SPACES[name])
    os.close(own)


def become_rank(order: dict, standard: list[int], spaces: list[int]) -> None:
    import runpy
    import traceback

    os.setsid()
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
    for name, space in zip(list(SPACES)[1:], spaces, strict=True):
        enter(name, space)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    for number in FORWARDED:
        ignored = number in order["ignored"]
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    sys.argv = order["argv"]
    code = 1
    try:
        runpy.run_module(order["argv"][0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    client()
