"""What backbones share whose stages differ in width: Swin, ConvNeXt, ResNet.

Their parameters are named `stage_<s>/block_<i>/...`. With `scan`, blocks that are alike
are stacked and stand under `stage_<s>/blocks/...`; which ones is each backbone's own.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from insvp_jax.methods.base import BackboneSpec, Stage
from insvp_jax.methods.hooks import UNCHANGED, Adaptation
from insvp_jax.models.backbone import Backbone
from insvp_jax.models.encoder import unsharded

_BLOCK = re.compile(r"stage_([0-9]{1,3})/block_([0-9]{1,4})/(.+)")
_STACKED = re.compile(r"stage_([0-9]{1,3})/blocks/(?:block_([01])/)?(.+)")


class StagedBackbone(Backbone, kw_only=True):
  """Base of these backbones.

  Each has the method `encode`, which calls `finish` at its end.

  Attributes:
    depths: blocks of each stage.
    image_size: pixels per side of an image.
    dtype, remat, scan, head_classes, unshard: as those of `models.vit.ViT`.
  """

  depths: Sequence[int]
  image_size: int = 224
  dtype: str = "float32"
  remat: bool = False
  scan: bool = False
  head_classes: int = 0
  unshard: Callable[[Any], Any] | None = None

  def check(self) -> None:
    """Checks the fields that all have.

    Raises:
      ValueError: a value that does not fit.
    """
    self.check_dtype()
    if not self.depths or min(self.depths) < 1:
      raise ValueError(
        f"depths is {self.depths!r}, expected the blocks of each stage, e.g. (3, 4, 6)."
      )

  @nn.nowrap
  def create_spec(
    self,
    stages: Sequence[Stage],
    patch_size: int,
    sites: Collection[str],
    patterns: tuple[str, ...],
    **fields: Any,
  ) -> BackboneSpec:
    """Returns the sizes that a method is built from.

    Args:
      stages: the stages.
      patch_size: pixels per side of a position of the first stage.
      sites: where hooks can be.
      patterns: over the parameters of each block, from `block_patterns`.
      **fields: of `BackboneSpec`, the other patterns.
    """
    last = stages[-1]
    return BackboneSpec(
      width=last.width,
      depth=sum(self.depths),
      mlp_dim=last.mlp_dim,
      num_heads=last.num_heads,
      patch_size=patch_size,
      image_size=self.image_size,
      num_prefix=0,
      sites=frozenset(sites),
      block_patterns=() if self.scan else patterns,
      head_classes=self.head_classes,
      dtype=self.dtype,
      stages=tuple(stages),
      **fields,
    )

  def embed(
    self,
    images: Float[Array, "b h w c"],
    adaptation: Adaptation = UNCHANGED,
    *,
    size: int = 0,
  ) -> Float[Array, "b ..."]:
    """Returns what the first stage gets.

    Args:
      images: the images.
      adaptation: not used: no hook is here.
      size: pixels per side of the images; 0 is the backbone's own.

    Raises:
      ValueError: the images do not have that size.
    """
    del adaptation
    self.check_size(images, size)
    return self.patches(images)

  def finish(self, feature: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Returns the feature; makes the parameters of the head while initializing."""
    if self.head_classes and self.is_initializing():
      self.head(jnp.zeros((1, feature.shape[-1])))
    return feature

  # The two layouts of the parameters.

  @nn.nowrap
  def place(self, block: int) -> tuple[str, int] | None:
    """Returns (name in its stage, row) of a block where blocks are stacked.

    None for a block that stays on its own.
    """
    return "blocks", block

  @nn.nowrap
  def stack(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the leaves by name, as with `scan`; the inverse of `unstack`.

    Raises:
      ValueError: a block lacks a leaf that another one has.
    """
    stacked: dict[str, Any] = {}
    rows: dict[str, dict[int, np.ndarray]] = {}
    for name, leaf in leaves.items():
      match = _BLOCK.fullmatch(name)
      place = match and self.place(int(match[2]))
      if place:
        rows.setdefault(f"stage_{match[1]}/{place[0]}/{match[3]}", {})[place[1]] = leaf
      else:
        stacked[name] = leaf
    for name, by_row in rows.items():
      if sorted(by_row) != list(range(len(by_row))):
        raise ValueError(f"a block has no {name!r}; cannot stack them.")
      stacked[name] = np.stack([by_row[i] for i in range(len(by_row))])
    return stacked


def unstack(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns leaves with one group per block; those of other backbones as they are."""
  alone = {match[1] for match in map(_BLOCK.fullmatch, leaves) if match}
  unstacked = {}
  for name, leaf in leaves.items():
    match = _STACKED.fullmatch(name)
    if match is None:
      unstacked[name] = leaf
      continue
    stage, half, rest = match.groups()
    for i, row in enumerate(leaf):
      # A row is a pair, or a block of all, or of all but the first one.
      block = i + (stage in alone) if half is None else 2 * i + int(half)
      unstacked[f"stage_{stage}/block_{block}/{rest}"] = row
  return unstacked


# Of a patch embedding with a norm of its own.
EMBEDDING_PATTERNS = ("backbone/embedding/.*", "backbone/embedding_norm/.*")


def lifted(
  block: type[nn.Module],
  remat: bool,
  unshard: Callable[[Any], Any] | None,
  **remat_options: Any,
) -> type[nn.Module]:
  """Returns a block's class with `unshard` and `remat`."""
  block = unsharded(block, unshard)
  if remat:
    return nn.remat(block, **remat_options)
  if unshard is not None:
    # As in `Encoder`: the whole weights are not kept for the backward pass.
    policy = jax.checkpoint_policies.dots_saveable
    return nn.remat(block, policy=policy, **remat_options)
  return block


def block_patterns(
  depths: Sequence[int], leaf: str = ".*", follows: str = ""
) -> tuple[str, ...]:
  """Returns the regular expression over each block's parameters, in their order.

  Args:
    depths: blocks of each stage.
    leaf: of the leaves that may train.
    follows: module at the start of a stage that trains with the last block of the stage
      before it; "" for none.
  """
  patterns = []
  for stage, depth in enumerate(depths):
    for block in range(depth):
      where = f"stage_{stage}/block_{block}"
      if follows and block + 1 == depth and stage + 1 < len(depths):
        where = f"({where}|stage_{stage + 1}/{follows})"
      patterns.append(f"backbone/{where}/{leaf}")
  return tuple(patterns)


class _ScannedBlock(nn.Module):
  """A block in the form that `nn.scan` wants: (carry, inputs) -> (carry, outputs)."""

  block: type[nn.Module]
  fields: Mapping[str, Any]

  @nn.compact
  def __call__(self, x, inputs):
    block = self.block(**self.fields)
    # The scanned block's parameters are the block's own, one level up.
    nn.share_scope(self, block)
    return block(x), inputs


def apply_blocks(
  x: Array,
  block: type[nn.Module],
  fields: Mapping[str, Any],
  blocks: range,
  *,
  remat: bool,
  scan: bool,
  unshard: Callable[[Any], Any] | None,
) -> Array:
  """Applies blocks that are alike; to be called within a compact module.

  Args:
    x: what the first one gets.
    block: their class.
    fields: of each.
    blocks: their numbers in the stage.
    remat: recompute each in the backward pass.
    scan: compile one for all.
    unshard: see `models.vit.ViT`.
  """
  if not scan:
    for i in blocks:
      x = lifted(block, remat, unshard)(**fields, name=f"block_{i}")(x)
    return x
  if not blocks:
    return x
  scanned = nn.scan(
    lifted(_ScannedBlock, remat, unshard, prevent_cse=False),
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=len(blocks),
  )(block, fields, name="blocks")
  return scanned(x, None)[0]


def check_coarsest(image_size: int, patch_size: int, num_stages: int) -> None:
  """Checks that the last stage has a position.

  Raises:
    ValueError: the images are too small.
  """
  coarsest = patch_size * 2 ** (num_stages - 1)
  if image_size < coarsest:
    raise ValueError(
      f"image_size is {image_size}, but one position of the last stage has {coarsest} "
      "pixels per side; take larger images."
    )
