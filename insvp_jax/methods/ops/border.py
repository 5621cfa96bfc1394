"""A border of pixels around images: its four sides, as VP and DAM-VP train them."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
import numpy as np

from insvp_jax import files
from insvp_jax.methods.base import BackboneSpec

SIDES = ("up", "down", "left", "right")


def default_size(spec: BackboneSpec) -> int:
  """Returns the published 30 pixels, or a quarter of a small image's side."""
  return max(1, min(30, spec.image_size // 4))


def check_size(spec: BackboneSpec, size: int, *, largest: int = 0) -> None:
  """Checks that a prompt of `size` pixels fits the images.

  Args:
    spec: of the backbone.
    size: the prompt's width.
    largest: that fits; 0 for a border, which has to leave a pixel within.

  Raises:
    ValueError: it does not.
  """
  largest = largest or (spec.image_size - 1) // 2
  if size > largest:
    raise ValueError(
      f"prompt_size is {size}, but the backbone's images have {spec.image_size} "
      f"pixels per side; expected an integer from 1 to {largest}."
    )


def shapes(side: int, size: int) -> dict[str, tuple[int, int, int]]:
  """Returns the shapes of up, down [k, S, 3] and left, right [S - 2k, k, 3]."""
  flat, upright = (size, side, 3), (side - 2 * size, size, 3)
  return dict(zip(SIDES, (flat, flat, upright, upright), strict=True))


def image(
  leaves: Mapping[str, Float[Array | np.ndarray, "..."]],
) -> Float[Array, "..."]:
  """Returns borders [..., S, S, 3] that are zero within.

  Args:
    leaves: with the last axes as in `shapes`.
  """
  up, down, left, right = (leaves[side] for side in SIDES)
  hole = jnp.zeros((*left.shape[:-2], left.shape[-3], 3), left.dtype)
  middle = jnp.concatenate([left, hole, right], axis=-2)
  return jnp.concatenate([up, middle, down], axis=-3)


def read(path: str, side: int, size: int) -> dict[str, Float32[np.ndarray, "..."]]:
  """Returns the leaves of a border that `insvp meta_init` has written.

  Raises:
    OSError: there is no such file.
    ValueError: it is no such file, or its border has another size.
  """
  try:
    arrays = files.read_npz(path, SIDES)
  except ValueError as error:
    raise ValueError(f"{path} has no border of `insvp meta_init`: {error}.") from error
  for name, shape in shapes(side, size).items():
    if (found := arrays[name].shape) != shape:
      raise ValueError(
        f"the border in {path} is for images of another size, or of another width: its "
        f"{name!r} is {list(found)}, expected {list(shape)}, for {side} pixels per "
        f"side and prompt_size {size}."
      )
  return {name: np.asarray(array, np.float32) for name, array in arrays.items()}
