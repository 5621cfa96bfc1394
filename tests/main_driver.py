"""Runs `insvp_jax.main` many times for the price of one import.

Reads cases from standard input, one JSON object a line, and answers each with a line
{"status", "out", "err"}. The imports happen once; each case is forked off before JAX
starts a backend, so that it has flags, signal handlers and output of its own and
leaves with the exit status that a user would see.

A case is {"argv", "cwd", "env", "signal", "when"}; with "signal" it is sent that
signal as soon as the file "when" has content.
"""

import json
import os
from pathlib import Path
import sys
import tempfile
import time
import traceback
from typing import Any, BinaryIO


def run_case(case: dict[str, Any]) -> dict[str, Any]:
  """Runs one case; the status of a process that a signal ended is negative."""
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    pid = os.fork()
    if pid == 0:
      _child(case, out, err)
    if case.get("signal"):
      _send(pid, case["signal"], Path(case["when"]))
    _, status = os.waitpid(pid, 0)
    texts = {}
    for name, file in (("out", out), ("err", err)):
      file.seek(0)
      texts[name] = file.read().decode()
  return {"status": os.waitstatus_to_exitcode(status), **texts}


def _child(case: dict[str, Any], out: BinaryIO, err: BinaryIO) -> None:
  """Does what `python -m insvp_jax.main` does, and never returns."""
  status = 1
  try:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.environ.update(case.get("env") or {})
    os.chdir(case["cwd"])
    sys.argv = ["insvp_jax.main", *case["argv"]]
    from insvp_jax import main

    main.run()
    status = 0
  except SystemExit as stop:
    status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _send(pid: int, signum: int, when: Path) -> None:
  """Sends the signal once `when` has content, unless the process ends before."""
  while not (when.exists() and when.stat().st_size):
    # WNOWAIT leaves the exit status for the caller.
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    if os.waitid(os.P_PID, pid, flags):
      return
    time.sleep(0.01)
  os.kill(pid, signum)


def main() -> None:
  """Answers until standard input ends."""
  # All that a run imports.
  import insvp_jax.main
  import insvp_jax.tools.visualize
  import insvp_jax.tune  # noqa: F401

  for line in sys.stdin:
    print(json.dumps(run_case(json.loads(line))), flush=True)


if __name__ == "__main__":
  main()
