"""Bias tuning: the backbone's biases and the head train.

Source: Ben Zaken et al. 2022, "BitFit"; the baseline "Bias" of Jia et al. 2022,
"Visual Prompt Tuning".
"""

from insvp_jax.methods.base import Method


class Bias(Method):
  """Trains the biases of every layer of the backbone, and the head."""

  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns the patterns of the backbone's biases and of the head."""
    return ("backbone/.*bias", "head/.*")
