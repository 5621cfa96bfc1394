#!/usr/bin/env bash
# Trains on a Cloud TPU VM of one or many workers, over preemptions, until it is done.
#   TPU_NAME=insvp ZONE=us-west4-a ACCELERATOR=v5litepod-16 \
#   RUNTIME=v2-alpha-tpuv5-lite BUCKET=my-bucket \
#   bash launch/tpu_pod.sh --queued --spot -- --config=configs/vtab.py:task=cifar100
#
#   --queued         ask for the TPU as a queued resource, and wait in the queue
#   --spot           cheaper, and may be taken away at any time
#   --delete_at_end  delete the TPU when this script ends, however it ends
#   --dry_run        print the commands
#
#   TPU_NAME, ZONE, ACCELERATOR, RUNTIME  the TPU; one of this name is used again
#   BUCKET               is mounted at MOUNT on each worker
#   MOUNT                default: /mnt/insvp
#   WORKDIR              where the run goes; a relative one lies in the bucket
#                        (default: runs/<TPU_NAME>)
#   PROJECT              default: gcloud's
#   CREATE_FLAGS         further flags of "gcloud compute tpus ... create"
#   LOG_DIR              one log for each worker (default: runs/logs/<TPU_NAME>)
#   MAX_RESTARTS         default: 50
#   BACKOFF_SECONDS, MAX_BACKOFF_SECONDS  the pause before a restart: it doubles from
#                        the first to the second (default: 10, 600)
#   POLL_SECONDS         how often the queue is looked at (default: 30)
#   GRACE_SECONDS        how long the others may go on when one worker has failed
#                        (default: 150, more than JAX needs to notice)
#
# Ctrl-C stops the workers after a checkpoint. The same command resumes, and ends what
# an earlier one left running: start it once for each TPU.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=common.sh
. "$root/launch/common.sh"

queued="" spot="" delete_at_end="" dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    --queued) queued=1 ;;
    --spot) spot=1 ;;
    --delete_at_end) delete_at_end=1 ;;
    --dry_run) dry_run=1 ;;
    --) shift && break ;;
    *) unknown_flag "$1" "--queued, --spot, --delete_at_end, --dry_run" ;;
  esac
  shift
done

