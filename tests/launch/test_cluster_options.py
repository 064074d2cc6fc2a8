"""What a cluster's options refuse, in words, and what the scripts are made of."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from light_run import LightRun, write_program
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.launch.cluster import (
    Address,
    Cluster,
    absolute,
    parse_hosts,
    parse_slurm,
    sbatch_options,
)
from megatron_infoentropy.launch.recipe import written_flags
from megatron_infoentropy.launch.run_folder import write_facts
from megatron_infoentropy.launch.scripts import (
    Plan,
    hosts_script,
    job_script,
    node_script,
    start,
    write,
)
from megatron_infoentropy.launch.train import finish
from megatron_infoentropy.runtime.device import Device

FLAGS = (*written_flags({}, {"tensor-model-parallel-size": 2}), "--x", "a b")
PATH = os.environ["PATH"]


def plan(run, nodes=1, ranks=4, **settings):
    """A training on so many ranks and GPUs."""
    return Plan(run, FLAGS, Cluster(nodes, ranks, ranks, **settings), "a test")


def asked(run, options):
    """What a job with these options asks of sbatch, which takes quotes as a shell does."""
    lines = job_script(plan(run, slurm=parse_slurm(options))).splitlines()
    return [word for line in lines if line[:8] == "#SBATCH " for word in shlex.split(line[8:])]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slurm": (), "hosts": (Address("a"),)}, "exclude each other"),
        ({"nodes": 3, "hosts": parse_hosts("a,b")}, "names 2 hosts for --nodes 3"),
        ({"nodes": 2, "hosts": parse_hosts("x@a,y@a")}, "a host twice: x@a, y@a"),
        ({"nodes": 2}, "2 nodes need --slurm, or --hosts, or the --rdzv-endpoint"),
        ({"image": "i", "engine": "pyxis"}, "a part of Slurm"),
        ({"image": "i", "engine": "docker"}, "must be pyxis or apptainer"),
        ({"max_requeues": 1}, "--max-requeues is about a job of Slurm: add --slurm"),
        ({"mounts": ("/a:/b",)}, "--container-mount needs --container-image"),
        ({"address": "a"}, "got 'a': it has no port"),
        ({"address": "al@a:1"}, "got 'al@a:1': it has a user"),
        ({"address": "::1:2950"}, "got '::1:2950': it has no port"),
    ],
)
def test_what_cannot_be_started_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Cluster(**settings)


@pytest.mark.parametrize(
    ("hosts", "destinations", "endpoint"),
    [
        ("jean-zay-ia810,b", ["jean-zay-ia810", "b"], "jean-zay-ia810:29500"),
        ("alice@a.lan, b", ["alice@a.lan", "b"], "a.lan:29500"),
        ("a:2222,alice@a:2223", ["ssh://a:2222", "ssh://alice@a:2223"], "a:29500"),
        ("LAN\\al@a:22,10.0.0.2", ["ssh://LAN%5Cal@a:22", "10.0.0.2"], "a:29500"),
        ("fe80::1,al@fe80::2", ["fe80::1", "al@fe80::2"], "[fe80::1]:29500"),
        ("al@[fe80::1]:22,[::2]", ["ssh://al@[fe80::1]:22", "::2"], "[fe80::1]:29500"),
    ],
)
def test_ssh_is_given_users_and_ports_and_the_ranks_meet_at_the_host_alone(
    tmp_path, hosts, destinations, endpoint
):
    made = plan(tmp_path, 2, 1, hosts=parse_hosts(hosts))
    listed = hosts_script(made).partition("\nhosts=(\n")[2].partition("\n)")[0]
    assert shlex.split(listed) == destinations
    assert f"\nendpoint=${{RDZV_ENDPOINT:-{endpoint}}} #" in node_script(made)
    host, port = endpoint.rsplit(":", 1)
    assert parse_rendezvous_endpoint(endpoint, 1) == (host.strip("[]"), int(port))


NO_MACHINE = [
    *("", "http://x", "-oProxyCommand=x", "a b", "a..b", "@a", "al ice@a", "-l@a", "4", "1.2"),
    *("a:0", "a:65536", "a:", "a:\u0663", "[a]", "[::1", "::1%eth0", "[::1]:99999"),
]


@pytest.mark.parametrize("text", NO_MACHINE)
def test_what_is_no_machine_is_neither_a_host_nor_an_endpoint(text):
    with pytest.raises(ValueError, match=r"--hosts must be hosts with commas between, .*: \S"):
        parse_hosts(f"a,{text}")
    if text:
        with pytest.raises(ValueError, match="--rdzv-endpoint must be HOST:PORT"):
            Cluster(address=text)


def test_options_of_sbatch_come_in_both_forms():
    assert parse_slurm("--time 1:00 -p gpu --qos=x") == ("--time=1:00", "-p gpu", "--qos=x")
    assert parse_slurm("--gpus=8 --nodelist=a,b") == ("--gpus=8", "--nodelist=a,b")


SET_BY_THE_SCRIPT = {
    "--nodes": ("--nodes=2",),
    "-N": ("-N 4",),
    "--ntasks": ("--ntasks 8",),
    "-n": ("-n8",),
    "--ntasks-per-node": ("--ntasks-per-n 8",),
    "--output": ("--out x.log",),
    "-o": ("-o x.log", "-ox.log"),
    "--error": ("--error=x",),
    "--signal": ("--sig=B:USR1",),
    "--array": ("--array=0-3", "--arr 0-3"),
    "-a": ("-a 0-3",),
}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        *((each, f"not hold {name}:") for name, all in SET_BY_THE_SCRIPT.items() for each in all),
        ("--comment 'a\nb'", "a value of several lines"),
        ("--time=1:00 now", "now is none"),
    ],
)
def test_what_is_no_option_of_sbatch_or_the_scripts_own_is_refused(option, said):
    with pytest.raises(ValueError, match=said):
        parse_slurm(f"--time=1:00 {option}")


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ("", ["--exclusive", "--mem=0"]),
        ("-p gpu --mem=64G --constraint=a", ["--exclusive"]),
        ("--cpus-per-task=8", []),
        ("-c 8 --mem-per-cpu=2G", []),
        ("--exclusive=user", []),
    ],
)
def test_a_node_is_asked_for_as_a_whole_unless_its_cpus_are_chosen(tmp_path, options, whole):
    words = asked(tmp_path, options)
    assert [word for word in words if word in ("--exclusive", "--mem=0")] == whole


OWN = {"--cpus-per-task": 8, "--mem": "64G"}


@pytest.mark.parametrize(
    ("slurm", "own", "options"),
    [
        (None, dict.fromkeys(OWN), None),
        ("-p gpu", dict.fromkeys(OWN), ("-p gpu",)),
        ("", OWN, ("--cpus-per-task=8", "--mem=64G")),
        ("--mem-bind=local", {"--mem": "0"}, ("--mem-bind=local", "--mem=0")),
        ("--mem=64G", {"--cpus-per-task": 8}, ("--mem=64G", "--cpus-per-task=8")),
    ],
)
def test_cpus_and_memory_are_asked_of_sbatch_by_its_own_names(slurm, own, options):
    assert sbatch_options(slurm, own) == options


@pytest.mark.parametrize(
    ("slurm", "own", "said"),
    [
        (None, OWN, "--cpus-per-task and --mem: what a node of Slurm gives the job; add --slurm"),
        ("-c 4", OWN, "--slurm may not hold -c 4 beside --cpus-per-task: say one of them"),
        ("--mem-per-cpu=2G", OWN, "may not hold --mem-per-cpu=2G beside --mem"),
        ("--nodes=2", OWN, "may not hold --nodes: the job script sets it"),
        *(("", {"--mem": mem}, f"0 for all of it; got '{mem}'$")
          for mem in ("", "-1", "1.5G", "64GB", "8 G", "all", "\u0663")),
    ],
)  # fmt: skip
def test_cpus_and_memory_that_sbatch_would_not_take_are_refused(slurm, own, said):
    with pytest.raises(ValueError, match=said):
        sbatch_options(slurm, own)


def test_what_sbatch_reads_is_quoted(tmp_path):
    """It takes quotes, # and % much as a shell does."""
    words = asked(tmp_path / "a'b#%j", """--comment "it's # b" -A 'x y' --time=1:00""")
    assert f"--output={tmp_path}/a'b#%%j/train.log" in words
    assert words[-4:] == ["--comment=it's # b", "-A", "x y", "--time=1:00"]


