"""One step, to train, evaluate and predict: speed, parts, memory, share of the ceiling.

  python -m benchmarks.step [--backbone=B/16] [--methods=insvp,insvp_release16]
      [--modes=train,eval,predict] [--batch_size=8] [--dtype=float32] [--json=step.json]
  python -m benchmarks.step --backbone=boxed                   in seconds
  python -m benchmarks.step --methods=insvp_release16 --yardstick [--torch_python=PATH]

Methods are those of the package, and `insvp_release` and `insvp_release16` (16 prompts,
as the released code has them for most data sets). All that is timed takes turns within
one run, there and back, and medians are reported. A train step takes its batch from the
images on the device, as training does; evaluation and prediction bring theirs there.

FLOPs are those of the matrix products that a step cannot do without, the ceiling is
measured in the same run, and `--yardstick` also runs InsVP in PyTorch
(`benchmarks/yardstick.py`), in a process of its own.
"""

import argparse
from collections.abc import Mapping, Sequence
import contextlib
import itertools
import json
import os
from pathlib import Path
import sys
from typing import Any

import jax

from benchmarks import ceilings, turns
from benchmarks.contestant import NAMES, Contestant, create_config
from benchmarks.parts import PARTS
from benchmarks.yardstick_client import Client, missing
from insvp_jax.config import FROZEN_DTYPES
from insvp_jax.search import tables
from insvp_jax.train import report

MODES = ("train", "eval", "predict")
YARDSTICK = "PyTorch"


def measure(
  contestants: Mapping[str, Contestant],
  modes: Sequence[str],
  rounds: int,
  *,
  parts: bool = True,
  yardsticks: Mapping[str, Client] | None = None,
  turn_seconds: float = 0.2,
  clock: str = "wall",
) -> dict[str, Any]:
  """Times everything in turns.

  Args:
    contestants: by name.
    modes: of `MODES`.
    rounds: how often each is timed.
    parts: whether the parts of a step are timed, too.
    yardsticks: PyTorch's counterpart, by the contestant's name.
    turn_seconds: see `turns.alternate`.
    clock: a key of `turns.CLOCKS`.

  Returns:
    {mode: {name: row}} with `seconds` (median of a step), `rounds` (of each), `parts`
    (seconds), `memory_mib`, `flops`; with a yardstick also `yardstick_seconds` and
    `ratio`, the median of the rounds' ratios.
  """
  found: dict[str, Any] = {}
  for mode in modes:
    functions = {}
    for name, contestant in contestants.items():
      pieces = {mode: contestant.whole(mode)}
      pieces |= contestant.part_functions(mode) if parts else {}
      for piece, function in pieces.items():
        functions[name, piece] = turns.timed(function, clock)
    for name, client in (yardsticks or {}).items():
      functions[name, YARDSTICK] = _remote(client, mode, clock)
    seconds = turns.alternate(functions, rounds, turn_seconds)
    found[mode] = {
      name: _row(name, contestant, mode, seconds, parts)
      for name, contestant in contestants.items()
    }
    for name, client in (yardsticks or {}).items():
      needed = client.ask(memory=_torch_mode(mode))
      found[mode][name]["yardstick_memory_mib"] = needed["mib"]
  return found


def _torch_mode(mode: str) -> str:
  return "train" if mode == "train" else "eval"


def _remote(client: Client, mode: str, clock: str) -> turns.Timed:
  return lambda times: client.seconds(_torch_mode(mode), times, clock)


def _row(name, contestant, mode, seconds, parts) -> dict[str, Any]:
  """Returns what was found of one contestant in one mode."""
  own = {piece: values for (n, piece), values in seconds.items() if n == name}
  medians = turns.medians(own)
  row = {
    "seconds": medians[mode],
    "rounds": own[mode],
    "images_per_second": contestant.config.batch_size / medians[mode],
    "memory_mib": contestant.memory_mib(mode),
    "flops": contestant.needed_flops(mode),
    "parts": contestant.parts_of(mode, medians) if parts else {},
  }
  if YARDSTICK in own:
    row["yardstick_seconds"] = medians[YARDSTICK]
    row["yardstick_rounds"] = own[YARDSTICK]
    row["ratio"] = turns.ratio(own, YARDSTICK, mode)
  return row


