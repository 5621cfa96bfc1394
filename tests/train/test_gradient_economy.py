"""Gradient economy, read off the FLOPs of the compiled step."""

import jax
import jax.numpy as jnp
import pytest
from test_steps import BATCH, batch_of, setup, state_shapes


def abstract(tree):
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def flops(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
  "method, limit", [("insvp", 2.3), ("vpt_deep", 2.3), ("linear", 1.05)]
)
def test_a_train_step_computes_no_frozen_gradient(method, limit):
  """S/16 at 64 px: large enough that matrix products dominate, quick to compile."""
  kwargs = {} if method == "linear" else {"prompt_length": 9}
  model, _, optimizer, step = setup(
    method, backbone="S/16", image_size=64, tiny={"depth": 3}, **kwargs
  )
  state = state_shapes(model, optimizer)
  forward = flops(
    lambda params, x: model.apply({"params": params}, x),
    state.params,
    jax.ShapeDtypeStruct((BATCH, 64, 64, 3), jnp.float32),
  )
  ratio = flops(step, state, abstract(batch_of(64))) / forward
  assert 1 <= ratio <= limit


def test_full_training_costs_three_forward_passes():
  """The yardstick of the test above: with all gradients the ratio is about 3."""
  model, _, optimizer, step = setup(
    "full", backbone="S/16", image_size=64, tiny={"depth": 3}
  )
  state = state_shapes(model, optimizer)
  forward = flops(
    lambda params, x: model.apply({"params": params}, x),
    state.params,
    jax.ShapeDtypeStruct((BATCH, 64, 64, 3), jnp.float32),
  )
  assert flops(step, state, abstract(batch_of(64))) / forward > 2.6
