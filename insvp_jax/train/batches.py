"""What a step is fed: batches to train on, and batches to evaluate.

Training has two forms, chosen by `create_feed`. A `StreamFeed` takes one step a call,
on a batch that comes from elsewhere. A `ResidentFeed` takes many steps in one call, on
examples that live on the devices. The trainer's loop treats both alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict
import numpy as np

from insvp_jax.data import ArraySplit, resident
from insvp_jax.data.preprocess import get_preset
from insvp_jax.data.splits import Split
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.train import flops, microbatch
from insvp_jax.train.objectives import objective_of
from insvp_jax.train.program import Program

# Of evaluation, where `config.eval_batch_size` is 0; see `microbatch` for CPUs.
EVAL_BATCH_SIZE = 256
# Nothing is gained by more, and a signal is looked at between two calls.
_MAX_STEPS_PER_CALL = 256
# FLOPs of a call on one device that take about a second, or less. No clock decides,
# because all processes have to decide alike.
_FLOPS_PER_CALL = {"cpu": 5e10}
_FLOPS_PER_CALL_ELSEWHERE = 1e13


class StreamFeed:
  """One step a call; the batches come from an iterator.

  Attributes:
    max_steps: the most steps that a call may take.
  """

  max_steps = 1

  def __init__(self, train_step: Callable, batches: Iterator):
    """Takes the jitted `train_step` and an iterator that can be closed."""
    self._train_step = train_step
    self._batches = batches

  def next(self, count: int) -> Any:
    """Returns the batch of the next step; it may have to be waited for."""
    del count
    return next(self._batches)

  def step(self, state: Any, batch: Any) -> tuple[Any, Any]:
    """Returns (state, metrics) after one step."""
    return self._train_step(state, batch)

  def close(self) -> None:
    """Ends the threads of a stream."""
    self._batches.close()


class ResidentFeed:
  """Many steps a call; the examples are on the devices.

  Attributes:
    max_steps: the most steps that a call may take.
  """

  def __init__(self, multi_step: Callable, arrays: Any, seed: Any, max_steps: int):
    """Takes the jitted function of `steps.create_multi_step` and its arguments."""
    self._multi_step, self._arrays, self._seed = multi_step, arrays, seed
    self.max_steps = max_steps

  def next(self, count: int) -> Any:
    """Returns the number of steps: there is nothing to wait for."""
    return np.int32(count)

  def step(self, state: Any, count: Any) -> tuple[Any, Any]:
    """Returns (state, metrics) after `count` steps."""
    return self._multi_step(state, self._arrays, self._seed, count)

  def close(self) -> None:
    """Has nothing to end."""


def create_feed(
  config: ConfigDict,
  program: Program,
  split: Split,
  state: Any,
  features: Any = None,
  route: Any = None,
) -> StreamFeed | ResidentFeed:
  """Returns what the loop takes its steps from.

  Args:
    config: the whole configuration; `steps_per_call` decides, 0 automatically.
    program: made for it.
    split: the training examples.
    state: before the next step, which says where in the data the run stands.
    features: features and labels of the split on the devices, where they are cached.
    route: of a split in memory, where it is cached.
  """
  steps_per_call, rows = config.steps_per_call, mesh_lib.batch_sharding(program.mesh)
  seed = np.uint32(config.seed % 2**32)
  arrays, is_routed, many = features, route is not None, steps_per_call != 1
  if arrays is None and isinstance(split, ArraySplit) and (many or is_routed):
    arrays = resident.put_split(split, rows) | ({"route": route} if is_routed else {})
  if arrays is not None and many:
    max_steps = steps_per_call or _steps_per_call(program, state, arrays, seed)
    if max_steps == 1 and features is None and _platform(program) == "cpu":
      # Such a step keeps a CPU busy for so long that a call of its own costs little.
      many, arrays = False, arrays if is_routed else None
  if arrays is None or not many:
    batches = program.objective.train_batches(
      split if arrays is None else arrays,
      batch_size=config.batch_size,
      seed=config.seed,
      image_size=program.model.input_size,
      start_step=int(state.step),
      balanced_classes=program.balanced_classes,
      sharding=rows,
    )
    return StreamFeed(program.train_step, batches)
  return ResidentFeed(program.multi_step, arrays, seed, max_steps)


def _steps_per_call(program: Program, state: Any, arrays: Any, seed: Any) -> int:
  """Returns how many steps are short enough for one call."""
  traced = program.multi_step.trace(state, arrays, seed, np.int32(1))
  limit = _FLOPS_PER_CALL.get(_platform(program), _FLOPS_PER_CALL_ELSEWHERE)
  # `flops.count` counts one round of the loop over steps.
  num_steps = limit * program.mesh.size / max(1, flops.count(traced.jaxpr))
  return max(1, min(_MAX_STEPS_PER_CALL, int(num_steps)))


def _platform(program: Program) -> str:
  return mesh_lib.platform(program.mesh)


def next_end(
  step: int, max_steps: int, periods: Sequence[int], marks: Sequence[int]
) -> int:
  """Returns the last step of the call that comes after a step.

  Args:
    step: number of steps taken.
    max_steps: of a call.
    periods: something is done at their multiples, so a call ends there; 0 is never.
    marks: single steps at which a call ends, too.
  """
  ends = [(step // every + 1) * every for every in periods if every]
  return min([step + max_steps, *ends, *(mark for mark in marks if mark > step)])


def abstract_batch(
  config: ConfigDict, program: Program, batch_size: int, *, train: bool
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes and types of a batch of images and targets, without a mask.

  Args:
    config: the whole configuration.
    program: made for it.
    batch_size: number of images.
    train: whether they have been cropped, where the preset crops.
  """
  preset, size = get_preset(config.data.preset), program.model.input_size
  is_cropped = (train and preset.augments) or not program.objective.ONE_FEATURE
  side = size if is_cropped else preset.stored_size(size)
  return {
    "images": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.uint8),
    **program.objective.abstract_targets(batch_size, side),
  }


