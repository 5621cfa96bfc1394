"""Golden files of prompts; see `golden_cases`."""

from collections.abc import Mapping
from typing import Any

from golden_family import Family
import jax
import jax.numpy as jnp
import numpy as np

from insvp_jax.methods.insvp_prompters import simam
from insvp_jax.methods.transhp import level_loss
from insvp_jax.models import positions


def _plain_logits(case) -> dict[str, Any]:
  return {"plain_logits": case.plain_logits()}


# InsVP.


def _insvp(config):
  fields = {
    "preset": "release",
    "prompt_length": config["prompt_length"],
    "patch_hidden": config["patch_hidden"],
    "global_hidden": config["global_hidden"],
    "global_kernels": tuple(config["global_kernels"]),
    "specific_kernels": tuple(config["specific_kernels"]),
    "image_fusion": (1.0, config["global_weight"]),
    "simam": config["simam"],
  }
  return Family("insvp", fields, extras=(_plain_logits, _insvp_prompts))


def _insvp_prompts(case) -> dict[str, Any]:
  model = case.model

  @jax.jit
  def made_of(params, images):
    attended = simam(images) if case.config["simam"] else images
    prompts = model.apply({"params": params}, images, method=model.prompts)
    return {
      "attended_image_sample": attended,
      "patch_prompt_sample": prompts["patch"],
      "global_prompt_sample": prompts["global"],
      "prompted_image_sample": attended + prompts["image"],
    }, prompts["specific"]

  samples, specific = made_of(case.params, case.images)
  samples = {name: images[:, ::16, ::16] for name, images in samples.items()}
  return {**samples, "specific_prompt": specific}


# VPT.


def _vpt(config):
  if "method" not in config:
    method = "vpt_deep" if config["deep"] else "vpt_shallow"
    fields = {"prompt_length": config["prompt_length"]}
    return Family(method, fields, extras=(_plain_logits, _plain_encoded))
  location = config.get("location", "prepend")
  if location in _PIXELS:
    length, names, options = _PIXELS[location]
    fields = {"location": location, "prompt_length": config[length]}
    names = {f"pixels/{ours}": theirs for ours, theirs in names.items()}
    return Family("vpt_shallow", fields, names, **options)
  names, fields = {"common_prompt": "prompt"}, {"location": location}
  fields["pool"] = config.get("pool", "cls").removesuffix("_pool")
  fields["pool"] = _POOLS.get(fields["pool"], fields["pool"])
  if "prompt_length" in config:
    fields["prompt_length"] = config["prompt_length"]
  if "prompt_width" in config:
    fields["project"] = config["prompt_width"]
    for leaf in ("kernel", "bias"):
      names[f"projection/{leaf}"] = f"prompt_projection/{leaf}"
  if not config.get("deep", True):
    return Family("vpt_shallow", fields, names)
  fields["prompted_blocks"] = config.get("num_deep_layers")
  fields["expand"] = not config.get("noexpand", False)
  fields["deep_shared"] = config.get("deep_shared", False)
  return Family("vpt_deep", fields, names)


def _plain_encoded(case) -> dict[str, Any]:
  """Returns the outputs of all tokens without a prompt."""
  backbone = case.model.backbone.clone(skip_unread=False)

  @jax.jit
  def encode(params, images):
    _, state = backbone.apply(
      {"params": params},
      images,
      capture_intermediates=lambda module, _: module.name == "Transformer",
    )
    return state["intermediates"]["Transformer"]["__call__"][0]

  return {"plain_encoded": encode(case.params["backbone"], case.images)}


def _position_embedding(case) -> dict[str, Any]:
  """Returns the resized position embedding, with the class token's entry."""
  vit = case.model.backbone
  grid = case.model.prompter.prompted_size() // vit.patch_size
  entries = jnp.asarray(case.params["backbone"]["pos_embedding"])
  resized = positions.resize_traced(entries, grid)
  whole = case.weights["Transformer/posembed_input/pos_embedding"]
  return {"position_embedding": np.concatenate([whole[:, :1], resized], axis=1)}


def _embedding_gradients(case) -> dict[str, Any]:
  """Returns the gradients of the embedding, that of the new channels joined."""
  kernel = case.backbone_grads["embedding/kernel"]
  # In the file it has no gradient of its own.
  below = case.results_of.pop("grad/below/kernel")
  kernel = jnp.concatenate([kernel, below], axis=2)
  bias = case.backbone_grads["embedding/bias"]
  return {"grad/embedding/kernel": kernel, "grad/embedding/bias": bias}


_POOLS = {"img": "image", "imgprompt": "both", "original": "cls"}
# By location: the length's name, our parameters' names in the file, more of `Family`.
_PIXELS = {
  "prepend-pixel": ("prompt_length", {"prompt": "prompt"}, {}),
  "pad": (
    "pad",
    {"top_bottom": "prompt_tb", "left_right": "prompt_lr"},
    {"extras": (_position_embedding,)},
  ),
  "below": (
    "channels",
    {"prompt": "prompt", "kernel": "below/kernel"},
    {
      "trains_backbone": ("embedding/kernel", "embedding/bias"),
      "extras": (_embedding_gradients,),
    },
  ),
}


# Gated prompts.


def _gated(config):
  fields = {
    "prompt_length": config["prompt_length"],
    "temperature_min": config["temperature_min"],
    "temperature_max": config["temperature_max"],
    "pool": "cls" if config["pool"] == "token" else "mean",
  }
  names = {
    "common_prompt": "prompt",
    "gate": "gate",
    "temperature": "temperature/scale",
  }
  return Family("gated", fields, names)


# TransHP.


def _transhp(config):
  num_classes = config["vit"]["num_classes"]
  fields = {
    # Any hierarchy of so many coarse classes: the file has labels of its own.
    "hierarchy": tuple(
      (size - 1, *(i % size for i in range(1, num_classes)))
      for size in config["level_classes"]
    ),
    "level_blocks": tuple(config["level_blocks"]),
    "level_weights": tuple(config["level_weights"]),
  }
  return Family("transhp", fields, extra_loss=_level_losses, extras=(_level_logits,))


def _levels(case, reads):
  """Yields each level's number and what was read of it."""
  for i, block in enumerate(case.config["level_blocks"]):
    yield i, reads[block]


def _level_losses(case, params: Mapping[str, Any], reads: list[Any]):
  del params
  total = 0.0
  for i, level in _levels(case, reads):
    logits = level["logits"]
    labels, no_label = case.arrays[f"level_{i}/labels"], logits.shape[1] - 1
    targets = jax.nn.one_hot(np.where(labels < 0, no_label, labels), no_label + 1)
    total += level["weight"] * level_loss(logits, targets)
  return total


def _level_logits(case) -> dict[str, Any]:
  @jax.jit
  def read(params, images):
    _, collections = case.model.apply({"params": params}, images, mutable=["reads"])
    return collections["reads"]["backbone"]["Transformer"]["blocks"]

  reads = read(case.params, case.images)
  return {f"level_{i}/logits": level["logits"] for i, level in _levels(case, reads)}


FAMILIES = {"insvp_release": _insvp, "vpt": _vpt, "gated": _gated, "transhp": _transhp}
