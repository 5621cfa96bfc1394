"""What every backbone has, whatever its architecture."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from insvp_jax.models.encoder import unsharded
from insvp_jax.models.heads import Head


class Backbone(nn.Module):
  """Base of the ViT and of the backbones with stages.

  Each has the fields `image_size`, `dtype`, `head_classes` and `unshard`, which are as
  those of `models.vit.ViT`, the property `spec`, and the methods `patches`, `embed` and
  `encode`.
  """

  def check_dtype(self) -> None:
    """Checks the type of the computation.

    Raises:
      ValueError: an unknown one.
    """
    # Without x64 JAX would take float32 for it, with a warning.
    is_double = self.dtype == "float64" and jax.config.jax_enable_x64
    if self.dtype not in ("float32", "bfloat16") and not is_double:
      raise ValueError(f"dtype is {self.dtype!r}, expected 'float32' or 'bfloat16'.")

  def create_head(self) -> None:
    """Creates the head that the backbone was trained with, if it is kept."""
    if self.head_classes:
      # Not zeros where it is drawn: they would tell nothing.
      self.head = unsharded(Head, self.unshard)(self.head_classes, "torch")

  def check_size(self, images: Float[Array, "b h w c"], size: int) -> None:
    """Checks the size of images against the size that is expected.

    Args:
      images: the images.
      size: pixels per side; 0 is the backbone's own.

    Raises:
      ValueError: it is another one.
    """
    size = size or self.image_size
    if images.shape[1:3] != (size, size):
      raise ValueError(
        f"images are {images.shape[1]} x {images.shape[2]} pixels, but the backbone "
        f"was built for {size} x {size}; resize the images or "
        f"build it with image_size={images.shape[1]}."
      )

  def source_logits(self, feature: Float[Array, "b d"]) -> Float[Array, "b s"]:
    """Returns logits of the classes that the backbone was trained on, in float32.

    Raises:
      ValueError: its head is not kept.
    """
    if not self.head_classes:
      raise ValueError(
        "this backbone is kept without the head that it was trained with; set "
        "head_classes to the number of its classes."
      )
    return self.head(feature)

  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
    """Returns the feature [b, d] of images, without any prompt."""
    return self.encode(self.embed(images))