def test_jobs_of_one_run_folder_wait_for_each_other_and_for_no_other(tmp_path):
    first, again, other = (asked(tmp_path / folder / "run", "") for folder in "aab")
    assert first == again
    assert first[0].startswith("--job-name=run-")
    assert first[0] != other[0]
    assert "--dependency=singleton" in first


@pytest.mark.parametrize("where", [{"slurm": ()}, {"hosts": parse_hosts("a")},
                                   {"nodes": 2, "address": "a:1"}])  # fmt: skip
def test_a_machine_without_gpus_does_not_decide_for_others(monkeypatch, where):
    def find(kind):
        device = Device(kind, "gloo", 2)
        monkeypatch.setattr("megatron_infoentropy.launch.cluster.find_device", lambda: device)

    find("cpu")
    with pytest.raises(
        ValueError, match="say how many a node has with --gpus-per-node, 0 to train"
    ):
        _ = Cluster(**where).device
    assert Cluster(gpus_per_node=0, **where).device.type == "cpu"
    assert Cluster().device.type == "cpu"
    find("cuda")
    assert Cluster(**where).device.count == 2


def test_another_command_line_that_makes_the_same_scripts_may_start_them(tmp_path):
    made = plan(tmp_path, slurm=())
    write(made)
    write(replace(made, made_by="launch"))
    with pytest.raises(ValueError, match=r"node\.sh is there and differs"):
        write(replace(made, flags=(*FLAGS, "--y", "1")))


