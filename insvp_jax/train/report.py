"""What a run says of itself: at its start, with each checkpoint, as its result."""

from collections.abc import Mapping
from importlib import metadata
import platform
import resource
import sys
from typing import Any

from clu import parameter_overview
import jax
from ml_collections import ConfigDict
import numpy as np
import tabulate

from insvp_jax import config as config_lib
from insvp_jax import trees
from insvp_jax.data import TaskData, tasks
from insvp_jax.data.preprocess import get_preset
from insvp_jax.models import architectures
from insvp_jax.models.vit import ViT
from insvp_jax.models.weights import backbone_fields, is_file_name, pixels_of
from insvp_jax.train import evaluate, features, losses, objectives, optim
from insvp_jax.train import state as state_lib
from insvp_jax.train.program import Program, model_kwargs
from insvp_jax.train.timing import Timer

_PARTS = ("backbone", "prompter", "head")
# The packages whose versions a result depends on.
PACKAGES = ("insvp_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def shared_text(
  config: ConfigDict, program: Program, data: TaskData, loaded: str
) -> str:
  """Returns what runs on one task and backbone share: data, pixels, weights, devices.

  Args:
    config: the whole configuration.
    program: made for it.
    data: the task's splits.
    loaded: what loading the backbone did, in a line; "" for random weights.
  """
  mesh, name = program.mesh, config.backbone.name
  split_over = f", backbone split over {config.backbone.fsdp}"
  return "\n".join(
    [
      data.summary(),
      get_preset(config.data.preset).summary(),
      *_other_pixels(config),
      loaded or f"backbone {name}: random weights",
      f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {config.backbone.dtype}"
      + (split_over if "fsdp" in mesh.shape else ""),
    ]
  )


def _other_pixels(config: ConfigDict) -> list[str]:
  """Returns a line where the backbone was trained on other pixels."""
  pixels = pixels_of(config.backbone.weights or config.backbone.name)
  if pixels is None:
    return []
  preset = get_preset(config.data.preset)
  if "preset" in pixels:
    own = get_preset(pixels["preset"])
    pixels = {"mean": own.mean, "std": own.std}
  chosen = {
    "mean": preset.mean,
    "std": preset.std,
    "resize": preset.resize,
    "crop": preset.crop / preset.margin,
  }
  numbers = [k for k in pixels if k != "resize"]
  if chosen["resize"] == pixels.get("resize", chosen["resize"]) and all(
    np.allclose(chosen[key], pixels[key], atol=1e-4) for key in numbers
  ):
    return []

  def text(numbers: Mapping[str, Any]) -> str:
    return f"mean {list(numbers['mean'])} and std {list(numbers['std'])}" + (
      f", {numbers['resize']}, crop {numbers['crop']:.4g}" if "resize" in pixels else ""
    )

  return [
    f"note: the backbone was trained on pixels with {text(pixels)}; preset "
    f"{preset.name} has {text(chosen)}"
  ]


def spare_params(program: Program, state: state_lib.TrainState) -> int:
  """Returns how many trainable parameters no image reaches."""
  own = state.params.get("prompter", {})
  return program.model.prompter.spare_params(own)


def run_text(
  config: ConfigDict, program: Program, data: TaskData, spare: int = 0
) -> str:
  """Returns what one run is: its steps and numbers.

  Args:
    config: the whole configuration.
    program: made for it.
    data: the task's splits.
    spare: from `spare_params`.
  """
  split = data.splits[config.data.train_split]
  peak_lr = optim.peak_lr(config.optim, config.batch_size)
  in_parts = program.num_parts > 1 and not features.are_cached(
    config, program, len(split)
  )
  at_once = f" ({config.batch_size // program.num_parts} at once)" if in_parts else ""
  lines = [
    f"{config.method} on {config.data.train_split}: {program.total_steps} steps of "
    f"{config.batch_size} images{at_once}, lr {peak_lr:g}, wd {config.optim.wd:g}, "
    f"seed {config.seed}",
    features.summary_line(config, program, split),
    _balance_line(config, split.labels, data.num_classes),
    f"{spare:,} of the prompter's parameters are spare: no image reaches them, and no "
    "result counts them"
    if spare
    else "",
  ]
  return "\n".join(filter(None, lines))


def _balance_line(config: ConfigDict, labels: np.ndarray, num_classes: int) -> str:
  """Returns how classes of unequal size are made to count alike; "" if they are not."""
  counts = np.bincount(labels, minlength=num_classes)
  if config.data.sampling == "balanced":
    times = len(labels) / np.count_nonzero(counts)
    return (
      f"balanced sampling: {times:.4g} images of each class an epoch, "
      f"of {counts[counts > 0].min()} to {counts.max()} that there are"
    )
  if config.loss.class_weights:
    weights = losses.class_weights(counts)[counts > 0]
    return f"class weights in the loss: {weights.min():.3g} to {weights.max():.3g}"
  return ""


