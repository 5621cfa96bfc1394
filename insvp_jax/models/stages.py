"""What backbones share whose stages differ in width: Swin, ConvNeXt, ResNet.

Their parameters are named `stage_<s>/block_<i>/...`. With `scan`, blocks that are alike
are stacked and stand under `stage_<s>/blocks/...`; which ones is each backbone's own.
"""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from insvp_jax.methods.hooks import UNCHANGED, Adaptation
from insvp_jax.models.encoder import unsharded
from insvp_jax.models.heads import Head

_BLOCK = re.compile(r"stage_([0-9]{1,3})/block_([0-9]{1,4})/(.+)")
_STACKED = re.compile(r"stage_([0-9]{1,3})/blocks/(?:block_([01])/)?(.+)")


class StagedBackbone(nn.Module):
  """Base of these backbones.

  Each has the fields `depths` (blocks of each stage), `image_size`, `dtype`, `remat`,
  `scan`, `head_classes` and `unshard`, which are as those of `models.vit.ViT`, and the
  method `encode`.
  """

  def check(self) -> None:
    """Checks the fields that all have.

    Raises:
      ValueError: a value that does not fit.
    """
    # Without x64 JAX would take float32 for it, with a warning.
    is_double = self.dtype == "float64" and jax.config.jax_enable_x64
    if self.dtype not in ("float32", "bfloat16") and not is_double:
      raise ValueError(f"dtype is {self.dtype!r}, expected 'float32' or 'bfloat16'.")
    if not self.depths or min(self.depths) < 1:
      raise ValueError(
        f"depths is {self.depths!r}, expected the blocks of each stage, e.g. (3, 4, 6)."
      )

  def create_head(self) -> None:
    """Creates the head that the backbone was trained with, if it is kept."""
    if self.head_classes:
      # Not zeros where it is drawn: they would tell nothing.
      self.head = unsharded(Head, self.unshard)(self.head_classes, "torch")

  def check_size(self, images: Float[Array, "b h w c"], size: int) -> None:
    """Checks the size of images against the size that is expected.

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

  def finish(self, feature: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Returns the feature; makes the parameters of the head while initializing."""
    if self.head_classes and self.is_initializing():
      self.head(jnp.zeros((1, feature.shape[-1])))
    return feature

  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
    """Returns the feature [b, d] of images, without any prompt."""
    return self.encode(self.embed(images))

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
