"""The convolution of InsVP's prompters, and how it is computed where."""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods.ops.conv_forms import FORMS
from insvp_jax.methods.ops.initializers import torch_uniform

AUTO = "auto"
CHOICES = (AUTO, *FORMS)
# What "auto" stands for in a program that is made here to run elsewhere.
PORTABLE = "portable"
_AUTO_IS = contextvars.ContextVar("auto_is", default="")


@contextlib.contextmanager
def auto_is(form: str) -> Iterator[None]:
  """Lets "auto" stand for one form in what is traced within.

  Args:
    form: a key of `FORMS`, or `PORTABLE`: the form that is fastest on the device that
      the program will run on.
  """
  token = _AUTO_IS.set(form)
  try:
    yield
  finally:
    _AUTO_IS.reset(token)


def is_one_cpu() -> bool:
  """Tells whether a CPU computes, as the only device."""
  return jax.default_backend() == "cpu" and jax.device_count() == 1


def choose_form(
  channels: int,
  features: int,
  kernel: int,
  dilation: int,
  on_cpu: bool | None = None,
) -> str:
  """Returns the form that is fastest, a key of `FORMS`.

  Measured by benchmarks/convolutions.py. On CPUs spectra win between few channels, by
  a factor of 30 or more for the published 25 x 25 kernel, and lose where a convolution
  has enough channels to keep the processor busy; those are as fast in a loop as alone
  in the form "nhwc". On a GPU matrix products win there, as long as fewer channels come
  in than its own products are made for; cuDNN takes 100 times as long for a dilated
  kernel. TPUs were not measured; they are made for matrix products. Several CPU devices
  take no spectra, since XLA gathers the whole batch on each of them before it
  transforms it: products there win from kernels of 11 x 11 on, at 224 pixels.

  Args:
    channels, features: that go in and come out.
    kernel, dilation: as of `Conv`.
    on_cpu: whether a CPU computes it that is the only device; None: as it is here.
  """
  if on_cpu is None:
    on_cpu = is_one_cpu()
    if not on_cpu and jax.default_backend() == "cpu":
      return "blocks" if kernel > 9 else "nhwc"
  if on_cpu:
    wide = channels * features <= 8 * kernel**2
    return "fft" if wide and kernel > 1 else "nhwc"
  wide = channels < 16 and channels * features <= 10 * kernel**2
  return "blocks" if wide and (kernel >= 5 or dilation > 1) else "plain"


@jax.custom_vjp
def add_bias(
  images: Float[Array, "b h w o"], bias: Float[Array, " o"]
) -> Float[Array, "b h w o"]:
  """Returns images + bias; the gradient of the bias is summed up in two steps.

  XLA's code for GPUs sums over all pixels at once, channel by channel: six or nine of
  them leave most of a GPU without work.
  """
  return images + bias


def _add_bias_backward(_: None, gradient: Array) -> tuple[Array, Array]:
  b, h, w, channels = gradient.shape
  rows = gradient.reshape(b * h, w * channels)
  dtype = jnp.promote_types(gradient.dtype, jnp.float32)
  # XLA would make one sum of the two.
  row = lax.optimization_barrier(rows.sum(0, dtype))
  return gradient, row.reshape(w, channels).sum(0).astype(gradient.dtype)


add_bias.defvjp(lambda images, bias: (images + bias, None), _add_bias_backward)


class Conv(nn.Module):
  """A convolution with stride 1 and "SAME" padding, initialised as PyTorch does.

  The parameters are those of `nn.Conv` in every form.

  Attributes:
    features: channels that come out.
    kernel_size: pixels per side of the kernel, before dilation.
    dilation: pixels from one tap to the next.
    form: a key of `FORMS`, or "auto" for the fastest one.
    dtype: of the computation; None: that of images and parameters.
  """

  features: int
  kernel_size: int
  dilation: int = 1
  form: str = AUTO
  dtype: Any = None

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h w o"]:
    """Returns the convolved images."""
    channels, size = images.shape[-1], self.kernel_size
    init = torch_uniform(channels * size**2)
    kernel = self.param("kernel", init, (size, size, channels, self.features))
    bias = self.param("bias", init, (self.features,))
    images, kernel, bias = nn.dtypes.promote_dtype(
      images, kernel, bias, dtype=self.dtype
    )
    y = self._convolve(images, kernel)
    return add_bias(y, bias) if jax.default_backend() == "gpu" else y + bias

  @nn.nowrap
  def _convolve(
    self, images: Float[Array, "b h w c"], kernel: Float[Array, "k k c o"]
  ) -> Float[Array, "b h w o"]:
    """Returns the images convolved with the kernel in the form of `form`."""

    def fastest(on_cpu: bool | None) -> str:
      return choose_form(*kernel.shape[2:], len(kernel), self.dilation, on_cpu)

    def convolve(form: str) -> Callable[[Array, Array], Array]:
      return lambda images, kernel: FORMS[form](images, kernel, self.dilation)

    form = self.form
    if form == AUTO:
      form = _AUTO_IS.get() or fastest(None)
    if form != PORTABLE:
      return convolve(form)(images, kernel)
    cpu, others = fastest(True), fastest(False)
    if cpu == others:
      return convolve(cpu)(images, kernel)
    return lax.platform_dependent(
      images, kernel, cpu=convolve(cpu), default=convolve(others)
    )
