"""VAPT: prompts made of patches, and how they start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import draw_backbone

from insvp_jax import trees
from insvp_jax.methods import BackboneSpec, create_method
from insvp_jax.methods.hooks import HookArrays, block_of
from insvp_jax.methods.vapt import convolved_weights
from insvp_jax.models.classifier import create_model
from insvp_jax.models.vit import decode_variant
from insvp_jax.train import state as state_lib

SPEC = BackboneSpec(
  width=32, depth=3, mlp_dim=64, num_heads=2, patch_size=4, image_size=16
)
IMAGES = jax.device_put(np.zeros((2, 16, 16, 3), np.float32))
TOKENS = jax.device_put(
  np.random.default_rng(9).standard_normal((2, 17, 32), np.float32)
)


def arrays(method, variables, block, **kwargs):
  adaptation = method.apply(variables, IMAGES, IMAGES, method="adapt", **kwargs)
  return HookArrays(block_of(adaptation.blocks, block), adaptation.shared)


def init(spec=SPEC, **fields):
  """Returns the method and parameters of which none is zero."""
  method = create_method("vapt", spec, **fields)
  shapes = jax.eval_shape(
    lambda key: method.init(key, IMAGES, IMAGES, method="adapt"), jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  return method, jax.tree.map(
    lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes
  )


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({}, 55_608),
    ({"static_blocks": 2}, 60_048),
    ({"prompt_length": 4, "kernel": 3, "hidden": 16}, 51_023),
  ],
)
def test_published_count(fields, expected):
  spec = BackboneSpec(**decode_variant("B/16"), image_size=224)
  method = create_method("vapt", spec, **fields)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  shapes = jax.eval_shape(
    lambda x: method.init(jax.random.key(0), x, x, method="adapt"), images
  )
  assert trees.count(shapes["params"]) == expected


def test_convolution_and_dense_layer_are_one_product():
  rng = np.random.default_rng(0)
  kernel, weights, grid = (
    rng.standard_normal(shape, np.float32)
    for shape in ((1, 3, 3), (1, 4, 4, 5), (2, 6, 6, 1))
  )
  windows = np.lib.stride_tricks.sliding_window_view(grid[..., 0], (3, 3), (1, 2))
  convolved = np.einsum("bhwij,ij->bhw", windows, kernel[0])
  expected = convolved.reshape(2, 16) @ weights.reshape(16, 5)
  joined = np.asarray(jax.jit(convolved_weights)(kernel, weights))
  actual = grid.reshape(2, 36) @ joined.reshape(36, 5)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_first_blocks_have_learned_prompts_and_later_ones_see_the_patches():
  method, variables = init(static_blocks=2, prompt_length=3)

  @jax.jit
  def prompts_of_blocks(variables):
    found = []
    for block in range(3):
      p = arrays(method, variables, block)
      x, prompts = method.hooks().enter(p, TOKENS, None)
      assert x is TOKENS and prompts.shape == (2, 3, 32)
      found.append(prompts)
    return found

  *static, made = jax.device_get(prompts_of_blocks(variables))
  learned = variables["params"]["common_prompt"]
  np.testing.assert_array_equal(static, np.stack([learned] * 2, axis=1))
  assert np.all(np.not_equal(*made))


def test_only_patches_are_read():
  method, variables = init()
  without_class = create_method("vapt", dataclasses.replace(SPEC, num_prefix=0))
  # Another class token, and another method's prompts behind the patches.
  tokens = np.asarray(TOKENS)
  other = np.concatenate([-tokens[:, :1], tokens[:, 1:], tokens[:, :4]], axis=1)

  @jax.jit
  def enter(variables, tokens, other):
    p = arrays(method, variables, 2)
    _, expected = method.hooks().enter(p, tokens, None)
    _, beside_others = method.hooks().enter(p, other, tokens)
    _, alone = without_class.hooks().enter(p, tokens[:, 1:], None)
    return expected, beside_others, alone

  expected, *prompts = enter(variables, tokens, other)
  for found in prompts:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_dropout_takes_whole_channels_and_values_of_prompts():
  method, variables = init(dropout=0.5, prompt_length=8)
  for name in ("projector_up", "norm_bias"):
    variables["params"][name] *= 0
  variables["params"]["positions"]["bias"] *= 0

  @jax.jit
  def enter(variables, key):
    p = arrays(method, variables, 1, train=True, rngs={"dropout": key})
    return method.hooks().enter(p, TOKENS, None)[1]

  is_zero = np.asarray(enter(variables, jax.random.key(2))) == 0
  # By chance alone 1 in 256 channels would lose all of its prompts.
  assert 0.3 < np.mean(is_zero.all(axis=1)) < 0.7
  assert 0.6 < np.mean(is_zero) < 0.9


def test_made_prompts_start_at_zero_and_everything_moves_within_two_steps():
  model = create_model(
    "B/16",
    "vapt",
    num_classes=3,
    image_size=16,
    backbone_kwargs={
      n: getattr(SPEC, n)
      for n in ("width", "depth", "mlp_dim", "num_heads", "patch_size")
    },
    method_kwargs={"prompt_length": 3},
    head_init="torch",
  )
  rng = np.random.default_rng(0)
  images = rng.standard_normal((2, 16, 16, 3), np.float32)
  draws = state_lib.Draws(model)
  backbone = draw_backbone(draws.shapes["backbone"])
  params = state_lib.init_params(model, 1, weights=backbone, draws=draws)

  @jax.jit
  def made(prompter):
    p = arrays(model.prompter, {"params": prompter}, 1)
    return model.prompter.hooks().enter(p, TOKENS, None)[1]

  @jax.jit
  def gradient(prompter, params, images):
    def loss(prompter):
      logits = model.apply({"params": {**params, "prompter": prompter}}, images)
      return jnp.sum(logits[:, 0])

    return jax.grad(loss)(prompter)

  prompter = params["prompter"]
  assert np.all(np.asarray(made(prompter)) == 0)
  grads = jax.device_get(gradient(prompter, params, images))
  unmoved = {n for n, g in trees.flatten(grads).items() if not np.any(g)}
  assert unmoved == {
    *("norm_scale", "norm_bias", "conv_kernel", "projector_down", "projector_up")
  }
  prompter = jax.tree.map(lambda x, g: np.asarray(x) - 1e-3 * g, prompter, grads)
  again = jax.device_get(gradient(prompter, params, images))
  assert all(np.any(g) for g in jax.tree.leaves(again))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"static_blocks": 3}, "static_blocks is 3, all of the .* With none .* vpt_deep"),
    ({"kernel": 5}, "kernel is 5, but an image has 4 x 4 patches; expected .* 1 to 4"),
    ({"hidden": 33}, "hidden is 33, but the backbone's tokens are 32 wide"),
  ],
)
def test_wrong_values_are_one_line(fields, message):
  with pytest.raises(ValueError, match=message):
    create_method("vapt", SPEC, **fields)
