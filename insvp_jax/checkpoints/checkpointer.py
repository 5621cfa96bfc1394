"""Checkpoints: what a run learnt, written so that a half-written one never counts.

A checkpoint `<workdir>/checkpoints/<step>/` holds separate items:

- `adapter`: every leaf under `prompter/` and `head/`, and every trainable leaf of
  the backbone, by '/'-joined name. All that a user needs besides the backbone.
- `optimizer`: the optimizer's state and the peak lr, by '/'-joined path.
- `progress`: JSON; step, random key and what else the trainer counts.
- `meta`: JSON; what the run is (model, backbone and its digest, class names, ...).
- `checksums.json`: size and sha256 of each file.

All of it is written to another directory, which then gets the name of the step.

Frozen weights are never written: the backbone is named by its digest instead.
Nothing is pickled.
"""

from collections.abc import Callable, Mapping
import contextlib
import json
import os
from pathlib import Path
import re
import shutil
import time
from typing import Any
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp

from insvp_jax import config as config_lib
from insvp_jax import config_checks, trees
from insvp_jax.checkpoints.files import (
  FOLDER,
  Damaged,
  is_step,
  load_json,
  newest_good,
  quieten_orbax,
  read_arrays,
  read_meta,
  read_progress,
  reason_of,
  sharding_of,
  short,
  stored_arrays,
  verify,
  write_checksums,
)
from insvp_jax.checkpoints.items import (
  as_array,
  decode_key,
  encode_key,
  flatten_rest,
  stored_names,
  unflatten_rest,
)
from insvp_jax.distributed import processes

# Orbax's file of when a checkpoint was written.
_TIMES = "_CHECKPOINT_METADATA"
OLD = "deleted"  # where checkpoints go that are no longer kept


