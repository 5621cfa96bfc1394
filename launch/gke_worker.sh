#!/usr/bin/env bash
# Trains in a pod of gke_jobset.yaml, which sets WORKDIR, HOSTS and RUN_LIST.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=common.sh
. "$root/launch/common.sh"
need WORKDIR "the folder of all runs"
need HOSTS "on how many hosts a run trains"
need RUN_LIST "the runs, one on each line"
need JOB_COMPLETION_INDEX "the number of this pod (Kubernetes does)"
need_numbers HOSTS JOB_COMPLETION_INDEX

multihost=True index=0
if [ "$HOSTS" -eq 1 ]; then
  # Pods of one Job, but no slice of several hosts: each has its own run and its own
  # TPU, whatever GKE makes of them.
  multihost=False index="$JOB_COMPLETION_INDEX"
  export TPU_WORKER_ID=0 TPU_WORKER_HOSTNAMES=localhost
  unset MEGASCALE_COORDINATOR_ADDRESS MEGASCALE_NUM_SLICES MEGASCALE_SLICE_ID
fi
line="$(printf '%s\n' "$RUN_LIST" | sed -n "$((index + 1))p")"
[ -n "$line" ] || fail 2 "RUN_LIST has no line for pod $index."
split_run "$line"
[ "$run_name" = . ] || WORKDIR="$WORKDIR/$run_name"
cd "$root"
check_data ${run_args[@]+"${run_args[@]}"}
mkdir -p "$WORKDIR" || fail 2 "Cannot make WORKDIR, $WORKDIR."
exec bash launch/local.sh ${run_args[@]+"${run_args[@]}"} \
  "--workdir=$WORKDIR" "--config.multihost=$multihost"
