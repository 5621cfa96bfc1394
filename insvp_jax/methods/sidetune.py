"""Sidetune: a convolutional network beside the frozen backbone, blended by a weight.

Source: Zhang et al. 2020, "Side-Tuning", as the baseline of Jia et al. 2022, "Visual
Prompt Tuning", and its published code:

    f' = s f + (1 - s) W flatten(AlexNet(x)),    s = sigmoid(alpha)

AlexNet stands for the layers before its classifier (Krizhevsky 2014, as torchvision has
them: five convolutions, ReLU, three max pools, and the average over 6 x 6 cells), W has
no bias, and alpha starts at 0: half and half. All of them train. x are the normalised
pixels that the method gets, before any prompt. AlexNet takes images from 63 pixels per
side on; smaller ones are enlarged to 64, bilinearly, as in `side_size`.

`weights` starts AlexNet from a file with torchvision's names (features.0.weight
[64, 3, 11, 11], features.0.bias, features.3, 6, 8, 10) of any format that backbones
have; others in it, such as the classifier's, are left out. These weights know pixels
normalised by ImageNet's mean, as `data.preset=vpt` does.

Parameters: 2,469,696 of the convolutions, 9,216 d of W, and 1; d the width. ViT-B/16:
9,547,585.
"""

from collections.abc import Mapping, Sequence
import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from insvp_jax import array_files
from insvp_jax.methods import checks
from insvp_jax.methods.base import Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.ops.conv import is_one_cpu
from insvp_jax.methods.ops.conv_forms import nhwc
from insvp_jax.methods.ops.initializers import torch_uniform

# Of torchvision's `features`: {index: (kernel, stride, padding, pooled after it)}.
LAYERS = {
  0: (11, 4, 2, True),
  3: (5, 1, 2, True),
  6: (3, 1, 1, False),
  8: (3, 1, 1, False),
  10: (3, 1, 1, True),
}
_CELLS = 6
# The last pool leaves one pixel of the smallest image that the layers can take.
_SMALLEST, _ENLARGED, _LARGEST = 63, 64, 2**13


def _convolve(x: Array, kernel: Array, strides: Any, padding: Any, **_: Any) -> Array:
  """Returns what `jax.lax.conv_general_dilated` does, by gradients fast in loops."""
  return nhwc(x, kernel, stride=strides[0], padding=padding[0][0])


class AlexNet(nn.Module):
  """The layers before the classifier, initialised as PyTorch does.

  Attributes:
    channels: of the five convolutions.
  """

  channels: Sequence[int]

  @nn.compact
  def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n"]:
    """Returns the averages of 6 x 6 cells, flat, channel by channel as PyTorch has."""
    x = images
    for (index, layer), channels in zip(LAYERS.items(), self.channels, strict=True):
      size, stride, padding, pooled = layer
      init = torch_uniform(x.shape[-1] * size**2)
      x = nn.Conv(
        channels,
        (size, size),
        stride,
        [(padding, padding)] * 2,
        dtype=x.dtype,
        kernel_init=init,
        bias_init=init,
        conv_general_dilated=_convolve if is_one_cpu() else None,
        name=f"features_{index}",
      )(x)
      x = nn.relu(x)
      if pooled:
        x = nn.max_pool(x, (3, 3), (2, 2))
    x = adaptive_average_pool(x, _CELLS)
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


