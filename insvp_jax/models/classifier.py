"""The model: a backbone, a method and a head, joined at the hooks.

`PromptedClassifier` has one class for an image, `PromptedSegmenter` one for each pixel.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from numbers import Integral
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from insvp_jax import methods, trees
from insvp_jax.methods.base import Method
from insvp_jax.methods.combined import Combined
from insvp_jax.methods.hooks import Adaptation
from insvp_jax.models import architectures, setr, weights
from insvp_jax.models.heads import HEAD_INITS, Head
from insvp_jax.models.vit import ViT

# What a method may do with the one feature of an image, or with its one label: there is
# none where each pixel has a class. {function of `Method`: what it does, in words}.
_OF_ONE_FEATURE = {
  "adapt_feature": "changes the pooled feature",
  "adapt_logits": "maps the logits of an image",
  "extra_loss": "has a loss of its own on an image's label",
  "head": "has a head of its own",
  "route": "groups images by their pooled feature",
}
# Running statistics of the head.
_UPDATED = r"head/.*/(mean|var)"
# Of one feature of an image, and of maps of patch tokens.
HEADS = ("linear", "setr")
_MOST_CHANNELS = 2**12


def block_reads(reads: Mapping[str, Any]) -> Any:
  """Returns what the hooks of the blocks kept: a list with an entry for each block.

  Args:
    reads: the collection of that name, where the backbone has sown it.
  """
  while isinstance(reads, Mapping):
    reads = reads["blocks"] if "blocks" in reads else next(iter(reads.values()))
  return reads


class PromptedClassifier(nn.Module):
  """Images in, logits out, under a method.

  Parameters: {"backbone": ..., "prompter": ..., "head": ...}; a method without
  parameters has no "prompter", and one that reads the backbone's own head no "head".
  """

  backbone: nn.Module
  prompter: Method
  head: nn.Module

  @property
  def input_size(self) -> int:
    """Pixels per side of the images that the model takes."""
    return self.prompter.input_size()

  @nn.nowrap
  def masks(self, shapes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (which parameters train, which a step changes): trees of bools.

    Those that a step changes are the trainable ones, and those that it sets without a
    gradient; see `Method.updated_patterns`.

    Args:
      shapes: the tree of parameters.
    """
    trainable, updated = (
      self.prompter.trainable_patterns(),
      self.prompter.updated_patterns(),
    )
    return trees.mask(shapes, trainable), trees.mask(shapes, trainable + updated)

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
    """Returns the images as the backbone sees them; `route` as for `__call__`.

    Raises:
      ValueError: the images are whole numbers: pixels that nobody has normalised.
    """
    _check_normalised(images)
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
    _check_normalised(images)
    return self.prompter.prompts(images, **self._routed(images, None))


