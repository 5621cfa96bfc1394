"""What a run consists of: the compiled program and the first state."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from insvp_jax import config as config_lib
from insvp_jax import trees
from insvp_jax.checkpoints import wide_head
from insvp_jax.data import preprocess, resident
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.distributed import sharding as sharding_lib
from insvp_jax.models.classifier import PromptedClassifier, create_model
from insvp_jax.models.heads import Head
from insvp_jax.train import calls, optim, parameters, steps


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled once and serves every run of the same shape.

  Attributes:
    model: the classifier.
    trained: the same with a head of `config.head_width` columns, if that is set. What
      the steps compute, and whose parameters a state has.
    model_kwargs: the arguments of `create_model` that made it, as JSON values.
    mask: bool tree of the trainable parameters.
    optimizer: over the full tree, with a peak lr of 1.
    schedule: the lr schedule with a peak of 1, by update.
    total_steps: batches of the whole run.
    steps_per_epoch: batches of an epoch.
    train_step: jitted `(state, batch) -> (state, metrics)`; donates the state.
    eval_step: jitted `(params, batch, numbers) -> sums`.
    mesh: all devices, from `mesh.create_mesh`.
    state_sharding: where the state lies: a `TrainState` of shardings.
    train_function: what `train_step` compiles, to be transformed.
    eval_function: `(params, batch, numbers) -> sums`, the same of `eval_step`.
    numbers: names of the method's fields that are data; see `numbers_of`.
    feature_step: jitted `({"backbone": params}, batch) -> features`, on every device;
      see `steps.create_feature_step`.
    train_call: jitted `(state, arrays, seed, count) -> (state, metrics, at)`; donates
      the state. See `calls.create_train_call`.
    gather: `(arrays, order, seed, step) -> batch`; see `resident.gather`.
    batch_size: of training.
  """

  model: PromptedClassifier
  trained: PromptedClassifier
  model_kwargs: Mapping[str, Any]
  mask: Mapping[str, Any]
  optimizer: optax.GradientTransformation
  schedule: optim.Schedule
  total_steps: int
  steps_per_epoch: int
  train_step: Any
  eval_step: Any
  mesh: jax.sharding.Mesh
  state_sharding: steps.TrainState
  train_function: Any = None
  eval_function: Any = None
  numbers: tuple[str, ...] = ()
  feature_step: Any = None
  train_call: Any = None
  gather: Any = None
  batch_size: int = 0

  @functools.cached_property
  def shapes(self) -> dict[str, Any]:
    """The parameters of `model` as `jax.ShapeDtypeStruct`, traced once."""
    return parameters.param_shapes(self.model)


def create_model_kwargs(config: ConfigDict, num_classes: int) -> dict[str, Any]:
  """Returns the arguments of `create_model` that a config asks for."""
  return {
    "backbone": config.backbone.name,
    "method": config.method,
    "num_classes": num_classes,
    "image_size": config.image_size,
    "backbone_kwargs": config_lib.backbone_kwargs(config),
    "method_kwargs": config_lib.method_kwargs(config),
    "head_init": config.head_init,
  }


def create_program(
  config: ConfigDict,
  num_classes: int,
  num_train: int,
  mesh: jax.sharding.Mesh,
  numbers: tuple[str, ...] = (),
) -> Program:
  """Builds model, mask, optimizer and the jitted steps; runs nothing.

  Args:
    config: the whole configuration.
    num_classes: k.
    num_train: images of the training split.
    mesh: where the batches will lie.
    numbers: fields of the method that come with the state instead of being compiled
      into the steps; names of its `NUMBERS`.

  Raises:
    ValueError: something in the config does not fit; see the message.
  """
  mesh_lib.check_batch_size(config.batch_size, mesh)
  kwargs = create_model_kwargs(config, num_classes)
  model = create_model(**kwargs)
  total_steps, steps_per_epoch = config_lib.num_steps(config, num_train)
  optim.check_optim(config.optim)
  trained = _trained(config, model)
  shapes = parameters.param_shapes(trained)
  mask = trees.mask(shapes, model.prompter.trainable_patterns())
  unit = config.optim.copy_and_resolve_references()
  unit.lr = 1.0
  unit.lr_scale_by_batch = 0
  schedule = optim.create_schedule(
    unit,
    total_steps=total_steps,
    steps_per_epoch=steps_per_epoch,
    batch_size=config.batch_size,
  )
  optimizer = optim.create_optimizer(unit, schedule, shapes, mask)
  preset = preprocess.get_preset(config.data.preset)
  gathered = sharding_lib.unshard_in_use(trained, mesh)
  train_step = steps.create_train_step(
    gathered, optimizer, mask, preset=preset, loss=config.loss.to_dict()
  )
  eval_step = steps.create_eval_step(gathered, preset=preset)
  whole = mesh_lib.replicated(mesh)
  rows = mesh_lib.batch_sharding(mesh)
  params = sharding_lib.param_shardings(shapes, mask, mesh)
  gather = _create_gather(config, model)
  state = steps.TrainState(
    step=whole,
    params=params,
    opt_state=whole,
    rng=whole,
    peak_lr=whole,
    wd=whole,
    numbers=whole,
  )
  return Program(
    model=model,
    trained=trained,
    model_kwargs=kwargs,
    mask=mask,
    optimizer=optimizer,
    schedule=schedule,
    total_steps=total_steps,
    steps_per_epoch=steps_per_epoch,
    train_step=jax.jit(
      train_step,
      donate_argnums=0,
      in_shardings=(state, rows),
      out_shardings=(state, whole),
    ),
    eval_step=jax.jit(
      eval_step,
      in_shardings=(params, rows, whole),
      out_shardings=whole,
    ),
    mesh=mesh,
    state_sharding=state,
    train_function=train_step,
    eval_function=eval_step,
    numbers=numbers,
    feature_step=jax.jit(
      steps.create_feature_step(gathered, preset=preset),
      in_shardings=({"backbone": params["backbone"]}, rows),
      out_shardings=whole,
    ),
    train_call=jax.jit(
      calls.create_train_call(
        train_step,
        mask,
        order=resident.epoch_order,
        gather=gather,
        batch_size=config.batch_size,
        sharding=rows,
      ),
      donate_argnums=0,
      in_shardings=(state, whole, whole, whole),
      out_shardings=(state, whole, whole),
    ),
    gather=gather,
    batch_size=config.batch_size,
  )


