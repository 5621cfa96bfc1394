"""Grad-CAM and attention roll-out, against plain computations of small models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import CLASSES, METHOD_KWARGS, SIZE, make_params

from insvp_jax import trees
from insvp_jax.data import preprocess
from insvp_jax.models.classifier import create_model
from insvp_jax.run import Run
from insvp_jax.tools import attribution

TOKENS = (SIZE // 4) ** 2
STAGED = {
  "swin_t": {"width": 16, "depths": (2, 2), "num_heads": (2, 4), "window": 2},
  "convnext_t": {"width": 16, "depths": (2, 1)},
  "resnet50": {"width": 4, "depths": (2, 2)},
}


def make_run(tmp_path, method="linear", backbone="mu/4", fields=None, **sizes):
  """Returns a run that was never trained, with parameters that are nowhere zero."""
  if backbone == "mu/4":
    sizes = {"depth": 2, "width": 16, "mlp_dim": 16, "num_heads": 2} | sizes
  model = create_model(
    backbone,
    method,
    num_classes=len(CLASSES),
    image_size=SIZE,
    backbone_kwargs=sizes,
    method_kwargs=METHOD_KWARGS.get(method, {}) if fields is None else fields,
  )
  leaves = trees.flatten(make_params(model))
  # So large that attention is not the same for all.
  leaves = {name: times(4, leaf) for name, leaf in leaves.items()}
  return Run(
    model=model,
    params=trees.unflatten(leaves),
    class_names=CLASSES,
    preset=preprocess.get_preset("vtab"),
    meta={"method": method, "config": {}},
    result=None,
    workdir=tmp_path,
  )


def times(factor, leaf):
  """Returns the product without a program for each shape."""
  return jax.device_put(np.float32(factor) * np.asarray(leaf))


@pytest.fixture(scope="module")
def vpt_run(tmp_path_factory):
  """A run that several tests look at, so that it is compiled once."""
  return make_run(tmp_path_factory.mktemp("vpt_deep"), "vpt_deep")


def inputs_of(run):
  return jax.device_put(run.preprocess(photos()))


def photos(count=3):
  rng = np.random.default_rng(1)
  return rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def norm(x, p, eps=1e-6):
  x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + eps)
  return x * p["scale"] + p["bias"]


def plain_blocks(run, images, prompts=(), carries=False, added=0.0):
  """Applies the blocks of a ViT to whole sequences, written down as in the papers.

  Args:
    run: its linear head and its prompts are not looked at.
    images: normalised.
    prompts: [p, d] for each block, the first alone if they are carried.
    carries: whether a block reads the prompts of the one before.
    added: to what the last block's first norm gives of the patches.

  Returns:
    (tokens before the last norm, attention [b, m + p, m + p] of each block, what the
    last block's first norm gives of the patches).
  """
  vit, backbone = run.model.backbone, run.params["backbone"]
  x = run.model.apply(
    {"params": run.params}, images, method=lambda m, x: m.backbone.embed(x)
  )
  if vit.has_cls:
    cls = jnp.broadcast_to(backbone["cls"], (len(x), 1, vit.width))
    x = jnp.concatenate([cls, x], axis=1)
  number, attentions, patches = x.shape[1], [], None
  for i in range(vit.depth):
    p = backbone["Transformer"][f"encoderblock_{i}"]
    if len(prompts) and (i == 0 or not carries):
      own = jnp.broadcast_to(prompts[i], (len(x), *prompts[i].shape))
      x = jnp.concatenate([x[:, :number], own], axis=1)
    y = norm(x, p["LayerNorm_0"])
    if i + 1 == vit.depth:
      patches = y[:, vit.num_prefix : number]
      y = y.at[:, vit.num_prefix : number].add(added)
    attention = p["MultiHeadDotProductAttention_0"]

    def project(name, y=y, attention=attention):
      weights = attention[name]
      return (
        jnp.einsum("bnd,dhe->bhne", y, weights["kernel"]) + weights["bias"][:, None]
      )

    q, k, v = map(project, ("query", "key", "value"))
    w = jax.nn.softmax(q @ jnp.swapaxes(k, 2, 3) / q.shape[-1] ** 0.5, axis=-1)
    attentions.append(w.mean(axis=1))
    out = attention["out"]
    x = x + jnp.einsum("bhne,hed->bnd", w @ v, out["kernel"]) + out["bias"]
    y, mlp = norm(x, p["LayerNorm_1"]), p["MlpBlock_0"]
    hidden = jax.nn.gelu(y @ mlp["Dense_0"]["kernel"] + mlp["Dense_0"]["bias"])
    x = x + hidden @ mlp["Dense_1"]["kernel"] + mlp["Dense_1"]["bias"]
  return x[:, :number], attentions, patches


def plain_rollout(attentions, num_tokens, carries):
  """Returns the product of (W + I) / 2 over whole sequences, [b, m, m]."""
  size = attentions[0].shape[-1]
  product = np.eye(size)
  # New prompts have nothing of what those of the block before them became.
  kept = np.ones(size) if carries else np.arange(size) < num_tokens
  for i, weights in enumerate(attentions):
    mixing = (np.asarray(weights, np.float64) + np.eye(size)) / 2
    product = mixing @ product if i == 0 else mixing @ (kept[:, None] * product)
  return product[:, :num_tokens, :num_tokens]


@pytest.mark.parametrize(
  ("method", "pool"),
  [("linear", "tok"), ("vpt_deep", "tok"), ("vpt_shallow", "gap")],
)
def test_rollout_is_the_product_of_attention_and_identity(
  vpt_run, tmp_path, method, pool
):
  run = vpt_run if method == "vpt_deep" else make_run(tmp_path, method, pool=pool)
  carries = method == "vpt_shallow"
  prompts = run.params.get("prompter", {}).get("common_prompt", ())
  images = inputs_of(run)
  blocks = jax.jit(lambda images: plain_blocks(run, images, prompts, carries))
  _, attentions, _ = blocks(images)
  prefix = run.model.backbone.num_prefix
  rows = plain_rollout(attentions, TOKENS + prefix, carries)
  row = rows[:, 0] if pool == "tok" else rows.mean(axis=1)
  found = attribution.attention_rollout(run, photos())
  assert found.shape == (3, 4, 4)
  np.testing.assert_allclose(found.reshape(3, -1), row[:, prefix:], rtol=1e-4)
  # The rest comes from prompts and the class token.
  sums = found.sum(axis=(1, 2))
  assert np.all(sums < 0.999) == (method != "linear" or pool == "tok")


def test_both_of_blocks_that_are_scanned_and_computed_again(vpt_run, tmp_path):
  run = vpt_run
  scanned = make_run(tmp_path, "vpt_deep", scan=True, remat=True)
  backbone = dict(run.params["backbone"])
  blocks = dict(backbone.pop("Transformer"))
  alone = [blocks.pop(f"encoderblock_{i}") for i in range(2)]
  blocks["encoderblock"] = jax.tree.map(lambda *x: jax.device_put(np.stack(x)), *alone)
  params = {**run.params, "backbone": {**backbone, "Transformer": blocks}}
  scanned.params.update(params)
  for compute in (attribution.attention_rollout, attribution.grad_cam):
    expected = compute(run, photos())
    np.testing.assert_allclose(
      compute(scanned, photos()), expected, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize(
  ("method", "fields"),
  [
    ("insvp", None),
    ("gated", {"prompt_length": 2, "pool": "mean"}),
    ("vpt_shallow+transhp", {"vpt_shallow": {"prompt_length": 2}}),
  ],
)
def test_both_read_what_methods_do_within_blocks(tmp_path, method, fields):
  run = make_run(tmp_path, method, fields=fields)
  rolled = attribution.attention_rollout(run, photos())
  # Some of it is of prompts, all of it at most 1.
  assert np.all(rolled > 0) and np.all(rolled.sum(axis=(1, 2)) < 0.95)
  cams = attribution.grad_cam(run, photos(), 1)
  assert cams.shape == (3, 4, 4) and cams.max() > 0 and cams.min() >= 0
  # The method is in force: with less of what it has learnt the maps are others.
  less = jax.tree.map(functools.partial(times, 0.01), run.params["prompter"])
  run.params.update({"prompter": less})
  changed = attribution.attention_rollout(run, photos())
  assert not np.allclose(changed, rolled, rtol=0.01)


def test_rollout_of_attention_pooling_weights_the_rows(tmp_path):
  run = make_run(tmp_path, pool="map")
  images = inputs_of(run)
  backbone = run.params["backbone"]
  pool = backbone["MAPHead_0"]["MultiHeadDotProductAttention_0"]

  def project(name, x):
    return (
      jnp.einsum("bnd,dhe->bhne", x, pool[name]["kernel"]) + pool[name]["bias"][:, None]
    )

  @jax.jit
  def plain(images):
    tokens, attentions, _ = plain_blocks(run, images)
    normed = norm(tokens, backbone["Transformer"]["encoder_norm"])
    q, k = project("query", backbone["MAPHead_0"]["probe"]), project("key", normed)
    weights = jax.nn.softmax(q @ jnp.swapaxes(k, 2, 3) / q.shape[-1] ** 0.5, axis=-1)
    return attentions, weights.mean(axis=1)

  attentions, weights = plain(images)
  expected = (np.asarray(weights) @ plain_rollout(attentions, TOKENS, True))[:, 0]
  found = attribution.attention_rollout(run, photos())
  np.testing.assert_allclose(found.reshape(3, -1), expected, rtol=1e-4)
  # All of it is of patches.
  np.testing.assert_allclose(found.sum(axis=(1, 2)), 1, rtol=1e-5)


def plain_cam(activations, logit_of):
  """Returns Grad-CAM by its definition: activations [b, n, d], logit of each image."""
  grads = jax.jit(jax.grad(lambda a: logit_of(a).sum()))(activations)
  weights = np.asarray(grads).mean(axis=1, keepdims=True)
  side = int(activations.shape[1] ** 0.5)
  values = (weights * np.asarray(activations)).sum(axis=-1)
  return np.maximum(values, 0).reshape(-1, side, side)


def test_grad_cam_of_mean_pooled_tokens_has_a_closed_form(tmp_path):
  """As y = w . mean(A) + b, the map is the positive part of A w / n."""
  run = make_run(tmp_path, pool="gap")
  inputs = inputs_of(run)
  tokens = jax.jit(
    lambda params, x: run.model.apply(
      {"params": params}, x, method=lambda model, x: model.backbone.tokens(x)
    )
  )(run.params, inputs)
  tokens = np.asarray(tokens)
  # So that some positions speak for each class.
  kernel = np.stack([tokens[0, 0], tokens[1, 3], -tokens[2, 5]], axis=1)
  run.params["head"].update(kernel=jnp.asarray(kernel))

  def closed(classes):
    weights = kernel[:, classes].T[:, None]
    return np.maximum((tokens * weights).sum(-1) / TOKENS, 0).reshape(-1, 4, 4)

  predicted = run.predict(photos()).argmax(axis=1)
  for given, classes in ((None, predicted), (2, [2, 2, 2]), ([0, 1, 2], [0, 1, 2])):
    found = attribution.grad_cam(run, photos(), given)
    np.testing.assert_allclose(found, closed(np.array(classes)), rtol=1e-4, atol=1e-6)
  assert found.dtype == np.float32 and found.max() > 0
  # However many there are.
  many = attribution.grad_cam(run, photos(33))
  np.testing.assert_allclose(
    many[32:], attribution.grad_cam(run, photos(33)[32:]), rtol=1e-4
  )


def test_grad_cam_of_a_class_token_is_of_what_the_last_block_attends_to(vpt_run):
  run = vpt_run
  inputs = inputs_of(run)
  prompts, head = run.params["prompter"]["common_prompt"], run.params["head"]
  last = run.params["backbone"]["Transformer"]["encoder_norm"]
  patches = jax.jit(lambda x: plain_blocks(run, x, prompts)[2])(inputs)

  def logit_of(activations):
    tokens = plain_blocks(run, inputs, prompts, added=activations - patches)[0]
    return (norm(tokens[:, 0], last) @ head["kernel"])[:, 1]

  found = attribution.grad_cam(run, photos(), 1)
  np.testing.assert_allclose(found, plain_cam(patches, logit_of), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", [*STAGED, "fc_norm"])
def test_grad_cam_of_each_architecture(tmp_path, variant):
  """What leaves the last stage, against the few operations after it."""
  if variant == "fc_norm":
    run = make_run(tmp_path, pool="gap", fc_norm=True)
    name, path = "fc_norm", ("Transformer", "encoderblock_1")
  else:
    run = make_run(tmp_path, "linear", variant, **STAGED[variant])
    name, path = "norm", ("stage_1",)
  params = run.params
  apply = jax.jit(functools.partial(run.model.apply, capture_intermediates=True))
  _, seen = apply({"params": params}, inputs_of(run))
  seen = seen["intermediates"]["backbone"]
  for part in path:
    seen = seen[part]
  output = seen["__call__"][0]
  output = np.asarray(output[0] if isinstance(output, tuple) else output)
  activations = output.reshape(len(output), -1, output.shape[-1])

  def logit_of(x):
    eps = 1e-5 if variant == "swin_t" else 1e-6
    p = params["backbone"].get(name)
    if variant == "swin_t":
      x = norm(x, p, eps)
    x = x.mean(axis=1)
    if variant in ("convnext_t", "fc_norm"):
      x = norm(x, p, eps)
    return (x @ params["head"]["kernel"])[:, 0]

  found = attribution.grad_cam(run, photos(), 0)
  expected = plain_cam(activations, logit_of)
  assert found.shape == expected.shape and found.max() > 0
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_computed_is_said(tmp_path):
  run = make_run(tmp_path)
  for wrong, message in (
    (3, "class_index is 3, expected a class from 0 to 2"),
    (-1, "class_index is -1"),
    ([0, 1], "expected a class, or one for each of 3 images"),
    (np.array([0.5] * 3), "class_index is array"),
  ):
    with pytest.raises(ValueError, match=message):
      attribution.grad_cam(run, photos(), wrong)
  with pytest.raises(ValueError, match="no images"):
    attribution.attention_rollout(run, [])
  run.params["head"].update(kernel=jax.device_put(np.full((16, 3), np.nan, np.float32)))
  with pytest.raises(ValueError, match="Grad-CAM of image 0 is not finite: the run at"):
    attribution.grad_cam(run, photos())
  staged = make_run(tmp_path, "linear", "resnet50", **STAGED["resnet50"])
  with pytest.raises(ValueError, match="needs a ViT.*backbone is a ResNet"):
    attribution.attention_rollout(staged, photos())
