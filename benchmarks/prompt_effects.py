"""What the prompts of a finished run do to its frozen backbone, on its val split.

  python -m benchmarks.prompt_effects --run=RUN [--run=RUN2 ...] [--images=200]
  python -m benchmarks.prompt_effects --run=RUN --curves

Four tables: how far prompts move the frozen feature, before the first step and after
the last one; what the val accuracy becomes where prompts are swapped between images,
averaged or left out; how far one step of AdamW moves each prompt; and how much of a
batch's gradient is noise, by part of the method. With --curves one: training against
validation loss, of the metrics of the run. A folder as --output gets the same as JSON
and as a figure.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import itertools
from pathlib import Path
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import curves
from benchmarks.interventions import Programs
from insvp_jax import run as run_lib
from insvp_jax import tools, trees
from insvp_jax.data import preprocess, splits
from insvp_jax.logs.writers import write_json
from insvp_jax.search import tables
from insvp_jax.tools import run_data, visualize
from insvp_jax.train import losses
from insvp_jax.train import state as state_lib

NAMES = {"specific": "specific prompt", "image": "image prompt"}
CHANGES = ("as is", "shuffled", "mean", "removed")
# Of the step whose effect on the prompts is measured.
STEP_LR = 1e-3


class _Subject:
  """A run with what is measured of it: its programs, parameters and val images."""

  def __init__(self, name: str, backbone: str | None, num_images: int):
    """Loads the run and its data.

    Args:
      name: of the run's workdir.
      backbone: the backbone's file, if it has moved.
      num_images: of val, at most.
    """
    run = run_lib.load_run(name, backbone=backbone)
    config = run.meta["config"]
    patterns = run.model.prompter.trainable_patterns()
    self.mask = trees.mask(run.params, patterns)
    if any(trees.flatten(self.mask["backbone"]).values()):
      raise SystemExit(
        f"{name}: {run.meta['method']} trains the backbone, so that there is no frozen "
        "one to compare with; measure a method that prompts."
      )
    if config["data"].get("train_split", "train") != "train":
      raise SystemExit(
        f"{name} was trained on {config['data']['train_split']}, so that val says "
        "nothing; measure a run of the split 'train' (--mode=train)."
      )
    data = run_data.read(run)
    self._run, self._columns, self.splits = run, data.columns, data.data.splits
    if "val" not in self.splits:
      raise SystemExit(f"{name}: its task has no val split to measure on.")
    self.programs, self.batch_size = Programs(run.model), config["batch_size"]
    # From everywhere in the split, which may be sorted by class.
    rows = np.random.default_rng(0).permutation(len(self.splits["val"]))[:num_images]
    self.inputs, self.labels = self.examples("val", rows)
    self.order = _derangement(len(rows))
    stages = {"end": run.params}
    if not run.model.prompter.prepares():
      frozen = {"backbone": run.params["backbone"]}
      first = state_lib.init_params(run.model, config["seed"], frozen["backbone"])
      stages = {"start": {**first, **frozen}, **stages}
    # Arrays that lie elsewhere would be programs of their own. Stage by stage: a tree's
    # keys come back sorted, the end before the start.
    self.stages = {
      stage: jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
      for stage, params in stages.items()
    }

  def examples(self, split: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (normalised images [n, h, w, 3], labels [n]) of some of a split."""
    part = splits.to_memory(self.splits[split], rows)
    images = part.images.view(preprocess.Resized)
    return self._run.preprocess(images), self._columns[part.labels]

  def parameters(
    self, params: Mapping[str, Any]
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (trainable, frozen) parameters by name, with the trained head.

    One that starts at zero would pass no gradient on.
    """
    head = {name: part for name, part in self.stages["end"].items() if name == "head"}
    return trees.split({**params, **head}, self.mask)


def measure(
  name: str, num_images: int, num_batches: int, backbone: str | None = None
) -> dict[str, Any]:
  """Returns all that is measured of one run.

  Args:
    name: of its workdir.
    num_images: of val, at most.
    num_batches: of the train split, for the gradients.
    backbone: the backbone's file, if it has moved.
  """
  subject = _Subject(name, backbone, num_images)
  prompts = {
    stage: subject.programs.prompts(params, subject.inputs)
    for stage, params in subject.stages.items()
  }
  # A method without image prompts gives back the images that it got.
  if "image" in prompts["end"] and not np.any(prompts["end"]["image"]):
    for made in prompts.values():
      del made["image"]
  outputs = {
    stage: subject.programs.prompted(params, subject.inputs, prompts[stage])
    for stage, params in subject.stages.items()
  }
  return {
    "run": name,
    "images": len(subject.inputs),
    "features": _features(subject, prompts, outputs),
    "interventions": _interventions(subject, prompts["end"], outputs["end"]),
    "steps": _steps(subject, prompts),
    "gradients": _gradients(subject, num_batches),
    "num_batches": num_batches,
    "batch_size": subject.batch_size,
  }


def _features(
  subject: _Subject, prompts: Mapping[str, Any], outputs: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
  """Returns, by stage, how far prompts move features and attention; see the README."""
  inputs, params = subject.inputs, subject.stages["end"]
  plain = subject.programs.plain(params, inputs)
  found = {}
  for stage, prompted in outputs.items():
    row = {
      "cosine of two images": _cosine(plain["feature"], plain["feature"][subject.order])
    }
    looks = {"plain": plain}
    if "image" in prompts[stage]:
      image = prompts[stage]["image"]
      row["prompt / image"] = float(np.mean(_norms(image) / _norms(inputs)))
      looks["image prompt"] = subject.programs.plain(params, inputs + image)
    looks["all prompts"] = prompted
    for look, output in looks.items():
      if look != "plain":
        row[f"cosine, {look}"] = _cosine(plain["feature"], output["feature"])
      if "entropy" in output:
        row[f"entropy, {look}"] = float(np.mean(output["entropy"]))
    if "share" in prompted:
      row["attention to prompts"] = float(np.mean(prompted["share"]))
    found[stage] = row
  return found


def _interventions(
  subject: _Subject, prompts: Mapping[str, Any], as_is: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
  """Returns {kind of prompt: {change: {"accuracy", "loss"}, "varies": share}}."""

  def score(output: Mapping[str, Any]) -> dict[str, float]:
    logits, labels = output["logits"], subject.labels
    targets = losses.targets(jnp.asarray(labels), logits.shape[-1])
    nats = np.asarray(losses.cross_entropy(jnp.asarray(logits), targets))
    right = np.argmax(logits, axis=-1) == labels
    return {"accuracy": float(np.mean(right)), "loss": float(np.mean(nats))}

  changes = {
    "shuffled": lambda x: x[subject.order],
    "mean": lambda x: np.broadcast_to(x.mean(axis=0, dtype=np.float64), x.shape),
    "removed": np.zeros_like,
  }
  found = {}
  for kind in (kind for kind in NAMES if kind in prompts):
    found[kind] = {"as is": score(as_is)}
    for name, change in changes.items():
      made = jax.tree.map(lambda x, c=change: c(x).astype(x.dtype), prompts[kind])
      output = subject.programs.prompted(
        subject.stages["end"], subject.inputs, {**prompts, kind: made}
      )
      found[kind][name] = score(output)
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(prompts[kind])]
    spread = sum(np.sum(np.square(x - x.mean(axis=0))) for x in leaves)
    found[kind]["varies"] = float(spread / sum(np.sum(np.square(x)) for x in leaves))
  return found


def _steps(
  subject: _Subject, prompts: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, float]]]:
  """Returns {stage: {prompt: {"size", "moved"}}}: root mean squares, see the README.

  The step is AdamW's first one, of `STEP_LR`: so much for each parameter, against the
  sign of its gradient.
  """
  off = dict.fromkeys(subject.programs.dropout_rates(), 0.0)
  batch, found = next(_batches(subject)), {}
  for stage, params in subject.stages.items():
    trainable, frozen = subject.parameters(params)
    gradient = subject.programs.gradient(
      trainable, frozen, batch, jax.random.key(0), off
    )
    moved = {n: x - STEP_LR * np.sign(gradient[n]) for n, x in trainable.items()}
    moved = subject.programs.prompts(trees.merge(moved, frozen), subject.inputs)
    found[stage] = {
      NAMES[kind]: {
        "size": _rms(prompts[stage][kind]),
        "moved": _rms(jax.tree.map(np.subtract, moved[kind], prompts[stage][kind])),
      }
      for kind in NAMES
      if kind in prompts[stage]
    }
    common = {n: x for n, x in trainable.items() if "common_prompt" in n}
    if common:
      found[stage]["common prompts"] = {"size": _rms(common), "moved": STEP_LR}
  return found


def _batches(subject: _Subject) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields batches of training images; each is drawn anew: they are independent."""
  rng, number = np.random.default_rng(0), len(subject.splits["train"])
  while True:
    yield subject.examples("train", rng.permutation(number)[: subject.batch_size])


def _gradients(subject: _Subject, num_batches: int) -> dict[str, Any]:
  """Returns {stage: {dropout: {part: {"mean", "batch", "ratio"}}}}."""
  programs, rates = subject.programs, subject.programs.dropout_rates()
  settings = {"off": dict.fromkeys(rates, 0.0)}
  if any(rates.values()):
    settings["on"] = rates
  batches, found = list(itertools.islice(_batches(subject), num_batches)), {}
  for stage, params in subject.stages.items():
    parameters = subject.parameters(params)
    found[stage] = {
      name: _signal_to_noise(
        [
          programs.gradient(*parameters, batch, jax.random.key(i), values)
          for i, batch in enumerate(batches)
        ]
      )
      for name, values in settings.items()
    }
  return found


def _signal_to_noise(
  gradients: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, dict[str, float]]:
  """Returns, by part, the norm of the "mean" gradient, the mean norm of a "batch" one.

  Their "ratio" is 1 where all batches agree and 1 / sqrt(their number) for noise alone.

  Args:
    gradients: of each batch, by name of the parameter.
  """
  mean = {name: np.mean([g[name] for g in gradients], axis=0) for name in gradients[0]}
  norms = [_norms_by_part(gradient) for gradient in gradients]
  found = {}
  for part, of_mean in _norms_by_part(mean).items():
    of_batch = float(np.mean([norm[part] for norm in norms]))
    # Both may be zero: behind a layer that is zero, or one that is never active.
    ratio = of_mean / of_batch if of_batch else 0.0
    found[part] = {"mean": of_mean, "batch": of_batch, "ratio": ratio}
  return found


def _norms_by_part(grads: Mapping[str, Any]) -> dict[str, float]:
  """Returns the norm of the gradient of each part: patch_prompter, head, ..."""
  squares: dict[str, float] = {}
  for name, grad in grads.items():
    top, *path = name.split("/")
    part = path[0] if top == "prompter" else top
    squared = np.sum(np.square(np.asarray(grad, np.float64)))
    squares[part] = squares.get(part, 0.0) + squared
  return {part: float(np.sqrt(square)) for part, square in squares.items()}


def _derangement(number: int) -> np.ndarray:
  """Returns an order in which no position stays where it was."""
  cycle, order = np.random.default_rng(0).permutation(number), np.empty(number, int)
  order[cycle] = np.roll(cycle, 1)
  return order


def _norms(x: np.ndarray) -> np.ndarray:
  """Returns the norm of each example, [n]."""
  return np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=-1)


