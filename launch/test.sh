#!/usr/bin/env bash
# Runs the tests; sets everything up the first time.
#   bash launch/test.sh                          all of them
#   bash launch/test.sh tests/launch/test_launch.py -x  arguments go to pytest
# Two processes share the test files (-n 0: one process, as debuggers need it).
# They run on the CPU unless JAX_PLATFORMS says otherwise.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
# The many processes that tests start would all compile the package's modules anew.
unset PYTHONDONTWRITEBYTECODE
# In the order of tests/conftest.py: slow files first.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