def adaptive_average_pool(
  x: Float[Array, "b h w c"], cells: int
) -> Float[Array, "b n n c"]:
  """Returns means over `cells` x `cells` parts, which overlap or repeat as PyTorch's.

  Part i of n pixels reaches from floor(i n / cells) to ceil((i + 1) n / cells).
  """
  if x.shape[1:3] == (cells, cells):
    return x
  weights = []
  for size in x.shape[1:3]:
    i, pixel = np.arange(cells)[:, None], np.arange(size)
    part = (pixel >= i * size // cells) & (pixel < -(-(i + 1) * size // cells))
    weights.append(jnp.asarray(part / part.sum(1, keepdims=True), x.dtype))
  return jnp.einsum(
    "ip,jq,bpqc->bijc", *weights, x, precision=jax.lax.Precision.HIGHEST
  )


def _check_side_size(name, value, spec):
  del spec
  is_int = isinstance(value, int) and not isinstance(value, bool)
  if not is_int or (value and not _SMALLEST <= value <= _LARGEST):
    raise ValueError(
      f"{name} is {value!r}, expected 0 or an integer of at least {_SMALLEST}, the "
      "smallest images whose pixels reach AlexNet's last layer, and at most "
      f"{_LARGEST}."
    )
  return value


class Sidetune(Method):
  """Blends the feature with that of a side network; trains it and the head."""

  weights: str = field(
    "",
    "file of torchvision's AlexNet; empty: a random start",
    check=checks.path,
  )
  side_size: int = field(
    0,
    "pixels per side of the images of the side network; 0: as they come, at least 64",
    check=_check_side_size,
  )
  channels: Sequence[int] = field(
    (64, 192, 384, 256, 256),
    "channels of the five convolutions",
    check=checks.positive_ints(len(LAYERS)),
  )

  def setup(self) -> None:
    """Creates AlexNet, W [36 c, d] and alpha []."""
    init = torch_uniform(_CELLS**2 * self.channels[-1])
    self.side = AlexNet(self.channels)
    self.projection = nn.Dense(self.spec.width, use_bias=False, kernel_init=init)
    self.alpha = self.param("alpha", nn.initializers.zeros, ())

  def adapt_feature(self, feature, images, *, train=False):
    del train
    size = images.shape[1]
    size = self.side_size or (size if size >= _SMALLEST else _ENLARGED)
    if size != images.shape[1]:
      shape = (images.shape[0], size, size, 3)
      images = jax.image.resize(images, shape, "bilinear")
    side = self.projection(self.side(images.astype(feature.dtype)))
    share = nn.sigmoid(self.alpha)
    return (share * feature + (1 - share) * side).astype(feature.dtype)

  @nn.nowrap
  def prepares(self) -> bool:
    return bool(self.weights)

  @nn.nowrap
  def prepare(self, params, batches, apply):
    own = params["prompter"]
    if self.weights:
      own = {**own, "side": read_alexnet(self.weights, own["side"])}
    return {**params, "prompter": own}


def read_alexnet(
  path: str | os.PathLike[str], side: Mapping[str, Mapping[str, Array]]
) -> dict[str, dict[str, np.ndarray]]:
  """Returns the parameters of `AlexNet` from a file with torchvision's names.

  Args:
    path: the file: .npz, .safetensors, or PyTorch's.
    side: parameters whose shapes are expected.

  Raises:
    OSError: it is missing or cannot be read.
    ValueError: it is no such file, or lacks an array of that name and shape.
  """
  names = [f"features.{i}.{leaf}" for i in LAYERS for leaf in ("weight", "bias")]
  try:
    file = array_files.open_arrays(Path(path), array_files.kind_of(path))
    if missing := [name for name in names if name not in file.shapes]:
      raise ValueError(f"there is no array {missing[0]!r} in it.")
    arrays = file.read(names)
  except ValueError as error:
    raise ValueError(
      f"sidetune.weights: {os.fspath(path)} has no weights of AlexNet in torchvision's "
      f"names: {error}"
    ) from error
  loaded: dict[str, dict[str, np.ndarray]] = {}
  for index in LAYERS:
    module = f"features_{index}"
    loaded[module] = {}
    for leaf, stored in (("kernel", "weight"), ("bias", "bias")):
      array = np.asarray(arrays[f"features.{index}.{stored}"], np.float32)
      expected = side[module][leaf].shape
      # From [out, in, h, w].
      expected = (
        expected if leaf == "bias" else tuple(expected[i] for i in (3, 2, 0, 1))
      )
      if array.shape != expected or not np.isfinite(array).all():
        raise ValueError(
          f"sidetune.weights: features.{index}.{stored} in {os.fspath(path)} is "
          f"{list(array.shape)}, expected finite values of shape {list(expected)}."
        )
      loaded[module][leaf] = array if leaf == "bias" else array.transpose(2, 3, 1, 0)
  return loaded
