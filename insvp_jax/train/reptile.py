"""A border of pixels learnt over several tasks, for DAM-VP and VP to start from.

Source: Huang et al. 2023, "Diversity-Aware Meta Visual Prompting", and its published
code. That is Reptile (Nichol et al. 2018): of each task a batch is drawn, and DAM-VP's
borders, which all start at the common one, take some steps of SGD on it, as does the
task's head, which goes on from where it was. The common border then moves towards the
mean of all borders of all tasks,

  border <- border + eps mean(border' - border).

The lr of the borders is a cosine from `lr` to 0. The code keeps the border of the
lowest loss on a batch, or of the best accuracy on a test set; here it is the last one.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from insvp_jax.data import pipeline, preprocess
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.distributed import sharding as sharding_lib
from insvp_jax.methods.ops import border as border_lib
from insvp_jax.train import losses, trainer
from insvp_jax.train.program import create_state

_METHOD = "dam_vp"


@dataclasses.dataclass
class _Task:
  """What one task needs.

  Attributes:
    params: of the whole model, on the devices; its head changes.
    inner: from `_create_inner`.
    batches: of training images, for ever.
    steps_per_epoch: batches of an epoch.
    num_clusters: of its images.
  """

  params: dict[str, Any]
  inner: Callable[..., Any]
  batches: Iterator[Any]
  steps_per_epoch: int
  num_clusters: int


def learn_border(
  configs: Sequence[ConfigDict],
  *,
  epochs: int = 200,
  lr: float = 0.5,
  head_lr: float = 0.1,
  outer_lr: float = 0.5,
  inner_steps: int = 4,
  seed: int = 0,
  on_epoch: Callable[[int, float], None] | None = None,
) -> dict[str, np.ndarray]:
  """Returns the leaves of a border, as in `methods.ops.border`.

  Args:
    configs: one for each task; what they say of `dam_vp` shapes borders and clusters.
    epochs: each of as many batches of every task as the smallest one has.
    lr: of the borders, at the start of its cosine.
    head_lr: of the heads.
    outer_lr: eps.
    inner_steps: on each batch.
    seed: of the start and the batches.
    on_epoch: called with the number of epochs and the mean loss in the last of them,
      before the steps on each batch.

  Raises:
    ValueError: tasks of different backbones or sizes, or numbers out of range.
    FloatingPointError: the loss is no longer a number.
  """
  _check(configs, epochs, lr, head_lr, outer_lr, inner_steps)
  tasks, border = _open_tasks(configs, head_lr, inner_steps, seed)
  num_clusters = sum(task.num_clusters for task in tasks)
  steps = min(task.steps_per_epoch for task in tasks)
  for epoch in range(epochs):
    values = []
    for step in range(epoch * steps, (epoch + 1) * steps):
      # The published schedule counts from 1.
      share = (step + 1) / (epochs * steps)
      rate = np.float32(lr * 0.5 * (1 + np.cos(np.pi * share)))
      changes = []
      for task in tasks:
        change, task.params["head"], value = task.inner(
          task.params, border, next(task.batches), rate
        )
        changes.append(change)
        values.append(value)
      border = jax.tree.map(
        lambda p, *each: p + outer_lr / num_clusters * sum(each), border, *changes
      )
    mean = float(np.mean(jax.device_get(values)))
    if not np.isfinite(mean):
      raise FloatingPointError(
        f"the loss is {mean} in epoch {epoch + 1} of {epochs}; lower the lr of the "
        f"borders (now {lr:g})."
      )
    if on_epoch:
      on_epoch(epoch + 1, mean)
  for task in tasks:
    task.batches.close()
  return {name: np.asarray(leaf) for name, leaf in jax.device_get(border).items()}


def _check(configs, epochs, lr, head_lr, outer_lr, inner_steps) -> None:
  """Checks what is the user's.

  Raises:
    ValueError: it is out of range.
  """
  if not configs:
    raise ValueError("there is no task to learn a border from; give one or more.")
  for name, value in (("epochs", epochs), ("inner_steps", inner_steps)):
    if value < 1:
      raise ValueError(f"{name} is {value}, expected at least 1.")
  for name, value in (("lr", lr), ("head_lr", head_lr), ("outer_lr", outer_lr)):
    if not 0 < value < float("inf"):
      raise ValueError(f"{name} is {value}, expected a number above 0.")


def _open_tasks(
  configs: Sequence[ConfigDict], head_lr: float, inner_steps: int, seed: int
) -> tuple[list[_Task], dict[str, Any]]:
  """Returns the tasks, which share one backbone, and the border at the start."""
  opened: list[tuple[ConfigDict, trainer.Prepared]] = []
  for config in configs:
    config = config.copy_and_resolve_references()
    config.method, config.seed, config.data.train_split = _METHOD, seed, "train"
    config[_METHOD].classifier, config[_METHOD].meta = "trained", ""
    prepared = trainer.prepare(config)
    first = opened[0][1] if opened else prepared
    if _shape_of(prepared) != _shape_of(first):
      raise ValueError(
        f"the task {prepared.data.name!r} has another backbone, image size or "
        f"prompt_size than {first.data.name!r}; a border is learnt for one of each."
      )
    # One backbone for all, there once.
    opened.append((config, dataclasses.replace(prepared, weights=first.weights)))
  tasks: list[_Task] = []
  for config, prepared in opened:
    params = prepared.prepare_params(config, prepared.first_params(config))
    placed = dict(create_state(config, prepared.program, params).params)
    if tasks:
      placed["backbone"] = tasks[0].params["backbone"]
    tasks.append(_open_task(config, prepared, placed, head_lr, inner_steps))
  drawn = tasks[0].params["prompter"]
  return tasks, {name: drawn[name][0] for name in border_lib.SIDES}


def _shape_of(prepared: trainer.Prepared) -> tuple[Any, ...]:
  """Returns what a border belongs to."""
  method = prepared.program.model.prompter
  identity = {n: v for n, v in prepared.backbone.items() if n != "source"}
  return identity, prepared.program.model.backbone, method.prompt_size


def _open_task(
  config: ConfigDict,
  prepared: trainer.Prepared,
  params: dict[str, Any],
  head_lr: float,
  inner_steps: int,
) -> _Task:
  program, preset = prepared.program, preprocess.get_preset(config.data.preset)
  model = sharding_lib.unshard_in_use(program.model, program.mesh)
  return _Task(
    params=params,
    inner=_create_inner(model, preset, head_lr, inner_steps),
    batches=pipeline.train_batches(
      prepared.data.splits["train"],
      batch_size=program.batch_size,
      seed=config.seed,
      preset=preset,
      image_size=model.input_size,
      balanced_classes=program.balanced_classes,
      sharding=mesh_lib.batch_sharding(program.mesh),
    ),
    steps_per_epoch=program.steps_per_epoch,
    num_clusters=int(jax.device_get(params["prompter"]["num_clusters"])),
  )


def _create_inner(
  model: Any, preset: preprocess.Preset, head_lr: float, inner_steps: int
) -> Callable[..., Any]:
  """Returns the jitted `(params, border, batch, lr) -> (change, head, loss)`.

  The change is that of the borders of all clusters together, the loss that before the
  first step.
  """

  @jax.jit
  def inner(params, border, batch, lr):
    images = preprocess.normalise(preset, batch["images"])
    targets = losses.targets(batch["labels"], model.head.num_classes)
    route = model.apply({"params": params}, images, method="route")

    def loss(trained):
      prompter = {**params["prompter"], **trained["border"]}
      whole = {**params, "prompter": prompter, "head": trained["head"]}
      logits = model.apply({"params": whole}, images, route=route)
      return jnp.mean(losses.cross_entropy(logits, targets))

    def step(trained, _):
      value, grads = jax.value_and_grad(loss)(trained)
      moved = {
        part: jax.tree.map(
          functools.partial(lambda rate, p, g: p - rate * g, rate),
          trained[part],
          grads[part],
        )
        for part, rate in (("border", lr), ("head", head_lr))
      }
      return moved, value

    copies = (model.prompter.max_clusters, 1, 1, 1)
    start = jax.tree.map(lambda leaf: jnp.tile(leaf, copies), border)
    end, values = jax.lax.scan(
      step, {"border": start, "head": params["head"]}, length=inner_steps
    )
    # Spare ones are chosen by no image, and stay.
    change = jax.tree.map(lambda a, b: jnp.sum(a - b, axis=0), end["border"], start)
    return change, end["head"], values[0]

  return inner
