"""The job script for sbatch: node.sh on every node, saved and requeued before the time limit.

    Slurm --SIGUSR1, `save_s` before the limit--> job.slurm --> srun --> node.sh --> ranks
    ranks save and exit 0 --> srun ends --> job.slurm: scontrol requeue --> the same from there on

Preemption takes the same way where the cluster says PreemptParameters=send_user_signal; elsewhere
Slurm requeues the job itself and it goes on from the last --save-interval.
"""

import shlex
import sys

from megatron_infoentropy.launch.cluster import PORT, Container
from megatron_infoentropy.launch.run_folder import LOG
from megatron_infoentropy.launch.scripts import NODE, Plan, node_command


def job_script(plan: Plan) -> str:
    """job.slurm, for `sbatch`."""
    cluster = plan.cluster
    assert cluster.slurm is not None
    directives = [
        f"--job-name={plan.run.name}",
        f"--nodes={cluster.nodes}",
        "--ntasks-per-node=1 # torchrun starts the ranks",
        *([f"--gpus-per-node={cluster.gpus_per_node}"] if cluster.gpus_per_node else []),
        f"--output={plan.run / LOG}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{cluster.save_s}",
        *cluster.slurm,
    ]
    return _JOB.format(
        name=plan.run.name,
        title=plan.title,
        made_by=plan.made_by,
        directives="\n".join(f"#SBATCH {directive}" for directive in directives),
        run=shlex.quote(str(plan.run)),
        endpoint=cluster.endpoint,
        rdzv_id=cluster.rdzv_id,
        port=PORT,
        save_s=cluster.save_s,
        give_up_s=max(1, cluster.save_s - max(5, cluster.save_s // 8)),
        srun=_srun(cluster.container),
        node=NODE,
        # outside a container its python may be absent, or lack the package
        python=shlex.quote(sys.executable if cluster.container else cluster.python),
    )


def _srun(container: Container | None) -> str:
    """srun with what stands before the path of node.sh."""
    words = ["srun", "--kill-on-bad-exit=1"]
    if container is not None and container.engine == "pyxis":
        words.append(f"--container-image={shlex.quote(container.image)}")
        if container.mounts:
            words.append(f"--container-mounts={shlex.quote(','.join(container.mounts))}")
    return " ".join([*words, node_command(container)])


_JOB = """\
#!/usr/bin/env bash
# The training {name} under Slurm, {title}.
# Made by: {made_by}
# Start it with `sbatch job.slurm`, as often as you like: it goes on from the last checkpoint.
{directives}
set -euo pipefail

run={run}
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || true
: "${{first:?Slurm names no hosts for this job: is this script run by sbatch?}}"
given={endpoint}
export RDZV_ENDPOINT=${{given:-$first:$(({port} + SLURM_JOB_ID % 1000))}}
export RDZV_ID={rdzv_id}${{SLURM_JOB_ID}}-${{SLURM_RESTART_COUNT:-0}}

requeue= # how many seconds remain to save, once it is so far
trap 'trap "" USR1; requeue={give_up_s}' USR1

echo "== start of job $SLURM_JOB_ID, restart ${{SLURM_RESTART_COUNT:-0}}: $SLURM_JOB_NODELIST"
{srun} "$run/{node}" "$@" &
step=$!

while kill -0 "$step" 2>/dev/null; do
  if [ -n "$requeue" ]; then
    if [ "$requeue" = {give_up_s} ]; then
      echo "== {save_s} s before the time limit, or preempted: saving, then requeueing"
    fi
    # srun hands it to node.sh on every node; again and again, as one that starts does not listen.
    [ $((({give_up_s} - requeue) % 5)) -ne 0 ] || kill -USR1 "$step" || true
    [ "$requeue" -gt 0 ] || break # not saved in time: from the checkpoint before
    requeue=$((requeue - 1))
  fi
  sleep 1 & # in the background: a signal ends the wait
  wait $! || true
done
if [ -n "$requeue" ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
code=0
wait "$step" || code=$?
[ $# -gt 0 ] || {python} -m megatron_infoentropy.launch.finish "$run" "$code" || true
exit "$code"
"""
