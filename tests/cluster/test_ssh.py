"""Hosts that are reached by a real ssh: not reached at all, cut off, stopped.

What trains there is a program of a few lines (`light_run`).
"""

import os
import signal
import sys

import pytest
from cluster_runs import PATIENCE_S, kill_connection, wait_until
from light_run import LightRun, text_of

from megatron_infoentropy.launch.cluster import Cluster, parse_hosts
from megatron_infoentropy.launch.failures import explain


@pytest.fixture(scope="session")
def quick_ranks():
    """No ranks here are Megatron's."""
    return {}


def on(hosts: str, **settings) -> Cluster:
    named = parse_hosts(hosts)
    return Cluster(len(named), hosts=named, **settings)


SILENT = """
import pathlib, socket, sys, time
listener = socket.create_server(("", 2224))
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""


@pytest.mark.parametrize("answer_s", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_hosts_that_cannot_take_part_are_named_before_anything_starts(machines, tmp_path, answer_s):
    run = LightRun(tmp_path / "run", on("n1,wrong-key,n2:2223,n2:2224,second,nowhere"))
    script = run.folder / "hosts.sh"
    assert "answer_s=60" in script.read_text()
    script.write_text(script.read_text().replace("answer_s=60", f"answer_s={answer_s}"))
    listens = tmp_path / "listens"
    silent = machines.nodes["n2"].start(sys.executable, "-c", SILENT, listens)
    wait_until(listens.exists, run.log)
    machines.nodes["n2"].check("mount", "-t", "tmpfs", "tmpfs", run.folder)
    training = run.start()
    said, _ = training.communicate(timeout=PATIENCE_S)
    machines.nodes["n2"].check("umount", run.folder)
    os.killpg(silent.pid, signal.SIGKILL)  # nsenter, and the listener it has forked
    assert training.returncode == 1
    failed = "ssh failed (exit code 255), its own words stand above"
    for host, why, words in (
        ("wrong-key", failed, "Permission denied (publickey)"),
        ("ssh://n2:2223", failed, "port 2223: Connection refused"),
        ("ssh://n2:2224", f"no answer to ssh in {answer_s} s", ""),
        ("second", f"there is no {run.folder}/node.sh, or no right to read it", ""),
        ("nowhere", failed, "Could not resolve hostname nowhere"),
    ):
        assert f"host {host} cannot take part: {why}\n" in said
        assert words in said
    assert "host n1 " not in said
    assert not run.started
    assert explain(said).startswith("a host of --hosts is not reached, or lacks the run folder")


def test_ctrl_c_while_ssh_connects_stops_it_once_the_node_can_save(machines, tmp_path):
    attempts = tmp_path / "attempts"
    slow = f'Match originalhost slow exec "echo >> {attempts}; sleep 1"\n HostName n1\n'
    config = machines.base / "home/.ssh/config"
    config.write_text(slow + config.read_text())
    run = LightRun(tmp_path / "run", on("slow"))
    training = run.start()
    wait_until(lambda: text_of(attempts).count("\n") == 2, run.log)  # the first asked for node.sh
    for _ in range(2):  # the second is impatience
        os.killpg(training.pid, signal.SIGINT)
    said, _ = training.communicate(timeout=PATIENCE_S)
    assert (training.returncode == 0) == (run.saved == 7), said
    # A rank that begins behind the order has nothing to save; it is told of, and ended.
    ended = "no rank was there that could save one" in said
    assert run.started == [] or ended or run.has_saved(0), said


@pytest.mark.parametrize("side", ["client", "server", "all clients"])
def test_a_connection_that_breaks_has_every_host_save(machines, tmp_path, side):
    run = LightRun(tmp_path / "run", on("n1,n2"))
    training = run.start()
    run.until_started()
    for node in ("0", "1") if side == "all clients" else ("1",):
        kill_connection(machines, node, "sshd" if side == "server" else "ssh")
    said, _ = training.communicate(timeout=PATIENCE_S)
    assert training.returncode != 0
    assert run.has_saved(0), said
    assert run.has_saved(1), said
    assert run.saved == 7
    assert "the ssh connection to node 1 (n2) broke" in said
    assert explain(said).startswith("the ssh connection to a host broke")


def test_words_given_to_the_scripts_run_instead_of_the_training(machines, tmp_path):
    """On every host, whatever is in them: so `infoentropy doctor` looks at a job's nodes."""
    run = LightRun(tmp_path / "run", on("n1"))
    words = ["--max-restarts", "0", "-m", "--", "a doctor", "it's", "--run", "$HOME"]
    training = run.start(*words)
    run.until_started()
    run.end(3)
    training.communicate(timeout=PATIENCE_S)
    said = run.words()
    assert said[:2] == ["-m", "torch.distributed.run"]
    assert said[-len(words) :] == words
    assert "megatron_infoentropy.pretrain" not in said
