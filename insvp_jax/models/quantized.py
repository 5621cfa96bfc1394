"""Frozen kernels in 8 bits: a quarter of the memory of float32.

A kernel is int8 values times one float32 scale for each of its output channels,
symmetric about zero: the largest entry of a channel becomes 127 or -127. Activations
keep their type. A product converts the values where it reads them and multiplies its
output by the scale; its gradient converts them once more, so that no copy of a kernel
in floats outlives the product that reads it. `Dense`, `DenseGeneral` and `Conv` are
Flax's, of such kernels or of arrays.

Source: Dettmers et al. 2022, "LLM.int8()", section 2.1 (absmax quantisation, by column
of the kernel), of the weights alone.
"""

from collections.abc import Callable
import functools
import re
from typing import Any

import flax
import flax.linen as nn
from flax.linen import dtypes
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

# The largest value; -128 has no counterpart and is not used.
_MAX = 127
_HEADS = r".*/(query|key|value)/kernel"


@flax.struct.dataclass
class Quantized:
  """A kernel in 8 bits, a node of a tree of parameters with two arrays.

  `np.asarray` of it are the floats that it stands for.

  Attributes:
    values: int8, in the kernel's shape.
    scale: float32, of as many axes; those that a product sums over are 1 long.
  """

  values: Any
  scale: Any

  @property
  def shape(self) -> tuple[int, ...]:
    """The kernel's shape."""
    return self.values.shape

  @property
  def dtype(self) -> Any:
    """The type of the values."""
    return self.values.dtype

  @property
  def nbytes(self) -> int:
    """Bytes of values and scales together."""
    return self.values.nbytes + self.scale.nbytes

  def reshape(self, *shape: int) -> "Quantized":
    """Returns it with the axes that are summed over joined to one, or split."""
    return jax.tree.map(lambda array: array.reshape(shape), self)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """Returns the float32 values, or those of another type."""
    del copy
    return (np.asarray(self.values) * np.asarray(self.scale)).astype(
      dtype or np.float32, copy=False
    )


def is_kernel(name: str) -> bool:
  """Returns whether a parameter of a backbone is a matrix, or a convolution's kernel.

  Args:
    name: '/'-joined, such as "backbone/embedding/kernel".
  """
  return re.fullmatch(r"(.*/)?kernel", name) is not None


def input_axes(name: str, ndim: int, stacked: bool) -> tuple[int, ...]:
  """Returns the axes of a kernel that a product sums over.

  Args:
    name: of the kernel, '/'-joined; queries, keys and values have two output axes.
    ndim: number of its axes.
    stacked: whether the first one counts blocks.
  """
  num_outputs = 2 if re.fullmatch(_HEADS, name) else 1
  return tuple(range(int(stacked), ndim - num_outputs))


def quantize(kernel: np.ndarray, axes: tuple[int, ...], name: str) -> Quantized:
  """Returns a kernel in 8 bits: each entry is off by half a scale at most.

  Args:
    kernel: floats, on the host.
    axes: from `input_axes`.
    name: of the kernel, for the message.

  Raises:
    ValueError: an entry is not finite.
  """
  kernel = np.asarray(kernel, np.float32)
  largest = np.max(np.abs(kernel), axis=axes, keepdims=True, initial=0.0)
  if not np.all(np.isfinite(largest)):
    raise ValueError(
      f"{name} has entries that are not finite, which int8 has no values for; check "
      "the file of the backbone, or set config.backbone.frozen_dtype to 'float32'."
    )
  scale = largest / np.float32(_MAX)
  # A channel of zeros, or of numbers that are too small to be divided by.
  scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
  values = np.clip(np.rint(kernel / scale), -_MAX, _MAX).astype(np.int8)
  return Quantized(values, scale)


def dequantize(params: Any) -> Any:
  """Returns a tree of parameters with floats, on the host, for kernels in 8 bits."""
  return jax.tree.map(
    lambda leaf: np.asarray(leaf) if _is_quantized(leaf) else leaf,
    params,
    is_leaf=_is_quantized,
  )


def abstract(shape: tuple[int, ...], axes: tuple[int, ...]) -> Quantized:
  """Returns what `quantize` does of a kernel of that shape, as shapes and types."""
  ones = tuple(1 if i in axes else size for i, size in enumerate(shape))
  return Quantized(
    jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(ones, jnp.float32)
  )


