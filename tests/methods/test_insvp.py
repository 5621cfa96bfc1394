"""InsVP: the paper's equations, the presets, every ablation, bad input."""

import dataclasses
import functools
import itertools

import flax.linen as nn
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax import trees
from insvp_jax.methods import BackboneSpec, create_method, method_fields
from insvp_jax.methods.insvp import InsVP
from insvp_jax.methods.insvp_prompters import (
  GlobalPrompter,
  PatchPrompter,
  SpecificPrompter,
  normalized,
  simam,
  specific_grid,
)
from insvp_jax.models.classifier import create_model

SPEC = BackboneSpec(
  width=32, depth=3, mlp_dim=64, num_heads=2, patch_size=4, image_size=16
)
IMAGES = jax.device_put(
  np.random.default_rng(1).standard_normal((2, 16, 16, 3), np.float32)
)
COMPONENTS = ("patch", "global", "common", "specific")
MODULES = {
  "patch": "patch_prompter",
  "global": "global_prompter",
  "common": "common_prompt",
  "specific": "specific_prompter",
}


def insvp(**kwargs):
  return create_method("insvp", SPEC, **{"prompt_length": 4, **kwargs})


def draw(shapes, seed=0):
  """Parameters by NumPy: JAX would compile a program for every shape."""
  rng = np.random.default_rng(seed)
  leaves = jax.tree.map(
    lambda s: rng.uniform(-0.2, 0.2, s.shape).astype(np.float32), shapes
  )
  return jax.device_put(leaves)


def init(method, seed=0):
  return draw(
    jax.eval_shape(
      lambda: method.init(jax.random.key(0), IMAGES, method="prompts"),
    ),
    seed,
  )


@functools.partial(jax.jit, static_argnums=0)
def prompts_of(method, variables, images=IMAGES):
  return method.apply(variables, images, method="prompts")


def _rngs(seed):
  return {} if seed is None else {"dropout": jax.random.key(seed)}


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def prompted_of(method, variables, *, seed=None, train=False):
  options = {"method": "prompt_image", "train": train, "rngs": _rngs(seed)}
  return method.apply(variables, IMAGES, **options)


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def tokens_of(method, variables, prompted=IMAGES, *, seed=None, train=False):
  options = {"method": "adapt", "train": train, "rngs": _rngs(seed)}
  return method.apply(variables, IMAGES, prompted, **options).prompts.tokens


def only(*components):
  return {f"use_{name}": name in components for name in COMPONENTS}


def test_image_prompt_fuses_patch_and_global():
  method = insvp()
  variables = init(method)
  prompts = prompts_of(method, variables)
  expected = 0.3 * prompts["patch"] + 0.7 * prompts["global"]
  np.testing.assert_allclose(prompts["image"], expected, atol=1e-6)
  prompted = prompted_of(method, variables)
  np.testing.assert_allclose(prompted, IMAGES + expected, atol=1e-6)


def test_feature_prompt_fuses_common_and_specific():
  method = insvp()
  variables = init(method)
  prompts = prompts_of(method, variables)
  common = variables["params"]["common_prompt"]
  assert prompts["specific"].shape == (2, 4, 32)
  expected = 0.5 * common[:, None] + 0.5 * prompts["specific"][None]
  assert prompts["feature"].shape == (3, 2, 4, 32)
  np.testing.assert_allclose(prompts["feature"], expected, atol=1e-6)
  tokens = tokens_of(method, variables, prompted_of(method, variables))
  np.testing.assert_allclose(tokens, prompts["feature"], atol=1e-6)


def test_specific_prompt_is_the_same_in_every_block():
  method = insvp(preset="release", prompt_dropout=0.0)
  variables = init(method)
  # In training too: one p^s, with one draw of dropout, for all blocks.
  tokens = np.asarray(tokens_of(method, variables, seed=2, train=True))
  specific = tokens - variables["params"]["common_prompt"][:, None]
  np.testing.assert_allclose(specific[1:], specific[:-1], atol=1e-6)
  assert not np.allclose(specific[:, 0], specific[:, 1])


