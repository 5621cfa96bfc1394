"""Makes small runs without training: drawn weights, saved as a trainer would."""

from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from insvp_jax import trees
from insvp_jax.checkpoints.checkpointer import Checkpointer
from insvp_jax.logs.writers import write_json
from insvp_jax.models import weights
from insvp_jax.models.classifier import create_model

CLASSES = ("ant", "bee", "$cat$")
SIZE = 16
METHOD_KWARGS = {
  "insvp": {"prompt_length": 2, "global_kernels": (3, 3), "global_dilations": (1, 1)},
  "vpt_deep": {"prompt_length": 2},
}


@flax.struct.dataclass
class State:
  step: jax.Array
  params: Any
  opt_state: Any
  rng: jax.Array


def make_params(model, seed=0):
  """Draws every leaf, so that no zero hides a mistake; compiles nothing."""
  images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    values = 0.2 * rng.normal(size=leaf.shape)
    # Variances have no sign.
    is_variance = path[-1].key == "var"
    return (np.abs(values) if is_variance else values).astype(np.float32)

  # Of a NumPy array `jnp.asarray` compiles a program for each shape.
  return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


def draw_backbone(shapes):
  """Returns weights of a tree of shapes, of about the size of trained ones.

  What JAX draws a backbone with takes longest to compile of all that a small test does.
  """
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key in ("scale", "var"):
      return rng.uniform(0.8, 1.2, leaf.shape).astype(leaf.dtype)
    fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 100
    return rng.normal(0, fan_in**-0.5, leaf.shape).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def make_run(
  workdir: Path, method="insvp", *, meta=None, sharding=None, patterns=None, **kwargs
) -> tuple[Path, Any, Any]:
  """Returns (workdir, model, params) of a saved run with its backbone beside it."""
  kwargs = {
    "backbone": "mu/4",
    "method": method,
    "num_classes": len(CLASSES),
    "image_size": SIZE,
    "method_kwargs": METHOD_KWARGS.get(method, {}),
    "backbone_kwargs": {"depth": 2},
  } | kwargs
  model = create_model(**kwargs)
  params = make_params(model)
  backbone_file = workdir / "backbone.npz"
  weights.save_backbone(params["backbone"], backbone_file)
  mask = trees.mask(params, patterns or model.prompter.trainable_patterns())
  flat = trees.flatten(mask)
  description = {
    "format": 1,
    "model": kwargs,
    "backbone": {
      "id": str(backbone_file),
      "sha256": weights.file_digest(backbone_file),
    },
    "class_names": list(CLASSES),
    "preset": "vtab",
    "image_size": SIZE,
    "method": method,
    "task": "insects",
    "trainable": [name for name, chosen in flat.items() if chosen],
    "config": {"task": "digits"},
    "versions": {},
  } | (meta or {})
  state = State(jnp.int32(1), params, (), jax.random.key(0))
  if sharding is not None:
    state = jax.device_put(state, sharding)
  with Checkpointer(workdir, mask=mask, meta=description) as checkpointer:
    checkpointer.save(state, progress={})
  write_json(workdir / "result.json", {"test_accuracy": 0.5})
  return workdir, model, params