def eval_batch_size(
  config: ConfigDict,
  program: Program,
  num_examples: int | None = None,
  *,
  of_features: bool = False,
) -> int:
  """Returns the size of an evaluation batch: any one fits, since it is padded.

  Args:
    config: the whole configuration; of its `eval_batch_size` 0 is automatic.
    program: made for it.
    num_examples: of the split; beyond them there is only padding. None where it is not
      known.
    of_features: whether the batches have features that are known, not images.
  """
  asked, devices = config.eval_batch_size, program.mesh.size
  size = asked or EVAL_BATCH_SIZE
  if not objective_of(config.task).ONE_FEATURE:
    size, num_examples = config.segment.batch_size, None
  elif not asked and not of_features and _platform(program) == "cpu":
    at_once = microbatch.images_at_once(program.model.backbone.spec)
    size = min(size, devices * at_once)
  if num_examples is not None:
    # Up to the usual size one program serves all splits.
    size = min(size, max(EVAL_BATCH_SIZE, num_examples))
  return -(-size // devices) * devices


def eval_batches(
  config: ConfigDict,
  program: Program,
  split: Split,
  features: Mapping[str, Array] | None = None,
  route: Array | None = None,
) -> Any:
  """Returns every example of a split once, as `Objective.evaluate` takes them.

  Of a classification these are padded batches with a "mask".

  Args:
    config: the whole configuration.
    program: made for it.
    split: the examples.
    features: from `FeatureCache.arrays`; the batches have features then, else images.
    route: from `RouteCache.array`; it goes with the images.
  """
  size = eval_batch_size(config, program, len(split), of_features=features is not None)
  rows = mesh_lib.batch_sharding(program.mesh)
  images = program.objective.eval_batches(
    split, batch_size=size, image_size=program.model.input_size, sharding=rows
  )
  if features is None and route is None:
    return images
  take = jax.jit(_take, static_argnames="size", out_shardings=rows)
  starts = range(0, len(split), size)
  if features is not None:
    return (take(dict(features), np.int32(start), size=size) for start in starts)
  known = {"route": route, "labels": resident.put_array(split.labels, route.sharding)}
  taken = (take(known, np.int32(start), size=size) for start in starts)
  return ({**batch, **more} for batch, more in zip(images, taken, strict=True))


def _take(arrays, start, size: int):
  """Returns rows start, start + 1, ... of each array; beyond the last the mask is 0."""
  indices = start + jnp.arange(size)
  take = functools.partial(jnp.take, indices=indices, axis=0, mode="clip")
  mask = (indices < arrays["labels"].shape[0]).astype(jnp.float32)
  return {name: take(array) for name, array in arrays.items()} | {"mask": mask}
