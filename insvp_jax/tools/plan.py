"""`--plan`: the memory and FLOPs of a run, before anything is allocated.

The steps are compiled for shapes alone. Neither images nor weights are needed, nor
memory for them, nor the devices: simulated CPU devices take their place, and then XLA's
compiler for CPUs plans. The bytes of arrays are exact in any case; those of temporaries
are exact only for the kind of device that the plan was made on.

On a TPU pod's host, set JAX_PLATFORMS=cpu: its TPU would wait for those of the others.
"""

from collections.abc import Sequence
import math
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import tabulate

from insvp_jax import config as config_lib
from insvp_jax import config_checks, trees
from insvp_jax.checkpoints.items import flatten_rest, stored_names
from insvp_jax.data import GROUPS, TASKS, load_data
from insvp_jax.data.preprocess import DEFAULT_PRESET, get_preset
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.train import batches, features, flops, windows
from insvp_jax.train import program as program_lib
from insvp_jax.train.program import Program
from insvp_jax.train.report import bytes_text

# The steps never run, and generating fast code takes longer than all the rest.
_CPU_COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}


def find_devices(count: int) -> list[jax.Device]:
  """Returns that many devices to plan for; 0 means all of this machine.

  If there are fewer, simulated CPU devices take their place; this works only before JAX
  has initialized its devices.

  Raises:
    ValueError: there are fewer, and the devices are initialized.
  """
  try:
    if count:
      # This does not change the number of other devices, which is not known yet.
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


