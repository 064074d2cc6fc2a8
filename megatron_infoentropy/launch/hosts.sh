# Port, user, key and other names of a host belong into ~/.ssh/config. A host that no longer answers
# is given up after a minute. Each in a session of its own: what a terminal sends to all must not
# end an ssh before its node has saved.
ssh=(setsid ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4)

trap '' PIPE # whoever reads what is said may be gone, before all have saved
stopping=0   # for so many seconds
trap 'trap "" USR1 TERM INT HUP; stopping=1' USR1 TERM INT HUP

# Before anything starts: every host answers, and has the run folder.
pids=()
for node in "${!hosts[@]}"; do
  timeout "$answer_s" "${ssh[@]}" "${hosts[$node]}" "test -r ${run@Q}/node.sh" < /dev/null &
  pids[$node]=$!
done
unreached=0
for node in "${!hosts[@]}"; do
  status=0
  wait "${pids[$node]}" || status=$?
  [ "$stopping" -eq 0 ] || { kill "${pids[@]}" 2> /dev/null; exit 130; } # nobody waits for answers
  [ "$status" -ne 0 ] || continue
  case $status in
    1) why="there is no $run/node.sh, or no right to read it" ;;
    124) why="no answer to ssh in $answer_s s" ;;
    *) why="ssh failed (exit code $status), its own words stand above" ;;
  esac
  echo "host ${hosts[$node]} cannot take part: $why" >&2
  unreached=1
done
[ "$unreached" -eq 0 ] || exit 1

pids=()
for node in "${!hosts[@]}"; do
  [ "$stopping" -eq 0 ] || break
  "${ssh[@]}" "${hosts[$node]}" "NODE=$node $command ${run@Q}/node.sh ${*@Q}" < /dev/null &
  pids[$node]=$!
done
[ "${#pids[@]}" -gt 0 ] || exit 130

# A node.sh that was killed has left its number behind.
order() { echo "p=\$(cat ${run@Q}/node-$1.pid) && grep -q node.sh /proc/\$p/cmdline && kill -USR1 \$p"; }

save_and_stop() {
  # Again and again: a node that is still starting does not listen yet.
  if [ $((stopping % 5)) -eq 1 ]; then
    for node in "${!pids[@]}"; do
      "${ssh[@]}" -o ConnectTimeout=5 "${hosts[$node]}" "$(order "$node")" \
        < /dev/null > /dev/null 2>&1 &
    done
  fi
  stopping=$((stopping + 1))
}

# Where only its connection broke a node's ranks live: they are told to save too, and waited for.
declare -A lost
find_again() {
  lost[$1]=1
  "${ssh[@]}" -o ConnectTimeout=30 "${hosts[$1]}" \
    "$(order "$1") && while [ -d /proc/\$p ]; do sleep 1; done" < /dev/null > /dev/null 2>&1 &
  pids[$1]=$!
}

code=0
while [ "${#pids[@]}" -gt 0 ]; do
  [ "$stopping" -eq 0 ] || save_and_stop
  sleep 1 > /dev/null 2>&1 & # in the background: a signal ends the wait
  wait $!
  for node in "${!pids[@]}"; do
    kill -0 "${pids[$node]}" 2>/dev/null && continue
    wait "${pids[$node]}"
    status=$?
    unset "pids[$node]"
    [ "$status" -ne 0 ] && [ -z "${lost[$node]:-}" ] || continue
    if [ "$code" -eq 0 ]; then
      code=$status stopping=1
      echo "node $node (${hosts[$node]}) ended with exit code $status; the others are stopped" >&2
    fi
    [ "$status" -lt 128 ] || echo "the ssh connection to node $node (${hosts[$node]}) broke" >&2
    find_again "$node"
  done
done
exit "$code"
