#!/usr/bin/env bash
# Runs the main job on this machine; sets everything up the first time. For example
#   bash launch/local.sh --config=configs/quickstart.py
# All arguments go to insvp_jax.main; setup.sh lists the variables it heeds.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec "$python" -m insvp_jax.main "$@"
