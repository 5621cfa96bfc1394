"""The hooks through which every adaptation method speaks to the backbone.

A method is a Flax module that turns images into arrays; the backbone consumes
the arrays and never learns the method's name. Each hook is the identity unless
a method overrides it, so a method's file holds only what the method is.
"""

from collections.abc import Mapping
import dataclasses
import inspect
from typing import Any, ClassVar

import flax
import flax.linen as nn
from jaxtyping import Array, Float

from insvp_jax.methods import fields

# The public methods of `Method` that do not change the feature of an image.
_BESIDE_THE_FEATURE = frozenset({"trainable_patterns", "prompts", "hparam", "clone"})


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

  A method declares its fields by `fields.field`. At construction each one that is None
  takes its default and all are checked, so that from then on a field has the value that
  the method computes with.

  Attributes:
    spec: the backbone's sizes.
    HPARAMS: names of the fields that shape no array and choose no operation: rates
      and weights. They may come as data (see `hparam`), so that configurations that
      differ in them share one compiled step. Derived from the declarations.
  """

  spec: BackboneSpec
  HPARAMS: ClassVar[tuple[str, ...]] = ()

  def __init_subclass__(cls, **kwargs: Any) -> None:
    """Derives `HPARAMS`."""
    super().__init_subclass__(**kwargs)
    declared = fields.declared(cls).items()
    cls.HPARAMS = tuple(name for name, field in declared if field.hparam)

  def __post_init__(self) -> None:
    """Resolves the fields, before any device work."""
    values = {name: getattr(self, name) for name in fields.declared(type(self))}
    # `clone` starts from these: other defaults may follow from what it changes.
    object.__setattr__(self, "_unresolved", values)
    for name, value in self.resolve(self.spec, values).items():
      object.__setattr__(self, name, value)
    super().__post_init__()

  @classmethod
  def resolve(cls, spec: BackboneSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the value of every declared field, checked.

    Args:
      spec: the backbone's sizes.
      values: by name of the field; None, or none at all, stands for the default.

    Raises:
      ValueError: a value that its field cannot have, or one that does not fit the
        backbone.
    """
    resolved: dict[str, Any] = {}
    for name, field in fields.declared(cls).items():
      value = values.get(name)
      if value is None:
        value = field.default_for(spec, resolved.get(fields.PRESET))
      if value is not None and field.check:
        value = field.check(name, value, spec)
      resolved[name] = value
    return resolved

  @nn.nowrap
  def clone(self, **updates: Any) -> "Method":
    """Returns a copy with some fields changed; see `nn.Module.clone`."""
    return super().clone(**{**self._unresolved, **updates})

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
    """Returns the names of the hooks by which this method changes the feature.

    Every public method of the base class counts that the class overrides, but for those
    that cannot change the feature: `trainable_patterns` and `prompts`. A hook that is
    added to the base class counts by itself.
    """
    hooks = {
      name
      for name, value in vars(Method).items()
      if inspect.isfunction(value) and not name.startswith("_")
    }
    return frozenset(
      name
      for name in hooks - _BESIDE_THE_FEATURE
      if getattr(cls, name) is not getattr(Method, name)
    )

  @nn.nowrap
  def hparam(self, name: str) -> Any:
    """Returns one of `HPARAMS`: the data of that name where there are any.

    Data come in the collection "hparams", next to "params": scalars, or vectors for
    fields that are pairs. Without them it is the field, a constant of what is compiled.
    """
    return self.get_variable("hparams", name, getattr(self, name))

  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns regular expressions over the names of the trainable parameters."""
    return ("prompter/.*", "head/.*")
