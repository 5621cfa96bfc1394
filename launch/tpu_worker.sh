#!/usr/bin/env bash
# Trains on one worker of a TPU VM. tpu_pod.sh copies it there and starts it:
#   env WORKER=... BUCKET=... MOUNT=... WORKDIR=... ACCELERATOR=... \
#     bash tpu_worker.sh <arguments of the trainer>
#   bash tpu_worker.sh --stop      ends the training after a checkpoint
#
#   MOUNT_OPTIONS  of gcsfuse
#   STOP_SECONDS   how long a training may take to end (default: 120)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=common.sh
. "$root/launch/common.sh"
base="$(dirname "$root")"
: "${STOP_SECONDS:=120}"
# Checkpoints are renamed folders, and each worker must see at once what another wrote.
: "${MOUNT_OPTIONS:=--implicit-dirs --rename-dir-limit=100000\
 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0}"

# Whether process $1 is a training that this user started here.
is_ours() {
  [ -O "/proc/$1" ] || return 1
  case "$({ tr '\0' ' ' <"/proc/$1/cmdline"; } 2>/dev/null)" in
    *insvp_jax.main* | *launch/local.sh*) ;;
    *) return 1 ;;
  esac
}

# Ends the training that an earlier attempt left running: it would hold the TPU.
stop_training() {
  local pid waited
  pid="$(cat "$base/trainer.pid" 2>/dev/null)" || return 0
  is_ours "$pid" || return 0
  echo "insvp_jax: stopping process $pid"
  kill -TERM "$pid" 2>/dev/null || true
  for ((waited = 0; waited < STOP_SECONDS; waited++)); do
    is_ours "$pid" || return 0
    sleep 1
  done
  kill -KILL "$pid" 2>/dev/null || true
  # It could not take its lock away.
  if [ -O /tmp/libtpu_lockfile ]; then rm -f /tmp/libtpu_lockfile; fi
}

if [ "${1:-}" = --stop ]; then
  echo none >"$base/owner"
  stop_training
  exit
fi
need WORKDIR "where the run goes"
need WORKER "the number of this worker"
need ACCELERATOR "the type of the TPU"
: "${BUCKET:=}" "${MOUNT:=/mnt/insvp}"
log="$base/trainer_$$.log"
# An attempt that is still installing gives way to a later one.
echo "$$" >"$base/owner"

# shellcheck disable=SC2329 # The trap calls it.
finish() {
  local status=$?
  trap - EXIT
  # The disk of this machine is lost with it.
  if [ -s "$log" ] && mkdir -p "$WORKDIR/logs" 2>/dev/null; then
    cat "$log" >>"$WORKDIR/logs/worker_$WORKER.log" && rm -f "$log"
  fi
  echo "insvp_jax: worker ended with status $status"
  exit "$status"
}
trap finish EXIT
# When the connection is lost, training goes on. When the machine is taken away, its
# processes are all sent TERM: the trainer needs no second one.
trap '' HUP
trap : TERM

apt() {
  # A new machine is busy with updates of its own.
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq "$@" >/dev/null
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
  curl -fsS "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null &&
    echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null &&
    apt update && apt install -y gcsfuse
}

mount_bucket() {
  if mountpoint -q "$MOUNT" && ls "$MOUNT" >/dev/null 2>&1; then return; fi
  command -v gcsfuse >/dev/null 2>&1 || install_gcsfuse || fail 1 "Cannot install gcsfuse."
  # Of one that has died, the mount point is left.
  fusermount -uz "$MOUNT" 2>/dev/null || true
  sudo mkdir -p "$MOUNT" && sudo chown "$(id -u):$(id -g)" "$MOUNT"
  # shellcheck disable=SC2086 # Several options.
  gcsfuse $MOUNT_OPTIONS "$BUCKET" "$MOUNT" >&2 ||
    fail 2 "Cannot mount the bucket $BUCKET: does it exist, and may this TPU use it?"
}

# Many TPU VMs come with Python 3.10.
install_python() {
  local candidate
  for candidate in python3.12 python3.11; do
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then return; fi
  done
  apt update
  apt install -y python3.12 python3.12-venv || {
    sudo add-apt-repository -y ppa:deadsnakes/ppa >/dev/null &&
      apt update && apt install -y python3.12 python3.12-venv
  } || fail 1 "Cannot install Python 3.12."
}

if [ -n "$BUCKET" ]; then mount_bucket; fi
mkdir -p "$WORKDIR" || fail 2 "Cannot make WORKDIR, $WORKDIR."
cd "$root"
check_data "$@"
stop_training
install_python
# The TPU's runtime starts and ends much faster so.
echo always 2>/dev/null |
  sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null 2>&1 || true

export INSVP_VENV="$base/venv" INSVP_EXTRAS=tpu
bash launch/setup.sh
# Beside the runs, so that a new machine need not compile again.
case "$BUCKET" in
  "") ;;
  *) export JAX_COMPILATION_CACHE_DIR="$MOUNT/.cache/jax/$ACCELERATOR" ;;
esac

[ "$(cat "$base/owner")" = "$$" ] || fail 42 "Stopped before the training began."
: >"$log"
# Through a file, so that a lost connection is not the trainer's concern.
bash launch/local.sh "$@" "--workdir=$WORKDIR" >>"$log" 2>&1 </dev/null &
trainer=$!
echo "$trainer" >"$base/trainer.pid"
tail -n +1 -f --pid="$trainer" "$log" 2>/dev/null &
tail=$!
status=0
wait_for "$trainer" || status=$?
wait "$tail" || true
exit "$status"
