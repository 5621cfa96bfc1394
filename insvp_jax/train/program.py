"""A model with its optimizer and its compiled steps: what runs of one shape share."""

from collections.abc import Mapping
import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from insvp_jax import config as config_lib
from insvp_jax.data import preprocess
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.distributed import processes
from insvp_jax.distributed import sharding as sharding_lib
from insvp_jax.methods import create_method
from insvp_jax.methods.base import Apply
from insvp_jax.methods.hooks import UNCHANGED
from insvp_jax.models import quantized
from insvp_jax.models import weights as weights_lib
from insvp_jax.models.classifier import (
  PromptedClassifier,
  block_reads,
  create_backbone,
  create_model,
)
from insvp_jax.train import losses, microbatch, optim, steps
from insvp_jax.train import state as state_lib
from insvp_jax.train.objectives import Objective, objective_of


@dataclasses.dataclass(frozen=True)
class Program:
  """A model with its optimizer and its jitted steps.

  Attributes:
    model: the classifier.
    draws: its parameters as a seed draws them.
    mask: bool tree of the trainable parameters.
    carried: bool tree of those that a step changes: the trainable ones, and those that
      it sets without a gradient; see `Method.updated_patterns`.
    optimizer: over the full tree, for a learning rate of 1.
    schedule: the lr schedule with a peak of 1, by train step.
    total_steps: batches of the whole run.
    steps_per_epoch: batches of an epoch.
    batch_size: of training.
    num_parts: in which a train step computes a batch of images; see `microbatch`.
    mesh: all devices, from `mesh.create_mesh`.
    state_sharding: where the state lies: a `TrainState` of shardings.
    functions: what the steps compute, to be jitted.
    objective: of the task: target, loss and metric.
    hparams: names of the method's fields that come with the state instead of being
      compiled into the steps.
    balanced_classes: number of classes that are shown alike; 0 with uniform sampling.
  """

  model: PromptedClassifier
  draws: state_lib.Draws
  mask: Mapping[str, Any]
  carried: Mapping[str, Any]
  optimizer: optax.GradientTransformation
  schedule: optim.Schedule
  total_steps: int
  steps_per_epoch: int
  batch_size: int
  num_parts: int
  mesh: jax.sharding.Mesh
  state_sharding: state_lib.TrainState
  functions: steps.StepFunctions
  objective: Objective
  hparams: tuple[str, ...] = ()
  balanced_classes: int = 0

  @property
  def shapes(self) -> dict[str, Any]:
    """The parameters as `jax.ShapeDtypeStruct`."""
    return self.draws.shapes

  @functools.cached_property
  def lr_factor(self) -> Any:
    """Jitted `schedule`: a program, and not one for each of its operations."""
    return jax.jit(self.schedule)

  @functools.cached_property
  def new_state(self) -> Any:
    """Jitted `(params, *, seed, peak_lr, wd, hparams) -> state` before the first step.

    It donates the parameters: there is no second copy of them, not even for a moment.
    """

    def new_state(params, *, seed, peak_lr, wd, hparams) -> state_lib.TrainState:
      return state_lib.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=self.optimizer.init(params),
        rng=jax.random.key(seed),
        peak_lr=peak_lr,
        wd=wd,
        hparams=hparams,
      )

    return jax.jit(new_state, out_shardings=self.state_sharding, donate_argnums=0)

  @functools.cached_property
  def train_step(self) -> Any:
    """Jitted `(state, batch) -> (state, metrics)`; donates the state."""
    replicated, sharded = self._shardings

    def train_step(state, batch):
      # As `multi_step` does: a function is traced once for arguments of one type, to
      # which JAX counts the mesh that they were put on.
      return self.functions.train(
        state, jax.lax.with_sharding_constraint(batch, sharded)
      )

    return jax.jit(
      train_step,
      donate_argnums=0,
      in_shardings=(self.state_sharding, sharded),
      out_shardings=(self.state_sharding, replicated),
      compiler_options=self.compiler_options,
    )

  @functools.cached_property
  def multi_step(self) -> Any:
    """Jitted `(state, arrays, seed, count) -> (state, metrics)`; donates the state.

    See `steps.create_multi_step`.
    """
    replicated, sharded = self._shardings
    return jax.jit(
      steps.create_multi_step(
        self.functions,
        self.carried,
        batch_size=self.batch_size,
        sharding=sharded,
        balanced_classes=self.balanced_classes,
      ),
      donate_argnums=0,
      in_shardings=(self.state_sharding, replicated, replicated, replicated),
      out_shardings=(self.state_sharding, replicated),
      compiler_options=self.compiler_options,
    )

  @functools.cached_property
  def eval_step(self) -> Any:
    """Jitted `(params, batch, hparams) -> outcome`; see `steps.create_eval_step`."""
    replicated, sharded = self._shardings
    return jax.jit(
      self.functions.evaluate,
      in_shardings=(self.state_sharding.params, sharded, replicated),
      out_shardings=replicated,
      compiler_options=self.compiler_options,
    )

  @functools.cached_property
  def feature_step(self) -> Any:
    """Jitted `({"backbone": params}, batch) -> features`, in full on every device."""
    replicated, sharded = self._shardings
    backbone = {"backbone": self.state_sharding.params["backbone"]}
    return jax.jit(
      self.functions.features,
      in_shardings=(backbone, sharded),
      out_shardings=replicated,
      compiler_options=self.compiler_options,
    )

  @functools.cached_property
  def route_step(self) -> Any:
    """Jitted `(params, batch) -> route`, in full on every device."""
    replicated, sharded = self._shardings
    # Parameters lie where they are: of several trials they are taken out of a stack.
    return jax.jit(
      self.functions.route,
      in_shardings=(None, sharded),
      out_shardings=replicated,
      compiler_options=self.compiler_options,
    )

  @functools.cached_property
  def apply(self) -> Apply:
    """What a method computes with, jitted; see `preparation`."""
    model = sharding_lib.unshard_in_use(self.model, self.mesh)
    whole = functools.partial(
      jax.jit,
      out_shardings=mesh_lib.replicated(self.mesh),
      compiler_options=self.compiler_options,
    )

    def encode(module, images, adaptation):
      tokens = module.backbone.embed(images, adaptation)
      return module.backbone.encode(tokens, adaptation)

    @whole
    def backbone(params, images, adaptation):
      feature, sown = model.apply(
        {"params": params}, images, adaptation, method=encode, mutable=["reads"]
      )
      reads = sown.get("reads")
      return feature, reads and block_reads(reads)

    @whole
    def logits(params, images):
      return model.apply({"params": params}, images)

    def apply_backbone(params, images, adaptation=None):
      return backbone(params, images, UNCHANGED if adaptation is None else adaptation)

    @whole
    def source_logits(params, images):
      return model.apply({"params": params}, images, method="source_logits")

    return Apply(apply_backbone, logits, source_logits)

  @property
  def compiler_options(self) -> dict[str, str] | None:
    """What `jax.jit` has to be told for functions of the parameters."""
    platform = mesh_lib.platform(self.mesh)
    return quantized.compiler_options(self.state_sharding.params, platform)

  @property
  def _shardings(self):
    """(of what every device holds in full, of batches: their first axis is split)."""
    return mesh_lib.replicated(self.mesh), mesh_lib.batch_sharding(self.mesh)


