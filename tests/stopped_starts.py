"""Sends SIGTERM or SIGINT to the command line at random moments of its start-up.

Every one has to end it with 42 or 130, and one line. `test_stopping.py` does so a few
times. For many more: python tests/stopped_starts.py FIRST COUNT.
"""

from collections import Counter
from collections.abc import Sequence
import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import tempfile
import time

from tiny_commands import base_flags, make_place

from insvp_jax.distributed.stopping import EXIT_STATUS

# A run that is not stopped does not end by itself.
ENDLESS = "--config.total_steps=100000000"
ROOT = Path(__file__).resolve().parents[1]


def start(flags: Sequence[str], workdir: Path) -> subprocess.Popen:
  """Starts a run, and returns once Python has started."""
  # Until then the system ends a process by its own rules.
  code = "import runpy; print(flush=True); runpy._run_module_as_main('insvp_jax.main')"
  process = subprocess.Popen(
    [sys.executable, "-c", code, *flags, f"--workdir={workdir}"],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  process.stdout.readline()
  return process


def seconds_to_first_step(flags: Sequence[str], folder: Path) -> float:
  """Returns how long a run takes up to there."""
  begin = time.monotonic()
  process = start(flags, folder / "whole")
  while not (folder / "whole" / "metrics.jsonl").exists() and process.poll() is None:
    time.sleep(0.01)
  seconds = time.monotonic() - begin
  process.terminate()
  _, err = process.communicate()
  assert process.returncode == 42, err
  return seconds


def stopped(
  flags: Sequence[str], workdir: Path, signum: int, seconds: float
) -> tuple[int, str]:
  """Returns status and standard error of a run that gets a signal after so long.

  Where it was lost the status is -9.
  """
  process = start(flags, workdir)
  time.sleep(seconds)
  process.send_signal(signum)
  try:
    _, err = process.communicate(timeout=60)
  except subprocess.TimeoutExpired:
    # It has not heard.
    process.kill()
    _, err = process.communicate()
  return process.returncode, err


def _main(first: int, count: int) -> None:
  """Stops many runs, and prints what came of it."""
  # Started in the background this process, and those that it starts, would ignore it.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  found = Counter()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    flags = [*base_flags(ROOT, make_place(folder)), ENDLESS]
    longest = seconds_to_first_step(flags, folder)
    for seed in range(first, first + count):
      rng = random.Random(seed)
      signum, seconds = rng.choice(list(EXIT_STATUS)), rng.uniform(0, longest)
      status, err = stopped(flags, folder / str(seed), signum, seconds)
      is_right = status == EXIT_STATUS[signum] and "Traceback" not in err
      found[signal.Signals(signum).name, status, is_right] += 1
      if not is_right:
        print(f"{seed}: {signum!r} after {seconds:.2f} s: {status}\n{err}", flush=True)
  print(f"the first step after {longest:.1f} s; {dict(found)}")


if __name__ == "__main__":
  _main(int(sys.argv[1]), int(sys.argv[2]))
