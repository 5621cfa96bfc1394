"""The linear head and its published initialisations."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax import trees
from insvp_jax.methods.ops.initializers import torch_uniform

# The logit of a column without a class: exp of it is exactly 0, and so is its product
# with a target of 0, which of -inf would be NaN.
_NEVER = -1e30


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

  A head may have more columns than its task has classes, so that one compiled step
  serves many tasks: then the collection "hparams", next to "params", has `num_classes`,
  int32 [], and the logits of the columns from there on are so low that they take no
  part in a softmax and get no gradient.

  Attributes:
    num_classes: k, the number of columns.
    initializer: "zeros" (big_vision), "torch" (InsVP's code: PyTorch's default) or
      "vpt" (VPT's code: Kaiming normal, bias -ln 99).
  """

  num_classes: int
  initializer: str = "zeros"

  @nn.compact
  def __call__(self, feature: Float[Array, "b d"]) -> Float[Array, "b k"]:
    """Returns logits [b, k] of features [b, d]."""
    width = feature.shape[-1]
    inits = trees.lookup(HEAD_INITS, self.initializer, "head_init")(
      width, self.num_classes
    )
    kernel = self.param("kernel", inits[0], (width, self.num_classes))
    bias = self.param("bias", inits[1], (self.num_classes,))
    logits = feature.astype(jnp.float32) @ kernel + bias
    used = self.get_variable("hparams", "num_classes", None)
    if used is None:
      return logits
    return jnp.where(jnp.arange(self.num_classes) < used, logits, _NEVER)