def compiler_options(params: Any, platform: str) -> dict[str, str] | None:
  """Returns the options of `jax.jit` for functions of parameters; None for none.

  XLA's compiler for CPUs converts the kernels of unrolled blocks all at once, before it
  needs the first one, unless it is to save memory.

  Args:
    params: a tree that has `Quantized` where the parameters have.
    platform: of the devices.
  """
  if platform != "cpu" or not any(map(_is_quantized, _leaves(params))):
    return None
  return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def hold(params: Any, changing: Any) -> tuple[Any, Any]:
  """Returns both as they are, for the body of a loop over steps or trials.

  XLA would convert the kernels before the loop, since they do not change in it: all of
  them in floats, for all of the loop. So it has to take them for changing ones.

  Args:
    params: a tree of parameters; nothing is done where none is `Quantized`.
    changing: one or more arrays that the loop changes.
  """
  if not any(map(_is_quantized, _leaves(params))):
    return params, changing
  return lax.optimization_barrier((params, changing))


def _is_quantized(leaf: Any) -> bool:
  return isinstance(leaf, Quantized)


def _leaves(params: Any) -> list[Any]:
  return jax.tree.leaves(params, is_leaf=_is_quantized)


def _scaled(
  product: Callable[[Array, Array], Array],
  x: Array,
  kernel: Quantized,
  num_outputs: int,
) -> Array:
  """Returns a product with a kernel in 8 bits, in the type of x.

  Args:
    product: of x and an array in the kernel's place; its last axes are the channels.
    x: what the kernel is multiplied by.
    kernel: it.
    num_outputs: how many axes the channels have.
  """
  shape, dtype = jax.ShapeDtypeStruct(x.shape, x.dtype), x.dtype
  # In float32 at least: a scale that is rounded is off for the whole of its channel.
  wide = jnp.promote_types(dtype, jnp.float32)

  @jax.custom_vjp
  def multiply(x: Array, values: Array, scale: Array) -> Array:
    y = product(x, values.astype(dtype)).astype(wide)
    return (y * scale.reshape(values.shape[-num_outputs:])).astype(dtype)

  def forward(x: Array, values: Array, scale: Array) -> tuple[Array, Any]:
    return multiply(x, values, scale), (values, scale)

  def backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    # Converted anew, and scaled, so that XLA does not find the same array in the
    # forward pass and keep it until here: it would be all kernels in floats at once.
    values, scale = kept
    floats = (values.astype(wide) * scale).astype(dtype)
    (dx,) = jax.linear_transpose(lambda x: product(x, floats), shape)(dy)
    return dx, None, None

  multiply.defvjp(forward, backward)
  return multiply(x, jnp.asarray(kernel.values), jnp.asarray(kernel.scale))


def dot_general(x: Array, kernel: Any, dimension_numbers: Any, **options: Any) -> Array:
  """As `jax.lax.dot_general`, of an array or a kernel in 8 bits.

  Of the latter the first axes have to be those that are summed over.
  """
  product = functools.partial(
    lax.dot_general, dimension_numbers=dimension_numbers, **options
  )
  if not isinstance(kernel, Quantized):
    return product(x, kernel)
  return _scaled(product, x, kernel, len(kernel.shape) - len(dimension_numbers[0][1]))


def conv_general_dilated(x: Array, kernel: Any, *args: Any, **options: Any) -> Array:
  """As `jax.lax.conv_general_dilated`, of an array or a kernel in 8 bits."""
  if not isinstance(kernel, Quantized):
    return lax.conv_general_dilated(x, kernel, *args, **options)
  return _scaled(
    lambda x, values: lax.conv_general_dilated(x, values, *args, **options),
    x,
    kernel,
    1,
  )


def matmul(x: Array, kernel: Any) -> Array:
  """Returns x [..., i] @ kernel [i, o], of an array or a kernel in 8 bits."""
  if not isinstance(kernel, Quantized):
    return x @ kernel
  return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def promote_dtype(x: Array, kernel: Any, bias: Any, *, dtype: Any) -> list[Any]:
  """As Flax's `promote_dtype`, which leaves a kernel in 8 bits as it is."""
  if not isinstance(kernel, Quantized):
    return dtypes.promote_dtype(x, kernel, bias, dtype=dtype)
  x, bias = dtypes.promote_dtype(x, bias, dtype=dtype)
  return [x, kernel, bias]


class Dense(nn.Dense):
  """Flax's, whose kernel may be `Quantized`."""

  promote_dtype: Any = promote_dtype
  dot_general: Any = dot_general


class DenseGeneral(nn.DenseGeneral):
  """Flax's, whose kernel may be `Quantized`."""

  promote_dtype: Any = promote_dtype
  dot_general: Any = dot_general


class Conv(nn.Conv):
  """Flax's, whose kernel may be `Quantized`."""

  promote_dtype: Any = promote_dtype
  conv_general_dilated: Any = conv_general_dilated
