#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster: fills in gke_jobset.yaml and hands it to kubectl.
#   export IMAGE=... BUCKET=my-bucket ACCELERATOR=tpu-v5-lite-podslice
#   NAME=cifar100 TOPOLOGY=4x4 CHIPS=4 \
#     bash launch/gke.sh --spot -- --config=configs/vtab.py:task=cifar100
#   NAME=vtab TOPOLOGY=2x4 CHIPS=8 \
#     bash launch/gke.sh --spot --runs=launch/vtab.txt -- --config.method=insvp
#
#   --runs=FILE  a list of runs, one host each, scheduled by the cluster
#   --spot       on spot nodes
#   --dry_run    print the JobSet
#
#   NAME             of the JobSet
#   IMAGE            made by launch/Dockerfile
#   BUCKET           is mounted at /mnt/insvp
#   ACCELERATOR, TOPOLOGY  the labels of the nodes; CHIPS: of one node
#   WORKDIR          where the run, or all runs, go in the bucket (default: runs/<NAME>)
#   NAMESPACE        default: default
#   SERVICE_ACCOUNT  may use the bucket (default: default)
#   PROVISIONING     of the nodes, if neither standard nor spot, such as flex-start
#   QUEUE            of Kueue, if the cluster has it
#   PARALLELISM      how many runs of a list may run at once (default: all)
#   MAX_RESTARTS     of all hosts of a run, or of each run of a list (default: 50)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=common.sh
. "$root/launch/common.sh"

run_file="" dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    --runs=?*) run_file="${1#*=}" ;;
    --spot) PROVISIONING=spot ;;
    --dry_run) dry_run=1 ;;
    --) shift && break ;;
    *) unknown_flag "$1" "--runs=FILE, --spot, --dry_run" ;;
  esac
  shift
done

need NAME "the name of the JobSet"
need IMAGE "the container image, made by launch/Dockerfile"
need BUCKET "the bucket for runs and data"
need ACCELERATOR "the label of the nodes, such as tpu-v5-lite-podslice"
need TOPOLOGY "the label of the nodes, such as 2x4"
need CHIPS "how many TPU chips a node has, such as 8"
: "${NAMESPACE:=default}" "${SERVICE_ACCOUNT:=default}" "${QUEUE:=}"
: "${WORKDIR:=runs/$NAME}" "${MAX_RESTARTS:=50}" "${PROVISIONING:=standard}"
case "$NAME" in
  *[!a-z0-9-]* | -* | *- | [0-9]* | ?????????????????????????????????????????*)
    fail 2 "NAME is $NAME, expected at most 40 of a-z, 0-9 and -, the first a letter."
    ;;
