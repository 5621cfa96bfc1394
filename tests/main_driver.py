"""Runs `insvp_jax.main` many times for the price of one import.

Reads cases from standard input, one JSON object a line, and answers each with a line
{"status", "out", "err"}. The imports happen once; each case is forked off before JAX
starts a backend, so that it has flags, signal handlers and output of its own and
leaves with the exit status that a user would see.

A case is {"argv", "cwd", "env", "signal", "when"}; with "signal" it is sent that
signal as soon as the file "when" has content. With "hold", {"beyond", "until"}, the
process that writes metrics.jsonl waits behind the first row beyond a step until the
file "until" exists. With "several", a list of further {"argv", "env"}, it is run by as
many processes at once: their ids come as one line, the list of their answers as the
next one.

`Driver` is the other end of it.
"""

import contextlib
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time
import traceback
import types
from typing import Any, BinaryIO


class Driver:
  """Starts the driver, and runs the command line by it."""

  def __init__(self, cwd: Path):
    """Starts it; `cwd` is where the runs are."""
    here = Path(__file__).resolve()
    self._cwd = cwd
    self._has_started = False
    self._process = subprocess.Popen(
      [sys.executable, here],
      env={
        **os.environ,
        "PYTHONPATH": str(here.parents[1]),
        # Its runs are many and alike: keep the programs that compile in no time, too.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      },
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def run(self, *argv, **case) -> types.SimpleNamespace:
    """Returns (status, out, err) of one process that has ended."""
    self._send(argv, case)
    return types.SimpleNamespace(**self._answer())

  def start(self, *argv, envs, extra=(), **case) -> list[int]:
    """Starts one process for each of `envs` and returns their ids; see `wait`.

    Args:
      *argv: of all of them.
      envs: what is added to the environment of each.
      extra: further arguments of each.
      **case: "hold" of all of them.
    """
    extra = extra or [[] for _ in envs]
    several = [
      {"argv": [str(arg) for arg in (*argv, *more)], "env": env}
      for env, more in zip(envs, extra, strict=True)
    ]
    self._send((), {"several": several, **case})
    self._has_started = True
    return self._answer()

  def wait(self) -> list[types.SimpleNamespace]:
    """Returns (status, out, err) of the processes that `start` has started."""
    self._has_started = False
    return [types.SimpleNamespace(**answer) for answer in self._answer()]

  def __enter__(self) -> "Driver":
    """Returns itself; it ends with the with block."""
    return self

  def __exit__(self, *error) -> None:
    """Ends the driver."""
    self._process.stdin.close()
    status = self._process.wait()
    self._process.stdout.close()
    assert status == 0 or error[0]

  def _send(self, argv, case) -> None:
    if self._has_started:
      # A test that failed between the two took no answer: it is not the next one's.
      self.wait()
    case = {"argv": [str(arg) for arg in argv], "cwd": str(self._cwd), **case}
    print(json.dumps(case), file=self._process.stdin, flush=True)

  def _answer(self):
    return json.loads(self._process.stdout.readline())


def run_case(case: dict[str, Any]) -> Any:
  """Runs one case; the status of a process that a signal ended is negative."""
  with contextlib.ExitStack() as stack:

    def start(case):
      out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
      pid = os.fork()
      if pid == 0:
        _child(case, out, err)
      return pid, out, err

    if "several" in case:
      started = [start({**case, **one}) for one in case["several"]]
      print(json.dumps([pid for pid, _, _ in started]), flush=True)
      return [_result(*one) for one in started]
    started = start(case)
    if case.get("signal"):
      _send(started[0], case["signal"], Path(case["when"]))
    return _result(*started)


def _result(pid: int, out: BinaryIO, err: BinaryIO) -> dict[str, Any]:
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

    if "hold" in case:
      _hold(case["hold"]["beyond"], Path(case["hold"]["until"]))
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


def _hold(beyond: int, until: Path) -> None:
  from insvp_jax.logs.writers import Writers

  write = Writers.scalars

  def write_and_wait(self, step, scalars):
    write(self, step, scalars)
    while step > beyond and not until.exists():
      time.sleep(0.01)

  Writers.scalars = write_and_wait


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
  import insvp_jax.search.tune  # noqa: F401

  for line in sys.stdin:
    print(json.dumps(run_case(json.loads(line))), flush=True)


if __name__ == "__main__":
  main()
