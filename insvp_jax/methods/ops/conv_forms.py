"""One convolution, four ways to compute it: the same function, other machine code.

Compilers are at their worst at what InsVP's prompters do: wide kernels between very
few channels, where a convolution feeds neither vector units nor matrix units. All
forms take images [b, h, w, c] and a kernel [k, k, c, o], stride 1, zero padding "SAME",
and return [b, h, w, o]; they differ by rounding.

As everywhere in deep learning a convolution is a cross-correlation: along one axis

  y[i] = sum over taps j of x[i + j * dilation - extent // 2] * k[j],

where extent = (k - 1) * dilation and x is zero outside of the image.
"""

from collections.abc import Callable
import functools
import itertools

import einops
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

# Sides of the blocks that matrix products work on.
BLOCK_SIZES = (4, 8)


def plain(
  images: Float[Array, "b h w c"],
  kernel: Float[Array, "k k c o"],
  dilation: int,
  precision: str | None = None,
) -> Float[Array, "b h w o"]:
  """The compiler's own convolution."""
  return lax.conv_general_dilated(
    images,
    kernel,
    (1, 1),
    "SAME",
    rhs_dilation=(dilation, dilation),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=precision,
  )


def nhwc(
  images: Float[Array, "b h w c"],
  kernel: Float[Array, "k k c o"],
  dilation: int = 1,
  precision: str | None = None,
  *,
  stride: int = 1,
  padding: int | None = None,
) -> Float[Array, "b i j o"]:
  """As `plain`, but its gradients are convolutions of NHWC by HWIO, too.

  XLA's fast convolution on CPUs takes this layout alone. It brings others into it, as
  JAX makes of the gradients, but not within a loop, and several train steps in one call
  are a loop: there they take about ten times as long.

  Args:
    images, kernel, dilation: as of all forms.
    precision: of the products, as of `jax.lax.conv_general_dilated`.
    stride: pixels from one output to the next.
    padding: zeros on each side; None: "SAME" with stride 1.
  """
  extent = (len(kernel) - 1) * dilation
  # As `plain` with "SAME".
  before, after = extent // 2, extent - extent // 2
  if padding is not None:
    before = after = padding
  layouts = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": precision}

  @jax.custom_vjp
  def convolve(images, kernel):
    return lax.conv_general_dilated(
      images,
      kernel,
      (stride, stride),
      [(before, after)] * 2,
      rhs_dilation=(dilation, dilation),
      **layouts,
    )

  def forward(images, kernel):
    return convolve(images, kernel), (images, kernel)

  def backward(saved, gradient):
    images, kernel = saved
    # Pixels that follow the one that the last output starts at.
    sides = zip(images.shape[1:3], gradient.shape[1:3], strict=True)
    rest = [side - 1 - stride * (outputs - 1) for side, outputs in sides]
    # y[i] = sum_j x[s i + j] k[j] makes dx[m] = sum_j d[(m - j) / s] k[j].
    to_images = lax.conv_general_dilated(
      gradient,
      _mirrored(kernel),
      (1, 1),
      [(extent - before, r + before) for r in rest],
      lhs_dilation=(stride, stride),
      rhs_dilation=(dilation, dilation),
      **layouts,
    )
    # dk[j] = sum_i x[s i + j] d[i]: d is the kernel, and examples are the channels.
    to_kernel = lax.conv_general_dilated(
      images.transpose(3, 1, 2, 0),
      gradient.transpose(1, 2, 0, 3),
      (dilation, dilation),
      [(before, extent - r - before) for r in rest],
      rhs_dilation=(stride, stride),
      **layouts,
    )
    return to_images, to_kernel.transpose(1, 2, 0, 3)

  convolve.defvjp(forward, backward)
  return convolve(images, kernel)


def _mirrored(kernel: Float[Array, "k k c o"]) -> Float[Array, "k k o c"]:
  """Returns the kernel that a gradient of the images is convolved with."""
  return lax.rev(kernel, (0, 1)).transpose(0, 1, 3, 2)


