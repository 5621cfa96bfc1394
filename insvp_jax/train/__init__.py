"""One run, from a config to a result: `insvp_jax.train(config, workdir)`."""

import sys
import types
from typing import Any


class _Train(types.ModuleType):
  """Makes this module callable: `insvp_jax.train` is a folder and a public function.

  Python sets the attribute to the folder as soon as anything in it is imported.
  """

  def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns `trainer.train(...)`."""
    from insvp_jax.train import trainer

    return trainer.train(*args, **kwargs)


sys.modules[__name__].__class__ = _Train
