#!/usr/bin/env bash
# Runs the main job on this machine; sets everything up the first time. For example
#   bash launch/local.sh --config=configs/quickstart.py
# All arguments go to insvp_jax.main; setup.sh lists the variables it heeds.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Compiled programs are kept, so that the next start is quick. What XLA compiled for
# one kind of processor may crash on another: machines that share this folder get a
# cache for each kind.
processor="$({
  uname -m
  grep -m 1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null ||
    sysctl -n machdep.cpu.brand_string 2>/dev/null || true
} | cksum | cut -d ' ' -f 1)"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/.cache/jax/$processor}"
: "${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:=0.3}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS

exec "$python" -m insvp_jax.main "$@"
