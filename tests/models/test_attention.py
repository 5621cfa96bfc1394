"""Fused attention: the same function as ours, and cuDNN's where that is."""

import re

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
import jax.numpy as jnp
import numpy as np
import pytest
from test_vit import build, draw, features, images, prompts

from insvp_jax.methods.hooks import UNCHANGED
from insvp_jax.models import layers


def tokens(number, seed, dtype=jnp.float32):
  shape = (2, number, 4, 8)
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def value_and_grads(function, *args):
  weights = tokens(args[0].shape[1], 9)
  loss = jax.value_and_grad(lambda *a: jnp.sum(function(*a) * weights), (0, 1, 2))
  return jax.jit(loss)(*args)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 7), (4, 7), (5, 6), (4, 6)])
def test_padded_sequences_attend_as_they_are(num_queries, num_keys):
  q, k, v = tokens(num_queries, 0), tokens(num_keys, 1), tokens(num_keys, 2)

  def padded(q, k, v):
    return layers.attend_padded(q, k, v, "xla")

  expected = value_and_grads(layers.attend, q, k, v)
  for function in (padded, layers.attend_fused):
    found = value_and_grads(function, q, k, v)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      found,
      expected,
    )


@pytest.mark.parametrize(
  ("changes", "blocks"),
  [({}, None), ({}, 2), ({"pool": "gap"}, 2), ({"scan": True}, 1), ({"scan": True}, 3)],
)
def test_a_backbone_computes_the_same_with_fused_attention(changes, blocks):
  model = build(**changes)
  params = draw(model)
  given = UNCHANGED if blocks is None else prompts(blocks)
  plain = features(model, params, images(), given)
  fused = features(build(fused_attention=True, **changes), params, images(), given)
  np.testing.assert_allclose(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_on_a_gpu_sixteen_bits_go_to_cudnn_forward_and_backward(monkeypatch, dtype):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
  # The odd lengths of a ViT at 224 px with 16 prompts.
  q, k = (jax.ShapeDtypeStruct((2, n, 12, 64), dtype) for n in (197, 213))

  def loss(q, k, v):
    return jnp.sum(layers.attend_fused(q, k, v).astype(jnp.float32))

  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  calls = set(re.findall(r"__cudnn\$\w+", text))
  flash = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
  assert calls == (flash if dtype == jnp.bfloat16 else set())
