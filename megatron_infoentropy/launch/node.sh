mkdir -p "$run"
saves=1 # a checkpoint, when asked to stop
if [ $# -gt 0 ]; then
  saves=
elif [ "$node" -eq 0 ]; then
  # Two trainings at once would overwrite each other's checkpoints. A file system without locks
  # (another exit code than 3) does without. torchrun holds the lock too, while it lives.
  exec 9>> "$run/lock"
  taken=0
  flock -w 5 -E 3 9 2> /dev/null || taken=$?
  if [ "$taken" -eq 3 ]; then
    echo "another training has the run folder $run, $(tail -n 1 "$run/lock")" >&2
    exit 1
  fi
  echo "${SLURM_JOB_ID:+Slurm job $SLURM_JOB_ID, }process $$ on $HOSTNAME" > "$run/lock"
fi

# Who prints to a reader that is gone (a lost ssh connection, a killed `infoentropy launch`) dies of
# it, before it has saved. tee -p goes on. Slurm's own log outlives what it starts.
if [ -z "${SLURM_JOB_ID:-}" ]; then
  log=$run/node-$node.log
  exec > >(trap '' USR1 TERM INT HUP; exec setsid tee -p -a "$log" 9>&-) 2>&1
  # A signal that comes before tee ignores it ends both.
  for _ in {1..500}; do
    [ "$(cat "/proc/$!/comm" 2> /dev/null)" != tee ] || break
    kill -0 $! || exit 1
    sleep 0.01
  done
fi

stopping=0 # for so many seconds
trap 'trap "" USR1 TERM INT HUP; stopping=1' USR1 TERM INT HUP
trap 'rm -f "$run/node-$node.pid"' EXIT
echo $$ > "$run/node-$node.pid"

# SIGTERM tells a rank to save and exit: this script sends it, and Slurm does, to every process.
# torchrun and Megatron's helpers must outlive it, so they are started with it ignored; ranks that
# do not listen yet are told again. SIGUSR1 is for this script alone, and so is the terminal's
# Ctrl-C: the others are in a session of their own. SIGHUP ends torchrun.
(
  trap '' USR1
  export INFOENTROPY_NODE_PROCESS=$$
  if [ -n "$saves" ]; then
    trap '' TERM
    export PET_SIGNALS_TO_HANDLE=SIGHUP # of torchrun
    set -- -m megatron_infoentropy.pretrain "${flags[@]}"
  fi
  exec setsid "${torchrun[@]}" "$@"
) &
launcher=$!

living_ranks() {
  for child in $(cat "/proc/$launcher/task/$launcher/children" 2> /dev/null); do
    if grep -qs '^State:[[:space:]]*[^Z[:space:]]' "/proc/$child/status"; then echo "$child"; fi
  done
}

told=   # the ranks that there were when the order came
ending= # torchrun, for so many seconds
save_and_stop() {
  local rank nothing_to_save= patient=60
  if [ "$stopping" -eq 1 ]; then
    echo "node $node: asked to stop${saves:+; the ranks save a checkpoint first}" || true
    told=$(living_ranks)
    [ -z "$told" ] || had_ranks=1
  fi
  # Ranks that were not there before: torchrun has started them in the place of ranks that died.
  for rank in $(living_ranks); do
    [[ $'\n'$told$'\n' == *$'\n'$rank$'\n'* ]] || nothing_to_save=1
  done
  # Without ranks it waits for other nodes; those may still save. Where they saved before the order
  # came here, its ranks are gone by then, and it ends by itself.
  [ -n "$told" ] || patient=10
  [ -n "$saves" ] && [ -n "$had_ranks" ] && [ "$idle" -le "$patient" ] || nothing_to_save=1
  if [ -n "$nothing_to_save$ending" ]; then
    end_launcher
  elif [ $((stopping % 5)) -eq 1 ]; then
    kill -TERM $(living_ranks) 2> /dev/null || true
  fi
  stopping=$((stopping + 1))
}

end_launcher() {
  if [ -z "$ending" ]; then
    echo "node $node: ended without a checkpoint${saves:+: no rank was there that could save one}"
    kill -HUP "$launcher" || true
  elif [ "$ending" -eq 45 ]; then # it gives its ranks 30
    kill -KILL $(living_ranks) "$launcher" || true
  fi
  ending=$((ending + 1))
}

idle=0 had_ranks=
while kill -0 "$launcher" 2> /dev/null; do
  idle=$((idle + 1))
  [ -z "$(living_ranks)" ] || { idle=0 had_ranks=1; }
  # Cut off from node 0, torchrun waits for an answer until the kernel gives up: for a quarter of
  # an hour.
  if [ "$idle" -ge "$patience" ]; then
    echo "node $node: no ranks for $patience s: other nodes did not come, or node 0 is not reached"
    kill -KILL "$launcher" || true
  fi
  [ "$stopping" -eq 0 ] || save_and_stop
  sleep 1 > /dev/null 2>&1 9>&- & # in the background: a signal ends the wait
  wait $! || true
done
code=0
wait "$launcher" || code=$?
# A torchrun that a signal ends knows nothing of a rank that it is just starting, and one that is
# killed leaves all of its ranks behind.
if [ "$code" -ne 0 ]; then
  for process in $(grep -lsz "^INFOENTROPY_NODE_PROCESS=$$\$" /proc/[0-9]*/environ); do
    process=${process#/proc/}
    kill -KILL "${process%/environ}" 2> /dev/null || true
  done
fi
exit $((code < 128 ? code : 1)) # hosts.sh takes more for the end of ssh itself
