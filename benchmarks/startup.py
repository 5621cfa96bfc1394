"""Start-up: seconds to import the package, and from `main` to the first train step.

  python benchmarks/startup.py

The first step is that of the quickstart's InsVP run, once with an empty cache of
compiled programs and once with the cache that the first left behind.
"""

import os
from pathlib import Path
import re
import subprocess
import sys
import tempfile
import time

ROOT = Path(__file__).resolve().parents[1]


def import_seconds() -> float:
  """Returns the seconds of `import insvp_jax` inside a fresh interpreter."""
  code = (
    "import time; t = time.perf_counter(); import insvp_jax; "
    "print(time.perf_counter() - t)"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
  )
  return float(run.stdout)


def first_step_seconds(workdir: Path, cache: Path) -> float:
  """Returns the seconds from the start of the process to the first train step."""
  start = time.perf_counter()
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "insvp_jax.main", "--config=configs/quickstart.py"),
      *("--config.tune.methods=('insvp',)", f"--workdir={workdir}"),
    ],
    cwd=ROOT,
    env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  lines = []
  for line in process.stderr:
    lines.append(line)
    if re.search(r"step 1/", line):
      seconds = time.perf_counter() - start
      process.kill()
      process.wait()
      return seconds
  raise RuntimeError(f"no first step:\n{''.join(lines)}")


def main() -> None:
  """Prints the three times."""
  print(f"import insvp_jax: {min(import_seconds() for _ in range(3)):.3f} s")
  with tempfile.TemporaryDirectory() as folder:
    for name in ("empty", "warm"):
      seconds = first_step_seconds(Path(folder) / name, Path(folder) / "cache")
      print(f"first train step, {name} cache: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
  main()
