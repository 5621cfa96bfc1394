"""VPT, linear, full and bias; and how a method is found by its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import prepare, tiny_config

from insvp_jax import trees
from insvp_jax.data import preprocess
from insvp_jax.methods import METHODS, BackboneSpec, create_method, method_fields
from insvp_jax.methods.base import Apply
from insvp_jax.methods.hooks import Adaptation
from insvp_jax.models.classifier import create_model
from insvp_jax.models.vit import decode_variant

SPEC = BackboneSpec(
  width=32, depth=3, mlp_dim=128, num_heads=2, patch_size=4, image_size=16
)
IMAGES = jax.device_put(
  np.random.default_rng(1).standard_normal((2, 16, 16, 3), np.float32)
)


def start(method, images=IMAGES):
  """Returns what a training starts from, on the host."""
  init = jax.jit(lambda key: method.init(key, images, method="prompts"))
  return jax.device_get(init(jax.random.key(0)))


def init(method, images=IMAGES):
  """Returns variables of which none is zero; compiles nothing."""
  key, rng = jax.random.key(0), np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.uniform(0.1, 0.2, leaf.shape).astype(np.float32),
    jax.eval_shape(lambda x: method.init(key, x, method="prompts"), images),
  )


def adapted(method, variables, *, train=False, key=None):
  rngs = {} if key is None else {"dropout": key}
  options = {"method": "adapt", "train": train, "rngs": rngs}
  apply = jax.jit(lambda v: method.apply(v, IMAGES, IMAGES, **options))
  return jax.device_get(apply(variables))


def tokens(method, variables, **kwargs):
  return adapted(method, variables, **kwargs).prompts.tokens


def tiny_model(method, **method_kwargs):
  return create_model(
    "mu/4",
    method,
    num_classes=5,
    image_size=16,
    backbone_kwargs={"depth": 3},
    method_kwargs=method_kwargs,
    head_init="torch",
  )


@pytest.mark.parametrize(
  ("name", "kwargs", "blocks"),
  [
    ("vpt_shallow", {}, 1),
    ("vpt_deep", {}, 3),
    ("vpt_deep", {"prompted_blocks": 2}, 2),
  ],
)
def test_shapes(name, kwargs, blocks):
  method = create_method(name, SPEC, prompt_length=4, **kwargs)
  variables = init(method)
  assert trees.flatten(variables["params"]).keys() == {"common_prompt"}
  assert variables["params"]["common_prompt"].shape == (blocks, 4, 32)
  # Shared by all instances, so the batch axis stays 1.
  assert tokens(method, variables).shape == (blocks, 1, 4, 32)
  prompts = jax.eval_shape(
    lambda v: method.apply(v, IMAGES, method="prompts"), variables
  )
  assert {k: v.shape for k, v in prompts.items()} == {"feature": (blocks, 2, 4, 32)}


@pytest.mark.parametrize(
  ("variant", "bound"),
  [
    ("Ti/16", 0.07906),
    ("S/16", 0.07217),
    ("B/16", 0.0625),
    ("B/32", 0.03953),
    ("L/16", 0.05786),
    ("H/14", 0.05667),
  ],
)
def test_init_is_uniform_within_the_published_bound(variant, bound):
  spec = BackboneSpec(**decode_variant(variant), image_size=224)
  method = create_method("vpt_shallow", spec, prompt_length=10)
  prompt = start(method)["params"]["common_prompt"]
  assert 0.99 * bound < np.max(np.abs(prompt)) < 1.0001 * bound
  np.testing.assert_allclose(np.std(prompt), bound / np.sqrt(3), rtol=0.05)


def test_projection_is_one_dense_layer_for_all_blocks():
  method = create_method("vpt_deep", SPEC, prompt_length=4, project=8)
  variables = start(method)
  params = variables["params"]
  shapes = {name: leaf.shape for name, leaf in trees.flatten(params).items()}
  assert shapes == {
    "common_prompt": (3, 4, 8),
    "projection/kernel": (8, 32),
    "projection/bias": (32,),
  }
  projection = params["projection"]
  bias = projection["bias"].reshape(1, 1, 32)
  expected = params["common_prompt"] @ projection["kernel"] + bias
  np.testing.assert_allclose(tokens(method, variables)[:, 0], expected, atol=1e-6)
  # The bound is that of the narrow prompts.
  bound = np.sqrt(6 / (3 * 16 + 8))
  assert 0.9 * bound < np.max(np.abs(params["common_prompt"])) <= bound


def test_dropout_is_drawn_for_each_sample_and_only_in_training():
  method = create_method("vpt_deep", SPEC, prompt_length=8, dropout=0.5)
  variables = init(method)
  np.testing.assert_array_equal(
    tokens(method, variables)[:, 0], variables["params"]["common_prompt"]
  )
  dropped = tokens(method, variables, train=True, key=jax.random.key(3))
  assert dropped.shape == (3, 2, 8, 32)
  assert not np.array_equal(dropped[:, 0], dropped[:, 1])
  assert 0.4 < np.mean(dropped == 0) < 0.6
  kept = dropped[:, 0] != 0
  np.testing.assert_allclose(
    dropped[:, 0][kept], 2 * variables["params"]["common_prompt"][kept], rtol=1e-6
  )


def test_defaults_are_the_published_ones():
  assert create_method("vpt_shallow", SPEC).dropout == 0
  assert create_method("vpt_deep", SPEC).dropout == 0.1
  # Without dropout, training needs no key and the prompts stay shared.
  shallow = create_method("vpt_shallow", SPEC)
  assert tokens(shallow, init(shallow), train=True).shape == (1, 1, 50, 32)
  assert create_method("vpt_deep", SPEC, dropout=None).dropout == 0.1


@pytest.mark.parametrize(
  ("name", "kwargs", "expected"),
  [
    ("vpt_deep", {"location": "add"}, 12 * 197 * 768),
    ("vpt_shallow", {"location": "add"}, 197 * 768),
    ("vpt_deep", {"location": "add-1", "prompted_blocks": 3}, 3 * 768),
    ("vpt_deep", {"deep_shared": True}, 38_400),
    ("vpt_deep", {"project": 20}, 12 * 50 * 20 + 20 * 768 + 768),
    ("vpt_shallow", {"location": "prepend-pixel", "prompt_length": 5}, 3 * 256 * 5),
    ("vpt_shallow", {"location": "pad", "prompt_length": 1}, 2_700),
    ("vpt_shallow", {"location": "pad", "prompt_length": 11}, 31_020),
    (
      "vpt_shallow",
      {"location": "below", "prompt_length": 2},
      2 * (224**2 + 256 * 768),
    ),
  ],
)
def test_counts_of_the_ablations_on_b16(name, kwargs, expected):
  spec = BackboneSpec(**decode_variant("B/16"), image_size=224)
  method = create_method(name, spec, **kwargs)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  shapes = jax.eval_shape(
    lambda x: method.init(jax.random.key(0), x, method="prompts"), images
  )
  assert trees.count(shapes["params"]) == expected


def test_which_blocks_are_prompted():
  method = create_method("vpt_deep", SPEC, prompted_blocks=2, prompted_from="last")
  prompts = adapted(method, init(method)).prompts
  assert (prompts.first, prompts.carry, len(prompts.tokens)) == (1, True, 2)
  method = create_method("vpt_deep", SPEC, prompted_blocks=1, expand=False)
  prompts = adapted(method, init(method)).prompts
  assert (prompts.first, prompts.carry, len(prompts.tokens)) == (0, False, 1)


def test_shared_prompts_are_one_parameter():
  method = create_method("vpt_deep", SPEC, prompt_length=4, deep_shared=True)
  variables = init(method)
  common = variables["params"]["common_prompt"]
  assert common.shape == (1, 4, 32)
  expected = np.broadcast_to(common[:, None], (3, 1, 4, 32))
  np.testing.assert_array_equal(tokens(method, variables), expected)


def test_prompts_are_added_in_their_blocks_alone():
  method = create_method(
    "vpt_deep", SPEC, location="add", prompted_blocks=1, prompted_from="last"
  )
  variables = init(method)
  found = adapted(method, variables)
  assert found.prompts is None and found.blocks.shape == (3, 1, 17, 32)
  assert not np.any(found.blocks[:2])
  np.testing.assert_array_equal(found.blocks[2], variables["params"]["common_prompt"])


def test_border_of_pixels():
  method = create_method("vpt_shallow", SPEC, location="pad", prompt_length=3)
  variables = start(method)
  prompt_image = jax.jit(lambda v: method.apply(v, IMAGES, method="prompt_image"))
  padded = np.asarray(prompt_image(variables))
  assert padded.shape == (2, 22, 22, 3) and method.prompted_size() == 22
  np.testing.assert_array_equal(padded[:, 3:-3, 3:-3], IMAGES)
  params = variables["params"]["pixels"]
  assert all(0 <= x.min() and x.max() < 1 for x in params.values())
  pixels = padded * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]
  for actual, expected in (
    (pixels[0, :3], params["top_bottom"][:3]),
    (pixels[1, -3:], params["top_bottom"][3:]),
    (pixels[0, 3:-3, :3], params["left_right"][:, :3]),
    (pixels[1, 3:-3, -3:], params["left_right"][:, 3:]),
  ):
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_more_channels_train_the_embedding():
  model = tiny_model("vpt_shallow", location="below", prompt_length=1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
  mask = trees.flatten(trees.mask(shapes, model.prompter.trainable_patterns()))
  assert {name for name, chosen in mask.items() if chosen} == {
    *("backbone/embedding/kernel", "backbone/embedding/bias"),
    *("prompter/pixels/prompt", "prompter/pixels/kernel", "head/kernel", "head/bias"),
  }


def test_pools_of_a_backbone_without_a_class_token():
  # There the image's rows are what the backbone pools itself.
  model = create_model(
    "mu/4",
    "vpt_deep",
    num_classes=5,
    image_size=16,
    backbone_kwargs={"pool": "gap"},
    method_kwargs={"prompt_length": 3},
    head_init="torch",
  )
  params = jax.jit(model.init)(jax.random.key(0), IMAGES)
  logits = jax.jit(model.apply)(params, IMAGES)
  pooled = model.clone(prompter=model.prompter.clone(pool="image"))
  np.testing.assert_allclose(jax.jit(pooled.apply)(params, IMAGES), logits, atol=1e-6)


@pytest.mark.parametrize(
  ("name", "kwargs", "sources"),
  [
    ("vpt_deep", {}, (0, 0, 1)),
    ("vpt_deep", {"prompted_blocks": 1, "prompted_from": "last"}, (1,)),
    ("vpt_deep", {"deep_shared": True}, (0,)),
    ("vpt_shallow", {}, (0,)),
  ],
)
def test_class_means(name, kwargs, sources):
  """Block i starts at the class tokens that leave block i - 1; block 0 at its own."""
  method = create_method(
    name, SPEC, prompt_length=5, prompt_init="class_means", **kwargs
  )
  # Of class 1 there are no images; the last one is padding.
  batches = [
    {"images": np.arange(3), "labels": np.array([2, 0, 2]), "mask": np.ones(3)},
    {"images": np.arange(3, 5), "labels": np.array([0, 1]), "mask": np.array([1, 0])},
  ]

  def backbone(params, images, adaptation):
    x = np.zeros((len(images), 17, 32), np.float32)
    x[:, 0] += images[:, None]
    reads = [adaptation.hooks.leave(None, x + 10 * i, None, None)[2] for i in range(3)]
    return None, reads

  params = {"backbone": {}, "prompter": dict(init(method)["params"]), "head": {}}
  shape = params["prompter"]["common_prompt"].shape
  prepared = method.prepare(params, lambda: iter(batches), Apply(backbone, None, None))
  prompts = prepared["prompter"]["common_prompt"]
  assert prompts.shape == shape and prompts.dtype == np.float32
  # Images 1 and 3 are of class 0, 0 and 2 of class 2.
  means = np.array([2, 1, 2, 1, 2])
  expected = np.stack([means + 10 * source for source in sources])
  np.testing.assert_array_equal(prompts, np.broadcast_to(expected[..., None], shape))


@pytest.mark.parametrize(
  ("name", "kwargs", "blocks"),
  [
    ("vpt_deep", {}, (0, 1, 2)),
    ("vpt_deep", {"prompted_blocks": 1, "prompted_from": "last"}, (2,)),
    ("vpt_shallow", {}, (0,)),
    ("insvp", {"prompted_blocks": 2}, (0, 1)),
  ],
)
def test_patch_tokens(name, kwargs, blocks):
  """Prompt i of each block is a patch token that enters it, as large as when drawn."""
  method = create_method(
    name, SPEC, prompt_length=5, prompt_init="patch_tokens", **kwargs
  )
  rng, limits = np.random.default_rng(0), []
  # That of image, block (what enters it, what leaves the last one), place.
  reads = rng.normal(size=(20, SPEC.depth + 1, 17, 32)).astype(np.float32)
  mask = (np.arange(20) < 3).astype(np.float32)

  def batches(limit):
    limits.append(limit)
    yield {"images": reads, "labels": np.zeros(20), "mask": mask}

  def backbone(params, images, adaptation):
    def read(i):
      # The last block reads the class token alone.
      entering = images[:, i] if i < SPEC.depth - 1 else images[:, i, :1]
      return adaptation.hooks.leave(None, images[:, i + 1], None, (entering, None))[2]

    return None, [read(i) for i in range(SPEC.depth)]

  params = {"backbone": {}, "prompter": dict(init(method)["params"]), "head": {}}
  drawn = params["prompter"]["common_prompt"]
  assert method.prepares()
  prepared = method.prepare(params, batches, Apply(backbone, None, None))
  prompts = prepared["prompter"]["common_prompt"]
  assert prompts.shape == drawn.shape and prompts.dtype == np.float32 and limits
  size = np.sqrt(np.mean(np.square(drawn)))
  np.testing.assert_allclose(np.sqrt(np.mean(prompts**2, -1)), size, rtol=1e-5)
  # Patches of real images alone: no class token, no padding.
  patches = reads[:3, :, 1:]
  patches = patches / np.sqrt(np.mean(patches**2, axis=-1, keepdims=True))
  chosen = []
  for i, block in enumerate(blocks):
    distance = np.abs(patches[:, None, block] - prompts[i][None, :, None] / size)
    places = [np.argwhere(d.max(-1) < 1e-4) for d in distance.swapaxes(0, 1)]
    assert all(len(place) == 1 for place in places)
    chosen.append([tuple(place[0]) for place in places])
  # The same patches in each block, and not one patch five times.
  assert chosen == [chosen[0]] * len(blocks) and len(set(chosen[0])) > 2
  again = method.prepare(params, batches, Apply(backbone, None, None))
  np.testing.assert_array_equal(again["prompter"]["common_prompt"], prompts)


def test_patch_tokens_of_a_real_backbone():
  config = tiny_config("vpt_deep", vpt_deep__prompt_init="patch_tokens")
  prepared = prepare(config)
  params = prepared.prepare_params(config, prepared.first_params(config))
  backbone = prepared.program.model.backbone
  preset = preprocess.get_preset("vtab")

  @jax.jit
  def embed(variables, images):
    images = preprocess.eval_preprocess(preset, images, backbone.image_size)
    return backbone.apply(variables, images, Adaptation(), method="embed")

  images = prepared.data.splits["train"].images
  x = np.asarray(embed({"params": params["backbone"]}, images))
  x = x[:, backbone.spec.num_prefix :]
  prompts = np.asarray(params["prompter"]["common_prompt"])[0]
  cosines = np.einsum("pd,bnd->pbn", prompts, x) / np.linalg.norm(x, axis=-1)
  cosines = cosines.max((1, 2)) / np.linalg.norm(prompts, axis=-1)
  np.testing.assert_allclose(cosines, 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["vpt_deep", "insvp"])
def test_patch_tokens_need_one_width(name):
  with pytest.raises(ValueError, match="'patch_tokens', which needs tokens between"):
    create_model(
      "swin_t",
      name,
      num_classes=2,
      backbone_kwargs={"depths": (1, 1), "width": 8, "num_heads": 1},
      method_kwargs={"prompt_init": "patch_tokens"},
    )


@pytest.mark.parametrize("name", ["linear", "full", "bias"])
def test_methods_without_prompts(name):
  model = tiny_model(name)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes
  )
  assert sorted(params) == ["backbone", "head"]
  assert model.apply({"params": params}, IMAGES, method=model.prompts) == {}
  feature = jax.jit(model.backbone.apply)({"params": params["backbone"]}, IMAGES)
  head = params["head"]
  expected = np.asarray(feature) @ head["kernel"] + head["bias"]
  apply = jax.jit(model.apply, static_argnames="train")
  logits = apply({"params": params}, IMAGES, train=True)
  np.testing.assert_allclose(logits, expected, atol=1e-5)

  mask = trees.flatten(trees.mask(params, model.prompter.trainable_patterns()))
  trainable = {name for name, chosen in mask.items() if chosen}
  expected = {
    "linear": {name for name in mask if name.startswith("head/")},
    "full": set(mask),
    "bias": {name for name in mask if name.endswith("/bias") or "head/" in name},
  }[name]
  assert trainable == expected
  assert name == "linear" or "backbone/embedding/bias" in trainable


def test_every_method_is_found_by_name():
  for name, kind in METHODS.items():
    assert type(create_method(name, SPEC)) is kind
  assert method_fields("linear") == ()
  assert set(method_fields("vpt_deep")) - set(method_fields("vpt_shallow")) == {
    *("prompted_blocks", "prompted_from", "expand", "deep_shared")
  }


@pytest.mark.parametrize(
  ("name", "kwargs", "message"),
  [
    ("vpt_dep", {}, "unknown method 'vpt_dep'. Nearest: vpt_deep, "),
    ("vpt_deep", {"prompt_lenght": 3}, "Did you mean 'prompt_length'"),
    ("vpt_shallow", {"prompted_blocks": 2}, "unknown field 'prompted_blocks'"),
    ("vpt_deep", {"spec": 2}, "unknown field 'spec'"),
    ("vpt_deep", {"name": "x"}, "unknown field 'name'"),
    ("linear", {"dropout": 0.1}, "'linear'. It has none"),
    ("vpt_deep", {"prompt_length": 0}, "prompt_length is 0, expected an integer"),
    ("vpt_deep", {"prompt_length": True}, "prompt_length is True"),
    ("vpt_deep", {"dropout": 1.0}, r"dropout is 1.0, expected a dropout rate in \[0"),
    ("vpt_deep", {"dropout": float("nan")}, "dropout is nan"),
    ("vpt_deep", {"project": 0}, "project is 0"),
    ("vpt_deep", {"prompted_blocks": 4}, "the backbone has 3 blocks"),
    ("vpt_deep", {"prompted_blocks": 0}, "expected an integer from 1 to 3"),
    ("vpt_deep", {"location": "pad"}, "location is 'pad', expected one of 'prepend'"),
    (
      "vpt_deep",
      {"location": "add", "pool": "both"},
      "no prompts are among the tokens",
    ),
    (
      "vpt_shallow",
      {"location": "pad", "project": 8},
      "project is 8, but prompts with",
    ),
    ("vpt_shallow", {"location": "below", "dropout": 0.1}, "no prompt tokens to drop"),
    (
      "vpt_deep",
      {"location": "add", "prompt_init": "class_means"},
      "location='prepend'",
    ),
    ("vpt_deep", {"project": 8, "prompt_init": "class_means"}, "and no project"),
    ("vpt_deep", {"location": "add-1", "expand": False}, "no prompts are carried on"),
    (
      "vpt_deep",
      {"prompted_blocks": 2, "expand": False, "pool": "prompt"},
      "no prompts after the last block",
    ),
  ],
)
def test_bad_input_is_one_clear_line(name, kwargs, message):
  with pytest.raises(ValueError, match=message) as error:
    create_method(name, SPEC, **kwargs)
  assert "\n" not in str(error.value)
