"""Linear probing: only the head trains."""

from insvp_jax.methods.base import Method


class Linear(Method):
  """Trains the head on the frozen backbone's feature; no prompter."""

  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns the pattern of the head."""
    return ("head/.*",)