def param_summary(config: ConfigDict, program: Program) -> str:
  """Returns a row for each part of the model: parameters, share and bytes."""
  total = trees.count(program.shapes)
  sizes: dict[str, list[jax.ShapeDtypeStruct]] = {}
  for trains, leaves in _split_params(config, program):
    kind = "trainable" if trains else "frozen"
    for name, leaf in leaves.items():
      sizes.setdefault(f"{name.split('/')[0]}, {kind}", []).append(leaf)
  rows = []
  for part in sorted(sizes, key=lambda part: _PARTS.index(part.split(",")[0])):
    count = sum(int(np.prod(leaf.shape)) for leaf in sizes[part])
    arrays = jax.tree.leaves(sizes[part])
    nbytes = sum(array.size * array.dtype.itemsize for array in arrays)
    rows.append((part, f"{count:,}", f"{100 * count / total:.3g}%", bytes_text(nbytes)))
  return tabulate.tabulate(
    rows,
    headers=(config.method, "parameters", "share", "bytes"),
    tablefmt="plain",
    disable_numparse=True,
    colalign=("left", "right", "right", "right"),
  )


def param_table(config: ConfigDict, program: Program) -> str:
  """Returns all parameters with their shapes and types, the trainable ones first."""
  return "\n".join(
    f"{'trainable' if trains else 'frozen'}\n"
    + parameter_overview.get_parameter_overview(leaves, include_stats=False)
    for trains, leaves in _split_params(config, program)
    if leaves
  )


def _split_params(config: ConfigDict, program: Program) -> list[tuple[bool, dict]]:
  """Returns [(True, trainable leaves), (False, frozen ones)], as they are stored."""
  params = state_lib.cast_frozen(program.shapes, program.mask, config)
  return list(zip((True, False), trees.split(params, program.mask), strict=True))


def config_table(config: ConfigDict) -> str:
  """Returns the config as a Markdown table."""
  flat = trees.flatten(config_lib.to_dict(config))
  rows = [(name.replace("/", "."), value) for name, value in flat.items()]
  return tabulate.tabulate(rows, headers=("config", ""), tablefmt="github")


def data_digest(config: ConfigDict, data: TaskData, test: bool = True) -> str:
  """Returns the digest of the splits that a run reads.

  Args:
    config: the whole configuration.
    data: the task's splits.
    test: whether the test split is one of them.
  """
  splits = {config.data.train_split, "val"} | ({"test"} if test else set())
  return data.digest(splits)


def run_meta(
  config: ConfigDict,
  program: Program,
  data: TaskData,
  backbone: Mapping[str, Any],
  data_sha256: str,
) -> dict[str, Any]:
  """Returns what a run is, as stored with each of its checkpoints.

  Args:
    config: the whole configuration.
    program: made for it.
    data: the task's splits.
    backbone: from `state.backbone_identity`.
    data_sha256: from `data_digest`.
  """
  is_trainable = trees.flatten(program.mask)
  split = data.splits[config.data.train_split]
  return {
    "format": 1,
    "model": config_lib.to_dict(_model_kwargs(config, program, data.num_classes)),
    "backbone": dict(backbone),
    "class_names": list(data.class_names),
    "train_count": split.class_counts(data.num_classes).tolist(),
    "num_train_examples": len(split),
    "preset": config.data.preset,
    "image_size": program.model.backbone.image_size,
    "method": config.method,
    "task": data.name,
    "data_sha256": data_sha256,
    "trainable": [name for name, trainable in is_trainable.items() if trainable],
    "config": config_lib.stored(config),
    "versions": versions(),
    # Of segmentation alone.
    **({"masks": data.mask_style.to_json()} if data.mask_style else {}),
  }


def _model_kwargs(
  config: ConfigDict, program: Program, num_classes: int
) -> dict[str, Any]:
  """Returns the arguments of `create_model` that make the run's model anywhere.

  The sizes of a backbone from a file are written out: the file may move.
  """
  kwargs, vit = model_kwargs(config, num_classes), program.model.backbone
  if not is_file_name(kwargs["backbone"]):
    return kwargs
  if not isinstance(vit, ViT):
    kwargs["backbone"] = architectures.variant_of(type(vit))
  fields = backbone_fields(vit)
  kwargs["image_size"] = fields.pop("image_size")
  return {**kwargs, "backbone_kwargs": fields | kwargs["backbone_kwargs"]}


