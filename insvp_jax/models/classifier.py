"""The classifier: a backbone, a method and a head, joined at the hooks."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from insvp_jax import methods, trees
from insvp_jax.methods.base import Method
from insvp_jax.methods.hooks import Adaptation
from insvp_jax.models import weights
from insvp_jax.models.heads import HEAD_INITS, Head
from insvp_jax.models.vit import ViT, decode_variant

BACKBONE_FIELDS = tuple(
  name for name in ViT.__dataclass_fields__ if name not in ("unshard", "parent", "name")
)


class PromptedClassifier(nn.Module):
  """Images in, logits out, under a method.

  Parameters: {"backbone": ..., "prompter": ..., "head": ...}; a method without
  parameters has no "prompter", and one that reads the backbone's own head no "head".
  """

  backbone: ViT
  prompter: Method
  head: nn.Module

  @property
  def input_size(self) -> int:
    """Pixels per side of the images that the model takes."""
    return self.prompter.input_size()

  def route(self, images: Float[Array, "b h w c"]) -> Int[Array, "b"]:
    """Returns the method's `route` of the plain backbone's feature."""
    feature = self.backbone(images)
    return self.prompter.route(jax.lax.stop_gradient(feature))

  def _routed(self, images: Array, route: Array | None) -> dict[str, Array]:
    """Returns {"route": ...} of a method that has one, computed if it is not given."""
    if not self.prompter.routes():
      return {}
    return {"route": self.route(images) if route is None else route}

  def prompt_image(
    self,
    images: Float[Array, "b h w c"],
    *,
    route: Int[Array, "b"] | None = None,
    train: bool = False,
  ) -> Float[Array, "b t t c"]:
    """Returns the images as the backbone sees them; `route` as for `__call__`."""
    routed = self._routed(images, route)
    return self.prompter.prompt_image(images, train=train, **routed)

  def adapt(
    self,
    images: Float[Array, "b h w c"],
    *,
    route: Int[Array, "b"] | None = None,
    train: bool = False,
  ) -> tuple[Array, Adaptation]:
    """Returns (prompted images, the arrays and functions that adapt the backbone)."""
    prompted = self.prompt_image(images, route=route, train=train)
    adaptation = self.prompter.adapt(
      images, prompted, embed=self.backbone.patches, train=train
    )
    return prompted, adaptation.replace(hooks=self.prompter.hooks())

  def features(
    self,
    images: Float[Array, "b h w c"],
    *,
    route: Int[Array, "b"] | None = None,
    train: bool = False,
  ) -> Float[Array, "b d"]:
    """Returns the feature that the head sees."""
    prompted, adaptation = self.adapt(images, route=route, train=train)
    size = self.prompter.prompted_size()
    tokens = self.backbone.embed(prompted, adaptation, size=size)
    feature = self.backbone.encode(tokens, adaptation)
    return self.prompter.adapt_feature(feature, images, train=train)

  def __call__(
    self,
    images: Float[Array, "b h w c"],
    *,
    route: Int[Array, "b"] | None = None,
    train: bool = False,
  ) -> Float[Array, "b k"]:
    """Returns logits [b, k] in float32.

    Args:
      images: [b, h, w, 3], normalised with the backbone's preset.
      route: from `route`, of these images; None computes it where the method has one.
      train: whether dropout is on; then `rngs={"dropout": key}` is needed.
    """
    features = self.features(images, route=route, train=train)
    return self.classify(features, train=train)

  def classify(
    self, features: Float[Array, "b d"], *, train: bool = False
  ) -> Float[Array, "b k"]:
    """Returns the logits of features, as from `features`."""
    if self.prompter.reads_source_head():
      logits = self.backbone.source_logits(features)
    else:
      logits = self.head(features, train=train)
    return self.prompter.adapt_logits(logits, train=train)

  def source_logits(self, images: Float[Array, "b h w c"]) -> Float[Array, "b s"]:
    """Returns logits of the classes that the backbone was trained on.

    Raises:
      ValueError: the backbone is kept without its head.
    """
    return self.backbone.source_logits(self.features(images))

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns what the method lays over the images, by name."""
    return self.prompter.prompts(images, **self._routed(images, None))


def create_backbone(
  name: str, image_size: int = 0, overrides: Mapping[str, Any] | None = None
) -> ViT:
  """Returns a ViT by variant ("Ti/16") or by a release's name ("vit_b16_i21k").

  Args:
    name: a variant with its patch size, or a name of `pretrained.RELEASES`.
    image_size: pixels per side; 0 is the release's own, or 224.
    overrides: fields of `ViT` that replace the variant's; None leaves one alone.

  Raises:
    ValueError: unknown name or field, or sizes that do not fit together.
  """
  overrides = dict(overrides or {})
  for field in overrides:
    if field not in BACKBONE_FIELDS or field == "image_size":
      known = [f for f in BACKBONE_FIELDS if f != "image_size"]
      raise ValueError(
        f"unknown backbone field {field!r}.{trees.did_you_mean(field, known)} "
        f"Known: {', '.join(known)}."
      )
  fields: dict[str, Any] = {"image_size": 224}
  if "/" in name:
    fields |= decode_variant(name)
  else:
    fields |= weights.architecture_of(name)
  fields |= {k: v for k, v in overrides.items() if v is not None}
  if image_size:
    fields["image_size"] = image_size
  return ViT(**fields)


def create_model(
  backbone: str,
  method: str | type[Method] = "insvp",
  *,
  num_classes: int,
  image_size: int = 0,
  backbone_kwargs: Mapping[str, Any] | None = None,
  method_kwargs: Mapping[str, Any] | None = None,
  head_init: str = "zeros",
  mean: Sequence[float] = (0.5, 0.5, 0.5),
  std: Sequence[float] = (0.5, 0.5, 0.5),
) -> PromptedClassifier:
  """Returns the classifier of a backbone under a method.

  Args:
    backbone: a variant ("Ti/16") or a release's name ("vit_b16_i21k", "boxed").
    method: a key of `methods.METHODS`, several joined by "+", or a class of your own.
    num_classes: k, the width of the logits.
    image_size: pixels per side; 0 is the release's own, or 224.
    backbone_kwargs: fields of `models.vit.ViT` to override.
    method_kwargs: the method's own fields; of several methods {method: its fields}.
    head_init: a key of `models.heads.HEAD_INITS`.
    mean, std: of each channel, by which pixels in [0, 1] are normalised; some methods
      compute with it.

  Raises:
    ValueError: an unknown name or field (with the nearest known one), or sizes
      that do not fit together.
  """
  if num_classes < 1:
    raise ValueError(f"num_classes is {num_classes}, expected at least 1.")
  trees.lookup(HEAD_INITS, head_init, "head_init")
  vit = create_backbone(backbone, image_size, backbone_kwargs)
  spec = dataclasses.replace(vit.spec, mean=tuple(mean), std=tuple(std))
  prompter = methods.create_method(
    method, spec, num_classes, **dict(method_kwargs or {})
  )
  if prompter.reads_source_head() and not vit.head_classes:
    raise ValueError(
      f"the method {method!r} reads the classes that the backbone was trained on, but "
      "its head is not kept: set head_classes (config.backbone.head_classes) to their "
      "number: 10 of boxed, 21843 of AugReg's on ImageNet-21k."
    )
  return PromptedClassifier(vit, prompter, prompter.head(Head(num_classes, head_init)))
