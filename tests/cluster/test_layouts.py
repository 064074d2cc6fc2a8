"""The long forms: model parallelism inside and across hosts that are cut off; ranks restarted."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster_runs import (
    PATIENCE_S,
    TIMEOUT_S,
    assert_same_losses,
    losses,
    prepared,
    processes_on,
    saved_in,
    text_of,
    train,
    train_until_cut_off,
    wait_until,
)
from namespaces import why_not

from megatron_infoentropy.launch.cluster import Address, Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason="network namespaces cannot be made here"),
]


def undisturbed(tokens, run, ranks, steps, settings=None):
    """The same training on one host, to its end."""
    cluster = Cluster(ranks_per_node=ranks, max_restarts=0)
    train(prepared(tokens, run, cluster, "--exit-interval", steps, settings=settings))
    return run


@pytest.mark.parametrize(
    ("axis", "ranks_per_node"),
    [("tensor", 2), ("pipeline", 1)],
    ids=["tensor inside, data across", "pipeline across"],
)
def test_a_layout_over_two_hosts_survives_that_one_is_cut_off(
    axis, ranks_per_node, two_hosts, tokens, tmp_path
):
    settings = {f"{axis}-model-parallel-size": 2}
    with ThreadPoolExecutor(1) as pool:
        run, layout = tmp_path / "run", {"ranks_per_node": ranks_per_node}
        # What gloo's send and receive wait for is set when their group is made, not after.
        minute = {"timeout": ("--distributed-timeout-minutes", 1)} if axis == "pipeline" else {}
        cut = train_until_cut_off(pool, two_hosts, tokens, run, settings, **minute, **layout)
        cut.assert_ends_by_itself()
    at = cut.go_on()
    steps = max(losses(run))
    reference = undisturbed(tokens, tmp_path / "one", 2 * ranks_per_node, steps, settings)
    assert_same_losses(run, reference, {at + 2})


def rank_on(host):
    """A rank, which is a fork of the server: not what torchrun started, nor torchrun."""
    for pid in processes_on(host):
        if b"quick_ranks.py\0serve" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError(f"no rank on {host.name}")


@pytest.mark.parametrize("victim", [0, 1])
def test_both_hosts_restart_their_ranks_when_one_is_killed(victim, two_hosts, tokens, tmp_path):
    """The training has no end of its own, so that a fast one cannot end before the kill."""
    run, log = tmp_path / "run", tmp_path / "run" / "train.log"
    hosts = tuple(Address(host.address) for host in two_hosts)
    cluster = Cluster(2, hosts=hosts, interface="eth0", max_restarts=1, join_timeout_s=PATIENCE_S)
    seconds = ("--distributed-timeout-seconds-after-init", TIMEOUT_S)
    made = prepared(tokens, run, cluster, "--save-interval", 10, *seconds)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train, made)
        wait_until(lambda: saved_in(run) >= 10, log, training)
        os.kill(rank_on(two_hosts[victim]), signal.SIGKILL)
        loaded = re.compile(r"successfully loaded checkpoint from \S+ .*at iteration (\d+)")
        wait_until(lambda: loaded.search(text_of(log)), log, training)
        at = int(loaded.search(text_of(log))[1])
        wait_until(lambda: saved_in(run) >= at + 10, log, training)
        os.kill(int((run / "node-0.pid").read_text()), signal.SIGUSR1)
        assert training.result(timeout=PATIENCE_S).startswith("stopped after saving a checkpoint")
    steps = max(losses(run))
    assert saved_in(run) == steps
    reference = undisturbed(tokens, tmp_path / "one", 1, steps)
    assert_same_losses(run, reference, {at + 2})
