"""Floating point operations of a traced function.

Counted on the jaxpr, not by XLA: its cost analysis counts the body of a loop once,
however often it runs, so that a scanned encoder would cost as much as one block.
"""

from collections.abc import Iterator
import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def count(jaxpr: ClosedJaxpr | Jaxpr) -> int:
  """Returns the FLOPs of matrix products and convolutions; a multiply-add is two.

  The rest of a Vision Transformer is a few per cent. Of a `while` loop one round
  counts, of a `cond` the dearest branch; a `scan` counts as often as it runs.

  Args:
    jaxpr: such as `jax.jit(f).trace(...).jaxpr`; for all devices together.
  """
  inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
  return sum(_count_eqn(eqn) for eqn in inner.eqns)


def _count_eqn(eqn: Any) -> int:
  name, params = eqn.primitive.name, eqn.params
  if name in ("dot_general", "conv_general_dilated"):
    terms = _dot_terms if name == "dot_general" else _conv_terms
    return 2 * math.prod(eqn.outvars[0].aval.shape) * terms(eqn)
  costs = [count(jaxpr) for jaxpr in _jaxprs(params)]
  if name == "cond":
    return max(costs)
  return sum(costs) * (params["length"] if name == "scan" else 1)


def _dot_terms(eqn: Any) -> int:
  """Returns how many products each value of a matrix product is the sum of."""
  (contracted, _), _ = eqn.params["dimension_numbers"]
  return math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def _conv_terms(eqn: Any) -> int:
  """Returns how many products each value of a convolution is the sum of."""
  kernel = eqn.invars[1].aval.shape
  return math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]


def _jaxprs(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
  for value in params.values():
    for item in value if isinstance(value, list | tuple) else (value,):
      if isinstance(item, ClosedJaxpr | Jaxpr):
        yield item
