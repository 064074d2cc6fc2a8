"""The scripts that start a training: plain bash around torchrun, to be read, kept and edited.

RUN/node.sh    what every node runs: environment, torchrun, Megatron's flags
RUN/hosts.sh   node.sh on every host, through ssh
RUN/job.slurm  node.sh on every node of a Slurm job (`launch.slurm`)

How a training is stopped without loss: Megatron saves and exits when a rank is sent SIGUSR1
(--exit-signal); all ranks ask each other after every step. torchrun would die of that signal, and
of SIGTERM it makes 30 seconds and a SIGKILL. So node.sh hands the signal to the ranks alone:
torchrun is started with SIGUSR1 ignored, which the ranks undo for themselves.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_infoentropy.launch.cluster import Cluster, Container
from megatron_infoentropy.launch.flags import ranks_of_a_model, read_facts

NODE, HOSTS, JOB = "node.sh", "hosts.sh", "job.slurm"
ENTRY = "megatron_infoentropy.pretrain"
ASKED = "asked to stop; the ranks save a checkpoint first"
SAVE_ON_SIGNAL = ("--exit-signal-handler", "--exit-signal", "SIGUSR1")


@dataclass(frozen=True)
class Plan:
    """A training on a cluster: Megatron's flags, where its run folder is, who made it."""

    run: Path
    flags: tuple[str, ...]
    cluster: Cluster
    made_by: str  # the command line, for the scripts' first lines

    @property
    def title(self) -> str:
        """The machines and the layout, for a reader."""
        cluster, facts = self.cluster, read_facts(list(self.flags))
        kind = "GPUs" if cluster.gpus_per_node else "CPU ranks"
        copies = cluster.ranks // ranks_of_a_model(facts)
        layout = f"tensor {facts['tensor_parallel']} x pipeline {facts['pipeline_parallel']}"
        return f"{cluster.nodes} x {cluster.ranks_per_node} {kind}: {layout} x data {copies}"


def node_script(plan: Plan) -> str:
    """node.sh: one node's ranks, from the environment variables NODE and RDZV_ENDPOINT."""
    cluster = plan.cluster
    return "\n".join([
        "#!/usr/bin/env bash",
        f"# One node of the training {plan.run.name}, {plan.title}.",
        f"# Made by: {plan.made_by}",
        "# Edit it as you like: it is all that a node runs. NODE (0, 1, ...) says which one it is.",
        "# Words given to it torchrun runs instead of the training, `infoentropy doctor` for one.",
        f"# To save a checkpoint and stop: Ctrl-C, or kill -USR1 $(cat {plan.run}/node-0.pid)",
        "set -euo pipefail",
        "",
        f"run={shlex.quote(str(plan.run))}",
        f"nodes={cluster.nodes}",
        f"ranks={cluster.ranks_per_node} # of this node",
        "node=${NODE:-${SLURM_NODEID:-0}}",
        f"endpoint=${{RDZV_ENDPOINT:-{cluster.endpoint}}} # where the nodes meet",
        f"id=${{RDZV_ID:-{cluster.rdzv_id or plan.run.name}}}",
        "",
        *_environment(cluster),
        "",
        "flags=(",
        *_one_flag_a_line(plan.flags),
        ")",
        "",
        "torchrun=(",
        f"  {shlex.quote(cluster.python)} -m torch.distributed.run",
        '  --nnodes "$nodes" --nproc-per-node "$ranks"',
        '  --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$id"',
        '  --rdzv-conf "is_host=$((node == 0)),'
        f'join_timeout={cluster.join_timeout_s},read_timeout={cluster.store_timeout_s}"',
        f"  --max-restarts {cluster.max_restarts}",
        *(['  --local-addr "$address"'] if cluster.interface else []),
        ")",
        _RUN_AND_STOP.format(
            entry=ENTRY, asked=ASKED, idle_s=cluster.join_timeout_s + cluster.store_timeout_s
        ),
    ])  # fmt: skip


_RUN_AND_STOP = """
mkdir -p "$run"
stopping=0 # for so many seconds
trap 'trap "" USR1 TERM INT HUP; stopping=1' USR1 TERM INT HUP
trap 'rm -f "$run/node-$node.pid"' EXIT
echo $$ > "$run/node-$node.pid"

# torchrun must not hear SIGUSR1, which would end it; the ranks take it as the order to save. In a
# session of their own they do not hear the terminal's Ctrl-C either: only this script does.
[ $# -gt 0 ] || set -- -m {entry} "${{flags[@]}}"
(trap '' USR1; exec setsid "${{torchrun[@]}}" "$@") &
launcher=$!

living_ranks() {{
  for child in $(cat "/proc/$launcher/task/$launcher/children" 2>/dev/null); do
    grep -q '^State:[[:space:]]*Z' "/proc/$child/status" || echo "$child"
  done
}}

told=
save_and_stop() {{
  [ "$stopping" -gt 1 ] || echo "node $node: {asked}" || true # the terminal may be gone
  # Again and again: a rank that is still starting does not listen yet.
  if [ $((stopping % 5)) -eq 1 ]; then
    if kill -USR1 $(living_ranks) 2>/dev/null; then
      told=1
    elif [ -z "$told" ] || [ "$idle" -gt 60 ]; then # not one that waits for others to save
      # Nothing to save: torchrun waits for nodes, in the end deaf to signals.
      [ "$stopping" -lt 30 ] && signal=TERM || signal=KILL
      kill -$signal "$launcher" || true
    fi
  fi
  stopping=$((stopping + 1))
}}

idle=0
while kill -0 "$launcher" 2>/dev/null; do
  [ -n "$(living_ranks)" ] && idle=0 || idle=$((idle + 1))
  # Cut off from node 0, torchrun waits for an answer until the kernel gives up: for a quarter of
  # an hour.
  if [ "$idle" -ge {idle_s} ]; then
    echo "node $node: no ranks for {idle_s} s: other nodes did not come, or node 0 is not reached"
    kill -KILL "$launcher" || true
  fi
  [ "$stopping" -eq 0 ] || save_and_stop
  sleep 1 > /dev/null 2>&1 & # in the background: a signal ends the wait
  wait $! || true
done
wait "$launcher" # its exit code
"""


