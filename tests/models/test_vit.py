"""The backbone: names, variants, prompts as keys only, scan, remat, precision."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax import trees
from insvp_jax.methods.hooks import UNCHANGED, Adaptation, BlockPrompts
from insvp_jax.models import encoder, layers, vit

SIZES = {"width": 16, "depth": 3, "mlp_dim": 24, "num_heads": 2}


def build(**changes):
  fields = {**SIZES, "patch_size": 4, "image_size": 8, **changes}
  return vit.ViT(**fields)


def draw(model, seed=0):
  """Parameters that are nowhere zero, so that every path counts."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), images())["params"]
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape).astype("f"), shapes)


def images(batch=2, size=8):
  rng = np.random.default_rng(1)
  return jax.device_put(rng.normal(size=(batch, size, size, 3)).astype(np.float32))


def prompts(blocks, batch=1, length=2):
  rng = np.random.default_rng(2)
  shape = (blocks, batch, length, SIZES["width"])
  tokens = jax.device_put(rng.normal(size=shape).astype(np.float32))
  return Adaptation(prompts=BlockPrompts(tokens))


def features(model, params, x, given=UNCHANGED):
  def run(module):
    return module.encode(module.embed(x), given)

  # Compiled as one program: op by op takes ten times as long.
  return jax.jit(lambda p: model.apply({"params": p}, method=run))(params)


def reference(params, x, given=UNCHANGED):
  """The paper's way: prompts stand in the sequence and are replaced block by block."""
  p = trees.flatten(params)

  def norm(t, name):
    mean, var = t.mean(-1, keepdims=True), t.var(-1, keepdims=True)
    scaled = (t - mean) / np.sqrt(var + 1e-6)
    return scaled * p[f"{name}/scale"] + p[f"{name}/bias"]

  def attend(t, name):
    q, k, v = (
      np.einsum("bnd,dhe->bhne", t, p[f"{name}/{n}/kernel"])
      + p[f"{name}/{n}/bias"][:, None]
      for n in ("query", "key", "value")
    )
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return (
      np.einsum("bhne,hed->bnd", out, p[f"{name}/out/kernel"]) + p[f"{name}/out/bias"]
    )

  b, size = len(x), 4
  patches = np.asarray(x).reshape(b, 2, size, 2, size, 3).transpose(0, 1, 3, 2, 4, 5)
  kernel = p["embedding/kernel"].reshape(-1, SIZES["width"])
  t = patches.reshape(b, 4, -1) @ kernel + p["embedding/bias"] + p["pos_embedding"]
  t = np.concatenate([np.repeat(p["cls"], b, 0), t], 1)
  inserted = 0
  for i in range(SIZES["depth"]):
    if given.prompts and i < given.prompts.tokens.shape[0]:
      tokens = np.asarray(given.prompts.tokens[i])
      tokens = np.broadcast_to(tokens, (b, *tokens.shape[1:]))
      t = np.concatenate([t[:, :1], tokens, t[:, 1 + inserted :]], 1)
      inserted = tokens.shape[1]
    name = f"Transformer/encoderblock_{i}"
    t = t + attend(
      norm(t, f"{name}/LayerNorm_0"), f"{name}/MultiHeadDotProductAttention_0"
    )
    y = norm(t, f"{name}/LayerNorm_1")
    mlp = f"{name}/MlpBlock_0"
    y = y @ p[f"{mlp}/Dense_0/kernel"] + p[f"{mlp}/Dense_0/bias"]
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    t = t + y @ p[f"{mlp}/Dense_1/kernel"] + p[f"{mlp}/Dense_1/bias"]
  return norm(t, "Transformer/encoder_norm")[:, 0]


@pytest.mark.parametrize(
  ("blocks", "batch"), [(None, 1), *itertools.product((1, 2, 3), (1, 2))]
)
@pytest.mark.parametrize("scan", [False, True])
def test_prompts_as_keys_equal_prompts_in_the_sequence(blocks, batch, scan):
  unrolled, model = build(), build(scan=scan)
  params = draw(unrolled)
  given = UNCHANGED if blocks is None else prompts(blocks, batch)
  expected = reference(params, images(), given)
  if scan:
    params = stack(params)
  np.testing.assert_allclose(
    features(model, params, images(), given), expected, rtol=2e-4, atol=2e-5
  )


def stack(params):
  """Unrolled to scanned layout."""
  flat = trees.flatten(params)
  first = "Transformer/encoderblock_0/"
  stacked = {n: v for n, v in flat.items() if "encoderblock" not in n}
  for name in [n for n in flat if n.startswith(first)]:
    leaf = name.removeprefix(first)
    blocks = [flat[f"Transformer/encoderblock_{i}/{leaf}"] for i in range(3)]
    stacked[f"Transformer/encoderblock/{leaf}"] = np.stack(blocks)
  return trees.unflatten(stacked)


