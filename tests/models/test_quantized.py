"""Kernels in 8 bits: how far off, what is computed of them, what memory they take."""

import functools

import flax.linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import draw_backbone
from tiny_training import prepare, tiny_config

from insvp_jax import trees
from insvp_jax.models import quantized
from insvp_jax.models.quantized import Quantized, quantize
from insvp_jax.search import population
from insvp_jax.tools import plan
from insvp_jax.train import program as program_lib
from insvp_jax.train import state as state_lib

INT8 = {"backbone__frozen_dtype": "int8"}
# (name, shape, stacked): layers, heads, convolutions, and stacks of blocks.
KERNELS = [
  ("backbone/projection/kernel", (5, 3), False),
  ("backbone/x/query/kernel", (7, 2, 3), False),
  ("backbone/x/out/kernel", (2, 3, 7), False),
  ("backbone/embedding/kernel", (2, 2, 3, 5), False),
  ("backbone/depthwise/kernel", (3, 3, 1, 6), False),
  ("backbone/Transformer/encoderblock/x/key/kernel", (3, 7, 2, 1), True),
  ("backbone/Transformer/encoderblock/x/Dense_0/kernel", (3, 1, 9), True),
]


def channels_of(kernel: Quantized) -> np.ndarray:
  """Returns the values [inputs, channels]: a block's channels are its own."""
  axes = [i for i, size in enumerate(kernel.scale.shape) if size != kernel.shape[i]]
  others = [i for i in range(len(kernel.shape)) if i not in axes]
  number = int(np.prod([kernel.shape[i] for i in others]))
  return np.transpose(np.asarray(kernel.values, int), axes + others).reshape(-1, number)


def draw(shape, seed, exponent=0, zeros=0.0):
  rng = np.random.default_rng(seed)
  kernel = rng.standard_normal(shape) * 10.0**exponent
  kernel[..., rng.random(shape[-1]) < zeros] = 0
  return kernel.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
  case=st.sampled_from(KERNELS),
  seed=st.integers(0, 10**6),
  exponent=st.integers(-45, 36),
  zeros=st.sampled_from([0.0, 0.5, 1.0]),
  negative=st.booleans(),
)
def test_an_entry_is_off_by_half_a_scale_at_most(case, seed, exponent, zeros, negative):
  name, shape, stacked = case
  kernel = draw(shape, seed, exponent, zeros)
  kernel = -np.abs(kernel) if negative else kernel
  axes = quantized.input_axes(name, len(shape), stacked)
  found = quantize(kernel, axes, name)
  assert found.values.dtype == np.int8 and found.scale.dtype == np.float32
  assert found.shape == shape and found.values.min(initial=0) >= -127
  assert np.all(found.scale > 0) and np.all(np.isfinite(found.scale))
  error = np.abs(np.asarray(found, np.float64) - kernel.astype(np.float64))
  assert np.all(error <= found.scale * 0.50001)
  # The largest entry of a channel is the largest value, and zero stays zero.
  largest = np.abs(channels_of(found)).max(axis=0)
  tiny = np.abs(kernel).max(axis=axes).ravel() < 127.1 * np.finfo(np.float32).tiny
  assert np.all((largest == 127) | tiny) and np.all(largest[tiny] == 0)
  np.testing.assert_array_equal(np.asarray(found)[kernel == 0], 0)
  # Once more it is the same: a backbone that is written as floats comes back so.
  again = quantize(np.asarray(found), axes, name)
  np.testing.assert_array_equal(again.values, found.values)
  # What a plan takes for it has its shapes.
  planned = quantized.abstract(shape, axes)
  assert jax.tree.map(jnp.shape, found) == jax.tree.map(lambda x: x.shape, planned)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(wrong):
  kernel = np.ones((4, 3), np.float32)
  kernel[2, 1] = wrong
  with pytest.raises(ValueError, match="backbone/a/kernel has entries .* not finite"):
    state_lib.cast_weight("backbone/a/kernel", kernel, "int8")


def test_only_matrices_are_quantised():
  shapes = state_lib.param_shapes(prepare(tiny_config("linear")).program.model)
  for name, leaf in trees.flatten({"backbone": shapes["backbone"]}).items():
    stored = state_lib.cast_weight(name, leaf, "int8")
    is_matrix = name.endswith("kernel")
    assert isinstance(stored, Quantized) == is_matrix, name
    assert stored.shape == leaf.shape and stored.dtype == (
      jnp.int8 if is_matrix else leaf.dtype
    )


