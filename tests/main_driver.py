"""Runs `insvp_jax.main` many times for the price of one import.

  python tests/main_driver.py cases.json

The imports happen once; then each case is forked off, before JAX starts a backend,
so that it has flags, signal handlers and file descriptors of its own and leaves with
the exit status that a user would see.

A case is {"name", "argv", "env", "cwd", "signal", "when"}; its output goes to
`<name>.out` and `<name>.err` beside cases.json, its exit status to `<name>.status`.
With "signal" the process is sent that signal once the file "when" has content.
"""

import json
import os
from pathlib import Path
import sys
import time
import traceback


def run_case(case, folder: Path) -> int:
  """Forks, runs one case and returns its exit status; a signal's is negative."""
  pid = os.fork()
  if pid == 0:
    status = 1
    try:
      for stream, fd in (("out", 1), ("err", 2)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(folder / f"{case['name']}.{stream}", flags), fd)
      os.environ.update(case.get("env", {}))
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
  if case.get("signal"):
    while not _has_content(Path(case["when"])):
      if (ended := os.waitpid(pid, os.WNOHANG))[0]:
        return os.waitstatus_to_exitcode(ended[1])
      time.sleep(0.02)
    os.kill(pid, case["signal"])
  return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _has_content(path: Path) -> bool:
  return path.exists() and path.stat().st_size > 0


def main() -> None:
  """Runs the cases one after the other."""
  path = Path(sys.argv[1])
  import insvp_jax.main
  import insvp_jax.tune  # noqa: F401  what main imports after its flags

  for case in json.loads(path.read_text()):
    start = time.perf_counter()
    status = run_case(case, path.parent)
    (path.parent / f"{case['name']}.status").write_text(str(status))
    print(f"{case['name']}: {status}, {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
  main()
