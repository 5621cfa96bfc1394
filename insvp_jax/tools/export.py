"""Writes a run for other programs: its backbone, its adapter, or a whole classifier.

insvp export --run=runs/svhn --format=stablehlo --output=model.stablehlo
insvp export --run=runs/svhn --format=adapter --output=svhn_insvp/
insvp export --run=runs/pretrain --output=backbone.npz
insvp export --run=runs/svhn --output=backbone.safetensors --names=timm

stablehlo: the classifier as one program for jax alone, and a description beside it. Of
a segmenter it is that of one window.
onnx: the same for ONNX Runtime.
adapter: a folder with what was trained, its description and a model card, which
`load_run` takes.
backbone, the default: an .npz has big_vision's names, a .safetensors timm's or, with
--names=hf, Hugging Face's.
A method that can be folded into a plain backbone, such as LoRA, is folded into it.
With --with_head the run's linear head comes along, for methods that read the classes a
backbone was trained on; whoever does not ask for it (head_classes) loads the same file
without it.
It also writes backbone.json: the sizes that `create_model` needs, how the backbone was
trained and its accuracy. With --output=insvp_jax/assets/boxed.npz it becomes the
backbone in the box.

Without the command `insvp` it is python -m insvp_jax.tools.export.
"""

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
import sys
from typing import Any

from insvp_jax import tools
from insvp_jax.tools import runs

# What the description of a backbone has, and that of a program.
_OF_BACKBONE = ("sha256", "trained_on")
_OF_PROGRAM = ("sha256", "platforms")
# The endings of --output by format; "" for a folder.
FORMATS = {
  "backbone": (".npz", ".safetensors"),
  "stablehlo": (".stablehlo",),
  "onnx": (".onnx",),
  "adapter": ("",),
}


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
  check_description(beside, _OF_BACKBONE)
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
  metric_key = f"test_{run.metric}"
  description = weights.backbone_fields(run.model.backbone)
  description |= {
    "sha256": weights.file_digest(output),
    "dtype": dtype,
    "preset": run.preset.name,
    "trained_on": run.meta["task"],
    metric_key: result.get(metric_key),
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


def export_program(run: Any, output: Path, form: str) -> dict[str, Any]:
  """Writes a run's whole classifier and its description; returns the description.

  Args:
    run: from `load_run`.
    output: path of the program; the description is beside it, such as
      model.stablehlo.json.
    form: "stablehlo" or "onnx".

  Raises:
    ValueError: the method cannot be exported so, or the weights are too large.
    OSError: the files cannot be written, or something else is in the way.
  """
  from insvp_jax import files
  from insvp_jax.logs.writers import write_json
  from insvp_jax.tools import programs

  beside = output.with_name(f"{output.name}.json")
  check_description(beside, _OF_PROGRAM)
  files.check_replaceable(output)
  write = {"stablehlo": programs.write_stablehlo, "onnx": programs.write_onnx}[form]
  description = programs.describe(run, output, write(run, output))
  write_json(beside, description)
  return description


def check_description(path: Path, keys: Collection[str]) -> None:
  """Checks that what lies where the description goes, if anything, is one.

  Args:
    path: of the .json.
    keys: that one of its kind has.

  Raises:
    ValueError: it is something else, which would be lost.
  """
  from insvp_jax.checkpoints.files import load_json

  if path.exists() and not set(keys) <= load_json(path).keys():
    kind = "a backbone" if keys == _OF_BACKBONE else "a program"
    raise ValueError(
      f"{path} is there already, and is no description of {kind}, which would take "
      "its place. Move it away, or choose another --output."
    )


def _check_arguments(args: argparse.Namespace, of_backbone: Mapping[str, Any]) -> None:
  """Checks that the flags are those of the format.

  Args:
    args: the arguments.
    of_backbone: defaults of the flags that only a backbone has.

  Raises:
    ValueError: they are not.
  """
  endings = FORMATS[args.format]
  if args.output.suffix not in endings and endings != ("",):
    raise ValueError(
      f"--output is {args.output}, expected a path ending in {' or '.join(endings)} "
      f"for --format={args.format}."
    )
  of_others = [ending for known in FORMATS.values() for ending in known if ending]
  if endings == ("",) and args.output.suffix in of_others:
    raise ValueError(f"--output is {args.output}, expected a folder for an adapter.")
  for name, default in of_backbone.items():
    if args.format != "backbone" and getattr(args, name) != default:
      raise ValueError(f"--{name} is of --format=backbone, not of {args.format}.")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  parser = tools.argument_parser(__doc__, "export", prog)
  runs.add_arguments(parser)
  parser.add_argument(
    "--output",
    required=True,
    type=Path,
    help="path of the .npz, .safetensors, .stablehlo or .onnx, or the adapter's folder",
  )
  parser.add_argument(
    "--format",
    choices=tuple(FORMATS),
    default="backbone",
    help="backbone is the default",
  )
  backbone = parser.add_argument_group("of a backbone")
  backbone.add_argument("--dtype", default="float32", help="float32 or float16")
  backbone.add_argument("--names", default="timm", help="of .safetensors: timm or hf")
  backbone.add_argument("--command", default="", help="that trained it, to be recorded")
  backbone.add_argument("--with_head", action="store_true", help="write its head, too")
  args = parser.parse_args(argv)
  flags = ("dtype", "names", "command", "with_head")

  def work() -> None:
    _check_arguments(args, {name: parser.get_default(name) for name in flags})
    if args.format == "adapter":
      from insvp_jax.checkpoints import adapters
      from insvp_jax.tools import hub

      adapters.check_writable(args.output)
      hub.export_adapter(runs.load(args), args.output)
      size = (args.output / adapters.ARRAYS).stat().st_size / 2**20
      print(f"{args.output}: {size:.2f} MiB, {', '.join(adapters.FILES)}")
      return
    run = runs.load(args)
    if args.format == "backbone":
      chosen = {name: getattr(args, name) for name in flags}
      description = export_backbone(run, args.output, **chosen)
    else:
      description = export_program(run, args.output, args.format)
    size = args.output.stat().st_size / 2**20
    print(f"{args.output}: {size:.2f} MiB, sha256 {description['sha256']}")

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())
