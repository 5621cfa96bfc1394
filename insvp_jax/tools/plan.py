"""What a run will need, before anything is allocated: `--plan`.

The steps are compiled for shapes alone, so that neither images nor weights need be
there, nor room for them, nor the devices: simulated CPU devices take their place. The
compiler that plans is then the CPU's. What arrays take is exact anywhere; what is
needed in between is exact for the devices that the plan was made on.

On a TPU pod's host, set JAX_PLATFORMS=cpu: its TPU would wait for those of the others.
"""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import config_checks, trees
from insvp_jax.checkpoints.items import flatten_rest, stored_names
from insvp_jax.data import GROUPS, TASKS, load_data
from insvp_jax.data.preprocess import get_preset
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.train import batches, features, flops
from insvp_jax.train import program as program_lib
from insvp_jax.train.program import Program

# Compiled only to be measured: generating quick code takes longer than all the rest.
_CPU_OPTIONS = {"xla_backend_optimization_level": 0}


def find_devices(count: int) -> list[jax.Device]:
  """Returns that many devices to plan for; 0 means all of this machine.

  Where there are fewer, simulated CPU devices take their place; for this JAX must not
  have started yet.

  Raises:
    ValueError: there are fewer and JAX has started.
  """
  try:
    if count:
      # It changes nothing about other devices, whose number is known only later.
      jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
      devices = jax.devices("cpu")
  except RuntimeError as error:
    raise ValueError(
      f"a plan for {count} devices needs a process of its own, with the CPU among "
      f"JAX's platforms: {error}"
    ) from error
  return devices[: count or None]


def plan(config: ConfigDict, devices: Sequence[jax.Device]) -> dict[str, Any]:
  """Returns what training and evaluating one method needs; allocates nothing.

  Args:
    config: the whole configuration; of `tune` nothing counts.
    devices: the run's, or as many simulated ones.

  Returns:
    What is planned (task, method, ...), and
    `arrays`: bytes on each device: frozen, trainable, optimizer, training_images,
      training_features.
    `train_step`, `eval_step`: bytes on each device: batch, temporaries (activations
      above all) and total, which has the arrays that are there meanwhile. Where
      features are computed once, evaluation stands for that pass over the images.
    `checkpoint`: bytes on disk before compression: adapter, optimizer.
    `flops`: of one train step on all devices; matrix products and convolutions.

  Raises:
    ValueError, FileNotFoundError: bad input; see the message.
  """
  config_checks.validate(config)
  mesh = mesh_lib.create_mesh(devices, fsdp=config.backbone.fsdp)
  task, num_classes, num_train = _numbers(config)
  program = program_lib.create_program(config, num_classes, num_train, mesh)
  state = program_lib.abstract_state(config, program)
  size = program.model.backbone.image_size
  preset = get_preset(config.data.preset)
  stored = preset.stored_size(size)
  cached = features.are_cached(config, program, num_train)
  batch = _batch(config.batch_size, size if preset.augments else stored)
  if cached:
    width = program.model.backbone.spec.width
    given = jax.ShapeDtypeStruct((config.batch_size, width), jnp.float32)
    batch = {"features": given, "labels": batch["labels"]}
  eval_size = batches.eval_batch_size(config, program)
  eval_batch = _batch(eval_size, stored) | {
    "mask": jax.ShapeDtypeStruct((eval_size,), jnp.float32)
  }
  traced = program.train_step.trace(state, batch)
  if cached:
    backbone = {"backbone": state.params["backbone"]}
    evaluation = program.feature_step.trace(backbone, eval_batch)
  else:
    evaluation = program.eval_step.trace(state.params, eval_batch, state.hparams)
  arrays = _arrays(program, state)
  # Every device keeps all of them, and their labels, if they are not streamed.
  images = num_train * (stored**2 * 3 + 4)
  streamed = images > config.data.resident_mb * 2**20
  arrays["training_images"] = 0 if cached or streamed else images
  kept = features.nbytes(program, num_train) + num_train * 4
  arrays["training_features"] = kept if cached else 0
  # While it is evaluated, the training images and the optimizer's state stay.
  resident = sum(arrays.values())
  return {
    "task": task,
    "method": config.method,
    "backbone": config.backbone.name,
    "image_size": size,
    "num_classes": num_classes,
    "num_train": num_train,
    "batch_size": config.batch_size,
    "eval_batch_size": eval_size,
    "devices": mesh.size,
    "fsdp": config.backbone.fsdp,
    "dtypes": [config.backbone.dtype, config.backbone.frozen_dtype],
    "planned_on": mesh.devices.flat[0].device_kind,
    "scan": config.backbone.scan,
    "remat": config.backbone.remat,
    "params": trees.count(program.shapes),
    "arrays": arrays,
    "train_step": _step(traced, batch, mesh, resident),
    "eval_step": _step(evaluation, eval_batch, mesh, resident),
    "checkpoint": _checkpoint(program, state),
    "flops": flops.count(traced.jaxpr),
  }


