"""The convolution of InsVP's prompters, and how it is computed where."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from insvp_jax.methods.ops.conv_forms import FORMS
from insvp_jax.methods.ops.initializers import torch_uniform

AUTO = "auto"
CHOICES = (AUTO, *FORMS)


def choose_form(channels: int, features: int, kernel: int, dilation: int) -> str:
  """Returns the form that is fastest here, a key of `FORMS`.

  Measured on CPUs by benchmarks/convolutions.py: spectra win between few channels,
  by a factor of 30 or more for the published 25 x 25 kernel, and lose where a
  convolution has enough channels to keep the processor busy. On other devices
  nothing is measured yet: wide dense kernels become matrix products there, which is
  what those devices are made for. So they do where there are several devices, since
  XLA gathers the whole batch on each of them before it transforms it.
  """
  wide = channels * features <= 8 * kernel**2
  if jax.default_backend() == "cpu" and jax.device_count() == 1:
    return "fft" if wide and kernel > 1 else "plain"
  return "blocks" if wide and kernel >= 7 and dilation == 1 else "plain"


class Conv(nn.Module):
  """A convolution with stride 1 and "SAME" padding, initialised as PyTorch does.

  The parameters are those of `nn.Conv` in every form.

  Attributes:
    features: channels that come out.
    kernel_size: pixels per side of the kernel, before dilation.
    dilation: pixels from one tap to the next.
    form: a key of `FORMS`, or "auto" for the fastest one.
  """

  features: int
  kernel_size: int
  dilation: int = 1
  form: str = AUTO

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h w o"]:
    """Returns the convolved images."""
    channels, size = images.shape[-1], self.kernel_size
    init = torch_uniform(channels * size**2)
    kernel = self.param("kernel", init, (size, size, channels, self.features))
    bias = self.param("bias", init, (self.features,))
    images, kernel, bias = nn.dtypes.promote_dtype(images, kernel, bias)
    form = self.form
    if form == AUTO:
      form = choose_form(channels, self.features, size, self.dilation)
    return FORMS[form](images, kernel, self.dilation) + bias
