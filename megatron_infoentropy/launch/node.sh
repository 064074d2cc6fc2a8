mkdir -p "$run"
stopping=0 # for so many seconds
trap 'trap "" USR1 TERM INT HUP; stopping=1' USR1 TERM INT HUP
trap 'rm -f "$run/node-$node.pid"' EXIT
echo $$ > "$run/node-$node.pid"

# torchrun must not hear SIGUSR1, which would end it; the ranks take it as the order to save. In a
# session of their own they do not hear the terminal's Ctrl-C either: only this script does.
[ $# -gt 0 ] || set -- -m megatron_infoentropy.pretrain "${flags[@]}"
(trap '' USR1; exec setsid "${torchrun[@]}" "$@") &
launcher=$!

living_ranks() {
  for child in $(cat "/proc/$launcher/task/$launcher/children" 2>/dev/null); do
    grep -q '^State:[[:space:]]*Z' "/proc/$child/status" || echo "$child"
  done
}

told=
save_and_stop() {
  [ "$stopping" -gt 1 ] || echo "node $node: asked to stop; the ranks save a checkpoint first" || true # the terminal may be gone
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
}

idle=0
while kill -0 "$launcher" 2>/dev/null; do
  [ -n "$(living_ranks)" ] && idle=0 || idle=$((idle + 1))
  # Cut off from node 0, torchrun waits for an answer until the kernel gives up: for a quarter of
  # an hour.
  if [ "$idle" -ge "$patience" ]; then
    echo "node $node: no ranks for $patience s: other nodes did not come, or node 0 is not reached"
    kill -KILL "$launcher" || true
  fi
  [ "$stopping" -eq 0 ] || save_and_stop
  sleep 1 > /dev/null 2>&1 & # in the background: a signal ends the wait
  wait $! || true
done
wait "$launcher" # its exit code
