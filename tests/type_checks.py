"""Makes the checks of all annotations cheap enough to be on in every test.

Left to itself jaxtyping makes two more functions of each that it decorates, of a nested
one each time that it is defined, and at each call it binds the arguments and compares
them twice. Here beartype compares, once, and jaxtyping is asked only where an
annotation names shapes.
"""

import functools
import inspect
from typing import Any

import beartype
import jaxtyping
from jaxtyping import _decorator

_beartype = beartype.beartype(
  conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError)
)


def _is_known(fn: Any) -> bool:
  """Tells whether beartype alone finds what a function's annotations mean.

  They may be text. And a Flax module's `__init__` takes any arguments and passes them
  on: beartype would look at what it takes, where jaxtyping looks at its signature.
  """
  annotations = inspect.get_annotations(fn).values()
  is_text = any(isinstance(each, str) for each in annotations)
  return not is_text and not hasattr(fn, "__wrapped__")


def install() -> None:
  """Has jaxtyping's import hook decorate as described above."""
  decorate = _decorator.jaxtyped

  def jaxtyped(fn: Any = None, *, typechecker: Any = None) -> Any:
    if fn is None:
      return functools.partial(jaxtyped, typechecker=typechecker)
    if not inspect.isfunction(fn) or not _is_known(fn):
      return decorate(fn, typechecker=typechecker)
    checked = _beartype(fn)
    if checked is fn:  # without annotations
      return fn
    if "jaxtyping" in repr(inspect.get_annotations(fn)):
      # A size has one value in all of a call.
      checked = decorate(checked, typechecker=None)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
      called = fn if jaxtyping.config.jaxtyping_disable else checked
      return called(*args, **kwargs)

    return wrapped

  # The hook takes the first; of classes, properties and static methods it is the
  # second that decorates what is in them.
  jaxtyping.jaxtyped = _decorator.jaxtyped = jaxtyped