def fft_length(size: int, extent: int) -> int:
  """Returns the shortest fast transform in which nothing wraps around into sight.

  Args:
    size: pixels of the image along the axis.
    extent: pixels that the dilated kernel spans, less one.
  """
  # With the image from index extent // 2 on, the last output reads up to the index
  # size - 1 + extent; modulo the length that has to fall on the zeros before the image.
  length = max(size + extent - extent // 2, extent + 1)
  while not _is_smooth(length):
    length += 1
  return length


def _is_smooth(length: int) -> bool:
  """Returns whether a length has small prime factors only, as fast transforms want."""
  for prime in (2, 3, 5, 7):
    while length % prime == 0:
      length //= prime
  return length == 1


def fft(
  images: Float[Array, "b h w c"], kernel: Float[Array, "k k c o"], dilation: int
) -> Float[Array, "b h w o"]:
  """A product of spectra: as many operations for a wide kernel as for a narrow one.

  Computed in float32 at least, whatever the images are.
  """
  dtype = jnp.promote_types(jnp.result_type(images, kernel), jnp.float32)
  result = _fft(images.astype(dtype), kernel.astype(dtype), dilation)
  return result.astype(images.dtype)


def _spectrum(x: Array, lengths: tuple[int, int], start: int, step: int) -> Array:
  """Returns the spectrum of the last two axes of an array [., ., h, w].

  Args:
    x: the array.
    lengths: of the transform, along height and width; zeros fill them up.
    start: index at which the first value is put.
    step: from one value to the next: zeros between them dilate a kernel.
  """
  # (before, after, between) for each axis.
  padding = [(0, 0, 0), (0, 0, 0)]
  for size, length in zip(x.shape[2:], lengths, strict=True):
    padding.append((start, length - start - (size - 1) * step - 1, step - 1))
  return jnp.fft.rfft2(lax.pad(x, jnp.zeros((), x.dtype), padding))


def _inverse(spectrum: Array, lengths: tuple[int, int]) -> Array:
  """Returns the real values [., ., h, w] of a spectrum."""
  return jnp.fft.irfft2(spectrum, lengths)


def _lengths(images: Array, extent: int) -> tuple[int, int]:
  """Returns the lengths of the transform of [b, h, w, c] along height and width."""
  return fft_length(images.shape[1], extent), fft_length(images.shape[2], extent)


def _fft_forward(images: Array, kernel: Array, dilation: int) -> tuple[Array, tuple]:
  """Returns the result, and the spectra that the gradient needs again."""
  _, height, width, _ = images.shape
  extent = (len(kernel) - 1) * dilation
  lengths = _lengths(images, extent)
  x = _spectrum(images.transpose(0, 3, 1, 2), lengths, extent // 2, 1)  # [b, c, ., .]
  k = _spectrum(kernel.transpose(2, 3, 0, 1), lengths, 0, dilation)  # [c, o, ., .]
  # A cross-correlation is a product with the conjugate: [b, c, 1] * [c, o], over c.
  # Written out rather than as an einsum, which would become many tiny products.
  y = _inverse(jnp.sum(x[:, :, None] * jnp.conj(k), axis=1), lengths)  # [b, o, ., .]
  return y[:, :, :height, :width].transpose(0, 2, 3, 1), (x, k)


def _fft_backward(
  dilation: int, size: int, saved: tuple, gradient: Array
) -> tuple[Array, Array]:
  """Returns the gradients of images and kernel.

  Args:
    dilation: of the kernel.
    size: of the kernel, before dilation.
    saved: spectra of images and kernel, from `_fft_forward`.
    gradient: of the result, [b, h, w, o].
  """
  x, k = saved
  _, height, width, _ = gradient.shape
  extent = (size - 1) * dilation
  lengths, start = _lengths(gradient, extent), extent // 2
  d = _spectrum(gradient.transpose(0, 3, 1, 2), lengths, 0, 1)
  d = d[:, None]  # [b, 1, o, ., .]
  # y[i] = sum_j x[i + j] k[j] makes dx[m] = sum_j d[m - j] k[j], a convolution: no
  # conjugate. The image lies where `_fft_forward` has put it.
  dx = _inverse(jnp.sum(d * k, axis=2), lengths)  # [b, c, ., .]
  dx = dx[:, :, start : start + height, start : start + width]
  # dk[j] = sum_i x[i + j] d[i], a cross-correlation again, over b; every dilation-th
  # value of it belongs to a tap.
  dk = _inverse(jnp.sum(x[:, :, None] * jnp.conj(d), axis=0), lengths)  # [c, o, ., .]
  dk = dk[:, :, : extent + 1 : dilation, : extent + 1 : dilation]
  return dx.transpose(0, 2, 3, 1), dk.transpose(2, 3, 0, 1)


def _fft(images: Array, kernel: Array, dilation: int) -> Array:
  """Returns the result of `fft`, with a gradient of its own."""
  # JAX would transform the gradient as complex numbers, twice the work.
  size = len(kernel)

  @jax.custom_vjp
  def convolve(images, kernel):
    return _fft_forward(images, kernel, dilation)[0]

  convolve.defvjp(
    lambda images, kernel: _fft_forward(images, kernel, dilation),
    lambda saved, gradient: _fft_backward(dilation, size, saved, gradient),
  )
  return convolve(images, kernel)


def block_size(kernel_size: int) -> int:
  """Returns the side s of the blocks.

  The windows of small blocks overlap more, so that more is copied; in the products of
  large ones more is multiplied with zeros.
  """
  return max((s for s in BLOCK_SIZES if s < kernel_size), default=min(BLOCK_SIZES))


def blocks(
  images: Float[Array, "b h w c"], kernel: Float[Array, "k k c o"], dilation: int
) -> Float[Array, "b h w o"]:
  """One matrix product over blocks of s x s pixels, which take the channels' place.

  Each block of results is a product of the window of s + k - 1 pixels per side that it
  reaches with a matrix: the small kernel, shifted to each place in a block and padded
  with zeros. A kernel of 25 x 25 pixels from 6 to 3 channels becomes one from 32 x 32 x
  6 to 8 x 8 x 3 numbers. The backward pass puts the windows together once more, so that
  nothing but the images is kept for it.
  """
  size = len(kernel)
  extent = (size - 1) * dilation
  before = extent // 2

  @jax.custom_vjp
  def convolve(images, kernel):
    return _in_blocks(images, kernel, dilation, before)

  def forward(images, kernel):
    return convolve(images, kernel), (images, kernel)

  def backward(saved, gradient):
    images, kernel = saved
    # y[i] = sum_j x[i + j] k[j] makes dx[m] = sum_j d[m - j] k[j].
    to_images = _in_blocks(gradient, _mirrored(kernel), dilation, extent - before)
    grid = _BlockGrid(*images.shape[1:3], size, dilation)
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    # Image by image, then their sum: a GPU has nothing to split in one long sum.
    to_large = jnp.einsum(
      "bni,bno->bio",
      grid.windows(images, before),
      grid.split(gradient),
      preferred_element_type=dtype,
    ).sum(0)
    enlarged = functools.partial(_enlarge, side=grid.side)
    (to_kernel,) = jax.linear_transpose(enlarged, kernel.astype(dtype))(to_large)
    return to_images, to_kernel.astype(kernel.dtype)

  convolve.defvjp(forward, backward)
  return convolve(images, kernel)


def _in_blocks(images: Array, kernel: Array, dilation: int, before: int) -> Array:
  """Returns the result of `blocks`, where an image has `before` zeros before it."""
  grid = _BlockGrid(*images.shape[1:3], len(kernel), dilation)
  weights = _enlarge(kernel, grid.side).astype(images.dtype)
  return grid.join(grid.windows(images, before) @ weights)


class _BlockGrid:
  """How an image is cut into blocks, n of them, of results and of what these reach.

  Pixels with the same remainder by the dilation form an image of their own, on which
  the kernel is dense.

  Attributes:
    side: s, pixels per side of a block.
  """

  _IMAGE, _BLOCKS = "b (r i p) (c j q) d", "b (p q r c) (i j d)"

  def __init__(self, height: int, width: int, size: int, dilation: int):
    """Takes the image's sides and the kernel's, before its dilation."""
    self.side = block_size(size)
    self._sides = height, width
    self._dilation = dilation
    # Pixels of the windows that lie behind their blocks.
    self._more = size - 1
    self._counts = [-(-side // (self.side * dilation)) for side in self._sides]
    self._axes = {"i": self.side, "j": self.side, "p": dilation, "q": dilation}

  def windows(self, images: Array, before: int) -> Float[Array, "b n i"]:
    """Returns the s + k - 1 pixels per side that each block of results reaches."""
    x = self._padded(images, before, self._more)
    phases = {"p": self._dilation, "q": self._dilation}
    x = einops.rearrange(x, "b (r p) (c q) d -> b p q r c d", **phases)
    x = self._overlapping(x, 4, self._counts[1])  # b p q r c j d
    x = self._overlapping(x, 3, self._counts[0])  # b p q r i c j d
    return einops.rearrange(x, "b p q r i c j d -> b (p q r c) (i j d)")

  def _overlapping(self, x: Array, axis: int, count: int) -> Array:
    """Returns x with an axis of pixels as two: of `count` windows, and their pixels."""
    length, parts = self.side + self._more, []
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -self._more % self.side)
    x = jnp.pad(x, padding)
    shape = (*x.shape[:axis], count, self.side, *x.shape[axis + 1 :])
    # What the windows reach of their blocks, of the next ones, and so on.
    for start in range(0, length, self.side):
      blocks = lax.slice_in_dim(x, start, start + count * self.side, axis=axis)
      reached = min(self.side, length - start)
      parts.append(lax.slice_in_dim(blocks.reshape(shape), 0, reached, axis=axis + 1))
    return jnp.concatenate(parts, axis + 1)

  def split(self, results: Array) -> Float[Array, "b n m"]:
    """Returns blocks of an image's size of results."""
    x = self._padded(results, 0, 0)
    return einops.rearrange(x, f"{self._IMAGE} -> {self._BLOCKS}", **self._axes)

  def join(self, results: Float[Array, "b n m"]) -> Float[Array, "b h w o"]:
    """Returns what `split` cut up."""
    axes = {**self._axes, "r": self._counts[0], "c": self._counts[1]}
    x = einops.rearrange(results, f"{self._BLOCKS} -> {self._IMAGE}", **axes)
    return x[:, : self._sides[0], : self._sides[1]]

  def _padded(self, x: Array, before: int, more: int) -> Array:
    """Returns x with zeros before it, and after it up to whole blocks and `more`."""
    padding = [
      (before, (count * self.side + more) * self._dilation - before - length)
      for count, length in zip(self._counts, self._sides, strict=True)
    ]
    return jnp.pad(x, [(0, 0), *padding, (0, 0)])


def _enlarge(kernel: Array, side: int) -> Float[Array, "i m"]:
  """Returns the matrix from a window to a block.

  Args:
    kernel: the dense kernel between pixels, [k, k, c, o].
    side: s, pixels per side of a block.

  Returns:
    [(s + k - 1) * (s + k - 1) * c, s * s * o].
  """
  # Along one axis: 1 where the result at pixel `shift` of a block has its tap `tap`, as
  # [pixel of the result, pixel of the window, tap].
  shifted = np.zeros((side, side + len(kernel) - 1, len(kernel)), kernel.dtype)
  for shift, tap in itertools.product(range(side), range(len(kernel))):
    shifted[shift, shift + tap, tap] = 1
  # Rows: i result, a window, j tap; columns: l, b, m; channels: c to o. A product with
  # zeros and ones only moves values, at full precision.
  weights = jnp.einsum(
    "iaj,lbm,jmco->abcilo", shifted, shifted, kernel, precision="highest"
  )
  return einops.rearrange(weights, "a b c i l o -> (a b c) (i l o)")


FORMS: dict[str, Callable[[Array, Array, int], Array]] = {
  "plain": plain,
  "nhwc": nhwc,
  "fft": fft,
  "blocks": blocks,
}