LAYERS = {
  "dense": (lambda m: m.Dense(6), (2, 3, 5), "kernel"),
  "heads": (lambda m: m.DenseGeneral((2, 3)), (2, 3, 5), "query/kernel"),
  "out": (lambda m: m.DenseGeneral(4, axis=(-2, -1)), (2, 3, 2, 5), "kernel"),
  "conv": (lambda m: m.Conv(4, (3, 3), strides=2, padding=1), (2, 7, 7, 3), "kernel"),
  "depthwise": (
    lambda m: m.Conv(6, (3, 3), feature_group_count=6),
    *((2, 4, 4, 6), "kernel"),
  ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_products_and_their_gradients_are_those_of_the_floats(layer, dtype):
  create, shape, name = LAYERS[layer]
  ours, flaxs = (create(module).clone(dtype=dtype) for module in (quantized, nn))
  x = draw(shape, 1).astype(dtype)
  shapes = jax.eval_shape(ours.init, jax.random.key(0), x)["params"]
  params = {name: draw(leaf.shape, i) for i, (name, leaf) in enumerate(shapes.items())}
  kernel = params["kernel"]
  axes = quantized.input_axes(f"backbone/{name}", kernel.ndim, stacked=False)
  stored = {**params, "kernel": quantize(kernel, axes, name)}
  floats = {**params, "kernel": np.asarray(stored["kernel"])}

  @functools.partial(jax.jit, static_argnums=0)
  def outputs(module, params, x):
    y, backward = jax.vjp(lambda x: module.apply({"params": params}, x), x)
    return y, *backward(jnp.asarray(draw(y.shape, 3), y.dtype))

  # Without 8 bits it is Flax's, bit for bit.
  for found, expected in zip(
    outputs(ours, params, x), outputs(flaxs, params, x), strict=True
  ):
    np.testing.assert_array_equal(found, expected)
  tolerance = 1e-5 if dtype == jnp.float32 else 0.02
  found, expected = outputs(ours, stored, x), outputs(flaxs, floats, x)
  for ours, theirs in zip(found, expected, strict=True):
    assert ours.dtype == theirs.dtype == dtype
    ours, theirs = (np.asarray(array, np.float32) for array in (ours, theirs))
    np.testing.assert_allclose(
      ours, theirs, tolerance, tolerance * np.abs(theirs).max()
    )


@functools.cache
def wide(parts=1, **changes):
  """Returns (config, program) of a backbone that is nearly all kernels."""
  sizes = {"width": 128, "mlp_dim": 512, "depth": 4}
  changes |= {f"backbone__{name}": value for name, value in sizes.items()}
  config = tiny_config("vpt_deep", image_size=8, **changes)
  config.batch_size = devices = config.backbone.fsdp
  config.batch_size *= parts
  config.microbatch_size = devices
  return config, prepare(config, devices=devices).program


def of_two_trials(program, state):
  """Returns the abstract state of two trials."""

  def stack(tree):
    return jax.tree.map(lambda x: x.update(shape=(2, *x.shape)), tree)

  carried, flat = trees.flatten(program.carried), trees.flatten(state.params)
  params = {n: stack(leaf) if carried[n] else leaf for n, leaf in flat.items()}
  names = ("opt_state", "peak_lr", "wd", "hparams")
  numbers = {name: stack(getattr(state, name)) for name in names}
  return state.replace(params=trees.unflatten(params), **numbers)


def frozen_bytes(config, program):
  state = program_lib.abstract_state(config, program)
  return plan._state_bytes(program, state)["frozen"]


@pytest.mark.parametrize(
  "scan, step",
  [*((False, step) for step in ("one", "many", "trials", "parts")), (True, "many")],
)
def test_the_memory_of_a_step_is_a_quarter_too(scan, step):
  parts = 2 if step == "parts" else 1
  config, program = wide(parts, backbone__scan=scan, **INT8)
  state = program_lib.abstract_state(config, program)
  floats = frozen_bytes(*wide(backbone__scan=scan))
  assert frozen_bytes(config, program) < 0.27 * floats
  arrays = {
    "images": jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.uint8),
    "labels": jax.ShapeDtypeStruct((4,), jnp.int32),
  }
  if step == "many":
    seed, count = (jax.ShapeDtypeStruct((), t) for t in (jnp.uint32, jnp.int32))
    traced = program.multi_step.trace(state, arrays, seed, count)
  else:
    if step == "trials":
      state = of_two_trials(program, state)
      program = population.stack_program(program, in_turn=True)
    batch = jax.tree.map(lambda x: x.update(shape=(parts, *x.shape[1:])), arrays)
    traced = program.train_step.trace(state, batch)
  # It never runs, and generating fast code takes longest.
  compiled = traced.lower().compile({"xla_backend_optimization_level": 0})
  # Activations of a few tokens, and floats of the kernels that are in use: of all of
  # them, from the forward pass to the backward pass or for a loop, it would be more.
  assert compiled.memory_analysis().temp_size_in_bytes < 0.4 * floats


def test_a_plan_of_split_kernels_has_their_bytes():
  config, program = wide(backbone__scan=True, backbone__fsdp=4, **INT8)
  placed = program_lib.create_state(config, program, draw_backbone(program.shapes))
  leaves = jax.tree.leaves(trees.split(placed.params, program.mask)[1])
  on_first = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
  assert frozen_bytes(config, program) == on_first
  assert on_first < 0.3 * sum(leaf.nbytes for leaf in leaves)