def _numbers(config: ConfigDict) -> tuple[str, int, int]:
  """Returns (task, classes, training images), from a table where there is one."""
  task, chosen = config.task, config.plan
  if task in GROUPS:  # the largest head
    task = max(GROUPS[task], key=lambda name: TASKS[name].num_classes)
  if chosen.num_classes and chosen.num_train:
    return task, chosen.num_classes, chosen.num_train
  split = config.data.train_split
  if task in TASKS:
    subset = TASKS[task].subset(config.data.subset)
    train = subset.train + (subset.val if split == "train_val" else 0)
    return task, chosen.num_classes or TASKS[task].num_classes, train
  unread = config.data.copy_and_resolve_references()
  unread.resident_mb = 0  # nothing is decoded
  try:
    data = load_data(task, unread, 1)
  except (ValueError, FileNotFoundError) as error:
    raise type(error)(
      f"{error} To plan without the images, set config.plan.num_classes and "
      "config.plan.num_train."
    ) from error
  return (
    task,
    chosen.num_classes or data.num_classes,
    chosen.num_train or len(data.splits[split]),
  )


def _batch(size: int, pixels: int) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    "images": jax.ShapeDtypeStruct((size, pixels, pixels, 3), jnp.uint8),
    "labels": jax.ShapeDtypeStruct((size,), jnp.int32),
  }


def _arrays(program: Program, state: Any) -> dict[str, int]:
  """Returns the bytes on each device of the state."""
  sharding = trees.flatten(program.state_sharding.params)

  def held(leaves):
    return sum(
      math.prod(sharding[name].shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for name, leaf in leaves.items()
    )

  trainable, frozen = trees.split(state.params, program.mask)
  return {
    "frozen": held(frozen),
    "trainable": held(trainable),
    "optimizer": _nbytes(state.replace(params=None, rng=None)),
  }


def _step(traced: Any, batch: Any, mesh: Any, resident: int) -> dict[str, int]:
  """Returns the bytes that a step needs on each device."""
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  compiled = traced.lower().compile(_CPU_OPTIONS if on_cpu else None)
  rows = _nbytes(batch) // mesh.size
  # What is returned takes the place of what was donated.
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  return {
    "batch": rows,
    "temporaries": temporaries,
    "total": resident + rows + temporaries,
  }


def _checkpoint(program: Program, state: Any) -> dict[str, int]:
  flat = trees.flatten(state.params)
  adapter = {name: flat[name] for name in stored_names(program.mask)}
  return {"adapter": _nbytes(adapter), "optimizer": _nbytes(flatten_rest(state))}


def _nbytes(tree: Any) -> int:
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def describe(found: dict[str, Any]) -> str:
  """Returns a plan as text: a table of bytes, and a few lines."""
  caches = found["arrays"]["training_features"] > 0
  inputs = "features" if caches else "images"
  rows = [
    ("bytes on each device", "training", "features" if caches else "evaluation"),
    ("frozen parameters", *[found["arrays"]["frozen"]] * 2),
    ("trainable parameters", *[found["arrays"]["trainable"]] * 2),
    ("optimizer state", *[found["arrays"]["optimizer"]] * 2),
    (f"training {inputs}", *[found["arrays"][f"training_{inputs}"]] * 2),
  ]
  for title, key in (
    ("one batch", "batch"),
    ("activations, temporaries", "temporaries"),
    ("all", "total"),
  ):
    rows.append((title, found["train_step"][key], found["eval_step"][key]))
  cells = [[x if isinstance(x, str) else _size(x) for x in row] for row in rows]
  lines = [
    f"{found['method']} on {found['task']}: {found['num_train']:,} images, "
    f"{found['num_classes']} classes; {found['backbone']} at {found['image_size']} px, "
    f"{found['params']:,} parameters",
    f"{found['devices']} x {found['planned_on']}, fsdp {found['fsdp']}; batches of "
    f"{found['batch_size']} to train and {found['eval_batch_size']} to evaluate",
    "",
    *[f"  {title:<26}{train:>12}{test:>12}" for title, train, test in cells],
    "",
    f"checkpoint: adapter {_size(found['checkpoint']['adapter'])}, "
    f"optimizer {_size(found['checkpoint']['optimizer'])}",
    f"a train step: {found['flops'] / 1e12:,.3g} TFLOP, "
    f"{found['flops'] / found['devices'] / 1e12:,.3g} on each device",
  ]
  return "\n".join([*lines, *_caveats(found)])


def _caveats(found: dict[str, Any]) -> list[str]:
  """Returns what the CPU's compiler says of other devices that is not so."""
  if found["planned_on"] != "cpu":
    return []
  lines = []
  if (found["remat"] or found["fsdp"] > 1) and not found["scan"]:
    lines.append(
      "The blocks are unrolled, and XLA's compiler for CPUs keeps what remat and fsdp "
      "would save there. Set config.backbone.scan to save it, and to plan for it."
    )
  if "bfloat16" in found["dtypes"]:
    lines.append(
      "XLA's compiler for CPUs makes bfloat16 wider before it computes: accelerators "
      "need less for temporaries. A plan in float32 is an upper bound too."
    )
  return lines


def _size(number: int) -> str:
  """Returns bytes for people, in powers of 1024."""
  value, units = float(number), iter(("B", "KiB", "MiB", "GiB", "TiB"))
  unit = next(units)
  while value >= 1024 and unit != "TiB":
    value, unit = value / 1024, next(units)
  return f"{number} B" if unit == "B" else f"{value:.2f} {unit}"
