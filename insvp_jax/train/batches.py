"""Where steps get their batches from, and how many of them a call takes."""

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from insvp_jax.data import ArraySplit, resident
from insvp_jax.data.splits import Split
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.train import flops
from insvp_jax.train.program import Program

# Nothing is gained by more, and a signal is looked at between two calls.
_MOST = 256
# FLOPs of a call on one device: what takes about a second, or less. No clock decides,
# because all processes have to decide alike.
_WORK = {"cpu": 1e10}
_WORK_ELSEWHERE = 1e13


class Stepwise:
  """One step a call; the batches come from elsewhere.

  Attributes:
    most: steps of a call.
  """

  most = 1

  def __init__(self, train_step: Callable, batches: Iterator):
    """Takes the jitted step, and an iterator that can be closed."""
    self._train_step = train_step
    self._batches = batches

  def next(self, count: int) -> Any:
    """Returns what `advance` needs for so many steps; it may have to be waited for."""
    del count
    return next(self._batches)

  def advance(self, state: Any, given: Any) -> tuple[Any, Any, Any]:
    """Returns (state, metrics, their step or None if there is but one)."""
    state, metrics = self._train_step(state, given)
    return state, metrics, None

  def close(self) -> None:
    """Ends the threads of a stream."""
    self._batches.close()


class Resident:
  """Many steps a call; the examples are on the devices.

  Attributes:
    most: steps of a call.
  """

  def __init__(self, train_call: Callable, arrays: Any, seed: Any, most: int):
    """Takes the jitted call of `calls.create_train_call` and its arguments."""
    self._train_call, self._arrays, self._seed = train_call, arrays, seed
    self.most = most

  def next(self, count: int) -> Any:
    """As of `Stepwise`; there is nothing to wait for."""
    return np.int32(count)

  def advance(self, state: Any, given: Any) -> tuple[Any, Any, Any]:
    """As of `Stepwise`."""
    return self._train_call(state, self._arrays, self._seed, given)

  def close(self) -> None:
    """Has nothing to end."""


def create_feed(
  config: ConfigDict,
  program: Program,
  split: Split,
  state: Any,
  *,
  features: Any,
  seed: Any,
  batches: Callable[[Any], Iterator],
) -> Stepwise | Resident:
  """Returns what the loop takes its steps from.

  Args:
    config: the whole configuration; `steps_per_call` decides, 0 automatically.
    program: with `train_step` and `train_call`.
    split: the training examples.
    state: before the next step.
    features: and labels on the devices, where they are cached; else None.
    seed: of the order, uint32 [], or [m] of a population.
    batches: maps arrays on the devices, or None, to an iterator of batches.
  """
  asked, on_cpu = config.steps_per_call, _platform(program) == "cpu"
  arrays = features
  # A step on images keeps a CPU busy for so long that a call of its own costs nothing.
  wanted = asked > 1 or (asked == 0 and (features is not None or not on_cpu))
  if arrays is None and wanted and isinstance(split, ArraySplit):
    arrays = resident.put_split(split, mesh_lib.batch_sharding(program.mesh))
  if arrays is None or not wanted:
    return Stepwise(program.train_step, batches(arrays))
  most = asked or _automatic(program, state, arrays, seed)
  return Resident(program.train_call, arrays, seed, most)


def _automatic(program: Program, state: Any, arrays: Any, seed: Any) -> int:
  """Returns how many steps are short enough for one call."""
  traced = program.train_call.trace(state, arrays, seed, np.int32(1))
  work = _WORK.get(_platform(program), _WORK_ELSEWHERE) * program.mesh.size
  # One round of the loop counts.
  return max(1, min(_MOST, int(work / max(1, flops.count(traced.jaxpr)))))


def _platform(program: Program) -> str:
  return program.mesh.devices.flat[0].platform
