"""Writes the backbone of a run to a file that this package and others read.

insvp export --run=runs/pretrain --output=backbone.npz
insvp export --run=runs/svhn --output=backbone.safetensors --names=timm

An .npz has big_vision's names, a .safetensors timm's or, with --names=hf, Hugging
Face's. Without the command `insvp` it is python -m insvp_jax.tools.export.
A method that can be folded into a plain backbone, such as LoRA, is folded into it.
With --with_head the run's linear head comes along, for methods that read the classes a
backbone was trained on; whoever does not ask for it (head_classes) loads the same file
without it.
It also writes backbone.json: the sizes that `create_model` needs, how the backbone was
trained and its accuracy. With --output=insvp_jax/assets/boxed.npz it becomes the
backbone in the box.
"""

from collections.abc import Sequence
from pathlib import Path
import sys
from typing import Any

from insvp_jax import tools


def export_backbone(
  run: Any,
  output: Path,
  *,
  dtype: str = "float32",
  names: str = "timm",
  command: str = "",
  with_head: bool = False,
) -> dict[str, Any]:
  """Writes `output` and its description; returns the description.

  The method is folded into the backbone: it computes the run's feature by itself.

  Args:
    run: from `load_run`.
    output: path of the .npz or .safetensors.
    dtype: of the stored values, "float32" or "float16" (half the size).
    names: of a .safetensors file: "timm" or "hf".
    command: that trained the run; it is stored in the description.
    with_head: write the run's head, too.

  Raises:
    ValueError: unknown dtype, values that float16 cannot hold, a method that cannot be
      folded into a backbone, or a head that is not one dense layer.
    OSError: the files cannot be written, or one that is something else is in the way.
  """
  from insvp_jax.logs.writers import write_json
  from insvp_jax.models import merging, weights

  beside = output.with_suffix(".json")
  check_description(beside)
  backbone = merging.merge(run.model, run.params)
  if with_head:
    head = run.params.get("head", {})
    if set(head) != {"kernel", "bias"}:
      raise ValueError(
        "this run has no head of one dense layer that could be written with its "
        "backbone; leave --with_head out."
      )
    backbone = {**backbone, "head": head}
  try:
    weights.save_backbone(backbone, output, dtype=dtype, names=names)
  except OSError as error:
    raise OSError(
      f"{output} could not be written: {error.strerror or error}."
    ) from error
  result = run.result or {}
  description = weights.backbone_fields(run.model.backbone)
  description |= {
    "sha256": weights.file_digest(output),
    "dtype": dtype,
    "preset": run.preset.name,
    "trained_on": run.meta["task"],
    "test_accuracy": result.get("test_accuracy"),
    "num_test_examples": result.get("num_test_examples"),
    "train_seconds": result.get("train_seconds"),
    "images_per_second": result.get("images_per_second"),
    "steps": result.get("steps"),
    "command": command,
    "versions": run.meta["versions"],
  }
  if with_head:
    description["head_classes"] = len(run.params["head"]["bias"])
  write_json(beside, description)
  return description


def check_description(path: Path) -> None:
  """Checks that what lies where the description goes, if anything, is one.

  Raises:
    ValueError: it is something else, which would be lost.
  """
  from insvp_jax.checkpoints.files import load_json

  if path.exists() and not {"sha256", "trained_on"} <= load_json(path).keys():
    raise ValueError(
      f"{path} is there already, and is no description of a backbone, which would take "
      "its place. Move it away, or choose another --output."
    )


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  parser = tools.argument_parser(__doc__, "export", prog)
  parser.add_argument("--run", required=True, help=tools.RUN_HELP)
  parser.add_argument("--backbone", help=tools.BACKBONE_HELP)
  parser.add_argument(
    "--output", required=True, type=Path, help="path of the .npz or .safetensors"
  )
  parser.add_argument("--dtype", default="float32", help="float32 or float16")
  parser.add_argument("--names", default="timm", help="of .safetensors: timm or hf")
  parser.add_argument("--command", default="", help="that trained it, to be recorded")
  parser.add_argument("--with_head", action="store_true", help="write its head, too")
  args = parser.parse_args(argv)

  def work() -> None:
    if args.output.suffix not in (".npz", ".safetensors"):
      raise ValueError(
        f"--output is {args.output}, expected a path ending in .npz or .safetensors."
      )
    from insvp_jax.run import load_run

    run = load_run(args.run, backbone=args.backbone)
    description = export_backbone(
      run,
      args.output,
      dtype=args.dtype,
      names=args.names,
      command=args.command,
      with_head=args.with_head,
    )
    size = args.output.stat().st_size / 2**20
    print(f"{args.output}: {size:.2f} MiB, sha256 {description['sha256']}")

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())
