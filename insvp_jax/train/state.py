"""The state of a run: what it holds, what it starts from, where it lies.

`TrainState` is all that changes while training. Its parameters are drawn from a seed,
with the backbone's loaded from a file (`load_weights`); `program.create_state` places
them on the devices.
"""

from collections.abc import Callable, Mapping
import functools
import re
from typing import Any

from absl import logging
import flax
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import config as config_lib
from insvp_jax import trees
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.distributed import sharding as sharding_lib
from insvp_jax.methods import parts_of
from insvp_jax.models import architectures, mimetic, quantized
from insvp_jax.models import weights as weights_lib
from insvp_jax.models.classifier import PromptedClassifier


@flax.struct.dataclass
class TrainState:
  """All that changes while training.

  The annotations are wide because JAX's transformations put shapes, shardings and
  masks where the arrays are.

  Attributes:
    step: number of batches seen, int32 []. It is the one clock of a run: the lr, the
      order of the data and all random draws are functions of it.
    params: {"backbone", "prompter", "head"}, trainable and frozen together.
    opt_state: of the trainable leaves only.
    rng: the run's typed key; step s draws from fold_in(rng, s).
    peak_lr: float32 []; multiplies the schedule, which has a peak of 1. As data rather
      than a constant it lets one compiled step serve a whole search.
    wd: float32 []; the weight decay. None leaves it the optimizer's own constant.
    hparams: {name: float32 [] or [2]} of the method's fields that are data (see
      `Method.hparam`). None or {} for none.
  """

  step: Any
  params: Any
  opt_state: Any
  rng: Any
  peak_lr: Any
  wd: Any = None
  hparams: Any = None


# The parameters that a run starts from.

# Draws run once, so that LLVM's usual level 2 takes seconds and gains none. At 1 the
# numbers are the same to the bit; at 0 they are not.
_DRAW_OPTIONS = {"xla_backend_optimization_level": 1}


def param_shapes(model: PromptedClassifier) -> dict[str, Any]:
  """Returns the tree of parameters as `jax.ShapeDtypeStruct`."""
  return jax.eval_shape(functools.partial(_init, model), np.uint32(0))


def _init(model: PromptedClassifier, seed: Any) -> dict[str, Any]:
  size = model.input_size
  return model.init(jax.random.key(seed), jnp.zeros((1, size, size, 3)))["params"]


class Draws:
  """The parameters of a model as they are drawn from a seed; traced and compiled once.

  Attributes:
    shapes: the tree of parameters as `jax.ShapeDtypeStruct`.
  """

  def __init__(self, model: PromptedClassifier):
    """Traces the model; computes and compiles nothing."""
    init = jax.jit(functools.partial(_init, model))
    self.shapes = jax.eval_shape(init, np.uint32(0))
    # Where JAX is told to optimize nothing, that is less.
    options = (
      None if jax.config.read("jax_disable_most_optimizations") else _DRAW_OPTIONS
    )

    @functools.partial(
      jax.jit, static_argnames="with_backbone", compiler_options=options
    )
    def draw(seed, *, with_backbone: bool):
      params = init(seed)
      # What is not returned is not computed: loaded weights cost no random numbers.
      return {k: v for k, v in params.items() if with_backbone or k != "backbone"}

    self._draw = draw

  def params(self, seed: int, *, with_backbone: bool = True) -> dict[str, Any]:
    """Returns the parameters of a seed on the host, with or without the backbone's."""
    # Always on the CPU: other devices round some distributions differently. The seed
    # lies there, which does not trace the model again as another default device would.
    cpu = jax.local_devices(backend="cpu")[0]
    placed = jax.device_put(np.uint32(seed), cpu)
    return jax.device_get(self._draw(placed, with_backbone=with_backbone))


def init_params(
  model: PromptedClassifier,
  seed: int,
  weights: Mapping[str, Any] | None = None,
  init: str = "default",
  *,
  draws: Draws | None = None,
) -> dict[str, Any]:
  """Returns parameters on the host: fresh prompter and head over a backbone.

  Args:
    model: the classifier.
    seed: of everything that is drawn.
    weights: the backbone's parameters; None draws them too.
    init: of a drawn backbone: "default" or "mimetic".
    draws: of the model, where they have been made.
  """
  has_weights = weights is not None
  draws = draws or Draws(model)
  params = draws.params(seed, with_backbone=not has_weights)
  if has_weights:
    params["backbone"] = jax.tree.map(np.asarray, dict(weights))
  elif init == "mimetic":
    params["backbone"] = mimetic.mimetic(params["backbone"], seed)
  return params