def result(
  config: ConfigDict,
  program: Program,
  timer: Timer,
  meta: Mapping[str, Any],
  *,
  step: int,
  spare: int = 0,
  val: Mapping[str, Any] | None,
  test: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Returns what result.json holds.

  Args:
    config: the whole configuration.
    program: made for it.
    timer: of the run.
    meta: from `run_meta`.
    step: the last one.
    spare: from `spare_params`; they are not counted.
    val: what `Prepared.evaluate` returned for val; None where it was not evaluated.
    test: the same for test.
  """
  trainable, _ = trees.split(program.shapes, program.mask)
  objective, metric = program.objective, program.objective.METRIC
  prompter = {n: leaf for n, leaf in trainable.items() if n.startswith("prompter/")}
  return {
    "task": meta["task"],
    "method": config.method,
    "method_kwargs": config_lib.to_dict(config_lib.method_kwargs(config)),
    "preset": config.data.preset,
    "seed": config.seed,
    "train_split": config.data.train_split,
    "lr": config.optim.lr,
    "wd": config.optim.wd,
    "steps": step,
    "metric": metric,
    f"val_{metric}": val and val[metric],
    f"test_{metric}": test and test[metric],
    "num_test_examples": test["num_examples"] if test else 0,
    "num_train_examples": meta["num_train_examples"],
    "test_by_class": test
    and objective.by_class(
      test,
      meta["class_names"],
      meta["train_count"],
      ordered=tasks.are_ordered(meta["task"], config.data),
    ),
    "trainable_params": trees.count(trainable) - spare,
    "prompter_params": trees.count(prompter) - spare,
    "total_params": trees.count(program.shapes) - spare,
    "backbone_params": trees.count(program.shapes["backbone"]),
    "backbone": meta["backbone"],
    "data_sha256": meta["data_sha256"],
    "train_seconds": timer.seconds,
    "images_per_second": timer.images_per_second,
    "compile_seconds": timer.compile_seconds,
    "input_wait_seconds": timer.input_wait_seconds,
    "feature_seconds": timer.feature_seconds,
    "step_seconds": timer.step_seconds,
    "peak_host_mb": peak_host_mb(),
    "peak_device_mb": peak_device_mb(),
    "devices": jax.device_count(),
    "versions": versions(),
  }


def metric_keys(result: Mapping[str, Any]) -> tuple[str, str]:
  """Returns the keys of a result under which the metric on val and on test stands."""
  metric = objectives.metric_of(result)
  return f"val_{metric}", f"test_{metric}"


def result_line(result: Mapping[str, Any]) -> str:
  """Returns one line about a finished run."""
  metric = objectives.metric_of(result)
  # Accuracy is what everybody expects.
  title = "" if metric == "accuracy" else f"{objectives.title_of(metric)} "
  scores = [
    f"{split} {title}{100 * result[key]:.2f}%"
    for split, key in zip(("val", "test"), metric_keys(result), strict=True)
    if result[key] is not None
  ]
  by_class = result.get("test_by_class")
  if by_class and metric == "accuracy":
    scores[-1] += by_class_text(by_class, with_figures=True)
  share = 100 * result["trainable_params"] / result["total_params"]
  # None where features came from a cache: no image was looked at.
  rate = result["images_per_second"]
  return (
    f"{result['task']} {result['method']}: {', '.join(scores) or 'not evaluated'}; "
    f"{result['trainable_params']:,} trainable parameters ({share:.2f}%), "
    f"{result['train_seconds']:.1f} s" + (f", {rate:.0f} images/s" if rate else "")
  )


def bytes_text(nbytes: int) -> str:
  """Returns bytes as text, in powers of 1024."""
  value, units = float(nbytes), iter(("B", "KiB", "MiB", "GiB", "TiB"))
  unit = next(units)
  while value >= 1024 and unit != "TiB":
    value, unit = value / 1024, next(units)
  return f"{nbytes} B" if unit == "B" else f"{value:.2f} {unit}"


def by_class_text(by_class: Mapping[str, Any], *, with_figures: bool = False) -> str:
  """Returns what accuracy hides, in brackets; "" where the classes are of one size.

  Args:
    by_class: from `evaluate.balanced`.
    with_figures: also macro-F1, and the quadratic kappa of classes that are grades.
  """
  parts, kappa = [], by_class.get("quadratic_kappa")
  if by_class["imbalance"] > evaluate.UNBALANCED:
    worst = by_class["worst_class"]
    parts = [
      f"balanced {100 * by_class['balanced_accuracy']:.2f}%",
      f"worst class {worst['name']} {100 * worst['accuracy']:.2f}% of "
      f"{worst['num_examples']}",
    ]
    # Results of before have none.
    if with_figures and "macro_f1" in by_class:
      parts.insert(1, f"macro-F1 {100 * by_class['macro_f1']:.2f}%")
  if with_figures and kappa is not None:
    parts.append(f"quadratic kappa {kappa:.3f}")
  parts += [
    f"{name} {100 * group['accuracy']:.2f}% of {group['num_classes']} classes"
    for name, group in by_class.get("groups", {}).items()
  ]
  return f" ({', '.join(parts)})" if parts else ""


def versions() -> dict[str, str]:
  """Returns {package: version} of what computes, and Python's."""
  result = {"python": platform.python_version()}
  for package in PACKAGES:
    try:
      result[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      result[package] = "not installed"
  return result


def peak_host_mb() -> float:
  """Returns the largest resident size of this process so far, in MiB."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # In KiB, but on macOS in bytes.
  return peak / (2**20 if sys.platform == "darwin" else 2**10)


def peak_device_mb() -> float | None:
  """Returns the peak of the local device that needed most, in MiB.

  None where the backend does not say: the CPU's memory is the host's.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks) / 2**20 if peaks else None