def add_ceiling(found: dict[str, Any], gflops: float) -> None:
  """Adds to each row of `measure` the fraction of the ceiling that it reaches.

  Args:
    found: from `measure`.
    gflops: the ceiling on all devices together, in GFLOP/s.
  """
  for rows in found.values():
    for row in rows.values():
      row["of_ceiling"] = row["flops"] / row["seconds"] / 1e9 / gflops


def table(found: Mapping[str, Any]) -> str:
  """Returns the rows of `measure` as a table."""
  rows = [row for by_name in found.values() for row in by_name.values()]
  shown = PARTS if any(row["parts"] for row in rows) else ()
  compared = any("ratio" in row for row in rows)
  header = ["step", "images/s", "ms", *shown, "MiB", "GFLOP", "of ceiling"]
  header += ["PyTorch, ms", "speed-up", "PyTorch, MiB"] if compared else []
  lines = []
  for mode, by_name in found.items():
    for name, row in by_name.items():
      cells = [f"{mode} {name}", f"{row['images_per_second']:,.1f}"]
      cells.append(f"{1e3 * row['seconds']:,.1f}")
      for part in shown:
        value = row["parts"].get(part)
        cells.append("" if value is None else f"{value / row['seconds']:.0%}")
      cells += [f"{row['memory_mib']:,.0f}", f"{row['flops'] / 1e9:,.1f}"]
      cells.append(f"{row['of_ceiling']:.0%}")
      if "ratio" in row:
        cells.append(f"{1e3 * row['yardstick_seconds']:,.1f}")
        cells.append(f"{row['ratio']:.2f}")
        mib = row["yardstick_memory_mib"]  # None on a CPU
        cells.append("" if mib is None else f"{mib:,.0f}")
      elif compared:
        cells += [""] * 3
      lines.append(cells)
  return tables.markdown(lines, header)


def _parse(argv: list[str] | None) -> argparse.Namespace:
  on_cpu = jax.default_backend() == "cpu"
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--backbone", default="B/16", help="a variant, or a release")
  parser.add_argument("--methods", default="insvp,insvp_release16")
  parser.add_argument("--fields", default="{}", help="JSON, of every method's fields")
  parser.add_argument("--modes", default=",".join(MODES))
  parser.add_argument("--batch_size", type=int, default=8 if on_cpu else 128)
  parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
  parser.add_argument(
    "--frozen_dtypes", default="", help="float32,bfloat16,int8: of frozen weights, each"
  )
  parser.add_argument(
    "--microbatch_sizes",
    type=_whole_numbers,
    default="0",
    help="32,8,...: images of a train step at once, each; 0: automatic",
  )
  parser.add_argument("--image_size", type=int, default=0, help="0: the backbone's")
  parser.add_argument("--fused_attention", action="store_true", help="cuDNN's")
  parser.add_argument("--num_classes", type=int, default=100)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--turn_seconds", type=float, default=0.2, help="of each turn")
  parser.add_argument(
    "--clock",
    default="wall",
    help="'cpu': processor seconds, for a busy machine; start it with taskset -c 0",
  )
  parser.add_argument("--no_parts", action="store_true", help="time whole steps only")
  parser.add_argument("--yardstick", action="store_true", help="PyTorch beside InsVP")
  parser.add_argument("--torch_python", default=sys.executable)
  parser.add_argument("--torch_compile", action="store_true")
  parser.add_argument(
    "--every_block",
    action="store_true",
    help="the yardstick makes the specific prompt in each block, as released",
  )
  parser.add_argument("--json", help="write everything there")
  args = parser.parse_args(argv)
  args.methods, args.modes = args.methods.split(","), args.modes.split(",")
  args.frozen_dtypes = args.frozen_dtypes.split(",")
  _check(parser, args)
  return args


