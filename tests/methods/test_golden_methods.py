"""InsVP and VPT against the outputs and gradients of their published code.

The backbone goes through the public loader, from a file with the original names.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax import trees
from insvp_jax.methods import create_method
from insvp_jax.methods.insvp_prompters import simam
from insvp_jax.models.classifier import PromptedClassifier, create_model
from insvp_jax.models.weights.load import load_backbone

# Of the largest absolute value.
OUTPUT_TOLERANCE = 1e-5
VPT_GRADIENT_TOLERANCE = 1e-4
# ReLU's kink: a hidden unit whose sign differs by rounding moves its whole row.
INSVP_GRADIENT_TOLERANCE = 2e-3


def assert_near(actual, expected, tolerance, name):
  expected = np.asarray(expected)
  assert actual.shape == expected.shape, name
  error = np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected))
  assert error < tolerance, f"{name}: relative error {error:.2e}"


class Case:
  """A golden file, with the model and the parameters that it was made from."""

  def __init__(self, golden, recipe, folder, name, method, method_kwargs, prompters):
    """Loads the backbone from disk and draws the rest.

    Args:
      golden: the fixture.
      recipe: the fixture.
      folder: where to write the backbone's file.
      name: of the golden file.
      method: a key of METHODS.
      method_kwargs: config -> the method's fields.
      prompters: the golden name of each prompter parameter -> ours.
    """
    self.file = golden(name)
    config, seed = self.file["config"], self.file["config"]["seed"]
    sizes = dict(config["vit"])
    num_classes = sizes.pop("num_classes")
    weights = recipe.vit(seed, num_classes=num_classes, **sizes)
    path = folder / f"{name.replace('/', '_')}.npz"
    np.savez(path, **weights)
    size = sizes["image_size"]
    self.model = create_model(
      "B/16",
      method,
      num_classes=num_classes,
      image_size=size,
      backbone_kwargs={k: v for k, v in sizes.items() if k != "image_size"},
      method_kwargs=method_kwargs(config),
    )
    self.images = jnp.asarray(recipe.images((config["batch"], size, size, 3), seed))
    shapes = jax.eval_shape(self.model.init, jax.random.key(0), self.images)["params"]
    shapes = trees.flatten(shapes["prompter"])
    self.names = prompters or {name: name for name in shapes}
    assert sorted(self.names.values()) == sorted(shapes)
    self.params = {
      "backbone": load_backbone(path, self.model),
      "prompter": trees.unflatten(
        {
          ours: recipe.draw(theirs, shapes[ours].shape, seed)
          for theirs, ours in self.names.items()
        }
      ),
      "head": {leaf: weights[f"head/{leaf}"] for leaf in ("kernel", "bias")},
    }

  def check(self, gradient_tolerance):
    """Compares logits, loss and every gradient."""
    labels = self.file["labels"]

    # Weights are arguments: as constants they would be compiled in, megabytes of them.
    def loss_fn(trainable, backbone, images):
      params = {"backbone": backbone, **trainable}
      logits = self.model.apply({"params": params}, images)
      log_probs = jax.nn.log_softmax(logits)
      return -jnp.mean(log_probs[jnp.arange(len(labels)), labels]), logits

    trainable = {k: self.params[k] for k in ("prompter", "head")}
    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, logits), grads = grad_fn(trainable, self.params["backbone"], self.images)
    assert_near(logits, self.file["logits"], OUTPUT_TOLERANCE, "logits")
    assert_near(loss, self.file["loss"], OUTPUT_TOLERANCE, "loss")
    grads = trees.flatten(grads)
    names = {theirs: f"prompter/{ours}" for theirs, ours in self.names.items()}
    names |= {f"head/{leaf}": f"head/{leaf}" for leaf in ("kernel", "bias")}
    for theirs, ours in names.items():
      expected = self.file[f"grad/{theirs}"]
      assert_near(grads[ours], expected, gradient_tolerance, f"gradient of {ours}")
    # Nothing that the file pins was left out.
    pinned = {key for key in self.file if key.startswith("grad/")}
    assert pinned == {f"grad/{theirs}" for theirs in names}

  def plain_logits(self):
    """Logits of the backbone and the head alone."""
    linear = create_method("linear", self.model.backbone.spec)
    model = PromptedClassifier(self.model.backbone, linear, self.model.head)
    params = {k: self.params[k] for k in ("backbone", "head")}
    return jax.jit(model.apply)({"params": params}, self.images)


@pytest.mark.parametrize(
  ("name", "method", "extra", "prompters"),
  [
    ("vpt_deep", "vpt_deep", (), {}),
    ("vpt_shallow", "vpt_shallow", (), {}),
    (
      "methods/vpt_num_deep_layers",
      "vpt_deep",
      (("prompted_blocks", "num_deep_layers"),),
      {"prompt": "common_prompt"},
    ),
    (
      "methods/vpt_project",
      "vpt_deep",
      (("project", "prompt_width"),),
      {
        "prompt": "common_prompt",
        "prompt_projection/kernel": "projection/kernel",
        "prompt_projection/bias": "projection/bias",
      },
    ),
  ],
)
def test_vpt(golden, recipe, tmp_path, name, method, extra, prompters):
  def fields(config):
    extras = {field: config[key] for field, key in extra}
    return {"prompt_length": config["prompt_length"], **extras}

  case = Case(golden, recipe, tmp_path, name, method, fields, prompters)
  case.check(VPT_GRADIENT_TOLERANCE)


def test_vpt_backbone_without_prompts(golden, recipe, tmp_path):
  def fields(config):
    return {"prompt_length": config["prompt_length"]}

  case = Case(golden, recipe, tmp_path, "vpt_deep", "vpt_deep", fields, {})
  expected = case.file["plain_logits"]
  assert_near(case.plain_logits(), expected, OUTPUT_TOLERANCE, "plain_logits")
  # The file has the outputs of all tokens.
  backbone = case.model.backbone.clone(skip_unread=False)

  @jax.jit
  def all_tokens(params, images):
    _, state = backbone.apply(
      {"params": params},
      images,
      capture_intermediates=lambda module, _: module.name == "Transformer",
    )
    return state["intermediates"]["Transformer"]["__call__"]

  (encoded,) = all_tokens(case.params["backbone"], case.images)
  expected = case.file["plain_encoded"]
  assert_near(encoded, expected, OUTPUT_TOLERANCE, "plain_encoded")


def _insvp_fields(config):
  return {
    "preset": "release",
    "prompt_length": config["prompt_length"],
    "patch_hidden": config["patch_hidden"],
    "global_hidden": config["global_hidden"],
    "global_kernels": tuple(config["global_kernels"]),
    "specific_kernels": tuple(config["specific_kernels"]),
    "image_fusion": (1.0, config["global_weight"]),
    "simam": config["simam"],
  }


@pytest.mark.parametrize(
  ("name", "conv"),
  [
    ("insvp_release", "plain"),
    ("insvp_release", "fft"),
    ("insvp_release", "blocks"),
    ("insvp_release_simam", "auto"),
  ],
)
def test_insvp_release(golden, recipe, tmp_path, name, conv):
  def fields(config):
    return {**_insvp_fields(config), "conv": conv}

  case = Case(golden, recipe, tmp_path, name, "insvp", fields, {})
  case.check(INSVP_GRADIENT_TOLERANCE)
  expected = case.file["plain_logits"]
  assert_near(case.plain_logits(), expected, OUTPUT_TOLERANCE, "plain_logits")

  @jax.jit
  def made_of(params, images):
    attended = simam(images) if case.file["config"]["simam"] else images
    prompts = case.model.apply({"params": params}, images, method=case.model.prompts)
    return attended, prompts

  attended, prompts = made_of(case.params, case.images)
  for key, images in {
    "attended_image_sample": attended,
    "patch_prompt_sample": prompts["patch"],
    "global_prompt_sample": prompts["global"],
    "prompted_image_sample": attended + prompts["image"],
  }.items():
    assert_near(images[:, ::16, ::16], case.file[key], OUTPUT_TOLERANCE, key)
  expected = case.file["specific_prompt"]
  assert_near(prompts["specific"], expected, OUTPUT_TOLERANCE, "specific")
  common = case.params["prompter"]["common_prompt"]
  fused = common[:, None] + expected[None]
  assert_near(prompts["feature"], fused, OUTPUT_TOLERANCE, "feature")