def _trained(config: ConfigDict, model: PromptedClassifier) -> PromptedClassifier:
  width, classes = config.head_width, model.head.num_classes
  if not width:
    return model
  if width < classes:
    raise ValueError(
      f"config.head_width is {width}, but the task has {classes} classes; expected at "
      f"least {classes}, or 0 for as many columns as there are classes."
    )
  return model.clone(head=Head(width, config.head_init))


def _create_gather(config: ConfigDict, model: PromptedClassifier) -> Callable:
  return functools.partial(
    resident.gather,
    batch_size=config.batch_size,
    preset=preprocess.get_preset(config.data.preset),
    image_size=model.backbone.image_size,
  )


def peak_lr(config: ConfigDict) -> float:
  """Returns the lr at the schedule's peak, scaled by the batch if asked for."""
  scale = config.optim.lr_scale_by_batch
  images = config.batch_size * config.optim.accumulate_steps
  return config.optim.lr * (images / scale if scale else 1.0)


def numbers_of(config: ConfigDict, program: Program) -> dict[str, np.ndarray]:
  """Returns what is data rather than compiled into the steps; see `TrainState`."""
  given = config_lib.method_kwargs(config)
  numbers = {name: np.asarray(given[name], np.float32) for name in program.numbers}
  if config.head_width:
    # Also where no column is left over: those of its suite have some.
    numbers["num_classes"] = np.asarray(program.model.head.num_classes, np.int32)
  return numbers


def create_state(
  config: ConfigDict, program: Program, params: Mapping[str, Any]
) -> steps.TrainState:
  """Returns the state before the first step, placed on the devices."""
  sharding = program.state_sharding
  # On the host until each device gets its part: none has room for all of it.
  params = wide_head.widen(params, program.trained.head.num_classes)
  params = sharding_lib.device_put(
    _stored(config, program, params, np.asarray), sharding.params
  )
  # Donated: there is no second copy of the parameters, not even for a moment.
  create = jax.jit(
    functools.partial(_new_state, config, program),
    out_shardings=sharding,
    donate_argnums=0,
  )
  return create(params)


def abstract_state(config: ConfigDict, program: Program) -> steps.TrainState:
  """Returns what `create_state` does as `jax.ShapeDtypeStruct`; allocates nothing."""

  def cast(leaf, dtype):
    return jax.ShapeDtypeStruct(leaf.shape, dtype)

  params = _stored(config, program, parameters.param_shapes(program.trained), cast)
  return jax.eval_shape(functools.partial(_new_state, config, program), params)


def _stored(config: ConfigDict, program: Program, params, cast) -> dict[str, Any]:
  """Returns the parameters in the types that they have on the devices."""
  trainable, frozen = trees.split(params, program.mask)
  dtype = jnp.dtype(config.backbone.frozen_dtype)
  return trees.merge(
    {name: cast(leaf, leaf.dtype) for name, leaf in trainable.items()},
    {name: cast(leaf, dtype) for name, leaf in frozen.items()},
  )


def _new_state(config: ConfigDict, program: Program, params) -> steps.TrainState:
  return steps.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=program.optimizer.init(params),
    rng=jax.random.key(config.seed),
    peak_lr=jnp.float32(peak_lr(config)),
    wd=jnp.float32(config.optim.wd),
    numbers=numbers_of(config, program),
  )