class PromptedSegmenter(PromptedClassifier):
  """Images in, logits of each pixel out, under a method.

  Parameters: as of `PromptedClassifier`.

  Attributes:
    blocks: whose maps the auxiliary heads see, counted from 1.
  """

  blocks: tuple[int, ...] = ()

  @nn.nowrap
  def masks(self, shapes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    trainable, carried = map(trees.flatten, super().masks(shapes))
    updated = {name for name in trainable if re.fullmatch(_UPDATED, name)}
    return (
      trees.unflatten({n: on and n not in updated for n, on in trainable.items()}),
      trees.unflatten({n: on or n in updated for n, on in carried.items()}),
    )

  def maps(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> tuple[Float[Array, "b g g d"], ...]:
    """Returns the maps that the head sees, those of `blocks` and the last one."""
    prompted, adaptation = self.adapt(images, train=train)
    tokens = self.backbone.embed(prompted, adaptation)
    return self.backbone.maps(tokens, adaptation, self.blocks)

  def __call__(
    self,
    images: Float[Array, "b h w c"],
    *,
    route: Int[Array, "b"] | None = None,
    train: bool = False,
  ) -> Float[Array, "b h w k"] | tuple[Float[Array, "b h w k"], ...]:
    """Returns logits of each pixel in float32.

    In training it is a tuple with those of the auxiliary heads after them.

    Args:
      images: normalised with the backbone's preset.
      route: None; there is no method with one.
      train: whether dropout is on; then `rngs={"dropout": key}` is needed.
    """
    del route
    outputs = self.head(self.maps(images, train=train), images.shape[1], train=train)
    return outputs if train else outputs[0]


def _check_segments(backbone: nn.Module, prompter: Method, name: Any) -> None:
  """Checks that a backbone and a method can segment.

  Args:
    backbone: of the model.
    prompter: the method.
    name: of the method, for messages.

  Raises:
    ValueError: they cannot; the message says why.
  """
  if not hasattr(backbone, "maps"):
    raise ValueError(
      f"the backbone is a {type(backbone).__name__}, but segmentation needs maps of "
      "patch tokens of several blocks: expected a ViT, e.g. B/16."
    )
  parts = dict(prompter.parts) if isinstance(prompter, Combined) else {name: prompter}
  for part, method in parts.items():
    does = [
      text
      for function, text in _OF_ONE_FEATURE.items()
      if getattr(type(method), function) is not getattr(Method, function)
    ]
    if method.prepares() or method.refresh_every_epochs():
      does.append("computes something of images and their labels beside the steps")
    if method.reads_source_head():
      does.append("reads the classes that the backbone was trained on")
    if method.hooks().overrides("pool"):
      does.append("pools the tokens")
    if method.input_size() != method.spec.image_size:
      does.append("takes images of a size of its own")
    if method.prompted_size() != method.spec.image_size:
      does.append("makes images larger")
    if does:
      raise ValueError(
        f"the method {part!r} cannot segment: it {does[0]}. Expected one that adapts "
        "the backbone alone, such as linear, bias, vpt_deep, insvp, lora or full."
      )


def _check_normalised(images: Any) -> None:
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f"images are {images.dtype}, expected floating-point numbers, normalised as the "
      "backbone's were: insvp_jax.data.preprocess.eval_preprocess does it, and a "
      "loaded run's predict by itself."
    )


def create_backbone(
  name: str, image_size: int = 0, overrides: Mapping[str, Any] | None = None
) -> nn.Module:
  """Returns a backbone by variant ("Ti/16", "swin_b"), by a release's name or its file.

  Args:
    name: a key of `architectures.VARIANTS`, a ViT's variant with its patch size, a name
      of `RELEASES`, the path of a file, or a repository ("timm/...", "hf-hub:...").
    image_size: pixels per side; 0 is the release's own, or 224.
    overrides: fields of the class that replace the variant's; None leaves one alone.

  Raises:
    ValueError: unknown name or field, or sizes that do not fit together.
  """
  overrides = dict(overrides or {})
  backbone, fields = ViT, {"image_size": 224}
  if architectures.is_variant(name):
    backbone, sizes = architectures.decode_variant(name)
    fields |= sizes
  else:
    fields |= weights.architecture_of(name, overrides)
    backbone = architectures.CLASSES[fields.pop("architecture", "vit")]
  if image_size:
    fields["image_size"] = image_size
  return architectures.build(backbone, fields, overrides)


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
  head: str = "linear",
  head_kwargs: Mapping[str, Any] | None = None,
) -> PromptedClassifier:
  """Returns the model of a backbone under a method.

  Args:
    backbone: a variant ("Ti/16", "swin_b"), a release's name ("vit_b16_i21k", "boxed"),
      the path of a file of weights, or a repository ("timm/...", "hf-hub:...").
    method: a key of `methods.METHODS`, several joined by "+", or a class of your own.
    num_classes: k, the width of the logits.
    image_size: pixels per side; 0 is the release's own, or 224.
    backbone_kwargs: fields of the backbone's class to override, e.g. of
      `models.vit.ViT`.
    method_kwargs: the method's own fields; of several methods {method: its fields}.
    head_init: a key of `models.heads.HEAD_INITS`.
    mean, std: of each channel, by which pixels in [0, 1] are normalised; some methods
      compute with it.
    head: "linear", or "setr" for a `PromptedSegmenter` with SETR's.
    head_kwargs: of "setr": `channels` of its convolutions, and `blocks`, those whose
      maps auxiliary heads see; None is `setr.aux_blocks`.

  Raises:
    ValueError: an unknown name or field (with the nearest known one), or sizes
      that do not fit together.
  """
  for name, number, least in (
    ("num_classes", num_classes, 1),
    ("image_size", image_size, 0),
  ):
    is_whole = isinstance(number, Integral) and not isinstance(number, bool)
    if not is_whole or number < least:
      raise ValueError(
        f"{name} is {number!r}, expected a whole number of at least {least}."
      )
  if not isinstance(backbone, str) or not isinstance(method, str | type):
    raise ValueError(
      f"backbone is {backbone!r} and method {method!r}, expected names; a method may "
      "be a class."
    )
  trees.lookup(HEAD_INITS, head_init, "head_init")
  built = create_backbone(backbone, image_size, backbone_kwargs)

  def create_prompter(backbone: nn.Module) -> Method:
    spec = dataclasses.replace(backbone.spec, mean=tuple(mean), std=tuple(std))
    return methods.create_method(method, spec, num_classes, **dict(method_kwargs or {}))

  prompter = create_prompter(built)
  asked = (backbone_kwargs or {}).get("layer_scale")
  if getattr(built, "layer_scale", False) and asked is None:
    # Exact and free: the factors are folded into the projections when they are loaded.
    plain = built.without_scales(prompter.trainable_patterns())
    if plain is not built:
      built, prompter = plain, create_prompter(plain)
  if prompter.reads_source_head() and not built.head_classes:
    raise ValueError(
      f"the method {method!r} reads the classes that the backbone was trained on, but "
      "its head is not kept: set head_classes (config.backbone.head_classes) to their "
      "number: 10 of boxed, 21843 of AugReg's on ImageNet-21k."
    )
  trees.lookup(dict.fromkeys(HEADS), head, "head")
  if head == "setr":
    _check_segments(built, prompter, method)
    for name in head_kwargs or {}:
      trees.lookup(dict.fromkeys(("channels", "blocks")), name, "field of head_kwargs")
    return _segmenter(built, prompter, num_classes, **(head_kwargs or {}))
  linear = prompter.head(Head(num_classes, head_init))
  return PromptedClassifier(built, prompter, linear)


