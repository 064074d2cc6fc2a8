# A host that no longer answers is given up after a minute. Each in a session of its own: what a
# terminal sends to all must not end an ssh before its node has saved.
ssh=(setsid ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4)

stopping=0 # for so many seconds
trap 'trap "" USR1 TERM INT HUP; stopping=1' USR1 TERM INT HUP

pids=()
for node in "${!hosts[@]}"; do
  [ "$stopping" -eq 0 ] || break
  "${ssh[@]}" "${hosts[$node]}" "NODE=$node $command ${run@Q}/node.sh ${*@Q}" < /dev/null &
  pids[$node]=$!
done

save_and_stop() {
  # Again and again: a node that is still starting does not listen yet.
  if [ $((stopping % 5)) -eq 1 ]; then
    for node in "${!pids[@]}"; do
      "${ssh[@]}" -o ConnectTimeout=5 "${hosts[$node]}" \
        "p=\$(cat ${run@Q}/node-$node.pid) && grep -q node.sh /proc/\$p/cmdline && kill -USR1 \$p" \
        < /dev/null > /dev/null 2>&1 & # a node.sh that was killed has left its number behind
    done
  fi
  stopping=$((stopping + 1))
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
    if [ "$status" -ne 0 ] && [ "$code" -eq 0 ]; then
      code=$status stopping=1
      echo "node $node (${hosts[$node]}) ended with exit code $status; the others are stopped" >&2
    fi
  done
done
exit "$code"
