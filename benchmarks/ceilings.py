"""What this machine can do at most: matrix products and copies, measured.

  python -m benchmarks.ceilings [--batch_size=8] [--dtypes=float32,bfloat16]

The products are those of one ViT block at the batch: tokens [b n, d] with the weights
of attention and MLP, and each head's scores. The ceiling is the best rate of any of
them. A copy reads and writes an array that no cache holds.
"""

import argparse
from collections.abc import Callable, Mapping
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import turns
from insvp_jax.models.classifier import create_backbone
from insvp_jax.models.vit import ViT
from insvp_jax.search import tables

COPY_MIB = 256


def products(vit: ViT, batch_size: int) -> dict[str, tuple[tuple[int, ...], ...]]:
  """Returns the shapes of a block's matrix products, [(b,) m, k] and [(b,) k, n].

  Args:
    vit: the backbone.
    batch_size: b.
  """
  tokens = (vit.image_size // vit.patch_size) ** 2 + (vit.pool == "tok")
  rows, d = batch_size * tokens, vit.width
  heads, e = batch_size * vit.num_heads, d // vit.num_heads
  return {
    "attention's weights": ((rows, d), (d, d)),
    "MLP, in": ((rows, d), (d, vit.mlp_dim)),
    "MLP, out": ((rows, vit.mlp_dim), (vit.mlp_dim, d)),
    "scores": ((heads, tokens, e), (heads, e, tokens)),
  }


def _product(shapes: tuple[tuple[int, ...], ...], dtype: str) -> tuple[Callable, float]:
  """Returns a call of one product and its FLOPs."""
  first, second = (
    jax.random.normal(jax.random.key(i), shape, jnp.dtype(dtype))
    for i, shape in enumerate(shapes)
  )
  flops = 2.0 * first.size * second.shape[-1]
  multiply = jax.jit(jnp.matmul)
  return lambda: multiply(first, second), flops


def _copy(mib: int) -> tuple[Callable, float]:
  """Returns a call that copies so many MiB, and the bytes it reads and writes."""
  array = jnp.zeros(mib * 2**18, jnp.float32)
  # An addition, since a plain copy might be left out.
  add = jax.jit(lambda x: x + 1)
  return lambda: add(array), 2.0 * array.nbytes


def measure(
  vit: ViT,
  batch_size: int,
  dtypes: tuple[str, ...],
  rounds: int,
  copy_mib: int = COPY_MIB,
  clock: str = "wall",
) -> dict[str, Any]:
  """Measures all ceilings in turns.

  Args:
    vit: whose block gives the shapes.
    batch_size: b.
    dtypes: of the products.
    rounds: how often each is timed.
    copy_mib: MiB of the array that is copied.
    clock: a key of `turns.CLOCKS`.

  Returns:
    `products`: GFLOP/s by dtype and product; `gflops`: the best one by dtype;
    `copy_gb_s`: GB/s read and written.
  """
  work = {
    (dtype, name): _product(shapes, dtype)
    for dtype in dtypes
    for name, shapes in products(vit, batch_size).items()
  }
  work["copy", ""] = _copy(copy_mib)
  functions = {key: turns.timed(call, clock) for key, (call, _) in work.items()}
  seconds = turns.medians(turns.alternate(functions, rounds, turn_seconds=0.1))
  rates = {key: amount / seconds[key] / 1e9 for key, (_, amount) in work.items()}
  copied = rates.pop(("copy", ""))
  by_dtype: dict[str, dict[str, float]] = {dtype: {} for dtype in dtypes}
  for (dtype, name), rate in rates.items():
    by_dtype[dtype][name] = rate
  return {
    "products": by_dtype,
    "gflops": {dtype: max(found.values()) for dtype, found in by_dtype.items()},
    "copy_gb_s": copied,
  }


def describe(found: Mapping[str, Any]) -> str:
  """Returns the ceilings as a table."""
  names = list(next(iter(found["products"].values())))
  rows = []
  for dtype, rates in found["products"].items():
    numbers = [*(rates[name] for name in names), found["gflops"][dtype]]
    rows.append([dtype, *(f"{number:,.0f}" for number in numbers)])
  table = tables.markdown(rows, ["GFLOP/s", *names, "ceiling"])
  return f"{table}copy: {found['copy_gb_s']:,.1f} GB/s, read and written"


def main(argv: list[str] | None = None) -> None:
  """Prints the table, and writes JSON if asked to."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--backbone", default="B/16")
  parser.add_argument("--image_size", type=int, default=0, help="0: the backbone's")
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--dtypes", default="float32,bfloat16")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--json", help="write the result there")
  args = parser.parse_args(argv)
  vit = create_backbone(args.backbone, args.image_size)
  dtypes = tuple(args.dtypes.split(","))
  found = measure(vit, args.batch_size, dtypes, args.rounds)
  print(f"{jax.devices()[0].device_kind}, {args.backbone}, batch {args.batch_size}")
  print(describe(found))
  if args.json:
    Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  main()
