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


def assert_close(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    found,
    expected,
  )


@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 7), (4, 7), (5, 6), (4, 6)])
def test_padded_sequences_attend_as_they_are(num_queries, num_keys):
  q, k, v = tokens(num_queries, 0), tokens(num_keys, 1), tokens(num_keys, 2)

  def padded(q, k, v):
    return layers.attend_padded(q, k, v, "xla")

  expected = value_and_grads(layers.attend, q, k, v)
  for function in (padded, layers.attend_fused):
    assert_close(value_and_grads(function, q, k, v), expected)


@pytest.mark.parametrize(
  ("number", "prompts"),
  # Padded without prompts and with shared ones; even with each image's own; too many.
  [(9, None), (8, (1, 1, 32)), (8, (2, 2, 32)), (9, (2, 3, 32))],
)
def test_even_rows_give_what_prompts_and_tokens_apart_do(number, prompts):
  rng = np.random.default_rng(0)
  shapes = [(2, number, 32)] if prompts is None else [(2, number, 32), prompts]
  x, *prompts = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

  def outputs(fused):
    attention = layers.Attention(4, jnp.float32, fused)
    params = attention.init(jax.random.key(0), x, x, *prompts)

    @jax.jit
    def run(params, x, *prompts):
      def loss(params, x, *prompts):
        y = attention.apply(params, x, x, *prompts)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

      return jax.value_and_grad(loss, (0, 1, 2)[: 2 + len(prompts)], has_aux=True)(
        params, x, *prompts
      )

    return run(params, x, *prompts)

  assert_close(outputs(fused=True), outputs(fused=False))


@pytest.mark.parametrize(
  ("num_tokens", "num_prompts", "num_rows", "masked"),
  [
    (197, 9, 206, False),
    (197, 10, 208, True),
    (197, 0, 198, True),
    (197, 50, 198, True),
  ],
)
def test_rows_are_padded_before_their_projections(
  monkeypatch, num_tokens, num_prompts, num_rows, masked
):
  """Unless prompts are many: as queries these would cost more than copies."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
  attention = layers.Attention(2, jnp.bfloat16, fused=True)
  x, prompts = (
    jax.ShapeDtypeStruct((2, n, 128), jnp.bfloat16) for n in (num_tokens, num_prompts)
  )
  prompts = prompts if num_prompts else None
  params = jax.eval_shape(attention.init, jax.random.key(0), x, x, prompts)
  traced = jax.jit(lambda p, x, prompts: attention.apply(p, x, x, prompts)).trace(
    params, x, prompts
  )
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  (call,) = re.findall(r"@__cudnn\$fmhaSoftmax\(.*", text)
  assert f"tensor<2x{num_rows}x2x64xbf16>" in call
  assert ("tensor<2xi32>" in call) == masked
  products = re.findall(r"dot_general .* \(tensor<2x(\d+)x128xbf16>", text)
  expected = [num_rows] * 3 if num_prompts < 50 else [num_tokens, 247, 247]
  assert [int(rows) for rows in products] == expected


@pytest.mark.parametrize(
  ("changes", "given"),
  [
    ({}, UNCHANGED),
    ({}, prompts(2)),
    ({}, prompts(3, length=1)),
    ({"pool": "gap"}, prompts(2)),
    ({"scan": True}, prompts(1)),
    ({"scan": True}, prompts(3)),
  ],
)
def test_a_backbone_computes_the_same_with_fused_attention(changes, given):
  model = build(**changes)
  params = draw(model)
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