def test_scanned_parameters_have_the_stacked_names():
  model = build(scan=True)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images())["params"]
  expected = {n: v.shape for n, v in trees.flatten(stack(draw(build()))).items()}
  assert {n: v.shape for n, v in trees.flatten(shapes).items()} == expected


@pytest.mark.parametrize(("scan", "depth"), [(False, 2), (True, 3)])
@pytest.mark.parametrize("updated", [False, True])
def test_remat_changes_no_gradient(scan, depth, updated):
  """With and without a last block that updates the prompts of the one before."""
  params = draw(build(depth=depth))
  params = stack(params) if scan else params

  def grads(model):
    def loss(params, x):
      return jnp.sum(features(model, params, x, prompts(depth - updated)) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, images())

  plain = grads(build(depth=depth, scan=scan))
  rematerialised = grads(build(depth=depth, scan=scan, remat=True))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rematerialised), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def randomised(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape), shapes)


def assert_all_near(actual, expected):
  """In float64."""
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype == jnp.float64
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
  ("blocks", "scan", "remat"),
  [(None, False, False), (1, True, False), (3, False, True), (3, True, True)],
)
def test_tokens_that_nobody_reads_change_nothing(blocks, scan, remat):
  """The first token and the gradients of parameters, tokens and prompts."""
  with jax.enable_x64():
    tokens = randomised(np.zeros((2, 5, 16)), 1)
    given = None if blocks is None else randomised(np.zeros((blocks, 2, 2, 16)), 2)

    def outputs(num_read):
      model = encoder.Encoder(3, 24, 2, "tanh", jnp.float64, remat, scan, num_read)
      key = jax.random.key(0)
      params = randomised(jax.eval_shape(model.init, key, tokens))

      def loss(params, tokens, given):
        given = None if given is None else BlockPrompts(given)
        given = Adaptation(prompts=given)
        first = model.apply(params, tokens, given)[:, :1]
        return jnp.sum(jnp.sin(first)), first

      gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
      return jax.jit(gradient)(params, tokens, given)

    assert_all_near(outputs(1), outputs(None))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("scan", [False, True])
def test_few_blocks_and_unread_tokens(scan, depth):
  models = [build(depth=depth, scan=scan, skip_unread=skip) for skip in (True, False)]
  params = draw(models[0])
  outputs = [features(model, params, images(), prompts(1)) for model in models]
  np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)


def flops(model, size):
  x = images(size=size)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  lowered = jax.jit(lambda p, x: model.apply({"params": p}, x)).lower(shapes, x)
  return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(
  ("pool", "least", "most"), [("tok", 0.25, 0.3), ("gap", 1, 1), ("map", 1, 1)]
)
def test_the_last_block_computes_what_the_pool_reads(pool, least, most):
  fields = {"pool": pool, "depth": 1, "image_size": 32}
  share = flops(build(**fields), 32) / flops(build(**fields, skip_unread=False), 32)
  assert least <= share <= most


def test_replaced_prompts_pass_nothing_on():
  """Block j + 1 does not see what block j made of its prompts."""
  model, params = build(), draw(build())

  def loss(tokens):
    return jnp.sum(
      features(model, params, images(), Adaptation(prompts=BlockPrompts(tokens))) ** 2
    )

  few, many, updated = (
    jax.jit(jax.grad(loss))
    .lower(prompts(blocks, length=n).prompts.tokens)
    .cost_analysis()
    for blocks, n in ((3, 1), (3, 9), (1, 9))
  )
  # Keys and values only: far cheaper than updating the same tokens.
  assert few["flops"] < many["flops"] < 0.8 * updated["flops"]


def test_prompts_of_each_image_equal_shared_ones():
  """Either way of joining keys and values, and its gradient."""
  model = build(depth=2)
  params, shared = draw(model), prompts(2).prompts.tokens

  def loss(tokens):
    given = Adaptation(prompts=BlockPrompts(tokens))
    return jnp.sum(jnp.sin(features(model, params, images(), given)))

  gradient = jax.jit(jax.value_and_grad(loss))
  expected, of_shared = gradient(shared)
  found, of_each = gradient(np.repeat(shared, 2, axis=1))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  summed = np.sum(np.asarray(of_each), axis=1, keepdims=True)
  np.testing.assert_allclose(summed, of_shared, rtol=1e-4, atol=1e-6)


def test_gradients_of_slices_are_put_side_by_side():
  def loss(x):
    return sum(i * jnp.sum(part) for i, part in enumerate(encoder.unstacked(x)))

  gradient, ones = jax.jit(jax.grad(loss)), np.ones((3, 2), np.float32)
  traced = str(gradient.trace(ones).jaxpr)
  assert "concatenate" in traced and "pad" not in traced
  np.testing.assert_array_equal(gradient(ones), [[0, 0], [1, 1], [2, 2]])


