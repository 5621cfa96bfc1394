"""The base of every adaptation method: what it may do, from the pixels to the logits.

A method is a Flax module that turns images into arrays; the backbone consumes
the arrays and never learns the method's name. Each method of the base class is the
identity unless a method overrides it, so a method's file holds only what the method is.
What it does inside the backbone is said by `hooks.Hooks`.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import inspect
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float, Int

from insvp_jax.methods import fields
from insvp_jax.methods.hooks import (
  PROMPTED_SIZE,
  PROMPTS,
  SITES,
  Adaptation,
  Hooks,
)

# The public methods of `Method` that do not change the feature of an image.
_BESIDE_THE_FEATURE = frozenset(
  {
    *("trainable_patterns", "updated_patterns", "prompts", "hparam", "clone"),
    *("head", "merge", "adjust_updates", "claims", "place_hparams", "prepares"),
    *("routes", "spare_params", "measures", "sites"),
  }
)


@dataclasses.dataclass(frozen=True)
class Stage:
  """Blocks of one width.

  Attributes:
    width: d.
    depth: number of blocks.
    mlp_dim, num_heads: of each; 0 where blocks have none.
    grid: tokens per side.
  """

  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  grid: int


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
  """What a method may know of the backbone.

  Attributes:
    width, depth, mlp_dim, num_heads: sizes; see `models.vit.ViT`. Of several stages the
      width, mlp_dim and num_heads of the last one, whose width is the feature's, and
      the number of all blocks.
    patch_size, image_size: pixels per side; a patch is what becomes one token, or one
      position of the first stage.
    num_prefix: tokens before the patches (the class token).
    sites: where hooks can be; see `hooks.SITES`.
    block_patterns: regular expression over the names of each block's parameters; ()
      where all blocks share their leaves (`scan`).
    norm_patterns: regular expressions over the parameters of all LayerNorms, the last
      one at the end.
    embedding_patterns: regular expressions over the patch embedding's parameters.
    constant_patterns: regular expressions over leaves that no method trains: a
      BatchNorm's statistics.
    head_classes: classes of the head that the backbone was trained with; 0 where that
      is not kept.
    mean, std: of each channel, by which pixels in [0, 1] are normalised.
    dtype: of the backbone's computation; None: that of its arrays.
    stages: the stages, first to last; () stands for the one that the sizes say.
  """

  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  patch_size: int
  image_size: int
  num_prefix: int = 1
  sites: frozenset[str] = SITES
  block_patterns: tuple[str, ...] = ()
  norm_patterns: tuple[str, ...] = ()
  embedding_patterns: tuple[str, ...] = ()
  constant_patterns: tuple[str, ...] = ()
  head_classes: int = 0
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  dtype: str | None = None
  stages: tuple[Stage, ...] = ()

  def __post_init__(self) -> None:
    """Makes the one stage of a backbone that has no more."""
    if not self.stages:
      stage = Stage(self.width, self.depth, self.mlp_dim, self.num_heads, self.grid)
      object.__setattr__(self, "stages", (stage,))

  def stage_counts(self, blocks: int) -> tuple[int, ...]:
    """Returns how many of the first so many blocks each stage has, without zeros."""
    counts = []
    for stage in self.stages:
      counts.append(min(blocks, stage.depth))
      blocks -= counts[-1]
    return tuple(count for count in counts if count)

  @property
  def grid(self) -> int:
    """Patches per side of an image."""
    return self.image_size // self.patch_size

  @property
  def num_patches(self) -> int:
    """Number of patch tokens n of one image."""
    return self.grid**2


class Apply(NamedTuple):
  """What a method may compute with the model before and between the epochs.

  Attributes:
    backbone: `(params, images, adaptation) -> (feature, reads)`: the feature [b, d]
      under an `Adaptation`, None for the plain backbone, and what its hooks' `leave`
      returned, a list with an entry for each block.
    logits: `(params, images) -> logits` [b, k] of the whole model, as in evaluation.
    source_logits: the same of the head that the backbone was trained with, [b, s].

  Results are whole on every device.
  """

  backbone: Callable[..., tuple[Array, Any]]
  logits: Callable[..., Array]
  source_logits: Callable[..., Array]


class Method(nn.Module):
  """Base of all methods: adapts nothing and trains the head.

  A method declares its fields by `fields.field`. At construction each one that is None
  takes its default and all are checked, so that from then on a field has the value that
  the method computes with.

  Attributes:
    spec: of the backbone.
    num_classes: k; 0 where there is no head.
    HPARAMS: names of the fields that shape no array and choose no operation: rates
      and weights. They may come as data (see `hparam`), so that configurations that
      differ in them share one compiled step. Derived from the declarations.
    MASKS: {name of a field: entries of a row that are kept at least} of the fields that
      a search may find by pruning; see `fields.field` and `search.pruning`.
    BY_STAGE: whether the prompts that the method makes are those of each stage; others
      need a backbone whose blocks all have one width.
  """

  spec: BackboneSpec
  num_classes: int = 0
  HPARAMS: ClassVar[tuple[str, ...]] = ()
  MASKS: ClassVar[Mapping[str, int]] = {}
  BY_STAGE: ClassVar[bool] = False

  def __init_subclass__(cls, **kwargs: Any) -> None:
    """Derives `HPARAMS` and `MASKS`."""
    super().__init_subclass__(**kwargs)
    declared = fields.declared(cls).items()
    cls.HPARAMS = tuple(name for name, field in declared if field.hparam)
    cls.MASKS = {n: field.keeps for n, field in declared if field.keeps is not None}

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
  def hooks(self) -> Hooks:
    """Returns the functions that the backbone calls within its blocks."""
    return Hooks()

  @nn.nowrap
  def clone(self, **updates: Any) -> "Method":
    """Returns a copy with some fields changed; see `nn.Module.clone`."""
    return super().clone(**{**self._unresolved, **updates})

  def prompt_image(
    self, images: Float[Array, "b h w c"], *, train: bool = False
  ) -> Float[Array, "b t t c"]:
    """Returns the images as the backbone shall see them.

    A method with a `route` gets what that returned as `route=`, too; so does `prompts`.
    """
    del train
    return images

  def route(self, feature: Float[Array, "b d"]) -> Int[Array, "b"]:
    """Returns a number of each image that decides how it is prompted.

    It may depend on parameters that never change, and on no other. So it is computed
    once, of images in memory that are the same in each step.

    Args:
      feature: of the images as they are, of the plain backbone; without a gradient.
    """
    raise NotImplementedError

  @nn.nowrap
  def routes(self) -> bool:
    """Returns whether there is a `route`, for which the backbone runs once more."""
    return type(self).route is not Method.route

  @nn.nowrap
  def input_size(self) -> int:
    """Returns the pixels per side of the images that the method gets."""
    return self.spec.image_size

  @nn.nowrap
  def prompted_size(self) -> int:
    """Returns the pixels per side of the images that `prompt_image` returns.

    Where that is not the backbone's `image_size`, its position embedding is resized to
    the new grid, linearly with aligned corners.
    """
    return self.spec.image_size

  def adapt(
    self,
    images: Float[Array, "b h w c"],
    prompted: Float[Array, "b t t c"],
    *,
    embed: Callable[[Array], Array] | None = None,
    train: bool = False,
  ) -> Adaptation:
    """Returns the arrays that the hooks take, and the prompts that join the sequence.

    The hooks themselves need not be set: `hooks()` says which they are.

    Args:
      images: the images before `prompt_image`.
      prompted: the images after it.
      embed: the backbone's patch embedding of images of any size, without positions.
      train: whether dropout is on.
    """
    del images, prompted, embed, train
    return Adaptation()

  def adapt_feature(
    self,
    feature: Float[Array, "b d"],
    images: Float[Array, "b h w c"],
    *,
    train: bool = False,
  ) -> Float[Array, "b d"]:
    """Returns the feature as the head shall see it.

    Args:
      feature: of the backbone.
      images: normalised, before `prompt_image`.
      train: whether dropout is on.
    """
    del images, train
    return feature

  @nn.nowrap
  def reads_source_head(self) -> bool:
    """Returns whether logits are those of the head that the backbone was trained with.

    Then no head is trained: `adapt_logits` makes the k logits of the s source classes'.
    """
    return False

  def adapt_logits(
    self, logits: Float[Array, "b s"], *, train: bool = False
  ) -> Float[Array, "b k"]:
    """Returns the logits of the k classes, of what the head gave."""
    del train
    return logits

  @nn.nowrap
  def spare_params(self, params: Mapping[str, Any]) -> int:
    """Returns how many of the trainable parameters no image can ever reach.

    Args:
      params: the method's own parameters.
    """
    del params
    return 0

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns what there is to look at, by name; see `Run.prompts`."""
    del images
    return {}

  @nn.nowrap
  def head(self, linear: nn.Module) -> nn.Module:
    """Returns the head: `linear`, the one dense layer, or a module around it.

    It is called as `head(feature, train=train)` and has the attribute `num_classes`.
    """
    return linear

  @nn.nowrap
  def extra_loss(
    self,
    params: Mapping[str, Any],
    reads: list[Any],
    targets: Float[Array, "b k"],
  ) -> Array | float:
    """Returns what is added to the loss, in nats.

    Args:
      params: the method's own parameters.
      reads: what the hooks' `leave` returned, a list with an entry for each block.
      targets: the distribution over classes of each image.
    """
    del params, reads, targets
    return 0.0

  @nn.nowrap
  def prepares(self) -> bool:
    """Returns whether `prepare` has anything to do."""
    return type(self).prepare is not Method.prepare

  @nn.nowrap
  def prepare(
    self,
    params: Mapping[str, Any],
    batches: Callable[..., Iterable[Mapping[str, Any]]],
    apply: Apply,
  ) -> Mapping[str, Any]:
    """Returns all parameters, with what the method computes once before training.

    It must be a function of its arguments alone, so that a run can be repeated.

    Args:
      params: of the whole model, at their start.
      batches: makes an iterator over the training images, normalised, as batches of
        "images", "labels" and "mask" (0 for padding); `batches(n)` over at most n of
        them, from everywhere in their order.
      apply: what may be computed.
    """
    del batches, apply
    return params

  @nn.nowrap
  def refresh_every_epochs(self) -> int:
    """Returns after how many epochs `refresh` is called again; 0 is never."""
    return 0

  @nn.nowrap
  def refresh(
    self,
    params: Mapping[str, Any],
    batches: Callable[..., Iterable[Mapping[str, Any]]],
    apply: Apply,
  ) -> Mapping[str, Any]:
    """Returns all parameters, with what the method computes anew in training.

    It is called before the first step and before that of every
    `refresh_every_epochs`-th epoch after it. It may change the parameters of
    `updated_patterns`, and be a function of its arguments alone, which are those of
    `prepare`.
    """
    del batches, apply
    return params

  @nn.nowrap
  def adjust_updates(
    self,
    updates: Mapping[str, Array],
    *,
    params: Mapping[str, Array],
    grads: Mapping[str, Array],
    lr: Array,
  ) -> Mapping[str, Array]:
    """Returns what is added to the trainable parameters in a step.

    Args:
      updates: what the optimizer would add, the learning rate applied, by whole name.
      params: the trainable parameters before the step.
      grads: their gradients.
      lr: the learning rate of the step.
    """
    del params, grads, lr
    return updates

  @nn.nowrap
  def merge(
    self, params: Mapping[str, Any], sites: Mapping[str, Mapping[str, Any]]
  ) -> Mapping[str, Mapping[str, Any]]:
    """Returns the backbone's operations with the method folded into them.

    Args:
      params: the method's own parameters, numpy float64.
      sites: of each operation of `hooks.OPERATIONS` {"kernel", "bias"}, or {"scale",
        "bias"} of a norm, numpy float64. Those of blocks are stacked: kernels are
        [l, in, out], flat on both sides, as `Hooks.after` sees them. A norm may get a
        "kernel" [l, d, d] in place of its "scale", for the operations that read it.

    Raises:
      ValueError: what the method computes is not what a plain backbone can.
    """
    del params
    if self.overridden_hooks():
      raise ValueError(
        "this method cannot be folded into a backbone: what it computes is no plain "
        "backbone under other weights."
      )
    return sites

  @nn.nowrap
  def claims(self) -> frozenset[str]:
    """Returns what of this method no other may do beside it, for a combination."""
    hooks = self.hooks()
    is_claimed = {
      "head": type(self).head is not Method.head,
      "input_size": self.input_size() != self.spec.image_size,
      "logits": self.reads_source_head(),
      "prompted_size": self.prompted_size() != self.spec.image_size,
      "pool": hooks.overrides("pool"),
      "prompts": hooks.makes_prompts,
      "refresh": self.refresh_every_epochs() > 0,
      "route": self.routes(),
    }
    return frozenset(name for name, claimed in is_claimed.items() if claimed)

  @nn.nowrap
  def sites(self) -> frozenset[str]:
    """Returns what a backbone must have for this method; see `hooks.SITES`."""
    return self.hooks().sites() | (self.claims() & {PROMPTS, PROMPTED_SIZE})

  @classmethod
  def overridden_hooks(cls) -> frozenset[str]:
    """Returns the names of the hooks by which this method changes the feature.

    Every public method of the base class counts that the class overrides, but for those
    that cannot change the feature, such as `trainable_patterns` and `prompts`. A hook
    that is added to the base class counts by itself.
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
    """Returns one of `HPARAMS` or `MASKS`: data of that name where there are any.

    Data come in the collection "hparams", next to "params": scalars, or vectors for
    fields that are pairs. Without them it is the field, a constant of what is compiled.
    """
    return self.get_variable("hparams", name, getattr(self, name))

  @nn.nowrap
  def place_hparams(self, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {name of a field: data} as `hparam` looks for them."""
    return dict(hparams)

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns regular expressions over the names of the trainable parameters."""
    return ("prompter/.*", "head/.*")

  @nn.nowrap
  def updated_patterns(self) -> tuple[str, ...]:
    """Returns those of parameters that change without a gradient.

    A step may set them, such as running means: a module sows the new value in the
    collection "updated", under the parameter's own name; see `ops.batch_norm`. Or
    `refresh` sets them.
    """
    return ()

  @nn.nowrap
  def measures(self) -> tuple[str, ...]:
    """Returns names, such as "prompter/gate/sum", of what is logged beside the loss.

    A module sows each array in the collection "measures", where that is mutable, by
    `sow_measure`; of each the largest entry is logged.
    """
    return ()


def sow_measure(module: nn.Module, name: str, value: Array) -> None:
  """Sows what `Method.measures` names; nothing where nobody looks at it."""
  module.sow("measures", name, value, reduce_fn=lambda _, x: x, init_fn=lambda: None)