esac
check_workdir "$WORKDIR"
case "$WORKDIR" in
  /*) fail 2 "WORKDIR is $WORKDIR, expected a path in the bucket, such as runs/$NAME." ;;
esac

need_names NAMESPACE SERVICE_ACCOUNT QUEUE ACCELERATOR PROVISIONING
case "x$TOPOLOGY" in
  *[!0-9x]* | *xx* | *x | *x0*)
    fail 2 "TOPOLOGY is '$TOPOLOGY', expected whole numbers and x, such as 2x4."
    ;;
esac
chips_of_slice=1
for size in ${TOPOLOGY//x/ }; do
  chips_of_slice=$((chips_of_slice * size))
done
need_numbers CHIPS MAX_RESTARTS
if [ "$CHIPS" -eq 0 ] || [ $((chips_of_slice % CHIPS)) -ne 0 ]; then
  fail 2 "TOPOLOGY $TOPOLOGY has $chips_of_slice chips, no multiple of CHIPS, $CHIPS."
fi
HOSTS=$((chips_of_slice / CHIPS))

# Each line of RUN_LIST: the name and all arguments of a run.
RUN_LIST=""
if [ -n "$run_file" ]; then
  if [ "$HOSTS" -gt 1 ]; then
    fail 2 "Each run of a list gets one host, but TOPOLOGY $TOPOLOGY with $CHIPS chips\
 on a node has $HOSTS: use a smaller one."
  fi
  read_runs "$run_file"
  for line in "${runs[@]}"; do
    split_run "$line"
    arguments=(${run_args[@]+"${run_args[@]}"} "$@")
    check_arguments ${arguments[@]+"${arguments[@]}"}
    RUN_LIST="$RUN_LIST${RUN_LIST:+$'\n'}$(quoted "$run_name" "${arguments[@]}")"
  done
else
  check_arguments "$@"
  runs=(one)
  RUN_LIST="$(quoted . "$@")"
fi

# Sets what the two shapes of the template differ in.
# shellcheck disable=SC2034 # render reads variables by their names.
choose_shape() {
  EXCLUSIVE_TOPOLOGY="" BACKOFF_LIMIT="" BACKOFF_LIMIT_PER_INDEX=""
  if [ "$HOSTS" -gt 1 ]; then
    COMPLETIONS="$HOSTS"
    PARALLELISM="$HOSTS"
    EXCLUSIVE_TOPOLOGY=cloud.google.com/gke-nodepool
    # One pod alone cannot come back: it fails the Job, and the JobSet makes a new one.
    BACKOFF_LIMIT=0
    ON_DISRUPTION=Count
    ON_ERROR=FailJob
    # When one host is gone, JAX ends the others with 1, or aborts them.
    RESTART_CODES="1, 42, 134, 137, 143"
  else
    COMPLETIONS="${#runs[@]}"
    : "${PARALLELISM:=$COMPLETIONS}"
    need_numbers PARALLELISM
    BACKOFF_LIMIT_PER_INDEX="$MAX_RESTARTS"
    ON_DISRUPTION=Ignore
    ON_ERROR=FailIndex
    RESTART_CODES="42, 137, 143"
  fi
}

# Prints the template, filled in. Every name in it is a variable of this script.
render() {
  local line key value
  while IFS= read -r line; do
    if [[ "$line" = "#"* ]]; then continue; fi
    if [[ "$line" = *"\${RUN_LIST}" ]]; then
      while IFS= read -r value; do
        printf '%s%s\n' "${line%%\$*}" "$value"
      done <<<"$RUN_LIST"
      continue
    fi
    while [[ "$line" =~ \$\{([A-Z_]+)\} ]]; do
      key="${BASH_REMATCH[1]}"
      value="${!key}"
      case "$value" in
        "") continue 2 ;;
        *[!A-Za-z0-9._/:@,\ -]*) fail 2 "$key is '$value', which has a character that\
 it cannot have." ;;
      esac
      line="${line%%\$\{"$key"\}*}$value${line#*\$\{"$key"\}}"
    done
    printf '%s\n' "$line"
  done <"$root/launch/gke_jobset.yaml"
}

choose_shape
yaml="$(render)"
if [ -n "$dry_run" ]; then
  printf '%s\n' "$yaml"
  exit
fi
need_command kubectl "install it and connect it with the cluster"
found="$(kubectl get jobset "$NAME" "--namespace=$NAMESPACE" --ignore-not-found -o name)" ||
  fail 1 "kubectl cannot tell whether there is a JobSet $NAME, see above."
if [ -n "$found" ]; then
  fail 2 "There is a JobSet $NAME: kubectl delete jobset $NAME --namespace=$NAMESPACE;\
 then the same command resumes."
fi
printf '%s\n' "$yaml" | kubectl create -f - || fail 1 "kubectl failed, see above."
cat <<END
It trains into gs://$BUCKET/$WORKDIR. To look at it:
  kubectl get jobset $NAME --namespace=$NAMESPACE
  kubectl logs --namespace=$NAMESPACE --prefix --follow --max-log-requests=$COMPLETIONS \\
    --selector=jobset.sigs.k8s.io/jobset-name=$NAME
To delete it (the same command resumes then):
  kubectl delete jobset $NAME --namespace=$NAMESPACE
END
