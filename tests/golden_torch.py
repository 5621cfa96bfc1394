"""Golden files of backbones with PyTorch's names, loaded as a user loads them."""

import json
from pathlib import Path
import tempfile

from golden_family import Family
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from insvp_jax.data import preprocess
from insvp_jax.models.classifier import create_model
from insvp_jax.models.weights.load import load_backbone

DINOV2 = Path(__file__).resolve().parents[2] / "shared/data/dinov2_small.safetensors"


def _outputs(path, images, **backbone_kwargs):
  """Returns (tokens, feature, source logits or None, parameters) of a file's ViT."""
  kwargs = {"skip_unread": False, **backbone_kwargs}
  model = create_model(str(path), "linear", num_classes=2, backbone_kwargs=kwargs)
  params = load_backbone(path, model)

  @jax.jit
  def apply(params, images):
    vit = model.backbone.bind({"params": params})
    feature = vit(images)
    logits = vit.source_logits(feature) if vit.head_classes else None
    return vit.tokens(images), feature, logits

  return *apply(params, jnp.asarray(images, jnp.float32)), params


def _torch_vit(case):
  sizes = case.config["vit"]
  shapes = json.loads(str(case.arrays["shapes"]))
  size = sizes["image_size"]
  images = case.recipe.images(
    (case.config["batch"], size, size, 3), case.config["seed"]
  )
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "vit.safetensors"
    weights = case.recipe.state_dict(shapes, case.config["seed"])
    safetensors.numpy.save_file(weights, path)
    heads = {"num_heads": sizes["num_heads"], "head_classes": sizes["num_classes"]}
    tokens, _, logits, _ = _outputs(path, images, **heads)
  return {"tokens": tokens, "logits": logits}


def _dinov2(case):
  preset = preprocess.get_preset("imagenet")
  images = preprocess.normalise(preset, jnp.asarray(case.arrays["images"]))
  tokens, feature, _, params = _outputs(DINOV2, images)
  return {
    "cls": feature,
    "patch_mean": tokens[:, 1:].mean(axis=1),
    "patch_tokens_sample": tokens[:, 1::16],
    "position_grid_16": np.asarray(params["pos_embedding"])[:, ::16],
  }


FAMILIES = {
  "vit_torch": lambda config: Family("", extras=(_torch_vit,)),
  "dinov2": lambda config: Family("", extras=(_dinov2,)),
}
