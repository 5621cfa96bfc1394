"""The hooks through which every adaptation method speaks to the backbone.

A method is a Flax module that turns images into arrays; the backbone consumes
the arrays and never learns the method's name. Each hook is the identity unless
a method overrides it, so a method's file holds only what the method is.
"""

import dataclasses
from typing import Any, ClassVar

import flax
import flax.linen as nn
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
  """What a method may know of the backbone: sizes, in tokens and pixels."""

  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  patch_size: int
  image_size: int

  @property
  def num_patches(self) -> int:
    """Number of patch tokens n of one image."""
    return (self.image_size // self.patch_size) ** 2


@flax.struct.dataclass
class BlockPrompts:
  """Prompt tokens for the first l blocks.

  Block i < l takes `tokens[i]` in place of the prompt outputs of the block
  before it. Blocks from l on carry the prompts along. So l = 1 is VPT-Shallow
  and l = depth is VPT-Deep.

  Attributes:
    tokens: [l, b, p, d]; b is 1 where all instances share the prompts. The
      annotation is wide because JAX's transformations put other leaves here.
  """

  tokens: Any


class Method(nn.Module):
  """Base of all methods: adapts nothing and trains the head.

  Attributes:
    spec: the backbone's sizes.
    NUMBERS: names of the fields that shape no array and choose no operation: rates
      and weights. They may come as data (see `number`), so that configurations that
      differ in them share one compiled step.
  """

  spec: BackboneSpec
  NUMBERS: ClassVar[tuple[str, ...]] = ()

  def prompt_image(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b h w c"]:
    """Returns the images as the backbone shall see them."""
    del train
    return images

  def prompt_tokens(
    self,
    images: Float[Array, "b h w c"],
    prompted_images: Float[Array, "b h w c"],
    *,
    train: bool = False,
  ) -> BlockPrompts | None:
    """Returns the prompt tokens that join the sequence, or None.

    Args:
      images: the images before `prompt_image`.
      prompted_images: the images after it.
      train: whether dropout is on.
    """
    del images, prompted_images, train
    return None

  def adapt_feature(
    self, feature: Float[Array, "b d"], *, train: bool = False
  ) -> Float[Array, "b d"]:
    """Returns the feature as the head shall see it."""
    del train
    return feature

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns what there is to look at, by name; see `Run.prompts`."""
    del images
    return {}

  @classmethod
  def overridden_hooks(cls) -> frozenset[str]:
    """Returns the names of the hooks that this method overrides."""
    return frozenset(
      name
      for name in ("prompt_image", "prompt_tokens", "adapt_feature")
      if getattr(cls, name) is not getattr(Method, name)
    )

  @nn.nowrap
  def number(self, name: str, constant: Any) -> Any:
    """Returns one of `NUMBERS`: the data of that name where there are any.

    Data come in the collection "numbers", next to "params": scalars, or vectors for
    fields that are pairs.

    Args:
      name: of the field.
      constant: its value where it is no data.
    """
    return self.get_variable("numbers", name, constant)

  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns regular expressions over the names of the trainable parameters."""
    return ("prompter/.*", "head/.*")
