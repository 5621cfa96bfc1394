"""Methods folded into their backbone: the same logits, from a plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax import trees
from insvp_jax.methods.hooks import OPERATIONS
from insvp_jax.models import merging
from insvp_jax.models.classifier import create_model
from insvp_jax.models.weights import npz

IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3), np.float32))
KWARGS = {
  "lora": {"rank": 2, "targets": ("query", "key", "out", "fc1", "fc2"), "scale": 0.5},
  "ssf": {},
  "repadapter": {"scale": 0.5},
  "fact_tt": {"rank": 3, "scale": 0.5},
  "fact_tk": {"rank": 3, "scale": 0.5},
}


def make_model(method, scan=False):
  parts = method.split("+")
  kwargs = {part: KWARGS.get(part, {}) for part in parts}
  return create_model(
    "mu/4",
    method,
    num_classes=3,
    image_size=8,
    backbone_kwargs={"depth": 2, "scan": scan},
    method_kwargs=kwargs if len(parts) > 1 else kwargs[method],
  )


def draw(model):
  """Draws all parameters, so that no zero hides a mistake."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]

  def leaf(name, shape):
    near_one = 1.0 if name.endswith("scale") else 0.0
    return np.float32(near_one + 0.2 * rng.standard_normal(shape))

  flat = trees.flatten(shapes)
  return trees.unflatten({name: leaf(name, x.shape) for name, x in flat.items()})


@functools.cache
def plain_logits():
  """Returns the compiled classifier without a method."""
  model = make_model("linear")
  return jax.jit(lambda params: model.apply({"params": params}, IMAGES))


# Of a combination RepAdapter changes what the other one finds: the output of a norm,
# the input of a projection.
@pytest.mark.parametrize("method", [*KWARGS, "repadapter+ssf", "repadapter+lora"])
def test_merged_logits(method):
  model = make_model(method)
  params = draw(model)
  logits = jax.jit(lambda params: model.apply({"params": params}, IMAGES))(params)
  merged = merging.merge(model, params)
  scale = np.max(np.abs(logits))
  actual = plain_logits()({"backbone": merged, "head": params["head"]})
  assert np.max(np.abs(actual - logits)) < 1e-5 * scale
  # There was something to fold.
  unmerged = plain_logits()({"backbone": params["backbone"], "head": params["head"]})
  assert np.max(np.abs(unmerged - logits)) > 1e-2 * scale

  # And the same where all blocks share their leaves.
  stacked = npz.stack(trees.flatten(params["backbone"]))
  scanned = {**params, "backbone": trees.unflatten(stacked)}
  scanned = trees.flatten(merging.merge(make_model(method, scan=True), scanned))
  expected = npz.stack(trees.flatten(merged))
  assert scanned.keys() == expected.keys() == stacked.keys()
  for name, leaf in scanned.items():
    assert leaf.dtype == stacked[name].dtype
    np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.mark.parametrize("scan", [False, True])
def test_sites_are_written_as_they_were_read(scan):
  params = draw(make_model("linear", scan))["backbone"]
  params["embedding"]["bias"] = jnp.asarray(params["embedding"]["bias"], jnp.bfloat16)
  sites = merging.read_sites(params)
  assert tuple(sites) == OPERATIONS
  assert {leaf.dtype for leaf in trees.flatten(sites).values()} == {np.dtype("float64")}
  shapes = {name: leaf.shape for name, leaf in trees.flatten(sites).items()}
  expected = {
    "embedding": (48, 32),
    "query": (2, 32, 32),
    "out": (2, 32, 32),
    "fc1": (2, 32, 128),
  }
  for name, shape in expected.items():
    assert shapes[f"{name}/kernel"] == shape
    assert shapes[f"{name}/bias"] == (*shape[:-2], shape[-1])
  assert shapes["norm2/scale"] == (2, 32) and shapes["encoder_norm/bias"] == (32,)
  written = merging.write_sites(params, sites)
  expected = trees.flatten(params)
  flat = trees.flatten(written)
  assert flat.keys() == expected.keys()
  for name, leaf in flat.items():
    assert leaf.dtype == expected[name].dtype
    np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.mark.parametrize("method", ["adapter", "vpt_deep", "lora+vpt_shallow"])
def test_what_no_plain_backbone_computes(method):
  model = make_model(method)
  with pytest.raises(ValueError, match="cannot be folded into a backbone"):
    merging.merge(model, draw(model))


def test_methods_that_train_the_backbone_itself_are_there_already():
  model = make_model("full")
  params = draw(model)
  merged = merging.merge(model, params)
  jax.tree.map(np.testing.assert_array_equal, merged, params["backbone"])