def _whole_numbers(text: str) -> list[int]:
  """Returns the numbers of a list such as "32,8"."""
  try:
    return [int(number) for number in text.split(",")]
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r}, expected whole numbers, such as 32,8"
    ) from None


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
  for what, given, known in (
    ("method", args.methods, NAMES),
    ("mode", args.modes, MODES),
    ("dtype", [args.dtype], ("float32", "bfloat16")),
    ("frozen dtype", args.frozen_dtypes, ("", *FROZEN_DTYPES)),
    ("clock", [args.clock], tuple(turns.CLOCKS)),
  ):
    for name in given:
      if name not in known:
        parser.error(f"unknown {what} {name!r}; known: {', '.join(known)}")
  for size in args.microbatch_sizes:
    if size < 0 or (size and args.batch_size % size):
      parser.error(f"parts of {size} do not divide a batch of {args.batch_size}")
  if args.yardstick and (reason := missing(args.torch_python)):
    parser.error(reason)


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Returns all that one run measures; see `_parse` for the arguments."""
  contestants = {}
  for name, frozen_dtype, size in itertools.product(
    args.methods, args.frozen_dtypes, args.microbatch_sizes
  ):
    config = create_config(
      name,
      backbone=args.backbone,
      batch_size=args.batch_size,
      dtype=args.dtype,
      image_size=args.image_size,
      fields=json.loads(args.fields),
      fused_attention=args.fused_attention,
      frozen_dtype=frozen_dtype,
      microbatch_size=size,
    )
    at_once = f"{size} at once" if size else ""
    title = " ".join(filter(None, (name, frozen_dtype, at_once)))
    contestants[title] = Contestant(config, args.num_classes)
  backbone = next(iter(contestants.values())).program.model.backbone
  with contextlib.ExitStack() as stack:
    yardsticks = {}
    for name, contestant in contestants.items() if args.yardstick else ():
      if contestant.config.method == "insvp":
        yardsticks[name] = stack.enter_context(
          Client(
            args.torch_python,
            contestant.program.model,
            batch_size=args.batch_size,
            dtype=args.dtype,
            compiled=args.torch_compile,
            specific_every_block=args.every_block,
          )
        )
    ceiling = ceilings.measure(
      backbone, args.batch_size, (args.dtype,), args.rounds, clock=args.clock
    )
    found = measure(
      contestants,
      args.modes,
      args.rounds,
      parts=not args.no_parts,
      yardsticks=yardsticks,
      turn_seconds=args.turn_seconds,
      clock=args.clock,
    )
    devices = next(iter(contestants.values())).program.mesh.size
    add_ceiling(found, ceiling["gflops"][args.dtype] * devices)
    return {
      "settings": vars(args),
      "image_size": backbone.image_size,
      "device": jax.devices()[0].device_kind,
      "devices": devices,
      "cpus": os.cpu_count(),
      "versions": report.versions(),
      "yardstick": {name: client.info for name, client in yardsticks.items()},
      "trainable": {name: c.trainable for name, c in contestants.items()},
      "ceilings": ceiling,
      "steps": found,
      "peak_host_mib": report.peak_host_mb(),
      "peak_device_mib": report.peak_device_mb(),
    }


def main(argv: list[str] | None = None) -> None:
  """Measures, prints the tables and writes JSON if asked to."""
  args = _parse(argv)
  found = run(args)
  print(
    f"{found['devices']} x {found['device']}, {found['cpus']} CPUs, jax "
    f"{found['versions']['jax']}; {args.backbone} at {found['image_size']} px, batch "
    f"{args.batch_size}, {args.dtype}, medians of {args.rounds} rounds, "
    f"{args.clock} time\n"
  )
  print(f"{ceilings.describe(found['ceilings'])}\n\n{table(found['steps'])}", end="")
  if args.json:
    Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  main()
