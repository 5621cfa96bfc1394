"""What a run says of itself: at its start, with each checkpoint, as its result."""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from insvp_jax import config as config_lib
from insvp_jax import trees
from insvp_jax.data import TaskData
from insvp_jax.data.preprocess import get_preset
from insvp_jax.logs.writers import param_overview
from insvp_jax.train import features, memory
from insvp_jax.train import program as program_lib
from insvp_jax.train.preparation import Prepared
from insvp_jax.train.steps import TrainState
from insvp_jax.train.timing import Clock
from insvp_jax.train.versions import versions


def data_digest(config: ConfigDict, data: TaskData, test: bool) -> str:
  """Returns the digest of the splits that a run reads."""
  splits = {config.data.train_split, "val"} | ({"test"} if test else set())
  return data.digest(splits)


def announce(config: ConfigDict, prepared: Prepared, step: int) -> str:
  """Returns what a run prints first: parameters, data, protocol, devices."""
  if step:
    return f"resumed at step {step} of {prepared.program.total_steps}"
  program, mesh = prepared.program, prepared.program.mesh
  split = prepared.data.splits[config.data.train_split]
  lines = [
    param_overview(program.shapes, program.mask),
    prepared.data.summary(),
    get_preset(config.data.preset).summary(),
    f"{config.method} on {config.data.train_split}: {program.total_steps} steps of "
    f"{config.batch_size} images, lr {program_lib.peak_lr(config):g}, "
    f"wd {config.optim.wd:g}, seed {config.seed}; {mesh.size} x "
    f"{mesh.devices.flat[0].device_kind}, {config.backbone.dtype}"
    + (f", backbone split over {config.backbone.fsdp}" if "fsdp" in mesh.shape else ""),
    features.describe(config, program, split),
  ]
  return "\n".join(filter(None, lines))


def config_table(config: ConfigDict) -> str:
  """Returns the config as a Markdown table."""
  flat = trees.flatten(config_lib.to_dict(config))
  rows = [f"| {name.replace('/', '.')} | {value} |" for name, value in flat.items()]
  return "\n".join(["| config | |", "|---|---|", *rows])


def describe_run(
  config: ConfigDict,
  prepared: Prepared,
  backbone: Mapping[str, Any],
  data_sha256: str,
) -> dict[str, Any]:
  """Returns what a run is, as stored with each of its checkpoints."""
  program = prepared.program
  trainable = [n for n, chosen in trees.flatten(program.mask).items() if chosen]
  return {
    "format": 1,
    "model": config_lib.to_dict(program.model_kwargs),
    "backbone": dict(backbone),
    "class_names": list(prepared.data.class_names),
    "preset": config.data.preset,
    "image_size": program.model.backbone.image_size,
    "method": config.method,
    "task": prepared.data.name,
    "data_sha256": data_sha256,
    "trainable": trainable,
    "config": config_lib.to_dict(config),
    "versions": versions(),
  }


def result(
  config: ConfigDict,
  prepared: Prepared,
  state: TrainState,
  clock: Clock,
  meta: Mapping[str, Any],
  test: bool,
) -> dict[str, Any]:
  """Evaluates the final model and returns what result.json holds.

  Args:
    config: the whole configuration.
    prepared: data and program.
    state: after the last step.
    clock: the loop's.
    meta: from `describe_run`.
    test: whether the test split is evaluated.
  """
  program, data = prepared.program, prepared.data
  params = state.params

  def accuracy(split):
    if split not in data.splits:
      return None, 0
    found = prepared.evaluate(config, split, params)
    return found["accuracy"], found["num_examples"]

  # After training on train_val, an accuracy on val would be one on training data.
  trained_on_val = config.data.train_split == "train_val"
  val_accuracy, _ = (None, 0) if trained_on_val else accuracy("val")
  test_accuracy, num_test = accuracy("test") if test else (None, 0)
  # Of the columns of a wider head, those without a class do not count.
  trainable, _ = trees.split(program.shapes, program.mask)
  prompter = {n: v for n, v in trainable.items() if n.startswith("prompter/")}
  return {
    "task": data.name,
    "method": config.method,
    "method_kwargs": config_lib.to_dict(config_lib.method_kwargs(config)),
    "preset": config.data.preset,
    "seed": config.seed,
    "train_split": config.data.train_split,
    "lr": config.optim.lr,
    "wd": config.optim.wd,
    "steps": int(state.step),
    "val_accuracy": val_accuracy,
    "test_accuracy": test_accuracy,
    "num_test_examples": num_test,
    "trainable_params": trees.count(trainable),
    "prompter_params": trees.count(prompter),
    "total_params": trees.count(program.shapes),
    "backbone": meta["backbone"],
    "data_sha256": meta["data_sha256"],
    "train_seconds": clock.seconds,
    "images_per_second": clock.images_per_second,
    "compile_seconds": clock.compile_seconds,
    "input_wait_seconds": clock.input_wait_seconds,
    "step_seconds": clock.step_seconds,
    "peak_host_mb": memory.peak_host_mb(),
    "peak_device_mb": memory.peak_device_mb(),
    "devices": jax.device_count(),
    "versions": versions(),
  }