def _is_in(value: Any, low: int, high: int) -> bool:
  """Returns whether a value is a whole number in a range."""
  is_whole = isinstance(value, Integral) and not isinstance(value, bool)
  return is_whole and low <= value <= high


def _segmenter(
  backbone: nn.Module,
  prompter: Method,
  num_classes: int,
  channels: Any = 256,
  blocks: Any = None,
) -> PromptedSegmenter:
  """Returns the model with SETR's head; `channels` and `blocks` may be a file's.

  Raises:
    ValueError: no number of channels, or blocks that the backbone does not have.
  """
  if not _is_in(channels, 1, _MOST_CHANNELS):
    raise ValueError(
      f"channels is {channels!r}, expected a whole number from 1 to {_MOST_CHANNELS}."
    )
  if blocks is None:
    blocks = setr.aux_blocks(backbone.depth)
  blocks = tuple(blocks)
  are_there = all(_is_in(block, 1, backbone.depth) for block in blocks)
  if not are_there or list(blocks) != sorted(set(blocks)):
    raise ValueError(
      f"the blocks of auxiliary heads are {blocks}, expected ascending numbers from 1 "
      f"to {backbone.depth}."
    )
  head = setr.SETRHead(num_classes, channels, len(blocks), jnp.dtype(backbone.dtype))
  return PromptedSegmenter(backbone, prompter, head, blocks)
