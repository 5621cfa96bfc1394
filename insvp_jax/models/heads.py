"""The linear head and its published initialisations."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax import trees
from insvp_jax.methods.ops.initializers import torch_uniform
from insvp_jax.models.quantized import matmul


def _zeros(width: int, num_classes: int):
  del width, num_classes
  return nn.initializers.zeros, nn.initializers.zeros


def _torch(width: int, num_classes: int):
  del num_classes
  return torch_uniform(width), torch_uniform(width)


def _vpt(width: int, num_classes: int):
  # Kaiming normal over the fan-out, and the prior of a 1% class in the bias.
  del width
  kernel = nn.initializers.normal(math.sqrt(2 / num_classes))
  return kernel, nn.initializers.constant(-math.log(99.0))


HEAD_INITS = {"zeros": _zeros, "torch": _torch, "vpt": _vpt}


class Head(nn.Module):
  """One linear layer from feature to logits, computed in float32.

  Attributes:
    num_classes: k.
    initializer: "zeros" (big_vision), "torch" (InsVP's code: PyTorch's default) or
      "vpt" (VPT's code: Kaiming normal, bias -ln 99).
  """

  num_classes: int
  initializer: str = "zeros"

  @nn.compact
  def __call__(
    self, feature: Float[Array, "b d"], *, train: bool = False
  ) -> Float[Array, "b k"]:
    """Returns logits [b, k] of features [b, d]; training changes nothing."""
    del train
    width = feature.shape[-1]
    inits = trees.lookup(HEAD_INITS, self.initializer, "head_init")(
      width, self.num_classes
    )
    kernel = self.param("kernel", inits[0], (width, self.num_classes))
    bias = self.param("bias", inits[1], (self.num_classes,))
    return matmul(feature.astype(jnp.float32), kernel) + bias
