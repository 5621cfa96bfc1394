"""Runs of which any file is damaged, and configs of which any key has a bad value.

Each may be refused in one clear line, or end as if nothing had been wrong. All cases
are made by rule; `test_bad_cases.py` tries some. For all of them, or for COUNT of
them from the one numbered FIRST: python tests/bad_cases.py NAME [FIRST COUNT].
"""

from collections import Counter
from collections.abc import Callable, Iterator
import contextlib
import functools
import io
import math
import os
from pathlib import Path
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import Any
from unittest import mock
import warnings

from absl import logging
import jax
from jaxtyping import TypeCheckError
import numpy as np
from tiny_runs import make_run
from tiny_training import make_data, prepare, stored, tiny_config

from insvp_jax import config as config_lib
from insvp_jax import errors
from insvp_jax import run as run_lib
from insvp_jax.methods import METHODS
from insvp_jax.search import tune
from insvp_jax.tools import plan
from insvp_jax.train import trainer

# Seconds after which a case hangs: all of them are small.
MAX_SECONDS = 60
SAME, REFUSED = "as if nothing had been wrong", "refused in one line"
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


# --- What may happen to a file.


def _halve(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
  data = bytearray(path.read_bytes() or b"x")
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def _zero(path: Path) -> None:
  path.write_bytes(bytes(path.stat().st_size))


def _replace(make: Callable[[Path], Any]) -> Callable[[Path], None]:
  def damage(path: Path) -> None:
    path.unlink()
    make(path)

  return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
  "removed": lambda path: path.unlink(),
  "empty": lambda path: path.write_bytes(b""),
  "half of it": _halve,
  "a flipped bit": _flip,
  "zeros": _zero,
  "a list": lambda path: path.write_text("[1]"),
  "a page": lambda path: path.write_text("<html>Please log in</html>"),
  "a folder": _replace(lambda path: path.mkdir()),
  "a link to itself": _replace(lambda path: path.symlink_to(path.name)),
  "a pipe": _replace(os.mkfifo),
}


def _files(folder: Path) -> list[Path]:
  return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def _damaged(made: Path, case: tuple[Path, str], workdir: Path) -> None:
  """Copies a run to `workdir`, and damages a file of the copy."""
  file, damage = case
  shutil.copytree(made, workdir, dirs_exist_ok=True)
  DAMAGES[damage](workdir / file)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  with (
    warnings.catch_warnings(),
    mock.patch.object(logging, "warning"),
    contextlib.redirect_stdout(io.StringIO()),
  ):
    warnings.simplefilter("ignore")
    yield


@functools.cache
def _folder() -> Path:
  return Path(tempfile.mkdtemp())


# --- Loading a damaged run.


@functools.cache
def _loaded() -> tuple[Path, np.ndarray]:
  (folder := _folder() / "load").mkdir()
  workdir = make_run(folder)[0]
  (workdir / "config.json").write_text("{}")
  return workdir, run_lib.load_run(workdir).predict(IMAGES)


def load_cases() -> list[tuple[Path, str]]:
  """Returns (file, damage) of a run that is loaded."""
  return [(file, damage) for file in _files(_loaded()[0]) for damage in DAMAGES]


def load(case: tuple[Path, str], workdir: Path) -> None:
  """Loads the run and predicts with it."""
  made, expected = _loaded()
  _damaged(made, case, workdir)
  # The run names its backbone by the path that it had.
  moved = workdir / "backbone.npz"
  with _quiet():
    run = run_lib.load_run(workdir, backbone=moved)
    assert run.predict(IMAGES).tobytes() == expected.tobytes(), "other predictions"


# --- Going on with a damaged run.


@functools.cache
def _resumed() -> tuple[Any, Any, Path, tuple]:
  # Half of it is trained; the other half is what is resumed.
  config = tiny_config(
    "linear", backbone__depth=1, checkpoint_every_epochs=1.0, total_epochs=3.0
  )
  prepared, made = prepare(config), _folder() / "resume"
  trainer.train(config, made, prepared=prepared)
  expected = stored(made)
  for step in made.glob("checkpoints/9"):
    shutil.rmtree(step)
  (made / "result.json").unlink()
  return config, prepared, made, expected


def resume_cases() -> list[tuple[Path, str]]:
  """Returns (file, damage) of a run that is resumed."""
  return [(file, damage) for file in _files(_resumed()[2]) for damage in DAMAGES]


def resume(case: tuple[Path, str], workdir: Path) -> None:
  """Trains the run to its end."""
  config, prepared, made, expected = _resumed()
  _damaged(made, case, workdir)
  with _quiet():
    trainer.train(config, workdir, prepared=prepared)
    _assert_same(stored(workdir), expected)


