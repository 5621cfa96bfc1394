#!/usr/bin/env bash
# Makes the virtual environment that the other scripts run in. Sourced by them, and
# leaves its interpreter in $python and the repository in $root. It needs Python 3.11
# or 3.12 and nothing else.
#
#   INSVP_VENV    where the environment lives (default: .venv in the repository)
#   INSVP_PYTHON  the interpreter to make it with (default: the first that fits of
#                 python3, python3.12, python3.11)
#   INSVP_EXTRAS  more of the extras in pyproject.toml, such as cuda12, cuda13 or tpu
#
# A stamp is written last, when everything is installed, and names what was installed
# and where. An environment without the right stamp is made anew, never mended.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${INSVP_VENV:-$root/.venv}"
case "$venv" in
  /*) ;;
  *) venv="$PWD/$venv" ;;
esac
python="$venv/bin/python"
mark="$venv/.insvp-made-here" # so that only our own environments are ever deleted
stamp="$venv/.insvp-stamp"

fail() { # code, message
  printf '%s\n' "$2" >&2
  exit "$1"
}

# Prints "ok", or what is wrong with interpreter $1. Runs it, because a version
# manager's shim can be on PATH and still have nothing behind it.
probe() {
  "$1" -c '
import sys
version = "%d.%d.%d" % sys.version_info[:3]
if sys.version_info[:2] not in ((3, 11), (3, 12)):
  print("is Python " + version)
else:
  try:
    import ensurepip, venv
    print("ok")
  except ImportError:
    print("is Python " + version + " without venv")
' 2>/dev/null || echo "does not run"
}

# Sets $base to an interpreter that fits, or ends with one line that says why none does.
find_base() {
  local candidate verdict reasons=""
  if [ -n "${INSVP_PYTHON:-}" ]; then
    set -- "$INSVP_PYTHON"
  else
    set -- python3 python3.12 python3.11
  fi
  for candidate in "$@"; do
    if ! command -v "$candidate" >/dev/null 2>&1; then
      verdict="is not there"
    else
      verdict="$(probe "$candidate")"
    fi
    if [ "$verdict" = ok ]; then
      base="$candidate"
      return
    fi
    reasons="$reasons${reasons:+, }$candidate $verdict"
  done
  fail 2 "insvp_jax needs Python 3.11 or 3.12 with venv, but $reasons. Install one\
 (Debian and Ubuntu: apt install python3-venv) or name one in INSVP_PYTHON."
}

# Prints a digest, by interpreter $1, of all that shapes the environment.
fingerprint() {
  "$1" -c '
import hashlib, sys
digest = hashlib.sha256(repr((sys.version_info[:3], sys.argv[1:])).encode())
for path in ("requirements.txt", "pyproject.toml"):
  with open(sys.argv[1] + "/" + path, "rb") as file:
    digest.update(hashlib.sha256(file.read()).digest())
print(digest.hexdigest())
' "$root" "$venv" ${INSVP_EXTRAS:+"$INSVP_EXTRAS"} 2>/dev/null
}

# Whether the environment is complete and up to date. It is judged by its own
# interpreter, so that another python on PATH does not make it anew.
is_ready() {
  [ -s "$stamp" ] && [ -x "$python" ] &&
    [ "$(cat "$stamp")" = "$(fingerprint "${INSVP_PYTHON:-$python}")" ]
}

make_venv() {
  local base
  find_base
  if [ -e "$venv" ] && [ ! -e "$mark" ] && ! rmdir "$venv" 2>/dev/null; then
    fail 2 "$venv was not made by this script: move it away, or name another folder in\
 INSVP_VENV."
  fi
  echo "Setting up $venv; the first time this takes some minutes." >&2
  rm -rf "$stamp" "$venv"
  mkdir -p "$venv"
  : >"$mark"
  "$base" -m venv "$venv" || fail 1 "$base could not make a virtual environment in $venv."
  # From the root, which requirements.txt calls ".".
  (cd "$root" && "$python" -m pip install --quiet --quiet --disable-pip-version-check \
    --no-input -r requirements.txt ${INSVP_EXTRAS:+-e ".[$INSVP_EXTRAS]"}) ||
    fail 1 "Installing failed, see above. Run the same command to start over."
  fingerprint "$python" >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

# Two set-ups at once: the second waits for the first and uses what it made. (macOS
# has no flock; there the two must not be started together.)
set_up() {
  if ! { mkdir -p "$(dirname "$venv")" && (: >>"$venv.lock"); } 2>/dev/null; then
    fail 2 "Cannot write beside $venv: name another folder in INSVP_VENV."
  fi
  if command -v flock >/dev/null 2>&1; then
    exec 9>"$venv.lock"
    if ! flock -n 9; then
      echo "Waiting for another set-up of $venv." >&2
      flock 9
    fi
  fi
  if ! is_ready; then make_venv; fi
  exec 9>&-
}

is_ready || set_up
