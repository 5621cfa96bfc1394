"""What a run tells: metrics.jsonl, TensorBoard, Weights & Biases, how far it is.

Everything is written by process 0 alone; on the others the same calls do nothing.
"""

from collections.abc import Iterable, Mapping
import contextlib
import io
import json
import math
import os
from pathlib import Path
import sys
from typing import Any

from jaxtyping import UInt8
import numpy as np

from insvp_jax import files
from insvp_jax.distributed import processes
from insvp_jax.logs import progress, weights_and_biases
from insvp_jax.logs.appended_file import AppendedFile, cannot_write
from insvp_jax.logs.tensorboard import EventFile
from insvp_jax.logs.weights_and_biases import WandbRun

METRICS_FILE = "metrics.jsonl"
PARTIAL = ".partial"  # ends the name of a file that is not complete yet
SHOWN = ("loss", "lr", "accuracy")  # while training; the files have all


class Writers:
  """Writes a run's scalars and shows how far it is."""

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    total_steps: int,
    start_step: int = 0,
    start_lines: int | None = None,
    tensorboard: bool = True,
    wandb: str = "",
    config: Mapping[str, Any] | None = None,
    name: str = "",
    whole: progress.Whole | None = None,
    stream: io.TextIOBase | None = None,
  ):
    """Opens the files of a run, for a new one or to go on with it.

    Args:
      workdir: the run's directory; made if need be.
      total_steps: steps of the whole run, for the share and the time left.
      start_step: the step resumed from. What the interrupted run wrote after it
        is dropped; with 0 everything is.
      start_lines: how many lines metrics.jsonl had then (`lines`), which tells apart
        what was written at `start_step` before and after it was saved. None keeps
        all lines of that step.
      tensorboard: whether to write an event file, too.
      wandb: the project of Weights & Biases to write to, too; "" for none.
      config: what Weights & Biases shows of the run.
      name: of the run, in front of its progress.
      whole: how far the search is that the run is a part of.
      stream: where progress goes, a bar on a terminal, else lines; None is the
        standard error.

    Raises:
      OSError: the files cannot be written.
      ValueError: Weights & Biases refuses the run.
    """
    self._is_main = processes.is_main_process()
    self._progress = progress.create(stream or sys.stderr, name, total_steps, whole)
    self._metrics = self._events = self._wandb = None
    self.lines = 0  # of metrics.jsonl
    if self._is_main:
      workdir = Path(workdir)
      workdir.mkdir(parents=True, exist_ok=True)
      kept = _kept_lines(workdir / METRICS_FILE, start_step, start_lines)
      self.lines = len(kept)
      self._metrics = AppendedFile(workdir / METRICS_FILE, sum(map(len, kept)))
      try:
        self._events = EventFile(workdir, start_step) if tensorboard else None
        if wandb:
          self._wandb = WandbRun(
            workdir, wandb, name=name, config=config or {}, start_step=start_step
          )
          write_json(workdir / weights_and_biases.FILE, self._wandb.identity)
      except BaseException:
        self.close(failed=True)
        raise

  def scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Appends scalars to metrics.jsonl, TensorBoard and Weights & Biases.

    Args:
      step: batches seen so far.
      scalars: names and numbers, host or device ones.
    """
    if not self._is_main:
      return
    values = {name: np.asarray(value).item() for name, value in scalars.items()}
    line = json.dumps({"step": step, **_finite(values)}) + "\n"
    self._metrics.append(line.encode())
    self.lines += 1
    for log in filter(None, (self._events, self._wandb)):
      log.write(step, values)

  def text(self, name: str, text: str) -> None:
    """Shows a text, Markdown, in TensorBoard."""
    if self._events:
      # Names of files that are no text in any encoding are spelt.
      spelt = text.encode("utf-8", "backslashreplace").decode()
      self._events.text(0, name, spelt)

  def images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w 3"]]) -> None:
    """Shows images in TensorBoard and Weights & Biases, by name."""
    for log in filter(None, (self._events, self._wandb)):
      for name, pixels in images.items():
        log.image(step, name, pixels)

  @property
  def shows_images(self) -> bool:
    """Whether `images` has an effect, so that they are worth being made."""
    return self._events is not None or self._wandb is not None

  def train(
    self, step: int, scalars: Mapping[str, Any], *, images_per_second: float | int = 0.0
  ) -> None:
    """Writes a training step's scalars and shows how far the run is.

    Args:
      step: batches seen so far; rising from call to call.
      scalars: as for `scalars`: loss, accuracy in [0, 1], lr per step, ...
      images_per_second: the rate; 0 while it is not known.
    """
    rate = {"images_per_second": images_per_second} if images_per_second else {}
    self.scalars(step, {**scalars, **rate})
    shown = [f"{name} {_number(scalars[name])}" for name in SHOWN if name in scalars]
    if images_per_second:
      shown.append(f"{images_per_second:.0f} images/s")
    if self._is_main:
      self._progress.show(step, shown)

  def log(self, text: str) -> None:
    """Shows text; if there is a bar, above it."""
    if self._is_main:
      self._progress.log(text)

  def close(self, *, failed: bool = False) -> None:
    """Ends the progress bar and closes the files.

    Args:
      failed: whether the run did not come to its end.
    """
    self._progress.close()
    for file in (self._metrics, self._events):
      if file:
        file.close()
    if self._wandb:
      self._wandb.close(failed=failed)

  def __enter__(self) -> "Writers":
    """Returns itself; `close` is called at the end of the with block."""
    return self

  def __exit__(self, *error: object) -> None:
    """Closes the files."""
    self.close(failed=error[0] is not None)


def write_json(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
  """Writes a JSON file that is either complete or not there at all.

  Args:
    path: the file; one that exists is replaced, and its directory is made.
    value: numpy and device scalars become numbers; NaN and infinity become null.

  Raises:
    OSError: the disk is full or read-only; what was there before stays.
  """
  text = json.dumps(_finite(value), indent=2, default=_plain, allow_nan=False)
  write_text(path, f"{text}\n")


def write_text(path: str | os.PathLike, text: str | Iterable[str]) -> None:
  """Writes a text file as `write_bytes` does, in UTF-8.

  Args:
    path: the file; one that exists is replaced, and its directory is made.
    text: all of its content, or pieces of it, which are written as they come.
  """
  pieces = [text] if isinstance(text, str) else text
  # Names of files that are no text in any encoding are spelt.
  write_bytes(path, (piece.encode("utf-8", "backslashreplace") for piece in pieces))


def write_bytes(path: str | os.PathLike, data: bytes | Iterable[bytes]) -> None:
  """Writes a file that is either complete or not there at all.

  Args:
    path: the file; one that exists is replaced, and its directory is made.
    data: all of its content, or pieces of it, which are written as they come.

  Raises:
    OSError: the disk is full or read-only; what was there before stays.
    ValueError: the file is a link, or none.
  """
  if not processes.is_main_process():
    return
  path = Path(path)
  partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.check_replaceable(path)
    with partial.open("wb") as file:
      file.writelines([data] if isinstance(data, bytes) else data)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  except OSError as error:
    raise cannot_write(path, error) from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)


def remove_partial(workdir: str | os.PathLike) -> None:
  """Removes what `write_text` left half written when its process was killed.

  Call it where no other process writes to `workdir`.
  """
  if processes.is_main_process():
    for partial in Path(workdir).glob(f".*{PARTIAL}"):
      if not partial.is_dir():
        partial.unlink(missing_ok=True)


def _kept_lines(path: Path, start_step: int, start_lines: int | None) -> list[bytes]:
  """Returns the lines that were there when `start_step` was saved."""
  kept: list[bytes] = []
  files.check_writable_in_place(path)
  if not start_step or not path.exists():
    return kept
  for line in path.read_bytes().splitlines(keepends=True)[:start_lines]:
    # A crash of the machine may have left half a line.
    try:
      # NaN is not above any step either.
      known = files.parse_json(line)["step"] <= start_step
      if not known or not line.endswith(b"\n"):
        break
    except (ValueError, TypeError, KeyError):
      break
    kept.append(line)
  return kept


def _number(value: Any) -> str:
  value = np.asarray(value).item()
  return str(value) if isinstance(value, int) else f"{value:.4g}"


def _plain(value: Any) -> Any:
  array = np.asarray(value)
  if array.dtype == object:
    raise TypeError(f"{type(value).__name__} is no JSON value: {value!r}.")
  return _finite(array.tolist())


def _finite(value: Any) -> Any:
  """Returns the value with None for NaN and infinities, which JSON has not."""
  if isinstance(value, Mapping):
    return {name: _finite(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