def _environment(cluster: Cluster) -> list[str]:
    """Lines that set what the ranks need, unless it is set already."""
    wanted = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # tensor parallelism relies on the order of launches
        "PYTHONUNBUFFERED": "1",
        # torchrun's own store outlives a restart, and with it the addresses of dead ranks.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if cluster.gpus_per_node:
        wanted["NCCL_DEBUG"] = "WARN"
    else:
        wanted["TORCHDYNAMO_DISABLE"] = "1"
    lines = [
        "threads=$(($(nproc) / ranks))",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}",
        *(f"export {name}=${{{name}:-{value}}}" for name, value in wanted.items()),
    ]
    if cluster.interface:
        name = shlex.quote(cluster.interface)
        lines += [
            f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}",
            f"address=$(ip -4 -o addr show dev {name} | awk '{{print $4; exit}}' | cut -d/ -f1)",
            f'[ -n "$address" ] || {{ echo "node $node: no IPv4 address on {name}" >&2; exit 1; }}',
        ]
    return lines


def node_command(container: Container | None) -> str:
    """What a node runs before the path of node.sh; Pyxis is a part of srun itself."""
    if container is None or container.engine == "pyxis":
        return "bash"
    binds = [f"--bind {shlex.quote(mount)}" for mount in container.mounts]
    return " ".join(["apptainer exec --nv", *binds, shlex.quote(container.image), "bash"])


def _one_flag_a_line(words: Iterable[str]) -> list[str]:
    """Every flag with its values, quoted for bash; of a flag given twice the last one."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            flags.pop(name, None)
            flags[name] = [word]
        else:
            flags[name].append(word)
    return [f"  {shlex.join(flag)}" for flag in flags.values()]


def hosts_script(plan: Plan) -> str:
    """hosts.sh: every host's node.sh; the first failure, or a signal, stops them all."""
    return _HOSTS.format(
        name=plan.run.name,
        title=plan.title,
        made_by=plan.made_by,
        command=node_command(plan.cluster.container),
        hosts="\n".join(f"  {shlex.quote(str(host))}" for host in plan.cluster.hosts),
        run=shlex.quote(str(plan.run)),
    )


_HOSTS = """\
#!/usr/bin/env bash
# The training {name} on hosts that ssh reaches without a password, {title}.
# Made by: {made_by}
# SIGUSR1, SIGTERM, Ctrl-C or a closed terminal: the training saves a checkpoint and stops.
set -uo pipefail

run={run} # the same folder on every host
hosts=(
{hosts}
)
# A host that no longer answers is given up after a minute. Each in a session of its own: what a
# terminal sends to all must not end an ssh before its node has saved.
ssh=(setsid ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4)

stopping=0 # for so many seconds
trap 'trap "" USR1 TERM INT HUP; stopping=1' USR1 TERM INT HUP

pids=()
for node in "${{!hosts[@]}}"; do
  [ "$stopping" -eq 0 ] || break
  "${{ssh[@]}}" "${{hosts[$node]}}" "NODE=$node {command} $run/node.sh ${{*@Q}}" < /dev/null &
  pids[$node]=$!
done

save_and_stop() {{
  # Again and again: a node that is still starting does not listen yet.
  if [ $((stopping % 5)) -eq 1 ]; then
    for node in "${{!pids[@]}}"; do
      "${{ssh[@]}}" -o ConnectTimeout=5 "${{hosts[$node]}}" \\
        "p=\\$(cat $run/node-$node.pid) && grep -q node.sh /proc/\\$p/cmdline && kill -USR1 \\$p" \\
        < /dev/null > /dev/null 2>&1 & # a node.sh that was killed has left its number behind
    done
  fi
  stopping=$((stopping + 1))
}}

code=0
while [ "${{#pids[@]}}" -gt 0 ]; do
  [ "$stopping" -eq 0 ] || save_and_stop
  sleep 1 > /dev/null 2>&1 & # in the background: a signal ends the wait
  wait $!
  for node in "${{!pids[@]}}"; do
    kill -0 "${{pids[$node]}}" 2>/dev/null && continue
    wait "${{pids[$node]}}"
    status=$?
    unset "pids[$node]"
    if [ "$status" -ne 0 ] && [ "$code" -eq 0 ]; then
      code=$status stopping=1
      echo "node $node (${{hosts[$node]}}) ended with exit code $status; the others are stopped" >&2
    fi
  done
done
exit "$code"
"""
