"""InsVP: prompts that are made from the image itself.

Source: Liu et al. 2024, "InsVP: Efficient Instance Visual Prompting from Image
Itself", ACM Multimedia.
"""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods.base import BlockPrompts, Method
from insvp_jax.methods.insvp_prompters import (
  GlobalPrompter,
  PatchPrompter,
  SpecificPrompter,
  simam,
)
from insvp_jax.methods.insvp_settings import Settings, resolve
from insvp_jax.methods.ops.dropout import Dropout, is_off
from insvp_jax.methods.ops.initializers import symmetric_uniform, vpt_bound


class InsVP(Method):
  """Instance visual prompting, on pixels and on tokens.

  With x the image, the backbone sees x + p^I, where p^I = a p^l + b p^g fuses a
  patch prompt and a global prompt (eq. 4 to 7), and block j gets the tokens
  p_j^F = c p_j^c + d p^s, which fuse the common prompt of the block and the
  specific prompt of the image (eq. 8 to 11). p^s is made once per forward pass.

  Two presets, which are different methods; each only sets defaults, and every
  field that is None takes the preset's:

  | field | paper | release |
  |---|---|---|
  | image_fusion (a, b) | 0.3, 0.7 | 1, 2 |
  | feature_fusion (c, d) | 0.5, 0.5 | 1, 1 |
  | global_kernels, global_dilations | (3, 3), (5, 12) | (11, 25), (1, 1) |
  | specific_input | original | prompted |
  | specific_activation | relu | leaky_relu (0.01) |
  | train_specific | True | False: random features |
  | prompt_init | vpt | unit |
  | prompt_dropout | 0 | 0.1 |

  "paper" is the equations; "release" is what the authors' code computes, at its
  settings for CUB (prompt_length 9, specific_kernels (9, 5, 3)). Its others use
  specific_kernels (7, 9, 3) with prompt_length 20 on CIFAR-100 and 16 elsewhere
  (NABirds, Dogs, Flowers, DTD, Food101, CIFAR-10, GTSRB, SVHN), and simam on CUB,
  Dogs and SVHN. On a small image the global prompter's extents (11 and 25 pixels)
  may deserve smaller values.

  Ablations (table 5, figure 7) are the `use_*` fields and the fusion weights. A
  component that is off has no parameters and its term is left out. Under "paper",
  whose fusion is convex, the component that is left then has weight 1 (eq. 6 and
  10 at the end of the range; so common prompts alone are VPT-Deep); under
  "release" it keeps its weight. Weights that are given are used as they are.

  Attributes:
    preset: "paper" or "release".
    prompt_length: prompt tokens p per block.
    prompted_blocks: the first l blocks get fresh prompts, the others carry the
      prompts' outputs on; by default all.
    use_patch: whether there is a patch prompt p^l.
    use_global: whether there is a global prompt p^g.
    use_common: whether there are common prompts p^c.
    use_specific: whether there is a specific prompt p^s.
    patch_hidden: hidden width of the patch prompter.
    global_hidden: hidden channels of the global prompter.
    global_kernels: its two kernel sizes.
    global_dilations: its two dilations.
    specific_kernels: the three kernel sizes of the specific prompter.
    specific_activation: its activation, "relu" or "leaky_relu".
    specific_input: the image that it sees, "original" or "prompted".
    train_specific: whether it is trained.
    image_fusion: weights (patch, global).
    feature_fusion: weights (common, specific).
    simam: whether images first pass SimAM attention.
    prompt_init: of p^c: "vpt" (VPT's uniform bound) or "unit" (U(-1, 1)).
    dropout: rate in the three prompters.
    prompt_dropout: rate on p^c, drawn for each sample.
    conv: how the prompters' convolutions are computed: "auto" (the fastest form for
      each on this machine), "plain" (the compiler's own), "fft" or "blocks" (matrix
      products). They differ by rounding.
  """

  NUMBERS: ClassVar[tuple[str, ...]] = (
    "dropout",
    "prompt_dropout",
    "image_fusion",
    "feature_fusion",
  )
  preset: str = "paper"
  prompt_length: int | None = None
  prompted_blocks: int | None = None
  use_patch: bool | None = None
  use_global: bool | None = None
  use_common: bool | None = None
  use_specific: bool | None = None
  patch_hidden: int | None = None
  global_hidden: int | None = None
  global_kernels: Sequence[int] | None = None
  global_dilations: Sequence[int] | None = None
  specific_kernels: Sequence[int] | None = None
  specific_activation: str | None = None
  specific_input: str | None = None
  train_specific: bool | None = None
  image_fusion: Sequence[float | int] | None = None
  feature_fusion: Sequence[float | int] | None = None
  simam: bool | None = None
  prompt_init: str | None = None
  dropout: float | int | None = None
  prompt_dropout: float | int | None = None
  conv: str | None = None

  def __post_init__(self) -> None:
    """Checks the fields at construction, before any device work."""
    self._resolve()
    super().__post_init__()

  @nn.nowrap
  def _resolve(self) -> Settings:
    fields = Settings.__dataclass_fields__
    given = {name: getattr(self, name) for name in fields}
    return resolve(self.preset, given, self.spec)

  @property
  def settings(self) -> Settings:
    """Every field after the preset's defaults."""
    return self._resolve()

  def setup(self) -> None:
    """Creates the prompters that are on."""
    s = self.settings
    dropout = self.number("dropout", s.dropout)
    if s.use_patch:
      size = self.spec.patch_size
      self.patch_prompter = PatchPrompter(size, s.patch_hidden, dropout)
    if s.use_global:
      self.global_prompter = GlobalPrompter(
        s.global_hidden, s.global_kernels, s.global_dilations, dropout, s.conv
      )
    if s.use_common:
      bound = 1.0
      if s.prompt_init == "vpt":
        bound = vpt_bound(self.spec.patch_size, self.spec.width)
      shape = (s.prompted_blocks, s.prompt_length, self.spec.width)
      self.common_prompt = self.param("common_prompt", symmetric_uniform(bound), shape)
      rate = self.number("prompt_dropout", s.prompt_dropout)
      self.common_dropout = Dropout(rate)
    if s.use_specific:
      self.specific_prompter = SpecificPrompter(
        self.spec.width,
        s.prompt_length,
        s.specific_kernels,
        s.specific_activation,
        dropout,
        s.conv,
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

  def prompt_tokens(
    self,
    images: Float[Array, "b h w c"],
    prompted_images: Float[Array, "b h w c"],
    *,
    train: bool = False,
  ) -> BlockPrompts | None:
    """Returns p_j^F for each prompted block (eq. 10), or None if both are off."""
    prompts = self._token_prompts(images, prompted_images, train)
    return BlockPrompts(prompts["feature"]) if prompts else None

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns the prompts that exist, by name.

    Args:
      images: [b, h, w, 3], as the backbone's preset normalises them.

    Returns:
      "global" p^g, "patch" p^l and "image" p^I, the fused one, [b, h, w, 3];
      "specific" p^s [b, p, d]; "feature" p^F [l, b, p, d].
    """
    attended = self._attended(images)
    found = self._image_prompts(attended, train=False)
    prompted = attended + found["image"] if found else attended
    found |= self._token_prompts(images, prompted, train=False)
    if "feature" in found:
      repeats = len(images) // found["feature"].shape[1]
      found["feature"] = jnp.repeat(found["feature"], repeats, axis=1)
    return found

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns patterns of the components that are on, and of the head."""
    s = self.settings
    trained = {
      "prompter/patch_prompter/.*": s.use_patch,
      "prompter/global_prompter/.*": s.use_global,
      "prompter/common_prompt": s.use_common,
      "prompter/specific_prompter/.*": s.use_specific and s.train_specific,
      "head/.*": True,
    }
    return tuple(pattern for pattern, used in trained.items() if used)

  def _attended(self, images: Array) -> Array:
    size = self.spec.image_size
    if images.shape[1:3] != (size, size):
      raise ValueError(
        f"images are {images.shape[1]} x {images.shape[2]} pixels, but the prompter "
        f"was built for {size} x {size}; resize the images or build the model with "
        f"image_size={images.shape[1]}."
      )
    return simam(images) if self.settings.simam else images

  def _image_prompts(self, images: Array, train: bool) -> dict[str, Array]:
    s = self.settings
    weights = self.number("image_fusion", s.image_fusion)
    found, fused = {}, []
    if s.use_patch:
      found["patch"] = self.patch_prompter(images, train=train)
      fused.append(weights[0] * found["patch"])
    if s.use_global:
      found["global"] = self.global_prompter(images, train=train)
      fused.append(weights[1] * found["global"])
    return {**found, "image": sum(fused)} if found else {}

  def _token_prompts(
    self, images: Array, prompted_images: Array, train: bool
  ) -> dict[str, Array]:
    s = self.settings
    weights = self.number("feature_fusion", s.feature_fusion)
    found, fused = {}, []
    if s.use_common:
      common = self._common(len(images), train)
      fused.append(weights[0] * common)
    if s.use_specific:
      source = prompted_images
      if s.specific_input == "original":
        source = self._attended(images)
      specific = self.specific_prompter(source, train=train)
      found["specific"] = specific
      fused.append(weights[1] * specific[None])
    if not fused:
      return {}
    feature = sum(fused)
    shape = (s.prompted_blocks, *feature.shape[1:])
    return {**found, "feature": jnp.broadcast_to(feature, shape)}

  def _common(self, batch_size: int, train: bool) -> Float[Array, "l b p d"]:
    """Common prompts; their batch axis is 1 unless dropout differs by sample."""
    common = jnp.expand_dims(self.common_prompt, 1)
    if not train or is_off(self.common_dropout.rate):
      return common
    common = jnp.repeat(common, batch_size, axis=1)
    return self.common_dropout(common, train=True)