@pytest.mark.parametrize(("preset", "depends"), [("paper", False), ("release", True)])
def test_specific_prompt_sees_the_original_or_the_prompted_image(preset, depends):
  method = insvp(preset=preset)
  params = init(method)["params"]
  other = {**params, "patch_prompter": init(method, 1)["params"]["patch_prompter"]}
  first = prompts_of(method, {"params": params})["specific"]
  second = prompts_of(method, {"params": other})["specific"]
  assert np.array_equal(first, second) != depends


def test_presets_differ_where_paper_and_release_do():
  paper, release = (insvp(preset=p) for p in ("paper", "release"))
  names = method_fields("insvp")
  different = {n for n in names if getattr(paper, n) != getattr(release, n)}
  assert different == {
    "preset",
    "global_kernels",
    "global_dilations",
    "specific_activation",
    "specific_input",
    "train_specific",
    "image_fusion",
    "feature_fusion",
    "prompt_init",
    "prompt_dropout",
  }
  assert create_method("insvp", SPEC).prompt_length == 9
  assert create_method("insvp", SPEC) == create_method("insvp", SPEC, preset="paper")


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_a_field_overrides_either_preset_and_none_does_not(preset):
  default = insvp(preset=preset)
  changes = {
    "prompt_length": 3,
    "prompted_blocks": 2,
    "patch_hidden": 5,
    "global_hidden": 7,
    "global_kernels": (5, 7),
    "global_dilations": (2, 3),
    "specific_kernels": (3, 3, 5),
    "image_fusion": (0.1, 0.2),
    "feature_fusion": (0.3, 0.4),
    "simam": True,
    "dropout": 0.25,
    "prompt_dropout": 0.3,
  }
  method = insvp(preset=preset, **changes)
  for name in method_fields("insvp"):
    assert getattr(method, name) == changes.get(name, getattr(default, name)), name
  nothing = dict.fromkeys(changes) | {"prompt_length": 4}
  assert insvp(preset=preset, **nothing) == default
  # Lists, as a config file may hold them, are as good as tuples.
  assert insvp(image_fusion=[1, 2]).image_fusion == (1.0, 2.0)


@pytest.mark.parametrize("preset", ["paper", "release"])
@pytest.mark.parametrize("used", list(itertools.product((False, True), repeat=4)))
def test_every_subset_of_prompts(preset, used):
  present = tuple(name for name, on in zip(COMPONENTS, used, strict=True) if on)
  method = insvp(preset=preset, **only(*present))
  variables = jax.eval_shape(lambda: init(method))
  params = variables.get("params", {})
  assert set(params) == {MODULES[name] for name in present}

  prompts = jax.eval_shape(lambda v: prompts_of(method, v), variables)
  expected = {name for name in ("patch", "global", "specific") if name in present}
  expected |= {"image"} if {"patch", "global"} & set(present) else set()
  expected |= {"feature"} if {"common", "specific"} & set(present) else set()
  assert set(prompts) == expected
  if "feature" in prompts:
    assert prompts["feature"].shape == (3, 2, 4, 32)

  tree = {"prompter": params, "head": {"kernel": np.zeros(())}}
  mask = trees.flatten(trees.mask(tree, method.trainable_patterns()))
  frozen = {name.split("/")[1] for name, chosen in mask.items() if not chosen}
  random_features = preset == "release" and "specific" in present
  assert frozen == ({"specific_prompter"} if random_features else set())


