"""Makes the checks of all annotations cheap enough to be on in every test.

jaxtyping makes three functions of each that it decorates, of a nested one each time
that it is defined, and binds the arguments of every call. Only where an annotation
names shapes is that needed; elsewhere beartype, which compares types, does alone.
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


def _needs_jaxtyping(fn: Any) -> bool:
  """Tells whether annotations name shapes, are text yet, or are of another function.

  The last is so of a Flax module's `__init__`, which takes any arguments and passes
  them on: beartype looks at what it takes, jaxtyping at its signature.
  """
  annotations = inspect.get_annotations(fn)
  is_text = any(isinstance(each, str) for each in annotations.values())
  return is_text or "jaxtyping" in repr(annotations) or hasattr(fn, "__wrapped__")


def install() -> None:
  """Has the import hook of jaxtyping decorate with both only where both are needed."""
  decorate = _decorator.jaxtyped

  def jaxtyped(fn: Any = None, *, typechecker: Any = None) -> Any:
    if fn is None:
      return functools.partial(jaxtyped, typechecker=typechecker)
    if not inspect.isfunction(fn) or _needs_jaxtyping(fn):
      return decorate(fn, typechecker=typechecker)
    checked = _beartype(fn)
    if checked is fn:  # without annotations
      return fn

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
      called = fn if jaxtyping.config.jaxtyping_disable else checked
      return called(*args, **kwargs)

    return wrapped

  # The hook takes the first; of classes, properties and static methods it is the
  # second that decorates what is in them.
  jaxtyping.jaxtyped = _decorator.jaxtyped = jaxtyped
