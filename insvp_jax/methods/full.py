"""Full fine-tuning: everything trains."""

from insvp_jax.methods.base import Method


class Full(Method):
  """Trains the backbone and the head; no prompter."""

  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns the pattern of every parameter but a BatchNorm's statistics."""
    constant = "|".join(self.spec.constant_patterns)
    return (f"(?!({constant})$).*",) if constant else (".*",)
