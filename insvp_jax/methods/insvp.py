"""InsVP: prompts that are made from the image itself.

Source: Liu et al. 2024, "InsVP: Efficient Instance Visual Prompting from Image
Itself", ACM Multimedia.
"""

from collections.abc import Mapping, Sequence
import itertools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax import trees
from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec, Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import PROMPTS, Adaptation
from insvp_jax.methods.insvp_prompters import (
  ACTIVATIONS,
  GlobalPrompter,
  PatchPrompter,
  SpecificPrompter,
  normalized,
  simam,
  specific_grid,
)
from insvp_jax.methods.ops import conv as conv_lib
from insvp_jax.methods.ops import patch_tokens, stage_prompts
from insvp_jax.methods.ops.dropout import Dropout
from insvp_jax.methods.ops.initializers import symmetric_uniform, vpt_bound

PRESETS = ("paper", "release", "tuned")
# The components that each pair of fusion weights belongs to.
_COMPONENTS = {
  "image_fusion": ("patch", "global"),
  "feature_fusion": ("common", "specific"),
}


def _presets(paper: Any, release: Any, tuned: Any = None) -> dict[str, Any]:
  """Returns a default by preset; "tuned" has the paper's where it has no other."""
  tuned = paper if tuned is None else tuned
  return {"paper": paper, "release": release, "tuned": tuned}


def _check_preset(name: str, value: Any, spec: BackboneSpec) -> str:
  del name, spec
  trees.lookup(dict.fromkeys(PRESETS), value, "InsVP preset")
  return value