def _rms(tree: Any) -> float:
  """Returns the root of the mean square of all numbers in a tree."""
  squares = [
    np.square(np.asarray(x, np.float64)).ravel() for x in jax.tree.leaves(tree)
  ]
  return float(np.sqrt(np.mean(np.concatenate(squares))))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the mean cosine of pairs of rows."""
  dots = np.sum(np.asarray(a, np.float64) * np.asarray(b, np.float64), axis=-1)
  return float(np.mean(dots / (_norms(a) * _norms(b))))


# What is shown.

FEATURES = {
  "prompt / image": ".3f",
  "cosine, image prompt": ".3f",
  "cosine, all prompts": ".3f",
  "cosine of two images": ".3f",
  "entropy, plain": ".2f",
  "entropy, image prompt": ".2f",
  "entropy, all prompts": ".2f",
  "attention to prompts": ".1%",
}


def features_table(found: Sequence[Mapping[str, Any]]) -> str:
  """Returns how far prompts move features: a row for each run and stage."""
  rows = [
    [f"{run['run']}, {stage}"]
    + [f"{row[name]:{form}}" if name in row else "-" for name, form in FEATURES.items()]
    for run in found
    for stage, row in run["features"].items()
  ]
  return tables.markdown(rows, ["prompts and features", *FEATURES])


def interventions_table(found: Sequence[Mapping[str, Any]]) -> str:
  """Returns accuracy and loss under each change; "" where no run has such prompts."""
  rows = [
    [f"{run['run']}, {NAMES[kind]}"]
    + [f"{100 * row[c]['accuracy']:.1f} ({row[c]['loss']:.3f})" for c in CHANGES]
    + [f"{row['varies']:.1%}"]
    for run in found
    for kind, row in run["interventions"].items()
  ]
  titles = ["val accuracy, % (loss)", *CHANGES, "varies"]
  return tables.markdown(rows, titles) if rows else ""


def steps_table(found: Sequence[Mapping[str, Any]]) -> str:
  """Returns "moved of size = share" of each prompt; "" where there are none."""
  rows = []
  for run in found:
    for prompt in run["steps"]["end"]:
      sizes = [stage[prompt] for stage in run["steps"].values()]
      cells = [f"{x['moved']:.2g} of {x['size']:.2g}" for x in sizes]
      # Prompts of a learnt weight start at zero.
      for i, x in enumerate(sizes):
        cells[i] += f" = {x['moved'] / x['size']:.1%}" if x["size"] else ""
      rows.append([f"{run['run']}, {prompt}", *["-"] * (2 - len(cells)), *cells])
  titles = [f"moved by a step of lr {STEP_LR:g}", "start", "end"]
  return tables.markdown(rows, titles) if rows else ""


def gradients_table(run: Mapping[str, Any]) -> str:
  """Returns "mean / batch = ratio" of the gradient of each part of one run."""
  columns = {
    f"{stage}, dropout {name}": parts
    for stage, settings in run["gradients"].items()
    for name, parts in settings.items()
  }
  rows = []
  for part in next(iter(columns.values())):
    norms = [parts[part] for parts in columns.values()]
    cells = [f"{n['mean']:.2g} / {n['batch']:.2g} = {n['ratio']:.2f}" for n in norms]
    rows.append([part, *cells])
  batches = f"{run['num_batches']} batches of {run['batch_size']}"
  return tables.markdown(rows, [f"{run['run']}, {batches}", *columns])


def figure(found: Sequence[Mapping[str, Any]]) -> Any:
  """Returns a figure with a row for each run: cosines, accuracies, signal to noise."""
  from matplotlib.figure import Figure

  result = Figure(figsize=(13, 3.2 * len(found)), layout="constrained")
  axes = result.subplots(len(found), 3, squeeze=False)
  for row, run in zip(axes, found, strict=True):
    cosines = {
      stage: {name: x for name, x in values.items() if name.startswith("cosine")}
      for stage, values in run["features"].items()
    }
    _bars(row[0], cosines, f"{run['run']}\ncosine with the plain feature")
    accuracies = {
      NAMES[kind]: {change: 100 * values[change]["accuracy"] for change in CHANGES}
      for kind, values in run["interventions"].items()
    }
    _bars(row[1], accuracies, "val accuracy, %")
    ratios = {
      f"{stage}, dropout {name}": {part: n["ratio"] for part, n in parts.items()}
      for stage, settings in run["gradients"].items()
      for name, parts in settings.items()
    }
    _bars(row[2], ratios, "gradient: norm of the mean / mean norm")
    # What noise alone gives.
    row[2].axhline(run["num_batches"] ** -0.5, color="black", linestyle=":")
  return result


def _bars(axis: Any, groups: Mapping[str, Mapping[str, float]], title: str) -> None:
  """Draws a colour for each group, with a bar for each of its names."""
  axis.set_title(title, fontsize=9, parse_math=False)
  for i, (group, values) in enumerate(groups.items()):
    places = np.arange(len(values)) + 0.8 * (i + 0.5) / len(groups) - 0.4
    axis.bar(places, list(values.values()), 0.8 / len(groups), label=group)
    axis.set_xticks(range(len(values)), list(values), fontsize=7, rotation=20)
  if groups:
    axis.margins(y=0.3)  # room for the legend
    axis.legend(fontsize=7, ncols=2, loc="upper center")


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the tables; returns the exit status, 2 after bad input."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", action="append", required=True, help=tools.RUN_HELP)
  parser.add_argument("--backbone", help="the backbone's file, if it has moved")
  parser.add_argument("--images", type=int, default=200, help="of val, at most")
  parser.add_argument("--batches", type=int, default=16, help="for the gradients")
  parser.add_argument("--curves", action="store_true", help="the losses by step, alone")
  parser.add_argument("--output", type=Path, help="a folder for JSON and a figure")
  args = parser.parse_args(argv)
  if args.images < 2 or args.batches < 2:
    parser.error("--images and --batches have to be at least 2")

  def work() -> None:
    if args.output:
      visualize.check_matplotlib()
    if args.curves:
      name, found = "curves", {run: curves.read(Path(run)) for run in args.run}
      print("\n".join(curves.table(run, points) for run, points in found.items()))
      draw = curves.figure
    else:
      name, draw, found = "prompt_effects", figure, []
      for run in args.run:
        print(f"measuring {run}", file=sys.stderr, flush=True)
        found.append(measure(run, args.images, args.batches, args.backbone))
      shown = [features_table(found), interventions_table(found), steps_table(found)]
      print("\n".join(filter(None, [*shown, *map(gradients_table, found)])))
    if args.output:
      write_json(args.output / f"{name}.json", {"runs": found})
      visualize.save_figure(draw(found), args.output / f"{name}.png")

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())