@pytest.mark.parametrize("pool", vit.POOLS)
def test_pools(pool):
  model = build(pool=pool)
  params = draw(model)
  out = features(model, params, images(), prompts(3))
  assert out.shape == (2, SIZES["width"])
  assert ("cls" in params) == (pool == "tok")
  assert ("MAPHead_0" in params) == (pool == "map")
  if pool == "map":
    assert set(params["MAPHead_0"]) == {
      "probe",
      "MultiHeadDotProductAttention_0",
      "LayerNorm_0",
      "MlpBlock_0",
    }


def test_gelu_is_a_choice():
  params = draw(build())
  tanh = features(build(), params, images())
  exact = features(build(gelu="exact"), params, images())
  assert 0 < np.max(np.abs(np.asarray(tanh) - np.asarray(exact))) < 0.05


@pytest.mark.parametrize("name", layers.GELUS)
def test_a_gelu_in_16_bits_keeps_its_input_alone(name):
  gelu = layers.GELUS[name]
  x = jnp.linspace(-9, 9, 181, dtype=jnp.bfloat16)
  y, backward = jax.vjp(gelu, x)
  (kept,) = jax.tree.leaves(backward)
  assert kept is x
  exact = gelu(x.astype(jnp.float32))
  np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=4e-3, atol=1e-6)
  (found,) = backward(jnp.ones_like(y))
  expected = jax.vmap(jax.grad(gelu))(x.astype(jnp.float32))
  assert found.dtype == x.dtype
  np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=4e-3, atol=1e-4)


def test_tokens_are_kept_image_by_image_where_a_single_gpu_trains(monkeypatch):
  model = build()
  params = draw(model)

  def loss(params):
    return jnp.sum(features(model, params, images()))

  def constraints(function, platform, devices):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    return str(jax.make_jaxpr(function)(params)).count("layout_constraint")

  # Of each block what it gets, between its branches and what it gives; and gradients.
  assert constraints(jax.grad(loss), "gpu", 1) == 2 * 3 * SIZES["depth"]
  for function, *where in (
    (loss, "gpu", 1),
    (jax.grad(loss), "gpu", 2),
    (jax.grad(loss), "cpu", 1),
  ):
    assert constraints(function, *where) == 0


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
  model = build(dtype="bfloat16")
  params = jax.eval_shape(model.init, jax.random.key(0), images())["params"]
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
  out = features(model, draw(build()), images(), prompts(3))
  assert out.dtype == jnp.bfloat16
  expected = features(build(), draw(build()), images(), prompts(3))
  np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.15)


@pytest.mark.parametrize(
  "variant, params",
  [
    ("Ti/16", 5_524_416),
    ("S/16", 21_665_664),
    ("B/16", 85_798_656),
    ("L/16", 303_301_632),
  ],
)
def test_published_parameter_counts(variant, params):
  """Sizes of the published backbones without head."""
  model = vit.ViT(image_size=224, **vit.decode_variant(variant), scan=True)
  x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  # The class token has no position of its own here: d less than 197 positions.
  assert trees.count(shapes) == params - model.width


def test_every_variant_builds():
  for name in vit.VARIANTS:
    # A scan traces one block instead of all.
    model = vit.ViT(image_size=28, **vit.decode_variant(f"{name}/14"), scan=True)
    x = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    scale = shapes["Transformer"]["encoderblock"]["LayerNorm_0"]["scale"]
    assert scale.shape == (model.depth, model.width)


@pytest.mark.parametrize(
  "variant, message",
  [("Q/16", "unknown ViT variant 'Q'"), ("B", "names no patch size"), ("B/x", "patch")],
)
def test_wrong_variants(variant, message):
  with pytest.raises(ValueError, match=message):
    vit.decode_variant(variant)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"pool": "avg"}, "pool is 'avg'"),
    ({"gelu": "erf"}, "gelu is 'erf'"),
    ({"dtype": "float16"}, "dtype is 'float16'"),
    ({"num_heads": 3}, "width 16 is not divisible by num_heads 3"),
    ({"image_size": 10}, "image_size 10 is not a multiple of patch_size 4"),
    ({"fused_attention": True, "num_heads": 4}, "4 heads of 16 have 4. Turn it off"),
  ],
)
def test_wrong_fields(changes, message):
  with pytest.raises(ValueError, match=message):
    build(**changes).init(jax.random.key(0), images())


def test_wrong_image_size_and_too_many_prompted_blocks():
  model, params = build(), draw(build())
  with pytest.raises(ValueError, match="16 x 16 pixels.*built for 8 x 8"):
    features(model, params, images(size=16))
  with pytest.raises(ValueError, match="prompts for 4 blocks.*has 3"):
    features(model, params, images(), prompts(4))