def create_program(
  config: ConfigDict,
  num_classes: int,
  num_train: int,
  mesh: jax.sharding.Mesh,
  hparams: tuple[str, ...] = (),
  *,
  class_counts: np.ndarray | None = None,
  like: Program | None = None,
) -> Program:
  """Builds model, mask, optimizer and steps; runs and compiles nothing.

  Args:
    config: the whole configuration. A `batch_size` of 0 is replaced in it by what it
      stands for, so that all that goes by the config, and what is stored, say the same.
    num_classes: k.
    num_train: number of training images.
    mesh: where the batches will lie.
    hparams: fields of the method that come with the state instead of being compiled
      into the steps; names of its `HPARAMS`.
    class_counts: training images of each class, int [k], which `loss.class_weights`
      asks for; None where nothing will be trained.
    like: another program, whose draws are these where the model is equal.

  Raises:
    ValueError: something in the config does not fit; see the message.
  """
  if jax.config.jax_enable_x64:
    # Its random numbers are others, so the same seed would be another run.
    raise ValueError(
      "JAX computes in 64 bits here, but everything of a run is float32: unset "
      "JAX_ENABLE_X64, or call jax.config.update('jax_enable_x64', False)."
    )
  if config.batch_size == 0:
    config.batch_size = config_lib.automatic_batch_size(num_train, mesh.size)
    if config.batch_size < config_lib.LARGEST_AUTOMATIC_BATCH:
      processes.print_once(
        f"note: {num_train} training images: batches of {config.batch_size} (chosen by "
        "config.batch_size=0)",
        file=sys.stderr,
      )
  mesh_lib.check_batch_size(config.batch_size, mesh)
  model = create_model(**model_kwargs(config, num_classes))
  total_steps, steps_per_epoch = config_lib.num_steps(config, num_train)
  is_equal = like is not None and like.model == model
  draws = like.draws if is_equal else state_lib.Draws(model)
  shapes = draws.shapes
  mask, carried = model.masks(shapes)
  schedule = optim.create_schedule(
    config.optim, total_steps=total_steps, steps_per_epoch=steps_per_epoch
  )
  optimizer = optim.create_optimizer(config.optim, shapes, mask)
  weights = None
  if config.loss.class_weights and class_counts is not None:
    weights = losses.class_weights(class_counts)
  objective = objective_of(config.task).create(config, num_classes, weights)
  # A step that sets parameters without a gradient sets them from the whole batch.
  num_parts = microbatch.num_parts(
    config, model.backbone.spec, mesh, needs_whole=carried != mask
  )
  return Program(
    model=model,
    draws=draws,
    mask=mask,
    carried=carried,
    optimizer=optimizer,
    schedule=schedule,
    total_steps=total_steps,
    steps_per_epoch=steps_per_epoch,
    batch_size=config.batch_size,
    num_parts=num_parts,
    mesh=mesh,
    state_sharding=state_lib.create_sharding(
      state_lib.cast_frozen(shapes, mask, config), mask, mesh
    ),
    functions=steps.create_step_functions(
      sharding_lib.unshard_in_use(model, mesh),
      optimizer,
      schedule,
      mask,
      config,
      objective,
      num_parts,
    ),
    objective=objective,
    hparams=hparams,
    balanced_classes=num_classes if config.data.sampling == "balanced" else 0,
  )


