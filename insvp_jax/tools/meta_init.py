"""Learns over several tasks a border of pixels that DAM-VP and VP can start from.

insvp meta_init folder:root=cats.zip folder:root=cars.zip --output=meta.npz
insvp train --config=folder:root=photos.zip,method=dam_vp --config.dam_vp.meta=meta.npz

Without the command `insvp` it is python -m insvp_jax.tools.meta_init.
Each task is a config as `insvp train --config=...` takes it; all of one backbone and
image size. Their training images alone are read: no test set chooses anything. How it
learns: insvp_jax/train/reptile.py.
"""

from collections.abc import Sequence
from pathlib import Path
import sys

import numpy as np

from insvp_jax import tools


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  parser = tools.argument_parser(__doc__, "meta_init", prog)
  parser.add_argument(
    "configs", nargs="+", help="a task each, as --config of insvp train takes it"
  )
  parser.add_argument("--output", required=True, type=Path, help="path of the .npz")
  parser.add_argument("--epochs", type=int, default=200, help="over the smallest task")
  parser.add_argument("--lr", type=float, default=0.5, help="of the borders")
  parser.add_argument("--head_lr", type=float, default=0.1, help="of each task's head")
  parser.add_argument("--outer_lr", type=float, default=0.5, help="Reptile's step")
  parser.add_argument("--inner_steps", type=int, default=4, help="on each batch")
  parser.add_argument("--seed", type=int, default=0, help="of start and batches")
  args = parser.parse_args(argv)

  def work() -> None:
    if args.output.suffix != ".npz":
      raise ValueError(f"--output is {args.output}, expected a path ending in .npz.")
    from insvp_jax import config_files
    from insvp_jax.models.weights.downloads import atomic_file
    from insvp_jax.train import reptile

    try:
      parse = config_files.ConfigParser().parse
      configs = [parse(config_files.find(name)) for name in args.configs]
    except config_files.ConfigMistakeError as error:
      raise ValueError(str(error)) from error
    numbers = ("epochs", "lr", "head_lr", "outer_lr", "inner_steps", "seed")
    border = reptile.learn_border(
      configs,
      **{name: getattr(args, name) for name in numbers},
      on_epoch=lambda epoch, loss: print(
        f"epoch {epoch} of {args.epochs}: loss {loss:.4f}", flush=True
      ),
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(args.output) as temporary, open(temporary, "wb") as file:
      np.savez(file, **border)
    print(f"{args.output}: a border learnt over {len(configs)} tasks")

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())
