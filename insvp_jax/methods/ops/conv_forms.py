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
import itertools

import einops
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

# Sides of the blocks that matrix products work on.
BLOCK_SIZES = (2, 4, 8)


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
      lax.rev(kernel, (0, 1)).transpose(0, 1, 3, 2),
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
  """Returns the side s of the blocks, at most about half of the kernel's.

  Larger blocks make larger products, of which more is multiplied with zeros.
  """
  return max((s for s in BLOCK_SIZES if 2 * s <= kernel_size + 1), default=1)


def blocks(
  images: Float[Array, "b h w c"], kernel: Float[Array, "k k c o"], dilation: int
) -> Float[Array, "b h w o"]:
  """Matrix products over blocks of s x s pixels, which take the channels' place.

  A kernel of 25 x 25 pixels from 6 to 3 channels becomes one of 4 x 4 blocks of 8 x 8
  pixels from 384 to 192 channels: the small kernel, shifted to each place in a block
  and padded with zeros. It is applied as one product for each of the 4 x 4 shifts.
  """
  _, height, width, _ = images.shape
  extent = (len(kernel) - 1) * dilation
  # Pixels with the same remainder by the dilation form an image of their own, on
  # which the kernel is dense.
  padding = [(0, 0)]
  for size in (height, width):
    # Besides "SAME"'s zeros, those up to a multiple of the dilation.
    after = extent - extent // 2 + -(size + extent) % dilation
    padding.append((extent // 2, after))
  images = jnp.pad(images, [*padding, (0, 0)])
  remainders = {"p": dilation, "q": dilation}
  images = einops.rearrange(images, "b (h p) (w q) c -> (b p q) h w c", **remainders)
  result = _blocks_valid(images, kernel)
  pattern = "(b p q) h w c -> b (h p) (w q) c"
  return einops.rearrange(result, pattern, **remainders)[:, :height, :width]


def _blocks_valid(images: Array, kernel: Array) -> Array:
  """Returns `blocks` of a dense kernel, unpadded: [b, h - k + 1, w - k + 1, o]."""
  size, _, _, features = kernel.shape
  height, width = (n - size + 1 for n in images.shape[1:3])
  side = block_size(size)
  # The results of one block reach over side + size - 1 pixels: so many blocks.
  taps = -(-(side + size - 1) // side)
  # Blocks of results, the last ones filled up with what is cut off in the end.
  rows, columns = -(-height // side), -(-width // side)
  padding = [
    (0, (count + taps - 1) * side - n)
    for count, n in zip((rows, columns), images.shape[1:3], strict=True)
  ]
  images = jnp.pad(images, [(0, 0), *padding, (0, 0)])
  sides = {"p": side, "q": side}
  images = einops.rearrange(images, "b (h p) (w q) c -> b h w (p q c)", **sides)
  weights = _enlarge(kernel, side, taps).astype(images.dtype)
  # A sum of products, not one product over all shifts side by side: that would keep
  # each pixel once for each shift until the backward pass.
  result = sum(
    images[:, i : i + rows, j : j + columns] @ weights[i, j]
    for i in range(taps)
    for j in range(taps)
  )
  pattern = "b h w (p q c) -> b (h p) (w q) c"
  result = einops.rearrange(result, pattern, c=features, **sides)
  return result[:, :height, :width]


def _enlarge(kernel: Array, side: int, taps: int) -> Float[Array, "t t i o"]:
  """Returns the kernel between blocks, with a block's pixels among its channels.

  Args:
    kernel: the dense kernel between pixels, [k, k, c, o].
    side: s, pixels per side of a block.
    taps: t, blocks per side of the new kernel.

  Returns:
    [t, t, s * s * c, s * s * o].
  """
  # Along one axis: 1 where the result at pixel `shift` of a block has its tap `tap`, as
  # [pixel of the result, pixel that is read, tap].
  shifted = np.zeros((side, taps * side, len(kernel)), kernel.dtype)
  for shift, tap in itertools.product(range(side), range(len(kernel))):
    shifted[shift, shift + tap, tap] = 1
  # [pixel of the result, block that is read, pixel in it, tap].
  shifted = shifted.reshape(side, taps, side, len(kernel))
  # Rows: i result, x block, a pixel, j tap; columns: l, y, b, m; channels: c to o.
  # A product with zeros and ones only moves values, at full precision.
  weights = jnp.einsum(
    "ixaj,lybm,jmco->xyabcilo", shifted, shifted, kernel, precision="highest"
  )
  shape = (taps, taps, side**2 * kernel.shape[2], side**2 * kernel.shape[3])
  return weights.reshape(shape)


FORMS: dict[str, Callable[[Array, Array, int], Array]] = {
  "plain": plain,
  "nhwc": nhwc,
  "fft": fft,
  "blocks": blocks,
}