def test_after_submitting_it_says_where_the_log_is_and_how_to_stop(tmp_path, monkeypatch):
    says = "#!/bin/sh\necho 'sbatch: a word of the site'\necho Submitted batch job 47\n"
    write_program(tmp_path / "sbatch", says)
    monkeypatch.setenv("PATH", f"{tmp_path}:{PATH}")
    said = start(plan(tmp_path, slurm=()), Path("r.yaml"))
    assert "Submitted batch job 47" in said
    assert f"its log is {tmp_path}/train.log" in said
    assert "scancel --signal=USR1 47" in said


def test_the_command_hands_on_what_slurm_is_asked_for_and_its_lines_as_one_comment(
    tmp_path, monkeypatch
):
    made = []

    def prepare(job, cluster, made_by):
        made.extend((cluster, made_by))
        raise ValueError("enough")

    words = ["launch", "x.yaml", "--data", "d", "--tokenizer", "t", "--run", str(tmp_path),
             "--slurm", "--time=1:00\n  --partition=gpu",
             "--cpus-per-task=8", "--mem=64G", "--max-requeues=3",
             "--gpus-per-node=2", "--ranks-per-node=2"]  # fmt: skip
    monkeypatch.setattr("megatron_infoentropy.launch.scripts.prepare", prepare)
    monkeypatch.setattr("sys.argv", ["infoentropy", *words])
    CliRunner().invoke(app, words)
    cluster, made_by = made
    assert "--slurm '--time=1:00 --partition=gpu' --cpus-per-task=8" in made_by
    assert cluster.slurm[-3:] == ("--partition=gpu", "--cpus-per-task=8", "--mem=64G")
    assert "\nmax_requeues=3\n" in job_script(Plan(tmp_path, FLAGS, cluster, "a test"))


def test_a_number_of_parameters_that_is_known_stays(tmp_path):
    """A job without run.json ends without one."""
    (tmp_path / "train.log").write_text("model parameters: 8")
    assert "ended well" in finish(tmp_path, 0)
    assert not (tmp_path / "run.json").exists()
    for said, kept in (("", None), ("model parameters: 9", 9), ("", 9)):
        write_facts(tmp_path, tmp_path / "r.yaml", list(FLAGS), 2, "CPU")
        (tmp_path / "train.log").write_text(said)
        finish(tmp_path, 0)
        assert json.loads((tmp_path / "run.json").read_text())["parameters"] == kept


@pytest.mark.parametrize("engine", ["pyxis", "apptainer"])
def test_the_scripts_are_bash_and_hold_every_choice(tmp_path, engine):
    container = {"image": "image.sif", "engine": engine, "mounts": ("/data:/data",)}
    python = {"python": "/their/python"}  # a job ends outside of it, with the one that made it
    made = plan(tmp_path, 2, slurm=("--time=1:00",), interface="ib0", **container, **python)
    node, job = node_script(made), job_script(made)
    for text in (node, job, hosts_script(made)):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert "2 x 4 GPUs: tensor 2 x pipeline 1 x data 4" in node
    assert node.count("--tensor-model-parallel-size") == 1
    assert "  --x 'a b'\n" in node
    assert "GLOO_SOCKET_IFNAME=ib0" in node
    assert "#SBATCH --signal=B:USR1@120\n#SBATCH --time=1:00\n" in job
    inside = {
        "pyxis": "--container-image=image.sif --container-mounts=/data:/data bash",
        "apptainer": "apptainer exec --nv --bind /data:/data image.sif bash",
    }
    assert f"\npython={sys.executable}\n" in job
    assert '\n[ $# -gt 0 ] || "$python" -m megatron_infoentropy.launch.train' in job
    assert "\npython=/their/python\n" in job_script(plan(tmp_path, slurm=(), **python))
    assert f"\nsrun=(srun --kill-on-bad-exit=1 --cpu-bind=none {inside[engine]})\n" in job


NAMES = [
    "my data",
    'it\'s $HOME "q" a[1] {b} 100% a;b&c a\\b d\u00e9p\u00f4t \u6570\u636e',
    "-dash",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_node_of_this_machine_works_in_a_folder_of_any_name(tmp_path, name):
    run = LightRun(absolute(tmp_path / name, Cluster()), Cluster())
    run.end(0)
    subprocess.run(run.command, check=True)
    words = run.words()
    assert words[words.index("--rdzv-id") + 1] == name
    assert words[words.index("--save") + 1] == f"{tmp_path / name}/checkpoints"


@pytest.mark.parametrize(
    ("name", "cluster", "said"),
    [
        ("a b", Cluster(2, slurm=()), "may not have white space in it on a cluster"),
        ("a b", Cluster(2, hosts=parse_hosts("a,b")), "may not have white space"),
        ("a\nb", Cluster(), "a script cannot hold the path"),
        ("a\udcffb", Cluster(), "a script cannot hold the path"),
    ],
)
def test_a_path_that_the_scripts_do_not_survive_is_refused(tmp_path, name, cluster, said):
    with pytest.raises(ValueError, match=said):
        absolute(tmp_path / name, cluster)