def load_weights(
  config: ConfigDict,
  model: PromptedClassifier,
  report: Callable[[str], Any] = logging.info,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
  """Returns (backbone parameters or None for random ones, the backbone's identity).

  The identity is stored with every run: `id` (path, name or "random"), `sha256` of
  the file, and for random weights how they are initialised.

  Args:
    config: the whole configuration.
    model: the classifier.
    report: called with one line that says what was loaded from where; not called for
      random weights.

  Raises:
    ValueError, FileNotFoundError: there are no such weights; see the message.
  """
  source = config.backbone.weights or config.backbone.name
  is_variant = architectures.is_variant(config.backbone.name)
  if is_variant and not config.backbone.weights:
    raise ValueError(
      f"config.backbone.name is {config.backbone.name!r}, an architecture without "
      "weights. Set config.backbone.weights to a path or to a release's name, or to "
      "'random' to train from scratch."
    )
  if source == "random":
    return None, {"id": "random", "init": config.backbone.init}
  path = weights_lib.resolve(source)
  weights = weights_lib.load_backbone(
    str(path),
    model,
    report=lambda loaded: report(f"backbone {config.backbone.name}: {loaded}"),
  )
  identity = {"id": source, "sha256": weights_lib.file_digest(path)}
  if source not in weights_lib.RELEASES and not source.startswith(("timm/", "hf-hub:")):
    # The path as given may be relative, but a run can be loaded from any folder.
    identity["source"] = str(path.resolve())
  return weights, identity


def backbone_identity(
  identity: Mapping[str, Any], seed: int, backbone: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the identity that is stored, with seed and digest of random weights.

  Args:
    identity: from `load_weights`.
    seed: that random weights were drawn with.
    backbone: the parameters before training.
  """
  if identity["id"] != "random":
    return dict(identity)
  return {**identity, "seed": seed, "sha256": trees.digest(backbone)}


# The state on the devices.


def create_sharding(
  shapes: Mapping[str, Any], mask: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> TrainState:
  """Returns where each part of a state lies, as a `TrainState` of shardings.

  Only frozen weights of the backbone may be split over devices; all else is whole on
  each of them.

  Args:
    shapes: the tree of parameters as they are stored (see `cast_frozen`), arrays or
      `jax.ShapeDtypeStruct`.
    mask: bool tree, True where trainable.
    mesh: from `mesh.create_mesh`.
  """
  replicated = mesh_lib.replicated(mesh)
  return TrainState(
    step=replicated,
    params=sharding_lib.param_shardings(shapes, mask, mesh),
    opt_state=replicated,
    rng=replicated,
    peak_lr=replicated,
    wd=replicated,
    hparams=replicated,
  )


def cast_frozen(
  params: Mapping[str, Any], mask: Mapping[str, Any], config: ConfigDict
) -> dict[str, Any]:
  """Returns parameters in the types that they have on the devices.

  Frozen weights of the backbone are stored as `config.backbone.frozen_dtype`. All else
  stays as it is, a frozen prompter too: it is small and stored with the run.

  Args:
    params: arrays, which are returned on the host, or `jax.ShapeDtypeStruct`.
    mask: bool tree, True where trainable.
    config: the whole configuration.

  Raises:
    ValueError: a weight that is not finite cannot be stored in 8 bits.
  """
  is_trainable = trees.flatten(mask)
  dtype = config.backbone.frozen_dtype
  return trees.unflatten(
    {
      name: cast_weight(name, leaf, dtype)
      if name.startswith("backbone/") and not is_trainable[name]
      else _cast(leaf, leaf.dtype)
      for name, leaf in trees.flatten(params).items()
    }
  )


def cast_weight(name: str, leaf: Any, dtype: str) -> Any:
  """Returns a frozen weight of the backbone in the type that it is stored in.

  Args:
    name: '/'-joined, from "backbone" on.
    leaf: an array, or a `jax.ShapeDtypeStruct`.
    dtype: a value of `config.backbone.frozen_dtype`. "int8" makes `Quantized` of
      kernels and leaves biases, norms, positions and tokens as they are.

  Raises:
    ValueError: a weight that is not finite cannot be stored in 8 bits.
  """
  if dtype != "int8":
    return _cast(leaf, jnp.dtype(dtype))
  if not quantized.is_kernel(name):
    return _cast(leaf, leaf.dtype)
  is_stacked = re.fullmatch(sharding_lib.SCANNED_BLOCKS, name) is not None
  axes = quantized.input_axes(name, len(leaf.shape), is_stacked)
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return quantized.abstract(leaf.shape, axes)
  return quantized.quantize(np.asarray(leaf), axes, name)


def _cast(leaf: Any, dtype: Any) -> Any:
  """Returns an array on the host, or a `jax.ShapeDtypeStruct`, in another type."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape, dtype)
  return np.asarray(leaf, dtype)


def hparams_of(config: ConfigDict, names: tuple[str, ...]) -> dict[str, np.ndarray]:
  """Returns the values of those fields of the method that are data.

  Args:
    config: the whole configuration.
    names: of the fields; see `Program.hparams`.
  """
  fields = config_lib.method_kwargs(config)
  if len(parts := parts_of(config.method)) > 1:
    # A name that several have was set for each of them alike.
    fields = {k: v for part in parts for k, v in fields.get(part, {}).items()}
  return {name: np.asarray(fields[name], np.float32) for name in names}
