"""MLP-k: hidden layers between the frozen feature and the classes.

Source: the baseline MLP-k of Jia et al. 2022, "Visual Prompt Tuning": k counts linear
layers, so that MLP-3 has two hidden ones; its published total (1.35 x) fits no other
number. Each hidden layer is dense, ReLU, batch norm, dropout. Parameters of m hidden
layers: m (d^2 + d) + 2 m d; m = 2 on ViT-B/16: 1,184,256.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from insvp_jax.methods import checks
from insvp_jax.methods.base import Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.ops.batch_norm import BatchNorm
from insvp_jax.methods.ops.dropout import Dropout, Rate
from insvp_jax.methods.ops.initializers import torch_uniform


class MLPHead(nn.Module):
  """Hidden layers before a linear head, in float32.

  Attributes:
    linear: the last layer.
    hidden_layers: m.
    dropout: rate after each hidden layer.
  """

  linear: nn.Module
  hidden_layers: int
  dropout: Rate

  @property
  def num_classes(self) -> int:
    """The width of the logits."""
    return self.linear.num_classes

  @nn.compact
  def __call__(self, feature, *, train: bool = False):
    """Returns logits [b, k] of features [b, d]."""
    x, width = feature.astype(jnp.float32), feature.shape[-1]
    for i in range(self.hidden_layers):
      # Kaiming normal over the fan-out, as published.
      x = nn.Dense(
        width,
        kernel_init=nn.initializers.normal(math.sqrt(2 / width)),
        bias_init=torch_uniform(width),
        name=f"Dense_{i}",
      )(x)
      x = BatchNorm(name=f"BatchNorm_{i}")(nn.relu(x), train=train)
      x = Dropout(self.dropout, name=f"Dropout_{i}")(x, train=train)
    return self.linear(x, train=train)


class MLP(Method):
  """Trains a multi-layer head on the frozen backbone's feature."""

  hidden_layers: int = field(
    2, "hidden layers; the published MLP-k has k - 1", check=checks.positive_int
  )
  dropout: float | int = field(0.1, "rate after each hidden layer", check=checks.rate)

  @nn.nowrap
  def head(self, linear: nn.Module) -> Any:
    return MLPHead(linear, self.hidden_layers, self.dropout)

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns the patterns of kernels, biases and scales."""
    return ("head/.*(kernel|bias|scale)",)

  @nn.nowrap
  def updated_patterns(self) -> tuple[str, ...]:
    """Returns the pattern of the running statistics."""
    return ("head/BatchNorm_.*/(mean|var)",)
