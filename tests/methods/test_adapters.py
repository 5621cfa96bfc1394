"""Adapter, AdaptFormer, Adapter+ and Convpass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax import trees
from insvp_jax.methods import BackboneSpec, HookArrays, create_method
from insvp_jax.methods.adapter_plus import AdapterPlusHooks
from insvp_jax.methods.convpass import convolve_tokens

SPEC = BackboneSpec(
  width=32, depth=2, mlp_dim=64, num_heads=2, patch_size=4, image_size=16
)
IMAGES = jax.device_put(
  np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
)


def create(method, key):
  return method.init(key, IMAGES, IMAGES, method="adapt")["params"]


def init(method, seed=0):
  """Returns a method's parameters by name, on the host."""
  params = jax.jit(lambda key: create(method, key))(jax.random.key(seed))
  return jax.device_get(trees.flatten(params))


def test_what_starts_as_the_identity_and_what_near_it():
  out = np.random.default_rng(1).standard_normal((2, 17, 32), np.float32)

  def changed(name, kwargs, out):
    method = create_method(name, SPEC, **kwargs)
    params = create(method, jax.random.key(0))
    adaptation = method.apply({"params": params}, IMAGES, IMAGES, method="adapt")
    arrays = HookArrays(
      jax.tree.map(lambda leaf: leaf[0], adaptation.blocks), adaptation.shared
    )
    hooks = method.hooks()
    if not hooks.at:
      return hooks.leave(arrays, out, None, (out, None))[0]
    for branch in hooks.at:
      # The stream and its norm: anything.
      last = hooks.branch(arrays, branch, -out, 2 * out, out)
    return last

  identities = (
    ("adapter", {"adapter_init": "lora"}),
    ("adapter", {"adapter_init": "vpt_zero"}),
    ("adaptformer", {}),
    ("convpass", {}),
    ("convpass", {"conv_init": "xavier"}),
  )
  near = (("adapter", {}), ("adapter_plus", {}))

  @jax.jit
  def results(out):
    return [[changed(*case, out) for case in cases] for cases in (identities, near)]

  unchanged, moved = jax.device_get(results(out))
  for case, result in zip(identities, unchanged, strict=True):
    np.testing.assert_array_equal(result, out, err_msg=str(case))
  for case, result in zip(near, moved, strict=True):
    difference = np.max(np.abs(result - out))
    assert 0 < difference < 0.01 * np.max(np.abs(out)), case


def test_initial_values():
  for name in ("adapter", "adapter_plus"):
    params = init(create_method(name, SPEC))
    for layer in ("down", "up"):
      kernel = params[f"{layer}/kernel"]
      assert 0 < np.max(np.abs(kernel)) <= 0.02 and np.std(kernel) > 0.005
      assert not np.any(params[f"{layer}/bias"])
  assert np.all(params["scale"] == 1)
  convs = [
    init(create_method("convpass", SPEC, hidden=3, conv_init=conv_init))
    for conv_init in ("identity", "xavier")
  ]
  identity, xavier = (params["attn_conv/kernel"] for params in convs)
  expected = np.zeros((2, 3, 3, 3, 3))
  expected[:, 1, 1] = np.eye(3)
  np.testing.assert_array_equal(identity, expected)
  # Each block on its own, within the bound of 9 * 3 values in and out.
  assert np.max(np.abs(xavier)) <= np.sqrt(6 / (2 * 27))
  assert np.min(np.abs(xavier[0] - xavier[1])) > 0


def test_zero_on_both_sides_trains_one_bias():
  method = create_method("adapter", SPEC, adapter_init="vpt_zero")
  params = jax.tree.map(lambda leaf: leaf[0], trees.unflatten(init(method)))
  x = jax.device_put(np.random.default_rng(2).standard_normal((2, 5, 32), np.float32))

  def loss(block):
    y = method.hooks().branch(HookArrays(block), "mlp", x, x, x)
    return jnp.sum(y**2)

  grads = trees.flatten(jax.device_get(jax.jit(jax.grad(loss))(params)))
  assert {name for name, grad in grads.items() if np.any(grad)} == {"up/bias"}