need TPU_NAME "the name of the TPU"
need ZONE "the zone of the TPU, such as us-west4-a"
need ACCELERATOR "the type of the TPU, such as v5litepod-16"
need RUNTIME "the software version of the TPU, such as v2-alpha-tpuv5-lite"
: "${BUCKET:=}" "${MOUNT:=/mnt/insvp}" "${WORKDIR:=runs/$TPU_NAME}" "${PROJECT:=}"
: "${LOG_DIR:=runs/logs/$TPU_NAME}" "${MAX_RESTARTS:=50}" "${BACKOFF_SECONDS:=10}"
: "${MAX_BACKOFF_SECONDS:=600}" "${POLL_SECONDS:=30}" "${GRACE_SECONDS:=150}"
need_numbers MAX_RESTARTS BACKOFF_SECONDS MAX_BACKOFF_SECONDS POLL_SECONDS GRACE_SECONDS
check_arguments "$@"
check_workdir "$WORKDIR"
case "$WORKDIR" in
  /*) ;;
  *)
    # The disk of a TPU VM is lost with it, and is not shared by the workers.
    [ -n "$BUCKET" ] || fail 2 "Set BUCKET, or WORKDIR to a path on shared storage."
    WORKDIR="$MOUNT/$WORKDIR"
    ;;
esac
[ -n "$dry_run" ] || need_command gcloud "install the Google Cloud CLI"
arguments=("$@")
read -r -a create_flags <<<"${CREATE_FLAGS:-}"

say() {
  printf '[tpu_pod] %s\n' "$1" >&2
}

# Sets $command to a gcloud command about the TPU.
compose() {
  command=(gcloud compute tpus "$@" "--zone=$ZONE" --quiet)
  if [ -n "$PROJECT" ]; then command+=("--project=$PROJECT"); fi
}

compose_create() {
  if [ -n "$queued" ]; then
    compose queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" \
      "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME"
  else
    compose tpu-vm create "$TPU_NAME" \
      "--accelerator-type=$ACCELERATOR" "--version=$RUNTIME"
  fi
  if [ -n "$spot" ]; then command+=(--spot); fi
  command+=(${create_flags[@]+"${create_flags[@]}"})
}

compose_delete() {
  if [ -n "$queued" ]; then
    compose queued-resources delete "$TPU_NAME" --force
  else
    compose tpu-vm delete "$TPU_NAME"
  fi
}

compose_copy() { # file
  compose tpu-vm scp "$1" "$TPU_NAME:insvp_jax.tgz" --worker=all
}

compose_ssh() { # worker, what to run there
  # A VM that is gone says nothing: ssh has to ask.
  compose tpu-vm ssh "$TPU_NAME" "--worker=$1" \
    --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4 "--command=$2"
}

remote_training() { # worker, number of workers
  local multihost=False new=.insvp_jax/code.new
  # Whether it is one of several, a TPU VM does not tell the trainer.
  if [ "$2" -gt 1 ]; then multihost=True; fi
  printf '%s' "rm -rf $new && mkdir -p $new && tar -xzf insvp_jax.tgz -C $new &&" \
    " rm -rf .insvp_jax/code && mv $new .insvp_jax/code && env "
  quoted "WORKER=$1" "BUCKET=$BUCKET" "MOUNT=$MOUNT" "WORKDIR=$WORKDIR" \
    "ACCELERATOR=$ACCELERATOR" bash .insvp_jax/code/launch/tpu_worker.sh \
    "${arguments[@]}" "--config.multihost=$multihost"
}

if [ -n "$dry_run" ]; then
  echo "# Unless there is one; one that was preempted or has failed is deleted first:"
  compose_create && quoted "${command[@]}"
  echo "# When it is ready:"
  compose_copy insvp_jax.tgz && quoted "${command[@]}"
  echo "# On each worker, here the first of several; again after statuses 42, 137, 143:"
  compose_ssh 0 "$(remote_training 0 2)" && quoted "${command[@]}"
  echo "# At the end${delete_at_end:+, by this script}:"
  compose_delete && quoted "${command[@]}"
  exit
fi

mkdir -p "$LOG_DIR" || fail 2 "Cannot make LOG_DIR, $LOG_DIR."
tmp="$(mktemp -d)"
pids=() stop_pids=() stopping="" is_there=""

# Ends the copies of gcloud that are still running here.
hang_up() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"} ${stop_pids[@]+"${stop_pids[@]}"}; do
    kill -- "-$pid" 2>/dev/null || true
  done
  pids=() stop_pids=()
}

finish() {
  local status=$?
  trap - EXIT
  trap '' INT TERM
  hang_up
  if [ -n "$is_there" ]; then
    compose_delete
    if [ -n "$delete_at_end" ]; then
      say "Deleting $TPU_NAME."
      "${command[@]}" </dev/null || say "That failed: it is still there, and is billed."
    else
      say "$TPU_NAME is still there, and is billed. To delete it:"
      quoted "${command[@]}" >&2
    fi
  fi
  rm -rf "$tmp"
  exit "$status"
}
trap finish EXIT

on_signal() { # exit status
  [ -z "$stopping" ] || exit "$stopping"
  stopping="$1"
  [ "${#pids[@]}" -gt 0 ] || exit "$stopping"
  say "Stopping the workers after a checkpoint; a second time leaves at once."
  stop_workers
}
trap 'on_signal 130' INT
trap 'on_signal 42' TERM

# Sleeps; a signal ends it.
pause() {
  sleep "$1" >/dev/null 2>&1 &
  wait $! || true
}

# Whether what gcloud wrote into $tmp/error will not get better by waiting.
is_hopeless() {
  grep -qE 'PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|active account|[Rr]eauth|invalid choice|unrecognized arguments' "$tmp/error"
}

# Prints the state of the TPU, or MISSING. Fails if gcloud cannot tell.
find_state() {
  local state delay="$BACKOFF_SECONDS" try
  if [ -n "$queued" ]; then
    compose queued-resources describe "$TPU_NAME" "--format=value(state.state)"
  else
    compose tpu-vm describe "$TPU_NAME" "--format=value(state)"
  fi
  for try in 1 2 3 4; do
    if state="$("${command[@]}" 2>"$tmp/error" </dev/null)"; then
      echo "${state:-UNKNOWN}"
      return
    fi
    if grep -qE 'NOT_FOUND|not found' "$tmp/error"; then
      echo MISSING
      return
    fi
    if is_hopeless || [ "$try" = 4 ]; then break; fi
    sleep "$delay"
    delay=$((2 * delay))
  done
  cat "$tmp/error" >&2
  return 1
}

# Makes sure that the TPU is there and ready, waiting for it if need be. Fails if it
# cannot be had this time.
ensure_tpu() {
  local state last=""
  while :; do
    state="$(find_state)" || fail 1 "gcloud cannot tell the state of $TPU_NAME, see above."
    [ "$state" = "$last" ] || say "$TPU_NAME is $state."
    last="$state"
    [ "$state" = MISSING ] || is_there=1
    case "$state" in
      ACTIVE | READY) return 0 ;;
      MISSING)
        compose_create
        say "Creating $TPU_NAME."
        is_there=1
        if ! "${command[@]}" 2>"$tmp/error" </dev/null; then
          cat "$tmp/error" >&2
          if is_hopeless; then
            is_there=""
            fail 2 "gcloud refuses to create $TPU_NAME, see above."
          fi
          return 1
        fi
        ;;
      SUSPENDED | FAILED | PREEMPTED | TERMINATED)
        # Such a one gets no machines any more, and stands in the way of a new one.
        compose_delete
        say "Deleting it, to ask for another."
        "${command[@]}" </dev/null || return 1
        return 1
        ;;
      STOPPED) fail 2 "$TPU_NAME is stopped: start it, or delete it." ;;
      *) pause "$POLL_SECONDS" ;;
    esac
  done
}

# Sets $workers.
count_workers() {
  local endpoints
  compose tpu-vm describe "$TPU_NAME" "--format=value(networkEndpoints[].ipAddress)"
  endpoints="$("${command[@]}" </dev/null)" || return 1
  read -r -a endpoints_list <<<"${endpoints//;/ }"
  workers="${#endpoints_list[@]}"
  [ "$workers" -gt 0 ]
}

copy_code() {
  # macOS would add files of its own.
  COPYFILE_DISABLE=1 tar -czf "$tmp/insvp_jax.tgz" --exclude=__pycache__ -C "$root" \
    insvp_jax configs launch requirements.txt pyproject.toml LICENSE README.md ||
    fail 1 "Packing the code failed, see above."
  compose_copy "$tmp/insvp_jax.tgz"
  "${command[@]}" </dev/null
}

# Runs the training of one worker: its output goes to its log and, prefixed, to the
# screen, its exit status to $tmp/status_<worker>.
follow() { # worker
  local line ssh_status="" worker_status=""
  compose_ssh "$1" "$(remote_training "$1" "$workers")"
  {
    code=0
    "${command[@]}" </dev/null 2>&1 || code=$?
    # On a line of its own, whatever came before.
    printf '\n%s\n' "insvp_jax: ssh ended with status $code"
  } | {
    while IFS= read -r line || [ -n "$line" ]; do
      case "$line" in
        "") continue ;;
        "insvp_jax: ssh ended with status "*) ssh_status="${line##* }" ;;
        "insvp_jax: worker ended with status "*) worker_status="${line##* }" ;;
      esac
      printf '%s\n' "$line" >>"$LOG_DIR/worker_$1.log"
      printf '[worker %s] %s\n' "$1" "$line"
    done
    # What the worker says counts; without it the connection was lost.
    [ "$ssh_status" != 0 ] || ssh_status=255
    printf '%s\n' "${worker_status:-$ssh_status}" >"$tmp/status_$1"
  }
}

# Asks all workers to write a checkpoint and end.
stop_workers() {
  local i
  for ((i = 0; i < workers; i++)); do
    compose_ssh "$i" "bash .insvp_jax/code/launch/tpu_worker.sh --stop"
    set -m
    "${command[@]}" </dev/null >/dev/null 2>&1 &
    set +m
    stop_pids+=($!)
  done
}

# Prints what the statuses of the workers mean together: bad input and Ctrl-C count
# most, and a restart more than a failure, for one lost worker makes the others fail.
combine() {
  local i status verdict=0
  for ((i = 0; i < workers; i++)); do
    [ -s "$tmp/status_$i" ] || continue
    status="$(cat "$tmp/status_$i")"
    case "$status" in
      0) ;;
      2) verdict=2 ;;
      130) [ "$verdict" = 2 ] || verdict=130 ;;
      42 | 137 | 143 | 255) case "$verdict" in 2 | 130) ;; *) verdict="$status" ;; esac ;;
      *) [ "$verdict" != 0 ] || verdict="$status" ;;
    esac
  done
  echo "$verdict"
}

# Waits for the workers to end and sets $verdict, the exit status of all.
wait_for_workers() {
  local pid failed_at="" stopped_at="" running
  verdict=""
  while :; do
    running=""
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then running=1; fi
    done
    [ -n "$running" ] || break
    if [ -z "$failed_at" ] && [ "$(combine)" != 0 ]; then failed_at="$SECONDS"; fi
    if [ -n "$stopped_at" ] && [ $((SECONDS - stopped_at)) -gt "$GRACE_SECONDS" ]; then
      say "The others do not end: leaving them."
      break
    elif [ -n "$failed_at" ] && [ -z "$stopped_at" ] && [ -z "$stopping" ] &&
      [ $((SECONDS - failed_at)) -ge "$GRACE_SECONDS" ]; then
      # How the others end from here on is our own doing.
      verdict="$(combine)"
      say "A worker has ended with status $verdict: stopping the others."
      stopped_at="$SECONDS"
      stop_workers
    fi
    pause 1
  done
  hang_up
  verdict="${verdict:-$(combine)}"
}

# One attempt to train from the last checkpoint to the end; sets $verdict.
train_once() {
  local i
  verdict=255
  ensure_tpu || return 0
  count_workers || return 0
  copy_code || return 0
  rm -f "$tmp"/status_*
  say "Training on $workers worker(s); the logs are $LOG_DIR/worker_*.log."
  for ((i = 0; i < workers; i++)); do
    # In a process group of its own: Ctrl-C must not cut the connection.
    set -m
    follow "$i" &
    set +m
    pids+=($!)
  done
  wait_for_workers
}

restarts=0 delay="$BACKOFF_SECONDS"
while :; do
  started="$SECONDS"
  train_once
  [ -z "$stopping" ] || exit "$stopping"
  case "$verdict" in
    0)
      say "Done: $WORKDIR"
      exit 0
      ;;
    2 | 130) fail "$verdict" "Ended with status $verdict, see $LOG_DIR." ;;
    42 | 137 | 143 | 255) ;;
    *)
      # An error of the program is one only if the TPU is still there.
      case "$(find_state || true)" in
        ACTIVE | READY) fail "$verdict" "Ended with status $verdict, see $LOG_DIR." ;;
      esac
      ;;
  esac
  restarts=$((restarts + 1))
  if [ "$restarts" -gt "$MAX_RESTARTS" ]; then
    fail 1 "Restarted $MAX_RESTARTS times; the same command goes on."
  fi
  # What ran for a while is not what fails at once again and again.
  if [ $((SECONDS - started)) -gt "$MAX_BACKOFF_SECONDS" ]; then
    delay="$BACKOFF_SECONDS"
  fi
  say "Status $verdict; restart $restarts of at most $MAX_RESTARTS in $delay seconds."
  pause "$delay"
  delay=$((2 * delay))
  if [ "$delay" -gt "$MAX_BACKOFF_SECONDS" ]; then delay="$MAX_BACKOFF_SECONDS"; fi
done
