"""LN-tune: the scales and biases of every LayerNorm train.

Source: Basu et al. 2024, "Strong Baselines for Parameter-Efficient Few-Shot
Fine-Tuning"; the row "LN" of Mai et al. 2025, "Lessons and Insights from a Unifying
Study of Parameter-Efficient Fine-Tuning (PEFT) in Visual Recognition". Parameters:
(2 l + 1) 2 d; 38,400 on ViT-B/16.
"""

import flax.linen as nn

from insvp_jax.methods.base import Method
from insvp_jax.methods.hooks import LAYER_NORMS


class LNTune(Method):
  """Trains the backbone's LayerNorms and the head."""

  @nn.nowrap
  def sites(self) -> frozenset[str]:
    return super().sites() | {LAYER_NORMS}

  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns the patterns of the norms and of the head."""
    return (*self.spec.norm_patterns, "head/.*")
