"""Checkpoints: what a run learnt, written so that a half-written one never counts.

A checkpoint `<workdir>/checkpoints/<step>/` holds separate items:

- `adapter`: every leaf under `prompter/` and `head/`, and every trainable leaf of
  the backbone, by '/'-joined name. All that a user needs besides the backbone.
- `optimizer`: the optimizer's state and the peak lr, by '/'-joined path.
- `progress`: JSON; step, random key and what else the trainer counts.
- `meta`: JSON; what the run is (model, backbone and its digest, class names, ...).
- `checksums.json`: size and sha256 of each file, written last.

Frozen weights are never written: the backbone is named by its digest instead.
Nothing is pickled.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
from pathlib import Path
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from insvp_jax import trees
from insvp_jax.checkpoint_files import (
  FOLDER,
  quieten_orbax,
  read_arrays,
  read_json,
  reason_of,
  sharding_of,
  short,
  verify,
  write_checksums,
)

ALWAYS_STORED = r"(prompter|head)/.*"


def stored_names(mask: Mapping[str, Any]) -> list[str]:
  """Returns the names of the parameters that a checkpoint's `adapter` holds."""
  return [
    name
    for name, trainable in trees.flatten(mask).items()
    if trainable or re.fullmatch(ALWAYS_STORED, name)
  ]


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
    keep: int = 1,
    async_ok: bool = True,
  ):
    """Opens, or creates, `<workdir>/checkpoints`.

    Args:
      workdir: the run's directory, seen by every process.
      mask: nested tree of bools over the parameters: True where trainable.
      meta: JSON-like description of the run, written into every checkpoint.
      keep: how many checkpoints stay on disk; the newest ones do.
      async_ok: whether `save` may return before everything is on disk.

    Raises:
      OSError: the directory cannot be written to.
      TypeError: `meta` holds something that JSON cannot.
    """
    quieten_orbax()
    self.directory = Path(workdir).absolute() / FOLDER
    self._stored = stored_names(mask)
    self._meta = json.loads(json.dumps(dict(meta)))
    self._async = async_ok
    self._pending: int | None = None
    _check_writable(self.directory)
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=async_ok,
        cleanup_tmp_directories=True,
      ),
    )

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
      "adapter": {name: _as_array(flat[name]) for name in self._stored},
      "optimizer": {k: _as_array(v) for k, v in _flatten_rest(state).items()},
    }
    progress = {**progress, "step": step, "rng": _encode_key(state.rng)}
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
    if force or not self._async:
      self.wait()
    return True

  def wait(self) -> None:
    """Returns when the checkpoint under way is complete on disk.

    Raises:
      OSError: it could not be written.
    """
    if self._pending is None:
      return
    try:
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        write_checksums(self.directory / str(self._pending))
    except Exception as error:
      self._fail(error)
    self._pending = None

  def restore(self, state: Any) -> Any | None:
    """Returns `state` with the newest checkpoint's values, bit for bit, or None.

    Args:
      state: as for `save`. Leaves that are stored may be abstract
        (`jax.ShapeDtypeStruct` with a sharding); the values are placed by the
        leaves' shardings, on any number of devices. Frozen leaves are kept.

    Returns:
      The state, or None where there is no checkpoint yet.

    Raises:
      ValueError: the newest checkpoint is damaged, or is of another backbone,
        method or shape. An older one is never taken silently.
    """
    step = self.latest_step()
    if step is None:
      return None
    where = self.directory / str(step)
    try:
      verify(where)
      self._check_same_run(read_json(where, "meta"), where)
      flat = trees.flatten(state.params)
      adapter = read_arrays(
        where, "adapter", {name: flat[name] for name in self._stored}
      )
      rest = read_arrays(where, "optimizer", _flatten_rest(state))
      progress = read_json(where, "progress")
    except ValueError as error:
      raise ValueError(f"{error}{self._older(step)}") from error
    return state.replace(
      step=jax.device_put(np.int32(progress["step"]), sharding_of(state.step)),
      params=trees.unflatten({**flat, **adapter}),
      rng=_decode_key(progress["rng"], state.rng, where),
      **_unflatten_rest(rest, state),
    )

  def progress(self) -> dict[str, Any]:
    """Returns what `save` was told with the newest checkpoint; {} without one."""
    step = self.latest_step()
    return {} if step is None else read_json(self.directory / str(step), "progress")

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, or None."""
    self.wait()
    return self._manager.latest_step()

  def reached_preemption(self, step: int) -> bool:
    """Returns whether the cluster is about to take this machine away."""
    return self._manager.reached_preemption(step)

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
    good = [int(p.name) for p in self.directory.glob("[0-9]*") if p.name.isdigit()]
    last = f"step {max(good)}" if good else "none"
    cause = reason if isinstance(reason, Exception) else None
    raise OSError(
      f"the checkpoint of step {step} could not be written to {self.directory}: "
      f"{reason_of(reason)}. The last good checkpoint: {last}. "
      "Free some space, or choose another workdir, and start again to resume."
    ) from cause

  def _remove_partial(self) -> None:
    if jax.process_index() == 0:
      for leftover in self.directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)

  def _check_same_run(self, stored: Mapping[str, Any], where: Path) -> None:
    mine, theirs = self._meta.get("backbone", {}), stored.get("backbone", {})
    # Random weights have the seed they were drawn from in place of a file's digest.
    if any(mine.get(key) != theirs.get(key) for key in ("sha256", "seed", "init")):
      raise ValueError(
        f"{where} is a checkpoint of another backbone: got {_describe(theirs)}, "
        f"expected {_describe(mine)}. Use another workdir."
      )
    for key in ("method", "class_names"):
      if self._meta.get(key) != stored.get(key):
        raise ValueError(
          f"{where} is a checkpoint of another run: got {key} "
          f"{short(stored.get(key))}, expected {short(self._meta.get(key))}. "
          "Use another workdir."
        )

  def _older(self, step: int) -> str:
    older = sorted(s for s in self._manager.all_steps() if s != step)
    if not older:
      return f" To start over, delete {self.directory}."
    return (
      f" It is the newest; step {older[-1]} is there too. To resume from that one, "
      f"delete {self.directory / str(step)}."
    )


def _describe(backbone: Mapping[str, Any]) -> str:
  seed = f", seed {backbone['seed']}" if "seed" in backbone else ""
  return f"sha256 {backbone.get('sha256')} ({backbone.get('id')}{seed})"


def _rest(state: Any) -> dict[str, Any]:
  """Returns the fields that have no item of their own: the optimizer's state."""
  names = [field.name for field in dataclasses.fields(state)]
  named = ("step", "params", "rng")
  return {name: getattr(state, name) for name in names if name not in named}