@pytest.mark.parametrize(
  "present", [(), ("patch", "common"), ("global", "specific"), COMPONENTS]
)
def test_ablations_run_in_the_classifier(present):
  model = create_model(
    "mu/4",
    "insvp",
    num_classes=5,
    image_size=16,
    backbone_kwargs={"depth": 2},
    method_kwargs={"prompt_length": 3, **only(*present)},
    head_init="torch",
  )
  params = draw(jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"])
  assert ("prompter" in params) == bool(present)
  apply = jax.jit(model.apply)
  logits = np.asarray(apply({"params": params}, IMAGES))
  assert np.all(np.isfinite(logits))
  # What is said of an image does not hang on the other one of the batch.
  for i, image in enumerate(np.asarray(IMAGES)):
    beside_another = apply({"params": params}, np.roll([image, -image], i, axis=0))
    np.testing.assert_allclose(beside_another[i], logits[i], atol=1e-5)


def test_without_any_prompt_nothing_changes():
  method = insvp(**only())
  assert method.apply({}, IMAGES, method="prompt_image") is IMAGES
  assert method.apply({}, IMAGES, IMAGES, method="adapt").prompts is None
  assert prompts_of(method, {}) == {}
  assert method.trainable_patterns() == ("head/.*",)


def test_common_prompts_alone_are_vpt_deep():
  method = insvp(**only("common"))
  variables = init(method)
  vpt = create_method("vpt_deep", SPEC, prompt_length=4)
  expected, tokens = tokens_of(vpt, variables), tokens_of(method, variables)
  # Shared by all instances, so the batch axis stays 1.
  assert tokens.shape == (3, 1, 4, 32)
  np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize(
  ("kwargs", "image", "feature"),
  [
    ({}, (0.3, 0.7), (0.5, 0.5)),
    (only("patch", "common"), (1.0, 1.0), (1.0, 1.0)),
    ({"use_global": False}, (1.0, 1.0), (0.5, 0.5)),
    ({"use_common": False}, (0.3, 0.7), (1.0, 1.0)),
    ({"preset": "release", "use_patch": False}, (1.0, 2.0), (1.0, 1.0)),
    ({"use_patch": False, "image_fusion": (0.3, 0.6)}, (0.3, 0.6), (0.5, 0.5)),
  ],
)
def test_fusion_weights_of_ablations(kwargs, image, feature):
  method = insvp(**kwargs)
  assert (method.image_fusion, method.feature_fusion) == (image, feature)


def test_a_clone_has_the_defaults_of_what_it_changes():
  method = insvp(image_fusion=(0.1, 0.2))
  assert method.clone() == method and hash(method.clone()) == hash(method)
  assert method.clone(preset="release") == insvp(
    preset="release", image_fusion=(0.1, 0.2)
  )
  assert method.clone(use_common=False).feature_fusion == (1.0, 1.0)
  assert method.clone(spec=dataclasses.replace(SPEC, depth=7)).prompted_blocks == 7


def test_given_fusion_weights_are_applied_to_a_lone_component():
  method = insvp(
    **only("global", "specific"), image_fusion=(9, 0.25), feature_fusion=(9, 4)
  )
  prompts = prompts_of(method, init(method))
  np.testing.assert_allclose(prompts["image"], 0.25 * prompts["global"], rtol=1e-6)
  np.testing.assert_allclose(prompts["feature"][2], 4 * prompts["specific"], rtol=1e-6)


def test_zero_weights_leave_the_image_and_empty_tokens():
  method = insvp(image_fusion=(0, 0), feature_fusion=(0, 0))
  variables = init(method)
  np.testing.assert_array_equal(prompted_of(method, variables), IMAGES)
  assert not np.any(prompts_of(method, variables)["feature"])


def test_tuned_starts_as_vpt_deep_and_trains_the_fusion_weights():
  method = insvp(preset="tuned", prompt_dropout=0.0)
  variables = jax.jit(
    lambda key: method.init(key, IMAGES, method="prompts"),
  )(jax.random.key(0))
  params, prompts = variables["params"], prompts_of(method, variables)
  assert not np.any(prompts["image"]) and np.any(prompts["patch"])
  common = np.broadcast_to(params["common_prompt"][:, None], (3, 2, 4, 32))
  np.testing.assert_array_equal(prompts["feature"], common)
  assert "prompter/fusion" in method.trainable_patterns()

  def loss(fusion):
    moved = {"params": {**params, "fusion": fusion}}
    found = prompts_of(method, moved)
    return jnp.sum(found["image"] ** 3) + jnp.sum(found["feature"] ** 3)

  # What is trained is added to (0, 0) and (1, 0).
  added = jnp.array([0.3, 0.7, -0.5, 0.5])
  paper = prompts_of(insvp(), {"params": {k: params[k] for k in MODULES.values()}})
  plain = insvp(preset="tuned", prompt_dropout=0.0, normalize=False)
  learnt = prompts_of(plain, {"params": {**params, "fusion": added}})
  for name, prompt in paper.items():
    np.testing.assert_allclose(learnt[name], prompt, atol=1e-6)
  assert np.all(np.asarray(jax.jit(jax.grad(loss))(added)) != 0)


def test_only_components_that_are_on_have_a_trained_weight():
  method = insvp(preset="tuned", **only("global", "specific"))
  variables = init(method)
  fusion = variables["params"]["fusion"]
  prompts = prompts_of(method, variables)
  np.testing.assert_allclose(prompts["image"], fusion[0] * prompts["global"], rtol=1e-6)
  expected = fusion[1] * prompts["specific"]
  np.testing.assert_allclose(prompts["feature"][0], expected, rtol=1e-6)
  for preset in ("paper", "release"):
    assert not insvp(preset=preset).learn_fusion
    assert "prompter/fusion" not in insvp(preset=preset).trainable_patterns()


def test_normalised_prompts_have_a_size_and_the_direction_of_what_was_made():
  weights = {"image_fusion": (0.5, 0.25), "feature_fusion": (0, 2)}
  plain, method = (insvp(normalize=on, **weights) for on in (False, True))
  variables = init(plain)
  made, prompts = jax.device_get([prompts_of(m, variables) for m in (plain, method)])
  # VPT draws from (-v, v), v = sqrt(6 / (3 patch_size^2 + width)).
  spec = method.spec
  start = np.sqrt(6 / (3 * spec.patch_size**2 + spec.width) / 3)
  for name, rms in {"patch": 1.0, "global": 1.0, "specific": start}.items():
    for before, after in zip(made[name], prompts[name], strict=True):
      expected = before * rms / np.sqrt(np.mean(before**2))
      np.testing.assert_allclose(after, expected, rtol=2e-3, atol=1e-6)
  fused = 0.5 * prompts["patch"] + 0.25 * prompts["global"]
  np.testing.assert_allclose(prompts["image"], fused, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(prompts["feature"][0], 2 * prompts["specific"], rtol=1e-6)


def test_prompts_of_nothing_are_normalised_to_nothing():
  nothing = np.zeros((2, 4, 4, 3), np.float32)
  total = jax.value_and_grad(lambda x: jnp.sum(normalized(x, 1.0)))
  value, gradient = jax.jit(total)(nothing)
  assert value == 0 and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_prompted_blocks(blocks):
  method = insvp(prompted_blocks=blocks)
  variables = init(method)
  assert variables["params"]["common_prompt"].shape == (blocks, 4, 32)
  assert prompts_of(method, variables)["feature"].shape == (blocks, 2, 4, 32)
  specific = insvp(prompted_blocks=blocks, use_common=False)
  assert prompts_of(specific, init(specific))["feature"].shape == (blocks, 2, 4, 32)


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_dropout_is_for_training_only(preset):
  method = insvp(preset=preset)
  variables = init(method)

  plain = prompted_of(method, variables)
  np.testing.assert_array_equal(plain, prompted_of(method, variables, seed=0))
  first = prompted_of(method, variables, seed=0, train=True)
  second = prompted_of(method, variables, seed=1, train=True)
  assert not np.array_equal(first, second)
  assert not np.array_equal(first, plain)
  # Dropped pixels of both prompts leave the image as it was.
  assert np.any(np.equal(first, IMAGES))

  first = tokens_of(method, variables, seed=0, train=True)
  assert not np.array_equal(first, tokens_of(method, variables))


def test_without_dropout_training_computes_what_evaluation_does():
  method = insvp(dropout=0.0, prompt_dropout=0.0)
  variables = init(method)
  # No key is needed.
  trained = prompted_of(method, variables, train=True)
  np.testing.assert_array_equal(trained, prompted_of(method, variables))
  tokens = [tokens_of(method, variables, train=t) for t in (False, True)]
  np.testing.assert_array_equal(*tokens)


def test_prompt_dropout_is_drawn_for_each_sample():
  method = insvp(**only("common"), prompt_dropout=0.5)
  variables = init(method)
  tokens = tokens_of(method, variables, seed=0, train=True)
  assert tokens.shape == (3, 2, 4, 32)
  assert not np.array_equal(tokens[:, 0], tokens[:, 1])
  assert 0.4 < np.mean(tokens == 0) < 0.6


@pytest.mark.parametrize(("preset", "attended"), [("paper", True), ("release", False)])
def test_prompts_do_not_depend_on_the_rest_of_the_batch(preset, attended):
  method = insvp(preset=preset, simam=attended)
  variables = init(method)
  together = prompts_of(method, variables)
  for i in range(2):
    alone = prompts_of(method, variables, IMAGES[i : i + 1])
    for name, prompt in alone.items():
      axis = 1 if name == "feature" else 0
      expected = np.take(together[name], [i], axis=axis)
      np.testing.assert_allclose(prompt, expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("preset", ["paper", "tuned"])
def test_prompters_compute_in_the_type_of_the_backbone(preset):
  variables = init(insvp(preset=preset))
  spec = dataclasses.replace(SPEC, dtype="bfloat16")
  method = create_method("insvp", spec, prompt_length=4, preset=preset)
  shapes = jax.eval_shape(
    lambda: method.init(jax.random.key(0), IMAGES, method="prompts")
  )
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(shapes)} == {"float32"}
  expected = prompts_of(insvp(preset=preset), variables)
  for name, prompt in prompts_of(method, variables).items():
    if name in ("global", "patch", "specific"):
      assert prompt.dtype == jnp.bfloat16
    largest = np.max(np.abs(expected[name]))
    np.testing.assert_allclose(
      prompt.astype(np.float32), expected[name], atol=0.02 * largest, err_msg=name
    )


@pytest.mark.parametrize(("preset", "common"), [("release", 1.0), ("paper", 0.0625)])
def test_prompters_start_as_pytorch_does(monkeypatch, preset, common):
  bounds = {}

  def uniform(key, shape, dtype, minval, maxval):
    del key
    assert minval == -maxval
    bounds.setdefault(tuple(shape), set()).add(maxval)
    return jnp.zeros(shape, dtype)

  monkeypatch.setattr(jax.random, "uniform", uniform)
  spec = BackboneSpec(
    width=768, depth=12, mlp_dim=3072, num_heads=12, patch_size=16, image_size=224
  )
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  kernels = {"global_kernels": (11, 25), "global_dilations": (1, 1)}
  method = create_method("insvp", spec, preset=preset, **kernels)
  jax.eval_shape(lambda x: method.init(jax.random.key(0), x, method="prompts"), images)
  # Kernels and biases alike; (27,) are the biases of two convolutions.
  expected = {
    (768, 16): {0.0361},
    (16,): {0.0361},
    (16, 768): {0.25},
    (768,): {0.25},
    (11, 11, 3, 6): {0.0525},
    (6,): {0.0525},
    (25, 25, 6, 3): {0.0163},
    (3,): {0.0163},
    (9, 9, 3, 9): {0.0642},
    (9,): {0.0642},
    (5, 5, 9, 27): {0.0667},
    (3, 3, 27, 27): {0.0642},
    (27,): {0.0667, 0.0642},
    (12, 9, 768): {common},
  }
  assert {k: {round(x, 4) for x in v} for k, v in bounds.items()} == {
    k: {round(x, 4) for x in v} for k, v in expected.items()
  }


def test_patch_prompter_treats_each_patch_alone_and_alike():
  module = PatchPrompter(patch_size=4, hidden=3, dropout=0.0)
  variables = draw(jax.eval_shape(module.init, jax.random.key(0), IMAGES))
  images, apply = np.array(IMAGES), jax.jit(module.apply)
  prompt = np.asarray(apply(variables, images))
  rolled = apply(variables, np.roll(images, (4, 8), axis=(1, 2)))
  np.testing.assert_allclose(rolled, np.roll(prompt, (4, 8), (1, 2)), atol=1e-6)
  images[:, 5, 9] += 1.0
  changed = apply(variables, images)
  moved = np.any(np.not_equal(changed, prompt), axis=(0, 3))
  assert moved[4:8, 8:12].all()
  assert moved.sum() == 16


@pytest.mark.parametrize(
  ("kernels", "dilations", "taps"),
  [((3, 3), (5, 12), 81), ((11, 25), (1, 1), 35 * 35)],
)
def test_global_prompter_reaches_35_pixels(kernels, dilations, taps):
  module = GlobalPrompter(6, kernels, dilations, dropout=0.0)
  images = np.ones((1, 48, 48, 3), np.float32)
  variables = draw(jax.eval_shape(module.init, jax.random.key(0), images))

  def value(x):
    return jnp.sum(module.apply(variables, x)[0, 24, 24])

  gradient = jax.jit(jax.grad(value))(images)
  rows, columns = np.nonzero(np.any(np.asarray(gradient[0]) != 0, axis=-1))
  assert (rows.min(), rows.max()) == (24 - 17, 24 + 17)
  assert (columns.min(), columns.max()) == (24 - 17, 24 + 17)
  # "Dilated": with the paper's preset, few taps cover the same field.
  assert len(rows) <= taps
  assert len(rows) > 0.8 * taps


def test_simam_is_its_formula():
  images = np.asarray(IMAGES, np.float64)
  expected = np.empty_like(images)
  for b, c in itertools.product(range(2), range(3)):
    x = images[b, :, :, c]
    deviation = (x - x.mean()) ** 2
    energy = deviation / (4 * (deviation.sum() / (x.size - 1) + 1e-3)) + 0.5
    expected[b, :, :, c] = x / (1 + np.exp(-energy))
  np.testing.assert_allclose(jax.jit(simam)(IMAGES), expected, atol=1e-6)


def test_simam_replaces_the_image_for_everything():
  attending, plain = insvp(simam=True), insvp()
  variables = init(plain)
  attended = jax.jit(simam)(IMAGES)
  expected = prompts_of(plain, variables, attended)
  prompts = prompts_of(attending, variables)
  for name, prompt in expected.items():
    np.testing.assert_allclose(prompts[name], prompt, atol=1e-6, err_msg=name)
  prompted = prompted_of(attending, variables)
  np.testing.assert_allclose(prompted, attended + prompts["image"], atol=1e-6)
  tokens = tokens_of(attending, variables, prompted)
  np.testing.assert_allclose(tokens, prompts["feature"], atol=1e-6)


@pytest.mark.parametrize(
  ("width", "image_size", "crop", "size", "channels", "pool"),
  [
    (768, 224, 8, 16, 3, 3),
    (192, 224, 8, 8, 3, 6),
    (256, 224, 8, 16, 1, 3),
    (384, 224, 8, 8, 6, 6),
    (1024, 224, 8, 16, 4, 3),
    (1152, 224, 8, 8, 18, 6),
    (1280, 224, 8, 16, 5, 3),
    (768, 384, 8, 16, 3, 5),
    (32, 224, 8, 4, 2, 13),
    # Small images: no crop, and a grid that the pooled image still fills.
    (128, 32, 0, 8, 2, 1),
    (192, 32, 0, 8, 3, 1),
    (768, 32, 0, 8, 12, 1),
    (48, 32, 0, 4, 3, 2),
    (768, 64, 8, 8, 12, 1),
    (768, 16, 0, 4, 48, 1),
  ],
)
def test_specific_grid_table(width, image_size, crop, size, channels, pool):
  grid = specific_grid(width, image_size)
  assert (grid.crop, grid.size, grid.channels, grid.pool) == (
    crop,
    size,
    channels,
    pool,
  )


@given(
  width=st.integers(1, 2048), image_size=st.integers(1, 512), length=st.integers(1, 20)
)
def test_specific_prompter_fits_every_width_and_resolution(width, image_size, length):
  side = (image_size - (16 if image_size >= 64 else 0)) // 4
  fitting = [s for s in (16, 8, 4) if width % s**2 == 0 and s <= side]
  if not fitting:
    with pytest.raises(ValueError, match="use_specific=False"):
      specific_grid(width, image_size)
    return
  grid = specific_grid(width, image_size)
  assert grid.size == fitting[0]
  assert grid.size**2 * grid.channels == width
  assert grid.size * grid.pool <= side < grid.size * (grid.pool + 1)
  module = SpecificPrompter((width,), length, (9, 5, 3), "relu", 0.1)
  images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
  (prompt,), variables = jax.eval_shape(
    lambda x: module.init_with_output(jax.random.key(0), x), images
  )
  assert prompt.shape == (2, length, width)
  last = variables["params"]["Conv_2"]["kernel"]
  assert last.shape == (3, 3, 3 * length, grid.channels * length)


@pytest.mark.parametrize("kernel", [1, 7, 8, 21])
def test_pixels_beyond_the_crop_are_left_out_without_a_trace(kernel):
  """The published order: convolve all, activate, crop, pool."""
  module = SpecificPrompter((16,), 2, (kernel, 1, 1), "leaky_relu", 0.0)
  images = np.random.default_rng(0).standard_normal((1, 64, 64, 3), np.float32)
  variables = draw(jax.eval_shape(module.init, jax.random.key(0), images))
  params = variables["params"]
  convolve = nn.Conv(2, (kernel, kernel), padding="SAME")

  @jax.jit
  def published(params, images):
    x = nn.leaky_relu(convolve.apply({"params": params["Conv_0"]}, images))
    x = nn.max_pool(x[:, 8:56, 8:56], (4, 4), (4, 4))
    for name in ("Conv_1", "Conv_2"):
      x = x @ params[name]["kernel"][0, 0] + params[name]["bias"]
      if name == "Conv_1":
        x = nn.max_pool(nn.leaky_relu(x), (3, 3), (3, 3))
    return x.reshape(1, 4, 4, 2, 1).transpose(0, 3, 4, 1, 2).reshape(1, 2, 16)

  expected = published(params, images)
  (prompt,) = jax.jit(module.apply)(variables, images)
  np.testing.assert_allclose(prompt, expected, atol=1e-4)


@pytest.mark.parametrize(
  ("width", "image_size", "need"),
  [
    (100, 224, "width must be divisible by 16"),
    (768, 12, "at least 16 pixels"),
    # There is room for 8 x 8 tokens, but no square divides the width.
    (24, 40, "width must be divisible by 16"),
  ],
)
def test_specific_grid_says_what_would_do(width, image_size, need):
  with pytest.raises(ValueError, match=need):
    specific_grid(width, image_size)
  spec = BackboneSpec(width, 2, 64, 2, patch_size=4, image_size=image_size)
  with pytest.raises(ValueError, match=need):
    create_method("insvp", spec)
  create_method("insvp", spec, use_specific=False)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"prompt_length": 0}, "prompt_length is 0"),
    ({"prompt_length": 2.5}, "prompt_length is 2.5"),
    ({"prompted_blocks": 4}, "the backbone has 3 blocks"),
    ({"prompted_blocks": -1}, "from 1 to 3"),
    ({"patch_hidden": -3}, "patch_hidden is -3"),
    ({"use_patch": "yes"}, "use_patch is 'yes', expected True or False"),
    ({"simam": 1}, "simam is 1, expected True or False"),
    ({"train_specific": "no"}, "train_specific is 'no'"),
    ({"global_kernels": (3,)}, r"global_kernels is \(3,\), expected 2 integers"),
    ({"global_kernels": 3}, "global_kernels is 3, expected 2 integers"),
    ({"global_dilations": (5, 0)}, "global_dilations"),
    ({"specific_kernels": (9, 5)}, "expected 3 integers from 1 to 65536"),
    ({"specific_kernels": "953"}, "expected 3 integers from 1 to 65536"),
    ({"specific_activation": "gelu"}, "expected one of 'relu', 'leaky_relu'"),
    ({"specific_input": "originl"}, "Did you mean 'original'"),
    ({"prompt_init": "zero"}, "expected one of 'vpt', 'unit'"),
    ({"image_fusion": (0.3,)}, "expected 2 finite numbers"),
    ({"image_fusion": (0.3, "0.7")}, "expected 2 finite numbers"),
    ({"feature_fusion": (float("nan"), 1.0)}, "expected 2 finite numbers"),
    ({"dropout": 1.0}, r"dropout is 1.0, expected a dropout rate in \[0, 1\)"),
    ({"dropout": -0.1}, "dropout is -0.1"),
    ({"prompt_dropout": "0.1"}, "prompt_dropout is '0.1'"),
  ],
)
def test_bad_input_is_one_clear_line(kwargs, message):
  # Below the constructor, whose annotations would refuse a wrong type in tests only.
  with pytest.raises(ValueError, match=message) as error:
    InsVP.resolve(SPEC, kwargs)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"prompt_lenght": 3}, "Did you mean 'prompt_length'"),
    ({"use_gobal": True}, "Did you mean 'use_global'"),
    ({"preset": "papre"}, "unknown InsVP preset 'papre'. Did you mean 'paper'"),
    ({"prompted_blocks": 4}, "the backbone has 3 blocks"),
    ({"dropout": 1.0}, "expected a dropout rate"),
  ],
)
def test_bad_input_is_refused_at_construction(kwargs, message):
  with pytest.raises(ValueError, match=message):
    insvp(**kwargs)


def test_images_of_another_size_are_refused():
  method = insvp()
  variables = init(method)
  with pytest.raises(ValueError, match="built for 16 x 16"):
    prompts_of(method, variables, np.zeros((1, 20, 20, 3), np.float32))
