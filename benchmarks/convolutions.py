"""InsVP's convolutions in each form that the package can compute them in.

  python -m benchmarks.convolutions [--batch_size=8] [--rounds=7] [--clock=cpu]
  python -m benchmarks.convolutions --loop=4 [--layers="32 px: spec"]

Prints the median milliseconds of a forward pass together with the gradients that the
train step needs, alternating between the forms within one run. `conv="auto"` chooses
by the rule in insvp_jax/methods/ops/conv.py, which this table is behind. With --loop
each call is so many rounds of a loop, as train steps that come in one call are; the
milliseconds are those of a round.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import turns
from insvp_jax.methods.ops.conv import choose_form
from insvp_jax.methods.ops.conv_forms import FORMS
from insvp_jax.search import tables


class Layer(NamedTuple):
  """One convolution; `wrt` says which gradients training needs: "x", "k" or "xk"."""

  name: str
  size: int
  channels: int
  features: int
  kernel: int
  dilation: int
  wrt: str


LAYERS = (
  Layer("release global 0", 224, 3, 6, 11, 1, "k"),
  Layer("release global 1", 224, 6, 3, 25, 1, "xk"),
  Layer("release specific 0, p = 16", 224, 3, 16, 7, 1, "x"),
  Layer("release specific 1, p = 16", 52, 16, 48, 9, 1, "x"),
  Layer("release specific 2, p = 16", 16, 48, 48, 3, 1, "x"),
  Layer("paper global 0", 224, 3, 6, 3, 5, "k"),
  Layer("paper global 1", 224, 6, 3, 3, 12, "xk"),
  Layer("paper specific 0, p = 9", 224, 3, 9, 9, 1, "k"),
  Layer("paper specific 1, p = 9", 52, 9, 27, 5, 1, "xk"),
  Layer("paper specific 2, p = 9", 16, 27, 27, 3, 1, "xk"),
  Layer("32 px: release global 0", 32, 3, 6, 11, 1, "k"),
  Layer("32 px: release global 1", 32, 6, 3, 25, 1, "xk"),
  Layer("32 px: specific 0, p = 9", 32, 3, 9, 9, 1, "xk"),
  Layer("32 px: specific 1, p = 9", 8, 9, 27, 5, 1, "xk"),
  Layer("32 px: specific 2, p = 9", 8, 27, 18, 3, 1, "xk"),
)


def compiled(
  layer: Layer, form: str, batch_size: int, loop: int = 0, dtype: str = "float32"
) -> Callable[[], object]:
  """Returns a call of the output and the gradients that training needs.

  Args:
    layer: the convolution.
    form: how it is computed.
    batch_size: number of images.
    loop: rounds of a loop in one call; 0: no loop.
    dtype: of images, kernel and gradient.
  """
  rng = np.random.default_rng(0)

  def draw(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

  pixels = (batch_size, layer.size, layer.size)
  images = draw(*pixels, layer.channels)
  kernel = draw(layer.kernel, layer.kernel, layer.channels, layer.features)
  gradient = draw(*pixels, layer.features)

  def once(images, kernel, gradient):
    output, backward = jax.vjp(
      lambda x, k: FORMS[form](x, k, layer.dilation), images, kernel
    )
    gradients = dict(zip("xk", backward(gradient), strict=True))
    return output, [gradients[name] for name in layer.wrt]

  @jax.jit
  def run(images, kernel, gradient):
    if not loop:
      return once(images, kernel, gradient)

    def body(_, carry):
      # Other numbers in each round, so that nothing can be computed before the loop.
      images, kernel, gradient, _ = carry
      results = once(images, kernel, gradient)
      return 0.5 * images, 0.5 * kernel, 0.5 * gradient, results

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(once, images, kernel, gradient))
    return jax.lax.fori_loop(0, loop, body, (images, kernel, gradient, zeros))[-1]

  return lambda: run(images, kernel, gradient)


def measure(
  layer: Layer,
  batch_size: int,
  rounds: int,
  clock: str = "wall",
  loop: int = 0,
  dtype: str = "float32",
) -> dict[str, float]:
  """Returns the median milliseconds by form; for the arguments see `compiled`."""
  calls = {
    form: turns.timed(compiled(layer, form, batch_size, loop, dtype), clock)
    for form in FORMS
  }
  per = 1e3 / max(1, loop)
  seconds = turns.alternate(calls, rounds)
  return {form: per * spent for form, spent in turns.medians(seconds).items()}


def main() -> None:
  """Prints one row per convolution."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--clock", choices=turns.CLOCKS, default="wall")
  parser.add_argument("--loop", type=int, default=0, help="rounds in one call")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--layers", default="", help="of whose name this is a part")
  args = parser.parse_args()
  layers = [layer for layer in LAYERS if args.layers in layer.name]
  if not layers:
    names = ", ".join(layer.name for layer in LAYERS)
    parser.error(f"--layers={args.layers!r} is in no name of a layer: {names}")
  device = jax.devices()[0]
  on = f"{device.platform}, {device.device_kind}"
  print(f"{on}, batch {args.batch_size}, {args.dtype}, ms")
  rows = []
  for layer in layers:
    ms = measure(layer, args.batch_size, args.rounds, args.clock, args.loop, args.dtype)
    shape = (layer.channels, layer.features, layer.kernel, layer.dilation)
    cells = [f"{ms[form]:.1f}" for form in FORMS]
    rows.append([layer.name, *cells, choose_form(*shape)])
  print(tables.markdown(rows, ["convolution", *FORMS, "auto"]), end="")


if __name__ == "__main__":
  main()
