# One start of the workers after the other, until the run is done, wrong, failed too often, or asked to stop.

say() { echo "moexpand: $*" >&2; }

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || { say "scontrol cannot name the nodes of this job, so nothing was started."; exit 3; }
count=$(printf '%s\n' "$hosts" | grep -c .)
if [ "$count" -ne "$NODES" ]; then
    say "SLURM gave $count nodes and the run needs $NODES; submit the script as it is, without --nodes."
    exit 2
fi

received=""
step=""
# shellcheck disable=SC2317 # called by a trap
pass_on() {
    received=$1
    say "the job received SIG$1; the workers save and stop"
    # srun passes it on to the launcher on every node.
    [ -z "$step" ] || kill -s USR1 "$step" 2>/dev/null
}
for name in USR1 TERM INT; do
    # shellcheck disable=SC2064
    trap "pass_on $name" "$name"
done

newest() { cat "$RUN/checkpoints/latest" 2>/dev/null || true; }
result() { sed -n 's/.*"code": *\([0-9]*\).*/\1/p' "$RUN/exit.json" 2>/dev/null || true; }

[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$RUN/.requeued"
attempt=0
failures=0
code=75
while [ -z "$received" ]; do
    attempt=$((attempt + 1))
    before=$(newest)
    srun "${STEP[@]}" "${WORKERS[@]}" --job "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$attempt" &
    step=$!
    [ -z "$received" ] || kill -s USR1 "$step" # it came while there was no step yet
    while :; do # a signal ends wait before its time
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    step=""
    if [ "$code" -eq 0 ]; then exit 0; fi
    # Wrong input, or a check that failed: starting again would change nothing. srun, too, says 1 when it could not start.
    if [ "$code" -eq 2 ] || { [ "$code" -eq 1 ] && [ "$(result)" = 1 ]; }; then
        say "start $attempt ended with code $code, and so would the next; the job ends"
        exit "$code"
    fi
    if [ "$code" -eq 75 ] || [ -n "$received" ]; then break; fi
    [ "$(newest)" = "$before" ] || failures=0
    failures=$((failures + 1))
    if [ "$failures" -gt "$RESTARTS" ]; then
        say "start $attempt failed, the last of $failures without a new checkpoint; $RUN/launch.log tells why"
        exit 3
    fi
    say "start $attempt failed with code $code; going on from the newest checkpoint"
done

# Asked to stop. A job that is being cancelled must not come back; one that SLURM interrupts (its time limit, a more important
# job) is still called running.
saved="saved"
[ "$code" -eq 75 ] || saved="not saved (code $code)"
if [ "$received" = INT ]; then
    say "$saved; the job ends"
    exit 75
fi
state=""
for _ in 1 2 3 4 5; do
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null) && break
    sleep 2
done
if [ "$state" != RUNNING ]; then
    say "$saved; the job is ${state:-unknown to squeue} and does not go back to the queue by itself"
    exit 75
fi
# Coming back again and again without a new checkpoint between is no progress.
idle=0
if [ -s "$RUN/.requeued" ] && [ "$(newest)" = "$(sed -n 2p "$RUN/.requeued")" ]; then idle=$(sed -n 1p "$RUN/.requeued"); fi
if [ "$idle" -gt "$RESTARTS" ]; then
    say "$saved; the job came back $idle times without a new checkpoint, so it ends; look at $RUN/launch.log"
    exit 3
fi
printf '%s\n%s\n' "$((idle + 1))" "$(newest)" >"$RUN/.requeued"
if scontrol requeue "$SLURM_JOB_ID"; then
    say "$saved; the job is back in the queue"
    exit 75
fi
say "$saved, but SLURM does not take the job back into the queue; submit it again to go on"
exit 75
