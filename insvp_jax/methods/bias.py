"""Bias tuning: the backbone's biases and the head train.

Source: Ben Zaken et al. 2022, "BitFit"; the baseline "Bias" of Jia et al. 2022,
"Visual Prompt Tuning". On a ViT both train the same: the biases of q, k, v and out, of
the MLP, of every LayerNorm and of the patch embedding. Those of the keys cancel in the
softmax. Parameters: l (7 d + mlp_dim) + 2 d; 102,912 on ViT-B/16.
"""

from insvp_jax.methods.base import Method

BIASES = "backbone/.*bias"


class Bias(Method):
  """Trains the biases of every layer of the backbone, and the head."""

  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns the patterns of the backbone's biases and of the head."""
    return (BIASES, "head/.*")


class BitFit(Bias):
  """The same as `Bias`, by the name and with the grid of BitFit's audits."""
