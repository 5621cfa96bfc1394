#!/usr/bin/env bash
# What the scripts for clusters share. Sourced by them; does nothing by itself.
set -euo pipefail

fail() { # code, message
  printf '%s\n' "$2" >&2
  exit "$1"
}

# Ends the script unless the variable named $1 is set; $2 says what it holds.
need() {
  [ -n "${!1:-}" ] || fail 2 "Set $1: $2."
}

# Ends the script unless the variables named hold whole numbers.
need_numbers() {
  local name
  for name in "$@"; do
    case "${!name}" in
      # With zeros in front the shell would read it in base 8.
      "" | *[!0-9]* | 0?*) fail 2 "$name is '${!name}', expected a whole number." ;;
    esac
  done
}

# Ends the script unless the variables named hold names that Kubernetes takes.
need_names() {
  local name
  for name in "$@"; do
    case "${!name}" in
      *[!a-z0-9.-]* | [.-]* | *[.-])
        fail 2 "$name is '${!name}', expected a name of a-z, 0-9, - and ."
        ;;
    esac
  done
}

need_command() { # command, where it comes from
  command -v "$1" >/dev/null 2>&1 || fail 2 "There is no $1 on PATH: $2."
}

unknown_flag() { # what came, the known ones
  fail 2 "Unknown flag $1; there are $2. What the trainer is to get goes after --."
}

# Prints the arguments as a line that a shell, and xargs, split into the same words.
quoted() {
  local word rest out space=""
  for word in "$@"; do
    case "$word" in
      "" | *[!A-Za-z0-9_./:=,@%+-]*)
        rest="$word" out=""
        while [ "${rest#*\'}" != "$rest" ]; do
          out="$out${rest%%\'*}'\\''"
          rest="${rest#*\'}"
        done
        word="'$out$rest'"
        ;;
    esac
    printf '%s' "$space$word"
    space=" "
  done
  printf '\n'
}

# Ends the script if the trainer's arguments are none, or name the workdir, which has
# to stay the same over all restarts and so belongs to the script.
check_arguments() {
  local arg
  [ $# -gt 0 ] || fail 2 "Nothing to train: put the trainer's arguments after --."
  for arg in "$@"; do
    case "$arg" in
      -workdir* | --workdir*) fail 2 "Set WORKDIR instead of $arg." ;;
    esac
  done
}

check_workdir() { # path
  case "$1" in
    *://*) fail 2 "WORKDIR is $1, a URL; expected a folder: mount the bucket." ;;
  esac
}

# Ends the script if the trainer's arguments name data that are not on this machine.
check_data() {
  local arg
  for arg in "$@"; do
    case "$arg" in
      --config.data.root=*://* | --config.data.data_dir=*://*) ;;
      --config.data.root=?* | --config.data.data_dir=?*)
        [ -e "${arg#*=}" ] || fail 2 "$(uname -n) has no ${arg#*=}, named by ${arg%%=*}."
        ;;
    esac
  done
}

# Sets the array $runs to the lines of file $1, a list of runs: the name of a run,
# which is its folder in WORKDIR, and its arguments.
read_runs() {
  local line twice
  [ -f "$1" ] || fail 2 "There is no list of runs $1."
  runs=()
  # With the usual IFS, which drops the white space around a line.
  while read -r line || [ -n "$line" ]; do
    case "${line%$'\r'}" in
      "" | "#"*) ;;
      *) runs+=("${line%$'\r'}") ;;
    esac
  done <"$1"
  [ "${#runs[@]}" -gt 0 ] || fail 2 "$1 lists no runs."
  twice="$(for line in "${runs[@]}"; do echo "${line%%[[:space:]]*}"; done | sort | uniq -d)"
  [ -z "$twice" ] || fail 2 "$1 lists ${twice%%$'\n'*} twice; each run needs its own name."
}

# Sets $run_name and the array $run_args to the words of one line of a list of runs.
split_run() {
  local words word
  # xargs knows quotes and, other than eval, runs nothing.
  words="$(printf '%s\n' "$1" | xargs -n 1 printf '%s\n' 2>/dev/null)" ||
    fail 2 "The quotes do not match in this run: $1"
  run_name="" run_args=()
  while IFS= read -r word; do
    if [ -z "$run_name" ]; then run_name="$word"; else run_args+=("$word"); fi
  done <<<"$words"
  case "/$run_name/" in
    */../* | */-* | *[!A-Za-z0-9._/-]*)
      fail 2 "'$run_name' cannot be the name of a run: letters, digits and ._/- can."
      ;;
  esac
}

# Waits for process $1 to end and returns its exit status. A wait that a trapped signal interrupts
# may lose the status, so there is none before the end.
wait_for() {
  while kill -0 "$1" 2>/dev/null; do sleep 1 || true; done
  wait "$1"
}
