"""create_model: hooks in order, names, errors before device work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import draw_backbone

import insvp_jax
from insvp_jax import trees
from insvp_jax.methods import Adaptation, BackboneSpec, BlockPrompts, Method
from insvp_jax.models import heads
from insvp_jax.models.classifier import (
  PromptedClassifier,
  create_backbone,
  create_model,
)
from insvp_jax.models.vit import ViT

TINY = {"width": 16, "depth": 2, "mlp_dim": 64, "num_heads": 2}


def tiny(method="insvp", **kwargs):
  fields = {"num_classes": 3, "image_size": 16, "backbone_kwargs": TINY, **kwargs}
  return create_model("mu/4", method, **fields)


def shapes(model):
  size = model.input_size
  x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), x)["params"]


@pytest.mark.parametrize("method", sorted(insvp_jax.METHODS))
def test_one_tree_of_parameters(method):
  # They have the head of the backbone.
  mapped = method in ("ilm_vp", "autovp")
  backbone = {**TINY, "head_classes": 4 * mapped}
  params = shapes(tiny(method, backbone_kwargs=backbone))
  groups = {"backbone"} if mapped else {"backbone", "head"}
  # These have no parameters of their own, or have them in the head.
  if method not in ("linear", "full", "mlp", "partial", "bias", "bitfit", "ln_tune"):
    groups.add("prompter")
  assert set(params) == groups
  assert mapped or method == "mlp" or params["head"]["kernel"].shape == (16, 3)


def test_hooks_run_in_order_and_see_what_they_should():
  seen, values = [], []

  class Spy(Method):
    def prompt_image(self, images, *, train=False):
      seen.append(("image", train))
      values.append(images.sum())
      return images + 1

    def adapt(self, images, prompted, *, embed=None, train=False):
      seen.append(("tokens", train))
      values.append((prompted - images).mean())
      return Adaptation(prompts=BlockPrompts(jnp.ones((1, 1, 2, self.spec.width))))

    def adapt_feature(self, feature, images, *, train=False):
      seen.append(("feature", feature.shape, train))
      values.append(images.sum())
      return 2 * feature

  vit = ViT(patch_size=4, image_size=8, **TINY)
  head, images = heads.Head(3, "torch"), np.zeros((2, 8, 8, 3), np.float32)
  # The spy has no parameters.
  params = draw_backbone(shapes(PromptedClassifier(vit, Method(vit.spec), head)))
  model = PromptedClassifier(vit, Spy(vit.spec), head)

  @jax.jit
  def logits_and_values(params, images):
    return model.apply({"params": params}, images, train=True), values

  logits, values = jax.device_get(logits_and_values(params, images))
  assert seen == [("image", True), ("tokens", True), ("feature", (2, 16), True)]
  assert values == [0.0, 1.0, 0.0]
  kernel, bias = params["head"]["kernel"], params["head"]["bias"]
  features = functools.partial(model.apply, method="features")
  feature = np.asarray(jax.jit(features)({"params": params}, images))
  np.testing.assert_allclose(logits, feature @ kernel + bias, rtol=1e-6)


def test_the_base_method_changes_nothing():
  vit = ViT(patch_size=4, image_size=8, **TINY)
  model = PromptedClassifier(vit, Method(vit.spec), heads.Head(3))
  rng = np.random.default_rng(1)
  images = jax.device_put(rng.standard_normal((2, 8, 8, 3), np.float32))
  params = draw_backbone(shapes(model))
  plain = jax.jit(vit.apply)({"params": params["backbone"]}, images)
  features = functools.partial(model.apply, method="features")
  adapted = jax.jit(features)({"params": params}, images)
  np.testing.assert_array_equal(plain, adapted)
  assert model.apply({"params": params}, images, method="prompts") == {}


def test_backbone_fields():
  spec = create_backbone("Ti/16").spec
  sizes = BackboneSpec(192, 12, 768, 3, 16, 224, dtype="float32")
  patterns = ("block_patterns", "norm_patterns", "embedding_patterns")
  assert dataclasses.replace(spec, **dict.fromkeys(patterns, ())) == sizes
  overridden = create_backbone("Ti/16", 64, {"depth": 3, "pool": "gap", "width": None})
  assert (overridden.depth, overridden.image_size, overridden.pool) == (3, 64, "gap")
  # A release knows its own image size.
  assert create_backbone("vit_b16_i21k").spec.image_size == 224


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"method": "insvpp"}, r"unknown method 'insvpp'. Nearest: insvp, "),
    ({"num_classes": 0}, "num_classes is 0"),
    ({"num_classes": 3.5}, "num_classes is 3.5, expected a whole number"),
    ({"num_classes": True}, "num_classes is True"),
    ({"image_size": -1}, "image_size is -1"),
    ({"image_size": 10**7}, "image_size is 10000000, expected a whole number, 1 to"),
    ({"backbone_kwargs": {"num_heads": 0}}, "num_heads is 0, expected a whole number"),
    ({"backbone_kwargs": {"patch_size": 0}}, "patch_size is 0"),
    ({"backbone_kwargs": {"mlp_dim": -1}}, "mlp_dim is -1"),
    ({"backbone_kwargs": {"depth": 0}}, "depth is 0"),
    ({"backbone_kwargs": {"width": 2.0}}, "width is 2.0"),
    ({"backbone_kwargs": {"registers": -1}}, "registers is -1, .*, 0 to"),
    ({"backbone_kwargs": {"pool": "x"}}, "pool is 'x', expected one of"),
    ({"backbone_kwargs": {"scan": 1}}, "scan is 1, expected True or False"),
    (
      {"method_kwargs": {"prompt_length": 10**7}},
      "prompt_length is 10000000, .* 65536",
    ),
    ({"head_init": "ones"}, "unknown head_init 'ones'.*torch, vpt, zeros"),
    ({"backbone_kwargs": {"widht": 8}}, r"'widht'.*Did you mean 'width'\?"),
    ({"backbone_kwargs": {"image_size": 8}}, "unknown backbone field 'image_size'"),
    ({"method_kwargs": {"prompt_lenght": 4}}, r"Did you mean 'prompt_length'\?"),
  ],
)
def test_errors_name_what_came_and_what_was_meant(unchecked, kwargs, message):
  with pytest.raises(ValueError, match=message):
    tiny(**kwargs)


def test_unknown_backbone():
  with pytest.raises(ValueError, match="vit_b16_i21"):
    create_model("vit_b16_i21", num_classes=3)
  with pytest.raises(ValueError, match="unknown ViT variant 'Bi'"):
    create_model("Bi/16", num_classes=3)


def test_head_inits():
  def head(init, width=64, num_classes=50):
    model = heads.Head(num_classes, init)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, width)))["params"])
    return jax.device_get(init(jax.random.key(0)))

  assert not any(np.any(leaf) for leaf in jax.tree.leaves(head("zeros")))
  torch = head("torch")
  for leaf in torch.values():
    assert 0.9 * 64**-0.5 < np.max(np.abs(leaf)) <= 64**-0.5
  vpt = head("vpt")
  assert np.std(vpt["kernel"]) == pytest.approx((2 / 50) ** 0.5, rel=0.05)
  assert np.allclose(vpt["bias"], -4.59512)


def test_the_head_computes_in_float32_on_a_bfloat16_backbone():
  model = tiny("linear", backbone_kwargs={**TINY, "dtype": "bfloat16"})
  images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  params = shapes(model)
  assert jax.eval_shape(model.apply, {"params": params}, images).dtype == jnp.float32
  assert trees.count(params["head"]) == 16 * 3 + 3


@pytest.mark.parametrize("method", [None, "features", "prompt_image", "prompts"])
def test_pixels_that_nobody_has_normalised_are_refused(unchecked, method):
  model = create_model("mu/4", num_classes=3, image_size=16)
  pixels = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.uint8)
  with pytest.raises(ValueError, match="images are uint8, expected floating-point"):
    jax.eval_shape(lambda x: model.init(jax.random.key(0), x, method=method), pixels)
