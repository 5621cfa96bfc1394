"""The parameters that a run starts from: their shapes, drawn or loaded."""

from collections.abc import Iterable, Mapping
import functools
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import trees
from insvp_jax.models import mimetic
from insvp_jax.models import weights as weights_lib
from insvp_jax.models.classifier import PromptedClassifier


def param_shapes(model: PromptedClassifier) -> dict[str, Any]:
  """Returns the tree of parameters as `jax.ShapeDtypeStruct`."""
  return jax.eval_shape(functools.partial(_init, model), jax.random.key(0))


def _init(model: PromptedClassifier, key: jax.Array) -> dict[str, Any]:
  size = model.backbone.image_size
  return model.init(key, jnp.zeros((1, size, size, 3)))["params"]


def load_weights(
  config: ConfigDict, model: PromptedClassifier
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
  """Returns (backbone parameters or None for random ones, the backbone's identity).

  The identity is stored with every run: `id` (path, name or "random"), `sha256` of
  the file, and for random weights the seed they were drawn from.
  """
  source = config.backbone.weights or config.backbone.name
  if "/" in config.backbone.name and not config.backbone.weights:
    raise ValueError(
      f"config.backbone.name is {config.backbone.name!r}, an architecture without "
      "weights. Set config.backbone.weights to a path or to a release's name, or to "
      "'random' to train from scratch."
    )
  if source == "random":
    return None, {"id": "random", "init": config.backbone.init}
  path = weights_lib.resolve(source)
  weights = weights_lib.load_backbone(str(path), model, report=logging.info)
  identity = {"id": source, "sha256": weights_lib.file_digest(path)}
  if source not in weights_lib.RELEASES:
    # The path as given may be relative; a run is loaded from anywhere.
    identity["source"] = str(path.resolve())
  return weights, identity


def identify(
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


def init_params(
  model: PromptedClassifier,
  seed: int,
  weights: Mapping[str, Any] | None = None,
  init: str = "default",
) -> dict[str, Any]:
  """Returns host parameters: fresh prompter and head over `weights`.

  Args:
    model: the classifier.
    seed: of everything that is drawn.
    weights: the backbone's parameters; None draws them too.
    init: of a drawn backbone: "default" or "mimetic".
  """
  return init_members(model, (seed,), weights, init)[seed]


def init_members(
  model: PromptedClassifier,
  seeds: Iterable[int],
  weights: Mapping[str, Any] | None = None,
  init: str = "default",
) -> dict[int, dict[str, Any]]:
  """Returns the host parameters of each seed; see `init_params`."""
  drop = weights is not None

  def fresh(key):
    params = _init(model, key)
    # XLA removes what is not returned: loaded weights cost no random numbers.
    return {k: v for k, v in params.items() if not (drop and k == "backbone")}

  # Always on the CPU: other devices round some distributions differently.
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    draw = jax.jit(fresh)
    members = {seed: jax.device_get(draw(jax.random.key(seed))) for seed in seeds}
  for seed, params in members.items():
    if weights is not None:
      params["backbone"] = jax.tree.map(np.asarray, dict(weights))
    elif init == "mimetic":
      params["backbone"] = mimetic.mimetic(params["backbone"], seed)
  return members
