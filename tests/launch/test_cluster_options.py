"""What a cluster's options refuse, in words, and what the scripts are made of."""

import subprocess

import pytest

from megatron_infoentropy.launch.cluster import Cluster, Container, parse_container, parse_slurm
from megatron_infoentropy.launch.scripts import Plan, hosts_script, node_script
from megatron_infoentropy.launch.slurm import job_script

FLAGS = (
    *("--infoentropy-objective", "focal", "--infoentropy-gamma", "1", "--infoentropy-sigma", "1"),
    *("--infoentropy-normalization", "paper", "--infoentropy-detach-weight", "--seed", "1"),
    *("--tensor-model-parallel-size", "1", "--tensor-model-parallel-size", "2"),
    *("--pipeline-model-parallel-size", "1", "--x", "a b"),
)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slurm": (), "hosts": ("a",)}, "exclude each other"),
        ({"nodes": 3, "hosts": ("a", "b")}, "names 2 hosts for --nodes 3"),
        ({"nodes": 2, "hosts": ("a", "a")}, "a host twice"),
        ({"nodes": 2}, "2 nodes need --slurm, or --hosts, or the --rdzv-endpoint"),
        ({"address": "a"}, "must be HOST:PORT, got 'a'"),
        ({"container": Container("pyxis", "i")}, "a part of Slurm"),
    ],
)
def test_what_cannot_be_started_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Cluster(**settings)


def test_options_of_sbatch():
    assert parse_slurm("--time 1:00 -p gpu --qos=x") == ("--time=1:00", "-p gpu", "--qos=x")
    with pytest.raises(ValueError, match="may not hold --nodes"):
        parse_slurm("--nodes=2")
    with pytest.raises(ValueError, match="now is none"):
        parse_slurm("now")
    with pytest.raises(ValueError, match="must be pyxis or apptainer"):
        parse_container("docker", "i", [])


@pytest.mark.parametrize("engine", ["pyxis", "apptainer"])
def test_the_scripts_are_bash_and_hold_every_choice(tmp_path, engine):
    container = Container(engine, "image.sif", ("/data:/data",))
    cluster = Cluster(2, 4, 4, slurm=("--time=1:00",), container=container, interface="ib0")
    plan = Plan(tmp_path, FLAGS, cluster, "a test")
    node, job = node_script(plan), job_script(plan)
    for text in (node, job, hosts_script(plan)):
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
    assert f'{inside[engine]} "$run/node.sh" &' in job