def fill_preset(config: ConfigDict) -> None:
  """Writes the preset that a config leaves open: how its weights' pixels were made.

  Raises:
    ValueError, FileNotFoundError: there are no such weights; see the message.
  """
  if not config.data.preset:
    source = config.backbone.weights or config.backbone.name
    pixels = weights_lib.pixels_of(source) or {}
    # What our own releases were trained on is the protocol's own preset.
    says_all = "resize" in pixels or "preset" in pixels
    default = preprocess.DEFAULT_PRESET
    config.data.preset = preset_of(pixels) if says_all else default


def preset_of(pixels: Mapping[str, Any]) -> str:
  """Returns the name of the preset of weights, as from `weights.pixels_of`."""
  if "preset" not in pixels:
    return preprocess.preset_name(**pixels)
  preset = preprocess.get_preset(pixels["preset"])
  if not preset.augments:
    return preset.name
  # How it was trained, as one sees it in evaluation.
  crop = preset.crop / preset.margin
  return preprocess.preset_name(preset.mean, preset.std, preset.resize, crop)


def model_kwargs(config: ConfigDict, num_classes: int) -> dict[str, Any]:
  """Returns the arguments of `create_model` that a config asks for."""
  fill_preset(config)
  preset = preprocess.get_preset(config.data.preset)
  return {
    "backbone": config.backbone.name,
    "method": config.method,
    "num_classes": num_classes,
    "image_size": config.image_size,
    "backbone_kwargs": config_lib.backbone_kwargs(config),
    "method_kwargs": config_lib.method_kwargs(config),
    "head_init": config.head_init,
    "mean": preset.mean,
    "std": preset.std,
    **objective_of(config.task).model_kwargs(config),
  }


def input_size(config: ConfigDict) -> int:
  """Returns the pixels per side of the images that a config's model takes."""
  backbone = create_backbone(
    config.backbone.name, config.image_size, config_lib.backbone_kwargs(config)
  )
  fields = config_lib.method_kwargs(config)
  return create_method(config.method, backbone.spec, **fields).input_size()


def create_state(
  config: ConfigDict, program: Program, params: Mapping[str, Any]
) -> state_lib.TrainState:
  """Returns the state before the first step, placed on the devices.

  Args:
    config: the whole configuration.
    program: made for it.
    params: from `state.init_params`.
  """
  params = state_lib.cast_frozen(params, program.mask, config)
  # On the host until each device gets its part: no device may have room for all.
  params = sharding_lib.device_put(params, program.state_sharding.params)
  return program.new_state(params, **_state_numbers(config, program))


def abstract_state(config: ConfigDict, program: Program) -> state_lib.TrainState:
  """Returns what `create_state` does as `jax.ShapeDtypeStruct`; allocates nothing."""
  params = state_lib.cast_frozen(program.shapes, program.mask, config)
  return jax.eval_shape(program.new_state, params, **_state_numbers(config, program))


def _state_numbers(config: ConfigDict, program: Program) -> dict[str, Any]:
  """Returns what a run's first state holds besides parameters."""
  peak_lr = optim.peak_lr(config.optim, config.batch_size)
  return {
    "seed": np.uint32(config.seed),
    "peak_lr": np.float32(peak_lr),
    "wd": np.float32(config.optim.wd),
    "hparams": state_lib.hparams_of(config, program.hparams),
  }
