"""Golden files of backbones that are no `.npz` ViT; see `golden_cases`."""

import json
from typing import Any

from golden_family import Family
import jax
import jax.numpy as jnp
import numpy as np

from insvp_jax import trees
from insvp_jax.models.classifier import create_model
from insvp_jax.models.weights import names_swin


def _swin(config):
  del config
  return Family("", extras=(_swin_features,))


def _swin_features(case) -> dict[str, Any]:
  """Returns the features of Swin without and with VPT's prompts."""
  config, draw = case.config, case.recipe.draw
  sizes, seed, length = dict(config["swin"]), config["seed"], config["prompt_length"]
  size, width = sizes.pop("image_size"), sizes["width"]
  weights = case.recipe.state_dict(json.loads(str(case.arrays["shapes"])), seed)
  backbone = names_swin.convert(weights)
  model = create_model(
    "swin_b",
    "vpt_deep" if config["deep"] else "vpt_shallow",
    num_classes=1,
    image_size=size,
    backbone_kwargs={n: tuple(v) if n == "depths" else v for n, v in sizes.items()},
    method_kwargs={"prompt_length": length},
  )
  prompts = {"common_prompt_0": draw("common_prompt", (1, length, width), seed)}
  for stage, depth in enumerate(sizes["depths"] if config["deep"] else ()):
    # The first block takes the prompts that stand alone.
    shape = (depth - (stage == 0), length, width * 2**stage)
    own = draw(f"deep_prompt_{stage}", shape, seed)
    name = f"common_prompt_{stage}"
    prompts[name] = np.concatenate([prompts[name], own]) if name in prompts else own
  params = {"backbone": trees.unflatten(backbone), "prompter": prompts}
  images = jnp.asarray(case.recipe.images((config["batch"], size, size, 3), seed))

  @jax.jit
  def features(params, images):
    plain = model.backbone.apply({"params": params["backbone"]}, images)
    prompted = model.apply({"params": params}, images, method="features")
    return {"plain_features": plain, "prompted_features": prompted}

  return features(params, images)


FAMILIES = {"swin": _swin}