class Checkpointer:
  """Saves and restores the state of one run.

  Frozen backbone leaves are neither written nor read: `restore` returns them as
  they were given.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    mask: Mapping[str, Any],
    meta: Mapping[str, Any],
    keep: int = 2,
    report: Callable[[str], Any] = warnings.warn,
  ):
    """Opens, or creates, `<workdir>/checkpoints`.

    Args:
      workdir: the run's directory, seen by every process.
      mask: nested tree of bools over the parameters: True where trainable.
      meta: JSON-like description of the run, written into every checkpoint.
      keep: how many checkpoints stay on disk; the newest ones do.
      report: is told of a damaged checkpoint that is passed over.

    Raises:
      OSError: the directory cannot be written to.
      TypeError: `meta` holds something that JSON cannot.
      ValueError: the path is no text.
    """
    config_checks.check_workdir(workdir)
    quieten_orbax()
    self.directory = Path(workdir).absolute() / FOLDER
    self._stored = stored_names(mask)
    self._meta = json.loads(json.dumps(dict(meta)))
    self._report = report
    self._pending: int | None = None
    _check_writable(self.directory)
    self._remove_old()
    self._manager = self._open(keep)

  def _open(self, keep: int) -> ocp.CheckpointManager:
    """Returns the manager, after removing files that it would stumble over."""
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      # Moved away at once, deleted by `_remove_old`: half a checkpoint is none.
      todelete_subdir=OLD,
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
    )
    self._remove_times(damaged=True)
    try:
      return ocp.CheckpointManager(self.directory, options=options)
    except (ValueError, TypeError, LookupError, AttributeError):
      # What Orbax makes of values of other types.
      self._remove_times(damaged=False)
      return ocp.CheckpointManager(self.directory, options=options)

  def save(
    self, state: Any, *, progress: Mapping[str, int | float], force: bool = False
  ) -> bool:
    """Writes a checkpoint of `state` at its step.

    Args:
      state: a dataclass with `step`, `params`, `rng` (a typed key), `opt_state`.
      progress: further numbers to keep, e.g. the seconds trained so far.
      force: return only when everything is on disk, as before an exit.

    Returns:
      Whether it was written; False where this step is there already.

    Raises:
      OSError: the disk is full or read-only. Earlier checkpoints stay as they are.
    """
    step = int(state.step)
    self.wait()
    if step in self._manager.all_steps():
      return False
    flat = trees.flatten(state.params)
    arrays = {
      "adapter": {name: as_array(flat[name]) for name in self._stored},
      "optimizer": {k: as_array(v) for k, v in flatten_rest(state).items()},
    }
    progress = {**progress, "step": step, "rng": encode_key(state.rng)}
    # Orbax refuses an item without leaves, as of an optimizer without state.
    items = {k: ocp.args.StandardSave(v) for k, v in arrays.items() if v}
    items["progress"] = ocp.args.JsonSave(progress)
    items["meta"] = ocp.args.JsonSave(self._meta)
    self._check_space(step, arrays)
    self._pending = step
    try:
      self._manager.save(step, args=ocp.args.Composite(**items))
    except Exception as error:
      self._fail(error)
    if force:
      self.wait()
    return True

  def try_out(self, state: Any) -> None:
    """Writes a checkpoint of `state`, reads what is in it, and removes it again.

    What keeps a run from being saved, such as a quota or a path that the libraries take
    for a pattern, shows before anything is trained.

    Args:
      state: as for `save`, of a run without checkpoints.

    Raises:
      OSError: it cannot be saved, or not be read again.
    """
    self.save(state, progress={}, force=True)
    step = int(state.step)
    try:
      # Others may be so late that it is removed again.
      if processes.is_main_process():
        stored_arrays(self.directory / str(step), "adapter")
    except Damaged as error:
      raise OSError(
        f"a checkpoint in {self.directory} cannot be read again: {reason_of(error)}. "
        "Choose a workdir whose path has letters, digits and ._/- alone."
      ) from error
    finally:
      self._manager.delete(step)
      self._remove_old()

  def wait(self) -> None:
    """Returns when the checkpoint under way is complete on disk.

    Raises:
      OSError: it could not be written.
    """
    if self._pending is None:
      return
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      self._fail(error)
    self._pending = None
    self._remove_old()

  def restore(self, state: Any) -> Any | None:
    """Returns `state` with the newest checkpoint's values, bit for bit, or None.

    Args:
      state: as for `save`. Leaves that are stored may be abstract
        (`jax.ShapeDtypeStruct` with a sharding); the values are placed by the
        leaves' shardings, on any number of devices. Frozen leaves are kept.

    Returns:
      The state, or None where there is no checkpoint yet. A damaged checkpoint is
      reported, set aside as `<step>.damaged`, and the one before it is taken.

    Raises:
      ValueError: all checkpoints are damaged, or the run is another one: of other
        settings, data, backbone or shapes.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    processes.check_same(
      "the checkpoints it sees",
      {"steps": steps},
      f"Is {self.directory} one directory that all of them share?",
    )
    if not steps:
      return None
    checkpoint, restored = newest_good(
      [self.directory / str(step) for step in steps],
      lambda checkpoint: self._read(checkpoint, state),
      self._report,
    )
    self._set_aside([step for step in steps if step > int(checkpoint.name)])
    return restored

  def _read(self, checkpoint: Path, state: Any) -> Any:
    """Returns `state` with the values of one checkpoint."""
    verify(checkpoint, self._report)
    self._check_same_run(read_meta(checkpoint), checkpoint)
    flat = trees.flatten(state.params)
    adapter = read_arrays(checkpoint, "adapter", {n: flat[n] for n in self._stored})
    rest = read_arrays(checkpoint, "optimizer", flatten_rest(state))
    progress = read_progress(checkpoint)
    step = progress.get("step")
    if not isinstance(step, int) or not 0 <= step < 2**31:
      raise Damaged(f"{checkpoint} is damaged: its progress has the step {step!r}.")
    return state.replace(
      step=jax.device_put(np.int32(step), sharding_of(state.step)),
      params=trees.unflatten({**flat, **adapter}),
      rng=decode_key(progress.get("rng"), state.rng, checkpoint),
      **unflatten_rest(rest, state),
    )

  def _set_aside(self, steps: list[int]) -> None:
    """Renames damaged checkpoints: their steps will be saved again."""
    if not steps:
      return
    processes.wait("read")
    for step in steps if processes.is_main_process() else ():
      aside = self.directory / f"{step}.damaged"
      shutil.rmtree(aside, ignore_errors=True)
      (self.directory / str(step)).rename(aside)
    processes.wait("set aside")
    self._manager.reload()

  def progress(self) -> dict[str, Any]:
    """Returns what `save` was told with the newest checkpoint; {} without one."""
    step = self.latest_step()
    return {} if step is None else read_progress(self.directory / str(step))

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, or None."""
    self.wait()
    return self._manager.latest_step()

  def close(self) -> None:
    """Waits for the checkpoint under way and gives up the directory."""
    try:
      self.wait()
    finally:
      self._manager.close()
      # Only now has the last thread of a failed save stopped writing.
      self._remove_partial()

  def __enter__(self):
    """Returns itself; `close` is called at the end of the with block."""
    return self

  def __exit__(self, kind, error, traceback):
    """Closes; an error of the with block is not replaced by one of closing."""
    try:
      self.close()
    except OSError:
      if error is None:
        raise

  def _seal(self) -> None:
    """Adds the checksums to a checkpoint that is about to get its name."""
    (partial,) = self.directory.glob(f"{self._pending}.orbax-checkpoint-tmp*")
    write_checksums(partial)

  def _check_space(self, step: int, arrays: Mapping[str, Mapping[str, Any]]) -> None:
    """Fails before anything is written where the disk is too full for it."""
    # A MiB for all that is not arrays.
    needed = 2**20 + sum(x.nbytes for item in arrays.values() for x in item.values())
    free = shutil.disk_usage(self.directory).free
    if free < needed:
      self._pending = step
      self._fail(f"{needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free")

  def _fail(self, reason: Exception | str) -> None:
    """Removes what was half written and raises one clear line."""
    step, self._pending = self._pending, None
    self._remove_partial()
    good = [int(p.name) for p in self.directory.glob("[0-9]*") if is_step(p.name)]
    last = f"step {max(good)}" if good else "none"
    is_full = re.search("(space|quota|MiB free)", reason_of(reason), re.I)
    advice = "Free some space, or choose" if is_full else "Choose"
    cause = reason if isinstance(reason, Exception) else None
    raise OSError(
      f"the checkpoint of step {step} could not be written to {self.directory}: "
      f"{reason_of(reason)}. The last good checkpoint: {last}. "
      f"{advice} another workdir, and start again to resume."
    ) from cause

  def _remove_times(self, *, damaged: bool) -> None:
    """Removes files with the times of checkpoints, which nobody needs.

    Orbax reads them as soon as it opens the folder. They have no checksum, since it
    writes to them once more when a checkpoint is complete.

    Args:
      damaged: only those that are no regular file with an object in it.
    """
    found = self.directory.glob(f"[0-9]*/{_TIMES}")
    for file in found if processes.is_main_process() else ():
      if damaged:
        with contextlib.suppress(Damaged):
          load_json(file)
          continue
      shutil.rmtree(file) if file.is_dir() else file.unlink()
    processes.wait("times")

  def _remove_old(self) -> None:
    if processes.is_main_process():
      shutil.rmtree(self.directory / OLD, ignore_errors=True)

  def _remove_partial(self) -> None:
    """Removes what a failed save left, also if its threads still write to it."""
    for _ in range(20 if processes.is_main_process() else 0):
      leftovers = list(self.directory.glob("*.orbax-checkpoint-tmp*"))
      for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
      if not any(leftover.exists() for leftover in leftovers):
        return
      time.sleep(0.1)

  def _check_same_run(self, stored: Mapping[str, Any], checkpoint: Path) -> None:
    differences = []
    if "config" in self._meta:
      config, stored_config = self._meta["config"], stored.get("config", {})
      if not config_lib.prolongs(config, stored_config):
        differences.append(config_lib.difference(config, stored_config))
        differences.append(config_lib.why_not_longer(config, stored_config))
    backbone, before = self._meta.get("backbone", {}), stored.get("backbone", {})
    # Random weights have the seed they were drawn from in place of a file's digest.
    if any(backbone.get(key) != before.get(key) for key in ("sha256", "seed", "init")):
      differences.append(
        f"the backbone is {_backbone_text(backbone)}, was {_backbone_text(before)}"
      )
    for key in (
      ("class_names",) if "config" in self._meta else ("class_names", "method")
    ):
      if self._meta.get(key) != stored.get(key):
        got, expected = short(stored.get(key)), short(self._meta.get(key))
        differences.append(f"{key} is {expected}, was {got}")
    if self._meta.get("data_sha256") != stored.get("data_sha256"):
      differences.append("the images or their labels have changed")
    if any(differences):
      raise ValueError(
        f"{checkpoint.parents[1]} holds a run with other settings: "
        f"{'; '.join(filter(None, differences))}. Use another workdir, or delete this "
        "one to start over."
      )


def _backbone_text(backbone: Mapping[str, Any]) -> str:
  seed = f", seed {backbone['seed']}" if "seed" in backbone else ""
  return f"sha256 {backbone.get('sha256')} ({backbone.get('id')}{seed})"


def _check_writable(directory: Path) -> None:
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".probe{jax.process_index()}"
    probe.write_bytes(b"")
    probe.unlink()
  except OSError as error:
    raise OSError(
      f"cannot write checkpoints to {directory}: {error.strerror}. "
      "Choose another workdir."
    ) from error
