"""Other launchers accept the files in examples/clusters, and node.sh runs as each calls it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from light_run import LightRun, write_program

from megatron_infoentropy.launch.cluster import Cluster

CLUSTERS = Path(__file__).parents[2] / "examples" / "clusters"
NODES = 2
# torchrun with the options that node.sh gives it, and for ranks a shell that says which one it is.
TORCHRUN = """#!{python}
import runpy, sys
words = sys.argv[1 : sys.argv.index("megatron_infoentropy.pretrain") - 1]
say = 'echo "$RANK of $WORLD_SIZE, node $GROUP_RANK" > {folder}/rank-$RANK'
sys.argv = ["torchrun", *words[2:], "--no-python", "sh", "-c", say]
runpy.run_module(words[1], run_name="__main__")
"""


def load(name):
    return yaml.safe_load((CLUSTERS / name).read_text())


def jobset(node, first):
    """Kubernetes sets the index; the pods' names are in node.sh, by --rdzv-endpoint."""
    spec = load("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == NODES
    command = spec["template"]["spec"]["containers"][0]["command"]
    return command, {"JOB_COMPLETION_INDEX": str(node)}


def skypilot(node, first):
    task = load("skypilot.yaml")
    assert task["num_nodes"] == NODES
    variables = {"SKYPILOT_NODE_RANK": str(node), "SKYPILOT_NODE_IPS": f"{first}\n10.0.0.2"}
    return ["bash", "-c", task["run"]], variables


def torchx(node, first):
    specs = pytest.importorskip("torchx.specs", reason="torchx is not installed")
    component = pytest.importorskip("torchx.specs.finder").get_component(
        f"{CLUSTERS}/torchx_nodes.py:training"
    )
    values = specs.macros.Values("", "app", str(node), rank0_env="TORCHX_RANK0_HOST")
    role = values.apply(component.fn("/runs/first").roles[0])
    assert role.num_replicas == NODES
    return [role.entrypoint, *role.args], {"TORCHX_RANK0_HOST": first}


def start(kind, node, run, first, *before):
    """Start one node as the launcher would."""
    command, variables = kind(node, first)
    command = [word.replace("/runs/first", str(run.folder)) for word in command]
    unset = ("NODE", "RDZV_ENDPOINT", "RDZV_ID")
    variables |= {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.Popen([*before, *command], env=variables)


@pytest.fixture
def run(tmp_path):
    address = "first-node-0-0.first:29500"
    return LightRun(tmp_path, Cluster(NODES, ranks_per_node=2, address=address))


@pytest.mark.parametrize(
    ("kind", "endpoint"),
    [
        (jobset, "first-node-0-0.first:29500"),
        (skypilot, "10.0.0.1:29500"),
        (torchx, "10.0.0.1:29500"),
    ],
)
def test_node_sh_learns_which_node_it_is_and_where_the_first_one_is(run, kind, endpoint):
    for node in range(NODES):
        run.end(0, node)
        assert start(kind, node, run, "10.0.0.1").wait() == 0
        words = run.words(node)
        assert words[words.index("--nnodes") + 1] == str(NODES)
        assert words[words.index("--rdzv-endpoint") + 1] == endpoint
        assert f"is_host={int(node == 0)}," in words[words.index("--rdzv-conf") + 1]


@pytest.fixture
def space():
    """Words that start a command in a network where no other process can have taken the port."""
    ready = "ip link set lo up && echo ready && exec sleep infinity"
    holder = subprocess.Popen(["unshare", "--net", "sh", "-c", ready], stdout=subprocess.PIPE)
    if holder.stdout.readline() != b"ready\n":
        pytest.skip("network namespaces cannot be made here")
    yield ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
    holder.kill()


def test_two_nodes_meet_and_count_their_ranks_through(run, space):
    folder = shlex.quote(str(run.folder))
    write_program(run.torchrun, TORCHRUN.format(python=sys.executable, folder=folder))
    nodes = [start(skypilot, node, run, "127.0.0.1", *space) for node in range(NODES)]
    assert [node.wait() for node in nodes] == [0, 0]
    said = [(run.folder / f"rank-{rank}").read_text() for rank in range(4)]
    assert sorted(said) == [f"{rank} of 4, node {rank // 2}\n" for rank in range(4)]


def test_jobset_has_every_field_under_its_published_name():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    document = load("jobset.yaml")
    # What it does not know it leaves out, a pod's fields too.
    assert models.JobsetV1alpha2JobSet.from_dict(document).to_dict() == document


def test_skypilot_takes_the_task(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # where it else leaves a folder
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(CLUSTERS / "skypilot.yaml")
    assert task.num_nodes == NODES


def test_torchx_plans_every_node(tmp_path):
    runner = pytest.importorskip("torchx.runner")
    name = f"{CLUSTERS}/torchx_nodes.py:training"
    with runner.get_runner() as session:
        planned = session.dryrun_component(name, ["--run", "/runs/first"], "local_cwd")
    assert len(planned.request.role_params["node"]) == NODES
