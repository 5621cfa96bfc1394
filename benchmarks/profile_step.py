"""Where a step goes: XLA's own profile of it, by kind of work.

  python -m benchmarks.profile_step [--backbone=B/16] [--methods=insvp,vpt_deep]
      [--mode=train] [--batch_size=8] [--image_size=0] [--slowest=10] [--json=FILE]
  taskset -c 0 python -m benchmarks.profile_step --backbone=boxed --batch_size=32

The profiler times each operation of the compiled step in several steps, of which the
fastest counts, since others may interrupt it. Its kind is read off the compiled
program: what it computes, and the names of the layers that it comes from. On one core
(`taskset`) one operation runs at a time, and the kinds add up to the step; on several
they overlap. "idle" is what is left of the cores' time: hand-offs, and waiting. On a
busy machine take one core and `--clock=cpu`, the processor's time of the step, and a
small batch: an operation that outlasts the system's time slices, some milliseconds,
counts what others compute in between.
"""

import argparse
import collections
from collections.abc import Callable, Mapping
import dataclasses
import json
import os
from pathlib import Path
import re
import resource
import tempfile
from typing import Any

import jax

from benchmarks import turns
from benchmarks.contestant import NAMES, Contestant, create_config
from insvp_jax.search import tables

MODES = ("train", "eval", "predict")
_ATTENTION = r"MultiHeadDotProductAttention_\d+"
# In the order in which they are looked for: an operation is of the first kind of which
# anything is in it.
KINDS = {
  "products": r" (dot|convolution)\(",
  "spectra": r" fft\(",
  "GELU": r"MlpBlock_\d+/(jit\(gelu\)/)?\w+\"",
  "softmax": rf"{_ATTENTION}/(reduce_max|exp|sub|div|reduce_sum|neg|softmax)",
  "LayerNorm": r"LayerNorm_\d+/|encoder_norm/",
  "prompters": r"prompter",
  "optimizer": r"op_name=\"jit\(\w+\)/(?!.*PromptedClassifier)",
}
# Of nothing but these: a copy, or a change of the layout.
_MOVES = frozenset(
  "parameter constant bitcast copy transpose broadcast slice concatenate pad reshape "
  "dynamic-slice dynamic-update-slice iota gather reverse tuple "
  "get-tuple-element".split()
)
COPIES, REST, IDLE = "copies", "sums and biases", "idle"
# Operations whose time is that of what they call.
_CALLERS = ("while", "call", "conditional")
_INSTRUCTION = re.compile(
  r"^\s+(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\((.*)$", re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class Operation:
  """One operation of a compiled program.

  Attributes:
    kind: a key of `KINDS`, or `COPIES` or `REST`.
    layer: what it comes from, named alike in all blocks.
  """

  kind: str
  layer: str


def operations(hlo: str) -> dict[str, Operation]:
  """Returns the operations that a compiled program runs, by name.

  Args:
    hlo: the optimized program as text.
  """
  bodies = {}
  for body in re.split(r"\n\n(?=%|ENTRY)", hlo):
    if name := re.match(r"(?:ENTRY )?%?([\w.-]+) ", body):
      bodies[name[1]] = body
  # What belongs to a fusion, a reduction and the like does not run by itself.
  inner = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", hlo))
  inner |= set(re.findall(r"to_apply=%?([\w.-]+)", hlo))
  found = {}
  for body in (body for name, body in bodies.items() if name not in inner):
    for match in _INSTRUCTION.finditer(body):
      text = match[0]
      if callee := re.search(r" fusion\(.*calls=%?([\w.-]+)", text):
        text += "\n" + bodies[callee[1]]
      if match[2] not in _CALLERS:
        found[match[1]] = Operation(_kind(text), _layer(match[0]))
  return found


def _kind(text: str) -> str:
  """Returns the kind of an operation, from its text and that of what it fuses."""
  opcodes = {match[2] for match in _INSTRUCTION.finditer(text)} - {"fusion"}
  if opcodes <= _MOVES:
    return COPIES
  return next((k for k, pattern in KINDS.items() if re.search(pattern, text)), REST)


def _layer(text: str) -> str:
  """Returns the last names of the layer that an operation says it comes from."""
  name = re.search(r'op_name="([^"]*)"', text)
  if not name:
    return ""
  parts = re.sub(r"encoderblock_\d+", "encoderblock", name[1]).split("/")
  backward = ", backward" if "transpose(jvp" in name[1] else ""
  return "/".join(parts[-3:]) + backward


def profile(function: Callable[[], Any], steps: int) -> dict[str, float]:
  """Returns the seconds of each operation in one call of a function, by its name.

  Args:
    function: runs a compiled program and returns its outputs.
    steps: how many calls are profiled; each operation's least counts.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  durations = collections.defaultdict(list)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      for _ in range(steps):
        jax.block_until_ready(function())
    (path,) = Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
    for event in (e for p in data.planes for line in p.lines for e in line.events):
      durations[event.name].append(event.duration_ns / 1e9)
  return {name: min(values) * len(values) / steps for name, values in durations.items()}


def measure(
  contestant: Contestant, mode: str, steps: int, clock: str = "wall"
) -> dict[str, Any]:
  """Returns where a step goes.

  Args:
    contestant: the method.
    mode: of `MODES`.
    steps: how many are profiled.
    clock: of the whole step, a key of `turns.CLOCKS`.

  Returns:
    `seconds` of a step, the fastest of as many without the profiler; `system_seconds`
    and `faults`: what the system took of the processors for it, and how many pages of
    memory it had to find; `kinds`: the processors' seconds by kind;
    `operations`: (seconds, kind, layer) of the layers' operations together over all
    blocks, the longest first.
  """
  step = contestant.whole(mode)
  timed = turns.timed(step, clock)
  timed(2)  # memory is where it will be after two
  walls = []
  for _ in range(steps):
    before = resource.getrusage(resource.RUSAGE_SELF)
    spent = timed(1)
    after = resource.getrusage(resource.RUSAGE_SELF)
    in_system = after.ru_stime - before.ru_stime
    walls.append((spent, in_system, after.ru_minflt - before.ru_minflt))
  seconds, in_system, faults = min(walls)
  known = operations(contestant.compiled(mode).as_text())
  kinds, layers = collections.Counter(), collections.Counter()
  for name, spent in profile(step, steps).items():
    if name in known:
      kinds[known[name].kind] += spent
      layers[known[name]] += spent
  return {
    "seconds": seconds,
    "system_seconds": in_system,
    "faults": faults,
    "kinds": dict(kinds),
    "operations": [(s, op.kind, op.layer) for op, s in layers.most_common()],
  }


def table(found: Mapping[str, Any], cores: int) -> str:
  """Returns the shares of the kinds as a table, one column for each contestant.

  Args:
    found: of `measure`, by name.
    cores: how many the process may use.
  """
  shares = {}
  for name, row in found.items():
    whole = cores * row["seconds"]
    shares[name] = {kind: seconds / whole for kind, seconds in row["kinds"].items()}
    shares[name][IDLE] = 1 - sum(shares[name].values())
  kinds = [*KINDS, COPIES, REST, IDLE]
  every = found.values()
  rows = [["ms", *(f"{1e3 * row['seconds']:,.1f}" for row in every)]]
  rows.append(["page faults", *(f"{row['faults']:,.0f}" for row in every)])
  system = (row["system_seconds"] / row["seconds"] / cores for row in every)
  rows.append(["of it in the system", *(f"{share:.1%}" for share in system)])
  rows += [[k, *(f"{share.get(k, 0):.1%}" for share in shares.values())] for k in kinds]
  return tables.markdown(rows, ["", *found])


def slowest(row: Mapping[str, Any], number: int) -> str:
  """Returns the longest operations of a `measure` as a table."""
  rows = [[f"{1e3 * s:,.2f}", *names] for s, *names in row["operations"][:number]]
  return tables.markdown(rows, ["ms", "kind", "layer"])


def main(argv: list[str] | None = None) -> None:
  """Prints the tables, and writes JSON if asked to."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--backbone", default="B/16", help="a variant, or a release")
  parser.add_argument("--methods", default="insvp,vpt_deep")
  parser.add_argument("--mode", default="train", choices=MODES)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--image_size", type=int, default=0, help="0: the backbone's")
  parser.add_argument("--num_classes", type=int, default=100)
  parser.add_argument("--steps", type=int, default=9)
  parser.add_argument("--clock", default="wall", choices=tuple(turns.CLOCKS))
  parser.add_argument("--slowest", type=int, default=0, help="so many operations, too")
  parser.add_argument("--json", help="write everything there")
  args = parser.parse_args(argv)
  found = {}
  for name in args.methods.split(","):
    if name not in NAMES:
      parser.error(f"unknown method {name!r}; known: {', '.join(NAMES)}")
    config = create_config(
      name,
      backbone=args.backbone,
      batch_size=args.batch_size,
      dtype=args.dtype,
      image_size=args.image_size,
    )
    contestant = Contestant(config, args.num_classes)
    found[name] = measure(contestant, args.mode, args.steps, args.clock)
  cores = len(os.sched_getaffinity(0))
  print(
    f"{args.mode}, {args.backbone}, batch {args.batch_size}, {args.dtype}, {cores} "
    f"core(s), the fastest of {args.steps} steps\n\n{table(found, cores)}",
    end="",
  )
  for name, row in found.items() if args.slowest else ():
    print(f"\n{name}\n{slowest(row, args.slowest)}", end="")
  if args.json:
    Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  main()