@pytest.mark.parametrize(
  ("name", "kwargs", "message"),
  [
    ("adapter", {"reduction": 33}, "reduction is 33, but .* 32 wide"),
    ("adapter", {"hidden": 0}, "hidden is 0, but .* from 1 to 32"),
    ("adapter", {"activation": "gelo"}, "Did you mean 'gelu'"),
    (
      "adapter",
      {"adapter_init": "zero"},
      "adapter_init is 'zero', expected one of 'houlsby'",
    ),
    ("adaptformer", {"hidden": 64}, "hidden is 64, but .* from 1 to 32"),
    ("adaptformer", {"dropout": 1.0}, r"dropout is 1.0, expected a dropout rate"),
    ("adapter_plus", {"hidden": 33}, "hidden is 33, but .* from 1 to 32"),
    ("convpass", {"branches": ()}, "branches is .*, expected some of"),
    ("convpass", {"branches": ("mlp", "mlp")}, "branches is .*, each once"),
    ("convpass", {"branches": ("atn",)}, "Did you mean 'attn'"),
    ("convpass", {"conv_init": "zeros"}, "expected one of 'identity', 'xavier'"),
  ],
)
def test_bad_fields(name, kwargs, message):
  with pytest.raises(ValueError, match=message):
    init(create_method(name, SPEC, **kwargs))


def test_the_grid_is_convolved_and_other_tokens_stand_alone():
  rng = np.random.default_rng(3)
  kernel, bias, x = (
    rng.standard_normal(shape, np.float32)
    for shape in ((3, 3, 4, 5), (5,), (2, 1 + 6 + 2, 4))
  )
  layer = {"kernel": kernel, "bias": bias}

  @jax.jit
  def conv(images):
    return bias + jax.lax.conv_general_dilated(
      images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  convolve = jax.jit(convolve_tokens, static_argnums=(2, 3))
  y = np.asarray(convolve(layer, x, 1, (2, 3)))
  expected = conv(x[:, 1:7].reshape(2, 2, 3, 4))
  np.testing.assert_allclose(y[:, 1:7].reshape(expected.shape), expected, atol=1e-5)
  for i in (0, 7, 8):
    expected = conv(x[:, i].reshape(2, 1, 1, 4))
    np.testing.assert_allclose(y[:, i], expected[:, 0, 0], atol=1e-5)
  # Where nothing else is read; and a backbone without a class token.
  alone = convolve(layer, x[:, :1], 1, (2, 3))
  np.testing.assert_allclose(alone, y[:, :1], atol=1e-6)
  no_prefix = convolve(layer, x[:, 1:7], 0, (2, 3))
  np.testing.assert_allclose(no_prefix, y[:, 1:7], atol=1e-6)


def test_convpass_on_images_of_another_size():
  # As padding prompts make them: the grid is the images'.
  method = create_method("convpass", SPEC)
  larger = jax.ShapeDtypeStruct((2, 24, 24, 3), jnp.float32)
  adaptation, _ = jax.eval_shape(
    lambda x: method.init_with_output(jax.random.key(0), IMAGES, x, method="adapt"),
    larger,
  )
  assert adaptation.shared["grid"].shape == (6, 6)


def test_adapter_plus_treats_prompts_in_the_sequence_as_tokens():
  rng = np.random.default_rng(4)
  method = create_method("adapter_plus", SPEC)
  params = jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape[1:], np.float32),
    jax.eval_shape(lambda: create(method, jax.random.key(0))),
  )
  x = rng.standard_normal((8, 5, 32), np.float32)

  @jax.jit
  def leave(x, prompts, before):
    block = {**params, "drop_path_key": jax.random.key(1)}
    arrays = HookArrays(jax.tree.map(jnp.asarray, block), {"drop_path": 0.5})
    return AdapterPlusHooks().leave(arrays, x, prompts, (before, None))[:2]

  tokens, prompts = leave(x[:, :3], x[:, 3:], x)
  whole, none = leave(x, None, x)
  assert none is None
  np.testing.assert_allclose(np.concatenate([tokens, prompts], 1), whole, atol=1e-5)
  is_dropped = np.all(whole == x, axis=(1, 2))
  assert 0 < np.sum(is_dropped) < 8
