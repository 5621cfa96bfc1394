"""AutoVP: a frame around an image whose size is trained, and one of five mappings.

Source: Tsao et al. 2024, "AutoVP: An Automated Visual Prompting Framework and
Benchmark", and its published code; what it searches over are the fields here
(`insvp tune`).

As ILM-VP, but the image is scaled about the centre by a trained factor in [0.1, 5], and
the frame's hole grows with it: floor(scale * inner) pixels, where the scale gets no
gradient. As published, the hole starts half a pixel before the middle where the image
starts half a pixel after it: with an odd number of pixels around, one row and column of
the image get the prompt, and one of the frame none.

The logit of a class is the mean of those of its m source classes, or a dense layer of
all ("full"). `additive` is the variant for CLIP: the prompt is added without a sigmoid,
in normalised units, around an image on grey instead of black.
Parameters: 3 S^2 + 1, and s k + k of a dense layer from s source to k classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods import checks
from insvp_jax.methods.fields import field
from insvp_jax.methods.label_mapped import (
  FIXED,
  FREQUENCY,
  FULL,
  ITERATIVE,
  SEMANTIC,
  LabelMapped,
  check_inner_size,
  default_inner_size,
)
from insvp_jax.methods.ops import frame

_SCALE = "prompter/scale"
_SMALLEST, _LARGEST = 0.1, 5.0


class AutoVP(LabelMapped):
  """A trained frame around a scaled image; the source's classes, mapped."""

  inner_size: int | None = field(
    default_inner_size,
    "pixels per side of the image before it is scaled; None: 4/7 of the backbone's, as "
    "128 of 224",
    check=check_inner_size,
  )
  resize: bool = field(True, "train the image's scale", check=checks.boolean)
  scale_init: float | int = field(
    1.0, "the scale at the start, if it is trained", check=checks.finite_number
  )
  additive: bool = field(
    False, "add the prompt as it is, without a sigmoid", check=checks.boolean
  )
  mapping: str = field(
    FULL,
    "source classes of a class: full (a dense layer of all), frequency (counted once), "
    "iterative (anew before each epoch), semantic (by embeddings) or fixed (the first)",
    check=checks.one_of(FULL, FREQUENCY, ITERATIVE, SEMANTIC, FIXED),
  )
  sources_per_target: int = field(
    1, "source classes whose mean logit is a class's", check=checks.positive_int
  )
  embeddings: str = field(
    "",
    "for semantic: .npz file with embeddings of the classes, source and target",
    check=checks.path,
  )

  @classmethod
  def resolve(cls, spec, values):
    resolved = super().resolve(spec, values)
    if not _SMALLEST <= resolved["scale_init"] <= _LARGEST:
      raise ValueError(
        f"scale_init is {resolved['scale_init']}, expected a number from "
        f"{_SMALLEST} to {_LARGEST}."
      )
    return resolved

  def setup(self) -> None:
    """Creates the prompt, the mapping and, where it is trained, the scale []."""
    super().setup()
    if self.resize:
      self.scale = self.param("scale", nn.initializers.constant(self.scale_init), ())

  def prompt_image(self, images, *, train=False):
    del train
    side = self.spec.image_size
    # Relative to black, so that what is not there is zero.
    black = jnp.zeros(3) if self.additive else self.black()
    inner = images - black.astype(images.dtype)
    if self.resize:
      inner = frame.pad_scaled(inner, side, self.scale)
    else:
      inner = frame.pad(inner, side)
    return inner + (self.border() + black).astype(images.dtype)

  def border(self) -> Float[Array, "t t c"]:
    """Returns the frame in normalised units, zero in its hole."""
    side, inner = self.spec.image_size, self.inner_size
    if self.resize:
      scale = jax.lax.stop_gradient(self.scale)
      inner = jnp.minimum(jnp.floor(inner * scale).astype(jnp.int32), side)
    around = frame.hole(side, inner, (side - inner) // 2)
    if self.additive:
      return around * self.delta
    return around * jax.nn.sigmoid(self.delta) / jnp.asarray(self.spec.std)

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns the patterns of the prompt, the scale and a dense mapping."""
    return (*super().trainable_patterns(), *((_SCALE,) if self.resize else ()))

  @nn.nowrap
  def adjust_updates(self, updates, *, params, grads, lr):
    """Keeps the scale within its bounds."""
    del grads, lr
    if not self.resize:
      return updates
    before = params[_SCALE]
    after = jnp.clip(before + updates[_SCALE], _SMALLEST, _LARGEST)
    return {**updates, _SCALE: after - before}
