"""A method with all that is timed of it: the real steps on made-up images."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from benchmarks import parts
from insvp_jax import trees
from insvp_jax.config import defaults, method_sections
from insvp_jax.data import ArraySplit, pipeline, preprocess
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.methods import METHODS
from insvp_jax.train import flops
from insvp_jax.train import program as program_lib
from insvp_jax.train import state as state_lib

# Names beside those of methods: a method and its fields. 16 prompts, and these kernels
# with them, are what the released code takes for most of its data sets.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
  "insvp_release": ("insvp", {"preset": "release"}),
  "insvp_release16": (
    "insvp",
    {"preset": "release", "prompt_length": 16, "specific_kernels": (7, 9, 3)},
  ),
}
NAMES = (*METHODS, *VARIANTS)
PRESET = "vtab"


def create_config(
  name: str,
  *,
  backbone: str,
  batch_size: int,
  dtype: str,
  image_size: int = 0,
  fields: Mapping[str, Any] | None = None,
  fused_attention: bool = False,
  frozen_dtype: str = "",
  microbatch_size: int = 0,
) -> ConfigDict:
  """Returns the config of a contestant.

  Args:
    name: of a method, or a key of `VARIANTS`.
    backbone: a variant ("B/16") or a release ("boxed"); its weights are random.
    batch_size: b, for training and evaluation.
    dtype: "float32" or "bfloat16": of the computation.
    image_size: pixels per side; 0 is the backbone's own.
    fields: of the method, over those of the variant.
    fused_attention: whether cuDNN attends.
    frozen_dtype: what frozen weights are stored as; "" is `dtype`.
    microbatch_size: images of a train step that are computed at once; 0 is automatic.

  Raises:
    ValueError: a field that the method has not.
  """
  method, chosen = VARIANTS.get(name, (name, {}))
  config = defaults()
  config.method = method
  config.batch_size = config.eval_batch_size = batch_size
  config.microbatch_size = microbatch_size
  config.image_size = image_size
  config.backbone.name, config.backbone.weights = backbone, "random"
  config.backbone.dtype, config.backbone.frozen_dtype = dtype, frozen_dtype or dtype
  config.backbone.fused_attention = fused_attention
  config.data.preset = PRESET
  config.total_steps = 10**6  # the schedule's length is nothing to the speed
  for field, value in {**chosen, **(fields or {})}.items():
    if method not in method_sections() or field not in config[method]:
      raise ValueError(f"{method} has no field {field!r}.")
    config[method][field] = tuple(value) if isinstance(value, list) else value
  return config


def _random_split(number: int, size: int, num_classes: int) -> ArraySplit:
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (number, size, size, 3), np.uint8)
  return ArraySplit(images, np.arange(number, dtype=np.int32) % num_classes)


class Contestant:
  """The compiled steps of a method, its state, and what is timed."""

  def __init__(self, config: ConfigDict, num_classes: int = 100):
    """Builds the steps; state and programs are made when they are first asked for.

    Args:
      config: from `create_config`.
      num_classes: k.

    Raises:
      ValueError: something in the config does not fit.
    """
    self.config = config
    mesh = mesh_lib.create_mesh()
    number = 4 * config.batch_size
    self.program = program_lib.create_program(config, num_classes, number, mesh)
    size = self.program.model.input_size
    split = _random_split(number, size, num_classes)
    self.preset = preprocess.get_preset(PRESET)
    self._rows = mesh_lib.batch_sharding(mesh)
    self._batches = pipeline.train_batches(
      split,
      batch_size=config.batch_size,
      seed=0,
      preset=self.preset,
      image_size=size,
      sharding=self._rows,
    )
    self._batch = next(self._batches)
    self._host = {
      "images": split.images[: config.batch_size],
      "labels": split.labels[: config.batch_size],
      "mask": np.ones(config.batch_size, np.float32),
    }

  @functools.cached_property
  def state(self) -> state_lib.TrainState:
    """The state after the steps that were taken."""
    params = self.program.draws.params(0)
    return program_lib.create_state(self.config, self.program, params)

  @functools.cached_property
  def _train(self) -> jax.stages.Compiled:
    return self.program.train_step.lower(self.state, self._batch).compile()

  @functools.cached_property
  def _evaluate(self) -> jax.stages.Compiled:
    return self.program.eval_step.lower(
      self.state.params, self._placed(), self.state.hparams
    ).compile()

  @functools.cached_property
  def _predict(self) -> jax.stages.Compiled:
    model, size = self.program.model, self.program.model.input_size

    def probabilities(params, images):
      inputs = preprocess.eval_preprocess(self.preset, images, size)
      return jax.nn.softmax(model.apply({"params": params}, inputs))

    images = self._placed()["images"]
    options = self.program.compiler_options
    compiled = jax.jit(probabilities, compiler_options=options)
    return compiled.lower(self.state.params, images).compile()

  def _placed(self) -> dict[str, jax.Array]:
    return jax.device_put(self._host, self._rows)

  def train(self) -> Any:
    """Takes a batch and a step."""
    self.state, metrics = self._train(self.state, next(self._batches))
    return metrics

  def eval(self) -> Any:
    """Brings a batch to the devices and counts the correct ones."""
    return self._evaluate(self.state.params, self._placed(), self.state.hparams)

  def predict(self) -> np.ndarray:
    """Brings a batch to the devices and probabilities back."""
    found = self._predict(self.state.params, self._placed()["images"])
    return jax.device_get(found)

  def whole(self, mode: str) -> Callable[[], Any]:
    """Returns what does one step of "train", "eval" or "predict"."""
    return {"train": self.train, "eval": self.eval}.get(mode, self.predict)

  def part_functions(self, mode: str) -> dict[str, Callable[[], Any]]:
    """Returns what `parts_of` needs the seconds of, the whole excepted."""
    normalise = jax.jit(lambda x: preprocess.normalise(self.preset, x))
    source = self._placed if mode != "train" else lambda: next(self._batches)
    found = {"input": lambda: normalise(source()["images"])}
    if mode == "train":
      return found | parts.train_functions(
        self.program, lambda: self.state, self._batch, self.preset
      )
    images = normalise(self._placed()["images"])
    return found | parts.evaluation_functions(self.program, self.state.params, images)

  def parts_of(self, mode: str, seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns the seconds of each part of a mode."""
    if mode == "train":
      return parts.train_parts(seconds, self.program.num_parts)
    return parts.evaluation_parts(seconds, mode)

  def compiled(self, mode: str) -> jax.stages.Compiled:
    """Returns the compiled program of a mode."""
    programs = {"train": "_train", "eval": "_evaluate"}
    return getattr(self, programs.get(mode, "_predict"))

  def memory_mib(self, mode: str) -> float:
    """Returns what the compiled program needs at once: arrays and temporaries, MiB."""
    found = self.compiled(mode).memory_analysis()
    total = found.argument_size_in_bytes + found.temp_size_in_bytes
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return (total + new) / 2**20

  def needed_flops(self, mode: str) -> int:
    """Returns the FLOPs of the matrix products that a mode cannot do without.

    InsVP's convolutions count nothing: they can be computed as spectra, which are no
    products. So the fraction of the ceiling that is reached is never overstated.
    """
    config = self.config.copy_and_resolve_references()
    config.insvp.conv = "fft"
    number = 4 * config.batch_size
    classes = self.program.model.head.num_classes
    program = program_lib.create_program(config, classes, number, self.program.mesh)
    state = program_lib.abstract_state(config, program)
    if mode == "train":
      traced = program.train_step.trace(state, self._batch)
    else:
      batch = {
        k: jax.ShapeDtypeStruct(v.shape, jnp.asarray(v).dtype)
        for k, v in self._host.items()
      }
      traced = program.eval_step.trace(state.params, batch, state.hparams)
    return flops.count(traced.jaxpr)

  @property
  def trainable(self) -> int:
    """The number of trainable parameters."""
    return trees.count(trees.split(self.program.shapes, self.program.mask)[0])