class InsVP(Method):
  """Instance visual prompting, on pixels and on tokens.

  With x the image, the backbone sees x + p^I, where p^I = a p^l + b p^g fuses a
  patch prompt and a global prompt (eq. 4 to 7), and block j gets the tokens
  p_j^F = c p_j^c + d p^s, which fuse the common prompt of the block and the
  specific prompt of the image (eq. 8 to 11). p^s is made once per forward pass.

  Three presets, which are different methods; each only sets defaults. "paper" is
  equations 4 to 13. What it leaves open is here: a global prompter with the extents 11
  and 25 of the released one, dilated, and VPT's prompt_init. "release" is what the
  authors' code computes, at its settings for CUB (prompt_length 9, specific_kernels
  (9, 5, 3)). Its others use specific_kernels (7, 9, 3) with prompt_length 20 on
  CIFAR-100 and 16 elsewhere (NABirds, Dogs, Flowers, DTD, Food101, CIFAR-10, GTSRB,
  SVHN), and simam on CUB, Dogs and SVHN. On a small image the global prompter's extents
  (11 and 25 pixels) may deserve smaller values.

  "tuned" is ours, for images of one's own: the paper's, but the fusion weights
  a, b, c and d are trained, from (0, 0) and (1, 0) on, what the prompters make is
  normalised for each image, and common prompts are dropped at a rate of 0.1. So
  training starts at VPT-Deep, and what comes from the image joins as far as the
  training images ask for it. A step of AdamW moves what a network makes far more than
  what is learnt itself; normalised, a step turns it, and its weight alone says how
  large it is. docs/insvp.md has the measurements.

  Ablations (table 5, figure 7) are the `use_*` fields and the fusion weights. A
  component that is off has no parameters and its term is left out. Under "paper",
  whose fusion is convex, the component that is left then has weight 1 (eq. 6 and
  10 at the end of the range; so common prompts alone are VPT-Deep); under
  "release" it keeps its weight. Weights that are given are used as they are.

  On a backbone of several stages (the paper's Swin, of which it says no more) each
  block has common prompts of its stage's width, and the image a specific prompt for
  each stage: one trunk, one last convolution per stage.
  """

  BY_STAGE = True

  preset: str = field(
    "paper",
    "paper, release or tuned: whose defaults the others have",
    check=_check_preset,
  )
  prompt_length: int = field(9, "prompt tokens p per block", check=checks.positive_int)
  prompted_blocks: int | None = field(
    lambda spec: spec.depth,
    "the first l blocks get fresh prompts, later ones carry them on; None: all blocks",
    check=checks.block_count,
  )
  use_patch: bool = field(
    True, "whether there is a patch prompt p^l", check=checks.boolean
  )
  use_global: bool = field(
    True, "whether there is a global prompt p^g", check=checks.boolean
  )
  use_common: bool = field(
    True, "whether there are common prompts p^c", check=checks.boolean
  )
  use_specific: bool = field(
    True, "whether there is a specific prompt p^s", check=checks.boolean
  )
  patch_hidden: int = field(
    16, "hidden width of the patch prompter", check=checks.positive_int
  )
  global_hidden: int = field(
    6, "hidden channels of the global prompter", check=checks.positive_int
  )
  global_kernels: Sequence[int] | None = field(
    None,
    "the two kernel sizes of the global prompter",
    check=checks.positive_ints(2),
    presets=_presets((3, 3), (11, 25)),
  )
  global_dilations: Sequence[int] | None = field(
    None,
    "the two dilations of the global prompter",
    check=checks.positive_ints(2),
    presets=_presets((5, 12), (1, 1)),
  )
  specific_kernels: Sequence[int] = field(
    (9, 5, 3),
    "the three kernel sizes of the specific prompter",
    check=checks.positive_ints(3),
  )
  specific_activation: str | None = field(
    None,
    "activation of the specific prompter: relu or leaky_relu (slope 0.01)",
    check=checks.one_of(*ACTIVATIONS),
    presets=_presets("relu", "leaky_relu"),
  )
  specific_input: str | None = field(
    None,
    "the image that the specific prompter sees: original or prompted",
    check=checks.one_of("original", "prompted"),
    presets=_presets("original", "prompted"),
  )
  train_specific: bool | None = field(
    None,
    "whether the specific prompter is trained; else its features are random",
    check=checks.boolean,
    presets=_presets(True, False),
  )
  simam: bool = field(
    False, "whether images first pass SimAM attention", check=checks.boolean
  )
  prompt_init: str | None = field(
    None,
    "how the common prompts start: vpt (VPT's uniform bound), unit (U(-1, 1)) or "
    "patch_tokens of training images, see ops.patch_tokens",
    check=checks.one_of("vpt", "unit", "patch_tokens"),
    presets=_presets("vpt", "unit"),
  )
  dropout: float | int = field(
    0.1, "rate in the three prompters", check=checks.rate, hparam=True
  )
  prompt_dropout: float | int | None = field(
    None,
    "rate on the common prompts, drawn for each sample",
    check=checks.rate,
    hparam=True,
    presets=_presets(0.0, 0.1, tuned=0.1),
  )
  image_fusion: Sequence[float | int] | None = field(
    None,
    "weights (patch, global) of the image prompt",
    check=checks.finite_numbers(2),
    hparam=True,
    presets=_presets((0.3, 0.7), (1.0, 2.0), tuned=(0.0, 0.0)),
  )
  feature_fusion: Sequence[float | int] | None = field(
    None,
    "weights (common, specific) of the prompt tokens",
    check=checks.finite_numbers(2),
    hparam=True,
    presets=_presets((0.5, 0.5), (1.0, 1.0), tuned=(1.0, 0.0)),
  )
  learn_fusion: bool | None = field(
    None,
    "whether the fusion weights are trained, from those that are given on",
    check=checks.boolean,
    presets=_presets(False, False, tuned=True),
  )
  normalize: bool | None = field(
    None,
    "whether the prompts that networks make are normalised for each image: patch and "
    "global ones to an rms of 1 (the pixels' is about that), specific ones to that at "
    "which VPT's prompts start",
    check=checks.boolean,
    presets=_presets(False, False, tuned=True),
  )
  conv: str = field(
    conv_lib.AUTO,
    "form of the prompters' convolutions, all alike up to rounding: auto (the fastest "
    "here), plain (the compiler's own), fft or blocks (matrix products)",
    check=checks.one_of(*conv_lib.CHOICES),
  )

  @classmethod
  def resolve(cls, spec: BackboneSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    resolved = super().resolve(spec, values)
    for name, components in _COMPONENTS.items():
      is_alone = sum(resolved[f"use_{component}"] for component in components) == 1
      # The paper fuses convexly: a component that stands alone has weight 1.
      if is_alone and resolved["preset"] == "paper" and values.get(name) is None:
        resolved[name] = (1.0, 1.0)
    has_tokens = resolved["use_common"] or resolved["use_specific"]
    if has_tokens and PROMPTS not in spec.sites:
      raise ValueError(
        "InsVP's feature prompts are tokens, which have no place in this backbone; set "
        "use_common=False and use_specific=False: its image prompts remain."
      )
    if resolved["use_common"] and resolved["prompt_init"] == "patch_tokens":
      patch_tokens.check("prompt_init", "patch_tokens", spec)
    if resolved["use_patch"] and spec.image_size % spec.patch_size:
      raise ValueError(
        f"InsVP's patch prompt needs whole patches of {spec.patch_size} pixels, but "
        f"image_size is {spec.image_size}; take a multiple of it or use_patch=False."
      )
    if resolved["use_specific"]:
      for width in stage_prompts.widths(spec, resolved["prompted_blocks"]):
        specific_grid(width, spec.image_size)  # raises where there is none
    return resolved

  @nn.nowrap
  def claims(self) -> frozenset[str]:
    has_tokens = self.use_common or self.use_specific
    return super().claims() | ({"prompts"} if has_tokens else set())

  def setup(self) -> None:
    """Creates the prompters that are on."""
    dropout = self.hparam("dropout")
    if self.learn_fusion:
      # What training adds to the weights, in the order of `_COMPONENTS`.
      self.fusion = self.param("fusion", nn.initializers.zeros, (len(self._parts()),))
    if self.use_patch:
      self.patch_prompter = PatchPrompter(
        self.spec.patch_size, self.patch_hidden, dropout, self.spec.dtype
      )
    if self.use_global:
      self.global_prompter = GlobalPrompter(
        self.global_hidden,
        self.global_kernels,
        self.global_dilations,
        dropout,
        self.conv,
        self.spec.dtype,
      )
    if self.use_common:
      bound = 1.0
      if self.prompt_init != "unit":
        bound = self._vpt_bound()
      self.common_prompts = stage_prompts.create(
        self, symmetric_uniform(bound), self.prompted_blocks, self.prompt_length
      )
      self.common_dropout = Dropout(self.hparam("prompt_dropout"))
    if self.use_specific:
      self.specific_prompter = SpecificPrompter(
        stage_prompts.widths(self.spec, self.prompted_blocks),
        self.prompt_length,
        self.specific_kernels,
        self.specific_activation,
        dropout,
        self.conv,
        self.spec.dtype,
      )

  def prompt_image(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b h w c"]:
    """Returns x + p^I (eq. 7).

    Raises:
      ValueError: the images do not have the backbone's size.
    """
    images = self._attended(images)
    prompts = self._image_prompts(images, train)
    return images + prompts["image"] if prompts else images

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    """Returns p_j^F for each prompted block (eq. 10), or nothing if both are off."""
    del embed
    _, feature = self._token_prompts(images, prompted, train)
    if not feature:
      return Adaptation()
    return Adaptation(prompts=stage_prompts.join(self.spec, feature))

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns the prompts that exist, by name.

    Args:
      images: [b, h, w, 3], as the backbone's preset normalises them.

    Returns:
      "global" p^g, "patch" p^l and "image" p^I, the fused one, [b, h, w, 3];
      "specific" p^s [b, p, d]; "feature" p^F [l, b, p, d]. Of several stages
      "specific_0", "feature_0" and so on.
    """
    attended = self._attended(images)
    prompts = self._image_prompts(attended, train=False)
    prompted = attended + prompts["image"] if prompts else attended
    specific, feature = self._token_prompts(images, prompted, train=False)
    feature = stage_prompts.for_each(images, feature)
    for name, tokens in {"specific": specific, "feature": feature}.items():
      prompts |= stage_prompts.named(self.spec, name, tokens) if tokens else {}
    return prompts

  @nn.nowrap
  def prepares(self) -> bool:
    return self.use_common and self.prompt_init == "patch_tokens"

  @nn.nowrap
  def prepare(self, params, batches, apply):
    """Returns the parameters, with patch tokens as common prompts."""
    blocks = range(self.prompted_blocks)
    return patch_tokens.start_prompts(self.spec, params, batches, apply, blocks)

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns patterns of the components that are on, and of the head."""
    is_trained = {
      "prompter/patch_prompter/.*": self.use_patch,
      "prompter/global_prompter/.*": self.use_global,
      "prompter/common_prompt.*": self.use_common,
      "prompter/specific_prompter/.*": self.use_specific and self.train_specific,
      "prompter/fusion": self.learn_fusion,
      "head/.*": True,
    }
    return tuple(pattern for pattern, trained in is_trained.items() if trained)

  @nn.nowrap
  def _vpt_bound(self) -> float:
    """Returns the bound of the uniform distribution from which VPT draws prompts."""
    return vpt_bound(self.spec.patch_size, self.spec.stages[0].width)

  @nn.nowrap
  def _parts(self) -> list[str]:
    """Returns the components that are on."""
    names = itertools.chain(*_COMPONENTS.values())
    return [name for name in names if getattr(self, f"use_{name}")]

  def _weights(self) -> dict[str, Any]:
    """Returns the fusion weight of each component."""
    given = {
      name: weight
      for field, names in _COMPONENTS.items()
      for name, weight in zip(names, self.hparam(field), strict=True)
    }
    if self.learn_fusion:
      for i, name in enumerate(self._parts()):
        given[name] += self.fusion[i]
    return given

  def _attended(self, images: Array) -> Array:
    """Returns the images, after SimAM if that is on."""
    size = self.spec.image_size
    if images.shape[1:3] != (size, size):
      raise ValueError(
        f"images are {images.shape[1]} x {images.shape[2]} pixels, but the prompter "
        f"was built for {size} x {size}; resize the images or build the model with "
        f"image_size={images.shape[1]}."
      )
    return simam(images) if self.simam else images

  def _image_prompts(self, images: Array, train: bool) -> dict[str, Array]:
    """Returns "patch" and "global" as far as they are on, and "image", their fusion."""
    weights = self._weights()
    prompts = {}
    if self.use_patch:
      prompts["patch"] = self.patch_prompter(images, train=train)
    if self.use_global:
      prompts["global"] = self.global_prompter(images, train=train)
    if self.normalize:
      prompts = {name: normalized(prompt, 1.0) for name, prompt in prompts.items()}
    terms = [weights[name] * prompt for name, prompt in prompts.items()]
    return {**prompts, "image": sum(terms)} if prompts else {}

  def _token_prompts(
    self, images: Array, prompted_images: Array, train: bool
  ) -> tuple[list[Array], list[Array]]:
    """Returns p^s [b, p, d] and p^F [l, b or 1, p, d] of each stage, or []."""
    weights = self._weights()
    terms, specific = [], []
    if self.use_common:
      common = stage_prompts.drop(
        self.common_dropout, self.common_prompts, images.shape[0], train=train
      )
      terms.append([weights["common"] * tokens for tokens in common])
    if self.use_specific:
      source = prompted_images
      if self.specific_input == "original":
        source = self._attended(images)
      specific = self.specific_prompter(source, train=train)
      if self.normalize:
        rms = self._vpt_bound() / math.sqrt(3)  # of a uniform distribution
        specific = [normalized(tokens, rms) for tokens in specific]
      terms.append([weights["specific"] * tokens[None] for tokens in specific])
    if not terms:
      return [], []
    counts = self.spec.stage_counts(self.prompted_blocks)
    # Specific prompts alone have a block axis of 1: every block gets the same.
    feature = [
      jnp.broadcast_to(sum(parts), (count, *sum(parts).shape[1:]))
      for count, *parts in zip(counts, *terms, strict=True)
    ]
    return specific, feature