def _flatten_rest(state: Any) -> dict[str, Any]:
  """Returns {'/'-joined path: leaf} of a state's `opt_state` and further fields."""
  # optax nests namedtuples and empty nodes, which a dict of leaves leaves behind.
  leaves = jax.tree_util.tree_leaves_with_path(_rest(state))
  return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


def _unflatten_rest(flat: Mapping[str, Any], state: Any) -> dict[str, Any]:
  leaves = [flat[name] for name in _flatten_rest(state)]
  return jax.tree.unflatten(jax.tree.structure(_rest(state)), leaves)


def _as_array(leaf: Any) -> jax.Array:
  # Orbax does not check the shape of a numpy leaf when it is restored.
  return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _encode_key(key: jax.Array) -> dict[str, Any]:
  data = np.asarray(jax.random.key_data(key))
  return {"impl": str(jax.random.key_impl(key)), "data": data.tolist()}


def _decode_key(stored: Mapping[str, Any], like: Any, where: Path) -> jax.Array:
  data = np.asarray(stored["data"], np.uint32)
  key = jax.random.wrap_key_data(data, impl=stored["impl"])
  if key.dtype != like.dtype or key.shape != like.shape:
    raise ValueError(
      f"the random key of the checkpoint {where} is {key.dtype}{list(key.shape)}, "
      f"expected {like.dtype}{list(like.shape)}. Set jax_default_prng_impl as then."
    )
  return jax.device_put(key, sharding_of(like))


def _check_writable(directory: Path) -> None:
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".probe{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()
  except OSError as error:
    raise OSError(
      f"cannot write checkpoints to {directory}: {error.strerror}. "
      "Choose another workdir."
    ) from error
