"""Our attention against `jax.nn.dot_product_attention`, forward and gradient.

  python -m benchmarks.attention

Prints milliseconds of processor time per call and their ratio, alternating between
the two within one run. The shape is that of the backbone in the box at batch 64.
"""

import time

import jax

from insvp_jax.models.layers import attend

SHAPE = (64, 65, 4, 32)  # [b, n, h, e]
ROUNDS = 20


def gradient(function):
  """Returns the jitted gradient of a function with respect to all its arguments."""
  return jax.jit(lambda q, k, v, d: jax.vjp(function, q, k, v)[1](d))


def main() -> None:
  """Times both, alternating."""
  q, k, v, d = jax.random.normal(jax.random.key(0), (4, *SHAPE))
  candidates = {"jax.nn": jax.nn.dot_product_attention, "insvp_jax": attend}
  forward = {name: jax.jit(f) for name, f in candidates.items()}
  backward = {name: gradient(f) for name, f in candidates.items()}
  for what, functions, args in (
    ("forward", forward, (q, k, v)),
    ("gradient", backward, (q, k, v, d)),
  ):
    spent = dict.fromkeys(functions, 0.0)
    for i in range(ROUNDS + 2):
      for name, function in functions.items():
        start = time.process_time()
        jax.block_until_ready(function(*args))
        if i >= 2:  # the first calls compile and warm up
          spent[name] += time.process_time() - start
    ms = {name: 1e3 * seconds / ROUNDS for name, seconds in spent.items()}
    ratio = ms["insvp_jax"] / ms["jax.nn"]
    print(
      f"{what}: {ms['jax.nn']:.2f} ms, ours {ms['insvp_jax']:.2f} ms, {ratio:.2f} x"
    )


if __name__ == "__main__":
  main()