def plan(
  config: ConfigDict, devices: Sequence[jax.Device], *, are_simulated: bool = False
) -> dict[str, Any]:
  """Returns what training and evaluating one method needs; allocates nothing.

  Args:
    config: the whole configuration; its section `tune` is ignored.
    devices: the run's, or as many simulated ones.
    are_simulated: whether they stand for others, which compute whole batches where the
      config leaves it open; a CPU computes a few images at once (see `microbatch`).

  Returns:
    The run (task, method, sizes, ...), and
    `arrays`: bytes on each device: frozen, trainable, optimizer, training_images,
      training_features.
    `train_step`, `eval_step`: bytes on each device: batch, temporaries (mostly
      activations) and total, which includes `arrays`. Where features are computed once,
      `eval_step` is that pass over the images. Of segmentation it includes what is held
      of an image that is twice as long as it is high.
    `checkpoint`: bytes on disk before compression: adapter, optimizer.
    `flops`: of one train step on all devices; matrix products and convolutions.

  Raises:
    ValueError, FileNotFoundError: bad input; see the message.
  """
  config_checks.validate(config)
  mesh = mesh_lib.create_mesh(devices, fsdp=config.backbone.fsdp)
  # No weights are read: whatever pixels they are for, the sizes are the same.
  config.data.preset = config.data.preset or DEFAULT_PRESET
  if are_simulated:
    config.microbatch_size = config.microbatch_size or config_lib.MAX_INT
    config.eval_batch_size = config.eval_batch_size or batches.EVAL_BATCH_SIZE
  task, num_classes, num_train = _task_sizes(config)
  program = program_lib.create_program(config, num_classes, num_train, mesh)
  state = program_lib.abstract_state(config, program)
  image_size = program.model.input_size
  stored_size = get_preset(config.data.preset).stored_size(image_size)
  train_on_features = features.are_cached(config, program, num_train)
  num_parts = 1 if train_on_features else program.num_parts
  train_batch = batches.abstract_batch(config, program, config.batch_size, train=True)
  if train_on_features:
    vit = program.model.backbone
    width = getattr(vit, "projection", 0) or vit.spec.width
    shape = (config.batch_size, width)
    train_batch["features"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    del train_batch["images"]
  eval_size = batches.eval_batch_size(config, program)
  eval_batch = batches.abstract_batch(config, program, eval_size, train=False)
  eval_batch["mask"] = jax.ShapeDtypeStruct((eval_size,), jnp.float32)
  train_step = program.train_step.trace(state, train_batch)
  if train_on_features:
    backbone = {"backbone": state.params["backbone"]}
    eval_step = program.feature_step.trace(backbone, eval_batch)
  else:
    eval_step = program.eval_step.trace(state.params, eval_batch, state.hparams)
  arrays = _state_bytes(program, state)
  # Every device keeps all training images and labels, unless they are streamed.
  image_bytes = num_train * (stored_size**2 * 3 + 4)
  are_streamed = image_bytes > config.data.resident_mb * 2**20
  are_streamed |= not program.objective.ONE_FEATURE
  feature_bytes = features.nbytes(program, num_train) + num_train * 4
  arrays["training_images"] = 0 if train_on_features or are_streamed else image_bytes
  arrays["training_features"] = feature_bytes if train_on_features else 0
  # The training images and the optimizer's state stay during evaluation.
  resident = sum(arrays.values())
  of_eval = _step_bytes(eval_step, eval_batch, mesh, resident)
  if not program.objective.ONE_FEATURE:
    # Logits of windows are as large as activations, and averaged where they are.
    logits = 4 * eval_size * image_size**2 * num_classes
    held = logits + windows.held_bytes(image_size, num_classes)
    of_eval["temporaries"] += held
    of_eval["total"] += held
  return {
    "task": task,
    "method": config.method,
    "backbone": config.backbone.name,
    "image_size": image_size,
    "num_classes": num_classes,
    "num_train": num_train,
    "batch_size": config.batch_size,
    "microbatch_size": config.batch_size // num_parts,
    "eval_batch_size": eval_size,
    "devices": mesh.size,
    "fsdp": config.backbone.fsdp,
    "dtypes": [config.backbone.dtype, config.backbone.frozen_dtype],
    "planned_on": mesh.devices.flat[0].device_kind,
    "scan": config.backbone.scan,
    "remat": config.backbone.remat,
    "params": trees.count(program.shapes),
    "arrays": arrays,
    "train_step": _step_bytes(train_step, train_batch, mesh, resident),
    "eval_step": of_eval,
    "checkpoint": _checkpoint_bytes(program, state),
    "flops": flops.count(train_step.jaxpr),
  }


def _task_sizes(config: ConfigDict) -> tuple[str, int, int]:
  """Returns (task, number of classes, number of training images).

  They are those of `config.plan`, of the table of tasks or of the data themselves.
  """
  task, given = config.task, config.plan
  if task in GROUPS:  # the largest head
    task = max(GROUPS[task], key=lambda name: TASKS[name].num_classes)
  if given.num_classes and given.num_train:
    return task, given.num_classes, given.num_train
  split = config.data.train_split
  if task in TASKS:
    subset = TASKS[task].subset(config.data.subset)
    num_train = subset.train + (subset.val if split == "train_val" else 0)
    num_classes, fraction = TASKS[task].num_classes, config.data.fraction
    if config.data.shots:
      num_train = config.data.shots * num_classes
    elif fraction != 1:
      num_train = max(num_classes, round(fraction * subset.train))
    return task, given.num_classes or TASKS[task].num_classes, num_train
  data_config = config.data.copy_and_resolve_references()
  data_config.resident_mb = 0  # so that no image is decoded
  try:
    data = load_data(task, data_config, 1)
  except (ValueError, FileNotFoundError) as error:
    raise type(error)(
      f"{error} To plan without the images, set config.plan.num_classes and "
      "config.plan.num_train."
    ) from error
  return (
    task,
    given.num_classes or data.num_classes,
    given.num_train or len(data.splits[split]),
  )


def _state_bytes(program: Program, state: Any) -> dict[str, int]:
  """Returns the bytes of the state on each device."""

  def nbytes(leaf, sharding):
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

  sizes = jax.tree.map(nbytes, state.params, program.state_sharding.params)
  trainable, frozen = trees.split(sizes, program.mask)
  return {
    "frozen": sum(jax.tree.leaves(frozen)),
    "trainable": sum(jax.tree.leaves(trainable)),
    "optimizer": _nbytes(state.replace(params=None, rng=None)),
  }


def _step_bytes(traced: Any, batch: Any, mesh: Any, resident: int) -> dict[str, int]:
  """Returns the bytes that a step needs on each device.

  Args:
    traced: the step.
    batch: its batch, on all devices together.
    mesh: the devices.
    resident: bytes of the arrays that are on each device meanwhile.
  """
  on_cpu = mesh_lib.platform(mesh) == "cpu"
  compiled = traced.lower().compile(_CPU_COMPILER_OPTIONS if on_cpu else None)
  batch_bytes = _nbytes(batch) // mesh.size
  # Outputs are not counted: they take the place of the donated inputs.
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  return {
    "batch": batch_bytes,
    "temporaries": temporaries,
    "total": resident + batch_bytes + temporaries,
  }


def _checkpoint_bytes(program: Program, state: Any) -> dict[str, int]:
  flat = trees.flatten(state.params)
  adapter = {name: flat[name] for name in stored_names(program.mask)}
  return {"adapter": _nbytes(adapter), "optimizer": _nbytes(flatten_rest(state))}


def _nbytes(tree: Any) -> int:
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def format_plan(result: dict[str, Any]) -> str:
  """Returns the result of `plan` as text: a table of bytes, and a few lines."""
  arrays = result["arrays"]
  size, batch_size = result["microbatch_size"], result["batch_size"]
  at_once = f" ({size} at once)" if size < batch_size else ""
  train_on_features = arrays["training_features"] > 0
  inputs = "features" if train_on_features else "images"
  passes = ("training", "features" if train_on_features else "evaluation")
  rows = [
    ("bytes on each device", *passes),
    ("frozen parameters", *[arrays["frozen"]] * 2),
    ("trainable parameters", *[arrays["trainable"]] * 2),
    ("optimizer state", *[arrays["optimizer"]] * 2),
    (f"training {inputs}", *[arrays[f"training_{inputs}"]] * 2),
  ]
  for title, key in (
    ("one batch", "batch"),
    ("activations, temporaries", "temporaries"),
    ("all", "total"),
  ):
    rows.append((title, result["train_step"][key], result["eval_step"][key]))
  cells = [[x if isinstance(x, str) else bytes_text(x) for x in row] for row in rows]
  table = tabulate.tabulate(
    cells, headers="firstrow", tablefmt="plain", colalign=("left", "right", "right")
  )
  lines = [
    f"{result['method']} on {result['task']}: {result['num_train']:,} images, "
    f"{result['num_classes']} classes; {result['backbone']} at "
    f"{result['image_size']} px, {result['params']:,} parameters",
    f"{result['devices']} x {result['planned_on']}, fsdp {result['fsdp']}; batches of "
    f"{batch_size} to train{at_once} and {result['eval_batch_size']} to evaluate",
    "",
    textwrap.indent(table, "  "),
    "",
    f"checkpoint: adapter {bytes_text(result['checkpoint']['adapter'])}, "
    f"optimizer {bytes_text(result['checkpoint']['optimizer'])}",
    f"a train step: {result['flops'] / 1e12:,.3g} TFLOP, "
    f"{result['flops'] / result['devices'] / 1e12:,.3g} on each device",
  ]
  return "\n".join([*lines, *_caveats(result)])


def _caveats(result: dict[str, Any]) -> list[str]:
  """Returns in what a plan that was made on CPUs is wrong for other devices."""
  if result["planned_on"] != "cpu":
    return []
  lines = []
  if (result["remat"] or result["fsdp"] > 1) and not result["scan"]:
    lines.append(
      "The blocks are unrolled, and XLA's compiler for CPUs keeps what remat and fsdp "
      "would save there. Set config.backbone.scan to save it, and to plan for it."
    )
  if "bfloat16" in result["dtypes"]:
    lines.append(
      "XLA's compiler for CPUs makes bfloat16 wider before it computes: accelerators "
      "need less for temporaries. A plan in float32 is an upper bound too."
    )
  return lines