def _assert_same(got: tuple, expected: tuple) -> None:
  assert got[:3] == expected[:3], "another step or state of random numbers"
  arrays = zip(*map(jax.tree.leaves, (got[3], expected[3])), strict=True)
  assert all(np.array_equal(a, b) for a, b in arrays), "other parameters"


# --- Going on with a damaged search.


@functools.cache
def _searched() -> tuple[Any, Path, Any]:
  config = tiny_config("linear", backbone__depth=1, total_epochs=1.0)
  config.tune.lr, config.tune.wd, config.tune.seeds = (0.1, 0.01), (0.0,), (0, 1)
  made = _folder() / "search"
  with _quiet(), mock.patch.object(trainer, "load_data", lambda *_: make_data()):
    summary = tune.run(config, made)
  return config, made, _outcome(summary)


def _outcome(summary: Any) -> Any:
  row = summary["linear"]
  return {key: row[key] for key in ("lr", "val_accuracy", "test_accuracies", "seeds")}


def search_cases() -> list[tuple[Path, str]]:
  """Returns (file, damage) of a search that is repeated."""
  # Checkpoints are damaged above.
  files = [file for file in _files(_searched()[1]) if "checkpoints" not in file.parts]
  return [(file, damage) for file in files for damage in DAMAGES]


def search(case: tuple[Path, str], workdir: Path) -> None:
  """Repeats the search."""
  config, made, expected = _searched()
  _damaged(made, case, workdir)
  with _quiet(), mock.patch.object(trainer, "load_data", lambda *_: make_data()):
    assert _outcome(tune.run(config, workdir)) == expected, "another outcome"


# --- Bad values of keys.

_BAD: dict[type, tuple[Any, ...]] = {
  bool: (2, "x"),
  int: (0, -1, 3.5, True, "x", 10**7, 2**31 - 1, 2**70),
  float: (0.0, -1.0, math.nan, math.inf, 1e-45, 3e38, "x"),
  str: ("x", "a\nb", "\udcff", "../x", "*", 3),
  tuple: ((-1,), ("x",), (math.nan,), ((),), 3),
}


def config_cases() -> list[tuple[str, Any]]:
  """Returns (key, value) that is bad, or as large as it can be."""
  return [
    (key, value)
    for key, (default, _) in config_lib.keys().items()
    for value in _BAD[default if isinstance(default, type) else type(default)]
  ]


def config(case: tuple[str, Any], workdir: Path) -> None:
  """Plans a run with it, which checks all and traces the step."""
  key, value = case
  section, _, name = key.rpartition(".")
  made = tiny_config(section if section in METHODS else "insvp", backbone__depth=1)
  made.plan.num_classes, made.plan.num_train = 3, 24
  with made.ignore_type():
    (made[section] if section else made)[name] = value
  plan.format_plan(plan.plan(made, jax.devices()[:1]))


KINDS: dict[str, tuple[Callable, Callable]] = {
  "load": (load_cases, load),
  "resume": (resume_cases, resume),
  "search": (search_cases, search),
  "config": (config_cases, config),
}


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
  def fail(signum, frame):
    raise AssertionError(f"hangs: no end after {MAX_SECONDS} seconds")

  before = signal.signal(signal.SIGALRM, fail)
  signal.alarm(MAX_SECONDS)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(kind: str, case: Any) -> str:
  """Returns `SAME` or `REFUSED`.

  Raises:
    Exception: of any other kind, where neither is true.
  """
  with tempfile.TemporaryDirectory() as workdir, _deadline():
    try:
      KINDS[kind][1](case, Path(workdir))
    except (*errors.INPUT_ERRORS, trainer.Diverged) as error:
      if not errors.is_ours(error) or "\n" in errors.one_line(error):
        raise AssertionError(f"no error of this package: {error!r}") from error
      return REFUSED
    except TypeCheckError:
      # Under pytest arguments are checked before anything else gets to see them.
      return REFUSED
  return SAME


def _main(kind: str, first: int = 0, count: int = 2**31) -> None:
  """Tries cases, and prints what came of them."""
  counts, slowest = Counter(), 0.0
  for case in KINDS[kind][0]()[first : first + count]:
    start = time.monotonic()
    try:
      counts[outcome(kind, case)] += 1
    except Exception:
      counts["found"] += 1
      print(kind, *map(repr, case), traceback.format_exc(limit=-3), flush=True)
    slowest = max(slowest, time.monotonic() - start)
  print(f"{kind}: {dict(counts)}, the slowest took {slowest:.1f} s")


if __name__ == "__main__":
  _main(sys.argv[1], *map(int, sys.argv[2:]))
