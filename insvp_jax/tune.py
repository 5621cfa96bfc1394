"""The VTAB protocol: choose on val, retrain on train + val, report test over seeds.

Source: Zhai et al. 2019, "A Large-scale Study of Representation Learning with the
Visual Task Adaptation Benchmark", section 3; the choice by the last epoch, ties to
the smaller lr, and the retraining on all 1,000 images as in VPT (Jia et al. 2022).
"""

from collections.abc import Iterator
import itertools
import json
from pathlib import Path
import statistics
from typing import Any

import jax
from ml_collections import ConfigDict

from insvp_jax import config as config_lib
from insvp_jax import trainer, trees
from insvp_jax.methods import METHODS
from insvp_jax.trainer import Prepared
from insvp_jax.writers import write_json


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
  """Does what a config asks for: one run, or search, retraining and a table.

  With `config.tune` empty this is `trainer.train` alone. Otherwise each method of
  `tune.methods` tries every (lr, wd) of `tune.lr` x `tune.wd` on the train split,
  is chosen by its last accuracy on val, and is trained again, on what the task's
  protocol says (`TaskData.final_split`), for each of `tune.seeds`; only these runs
  ever see the test split. Finished runs are not repeated when the same command is
  started again.

  Args:
    config: the whole configuration.
    workdir: of a single run; with a search, the parent of `<method>/search/...`
      and `<method>/seed<n>`, and the place of summary.json and table.md.

  Returns:
    The result of the single run, or the summary by method.

  Raises:
    ValueError: bad input, or a search on a task that has no val split.
  """
  workdir = Path(workdir)
  config_lib.validate(config)
  tune = config.tune
  for method in tune.methods or (config.method,):
    trees.lookup(METHODS, method, "method")
  if not _is_search(config):
    result = trainer.train(config, workdir)
    say(describe(result))
    return result
  # All at once: a wrong field of the last method shows before the first one trains.
  programs, prepared = {}, None
  for method in tune.methods or (config.method,):
    prepared = trainer.prepare(_with(config, method=method), like=prepared)
    programs[method] = prepared
  summary = {}
  for method, prepared in programs.items():
    base = _with(config, method=method)
    summary[method] = _tune_method(base, workdir / method, prepared)
    write_json(workdir / "summary.json", summary)
    table = format_table(prepared.data.name, summary)
    if jax.process_index() == 0:
      (workdir / "table.md").write_text(table)
  say(f"\n{table}")
  return summary


def say(text: str) -> None:
  """Prints on the first of several processes."""
  if jax.process_index() == 0:
    print(text, flush=True)


def first_run(config: ConfigDict, workdir: str | Path, method: str) -> Path | None:
  """Returns where `run` put a method's (first) final run; None if it had none."""
  workdir = Path(workdir)
  if method not in (config.tune.methods or (config.method,)):
    return None
  if not _is_search(config):
    return workdir
  seeds = config.tune.seeds or (config.seed,)
  return workdir / method / f"seed{seeds[0]}"


def _is_search(config: ConfigDict) -> bool:
  tune = config.tune
  return any((tune.methods, tune.lr, tune.wd, tune.seeds))


def describe(result: dict[str, Any]) -> str:
  """Returns one line about a finished run."""
  accuracies = [
    f"{split} {100 * result[f'{split}_accuracy']:.2f}%"
    for split in ("val", "test")
    if result[f"{split}_accuracy"] is not None
  ]
  share = 100 * result["trainable_params"] / result["total_params"]
  return (
    f"{result['task']} {result['method']}: {', '.join(accuracies) or 'not evaluated'}; "
    f"{result['trainable_params']:,} trainable parameters ({share:.2f}%), "
    f"{result['train_seconds']:.0f} s, {result['images_per_second']:.0f} images/s"
  )


def format_table(task: str, summary: dict[str, Any]) -> str:
  """Returns the summary as a Markdown table, one row per method."""
  rows = [
    f"| {task} | test accuracy | seeds | lr | wd | prompter + head | seconds a run |",
    "|---|---|---|---|---|---|---|",
  ]
  for method, found in summary.items():
    mean = "-" if found["mean"] is None else f"{100 * found['mean']:.2f}"
    spread = f" ± {100 * found['std']:.2f}" if found["std"] is not None else ""
    rows.append(
      f"| {method} | {mean}{spread} | {len(found['seeds'])} "
      f"| {found['lr']:g} | {found['wd']:g} | {found['trainable_params']:,} "
      f"| {found['train_seconds']:.0f} |"
    )
  return "\n".join(rows) + "\n"


def _tune_method(
  config: ConfigDict, workdir: Path, prepared: Prepared
) -> dict[str, Any]:
  chosen, trials = _search(config, workdir / "search", prepared)
  data = prepared.data
  split = data.final_split if data.final_split in data.splits else "train"
  final = _with(config, lr=chosen["lr"], wd=chosen["wd"], train_split=split)
  retrained = trainer.prepare(final, like=prepared)
  results = []
  for seed in config.tune.seeds or (config.seed,):
    result = _finish(_with(final, seed=seed), workdir / f"seed{seed}", retrained)
    say(f"seed {seed}: {describe(result)}")
    results.append(result)
  # A task without a test split has no accuracies: its models are all there is.
  accuracies = [r["test_accuracy"] for r in results if r["test_accuracy"] is not None]
  return {
    "mean": statistics.mean(accuracies) if accuracies else None,
    "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
    "test_accuracies": accuracies,
    "seeds": [result["seed"] for result in results],
    "lr": chosen["lr"],
    "wd": chosen["wd"],
    "trials": trials,
    "trainable_params": results[0]["trainable_params"],
    "prompter_params": results[0]["prompter_params"],
    "train_seconds": statistics.mean(result["train_seconds"] for result in results),
    "images_per_second": statistics.mean(r["images_per_second"] for r in results),
  }


def _search(config, workdir: Path, prepared: Prepared):
  """Returns (the chosen {lr, wd}, all trials); trains nothing for one candidate."""
  candidates = list(_candidates(config))
  if len(candidates) == 1:
    return candidates[0], []
  if not {"train", "val"} <= set(prepared.data.splits):
    raise ValueError(
      f"the task {prepared.data.name!r} has no val split to choose lr and wd on; set "
      "config.tune.lr and config.tune.wd to one value each, or add a val split. The "
      "test split never selects."
    )
  trials = []
  programs = {config.optim.wd: prepared} if config.data.train_split == "train" else {}
  for candidate in candidates:
    trial = _with(config, train_split="train", **candidate)
    if candidate["wd"] not in programs:
      # lr is an argument of the compiled step; wd is a part of it.
      programs[candidate["wd"]] = trainer.prepare(trial, like=prepared)
    name = f"lr{candidate['lr']:.12g}_wd{candidate['wd']:.12g}"
    said = f"lr {candidate['lr']:g}, wd {candidate['wd']:g}"
    try:
      result = _finish(trial, workdir / name, programs[candidate["wd"]], test=False)
    except trainer.Diverged as error:
      # The others may still be good.
      say(f"{said}: {error}")
      trials.append({**candidate, "val_accuracy": None})
      continue
    say(f"{said}: {describe(result)}")
    trials.append({**candidate, "val_accuracy": result["val_accuracy"]})
  return choose(trials), trials


def choose(trials: list[dict[str, Any]]) -> dict[str, float]:
  """Returns the {lr, wd} of the best val accuracy; ties go to the smaller lr, wd.

  Args:
    trials: with lr, wd and val_accuracy, which is None where the loss diverged.

  Raises:
    ValueError: all of them diverged.
  """
  finished = [trial for trial in trials if trial["val_accuracy"] is not None]
  if not finished:
    raise ValueError("every run of the search diverged; lower config.tune.lr.")
  best = min(finished, key=lambda t: (-t["val_accuracy"], t["lr"], t["wd"]))
  return {"lr": best["lr"], "wd": best["wd"]}


def _candidates(config: ConfigDict) -> Iterator[dict[str, float]]:
  lrs = config.tune.lr or (config.optim.lr,)
  wds = config.tune.wd or (config.optim.wd,)
  for wd, lr in itertools.product(wds, lrs):
    yield {"lr": float(lr), "wd": float(wd)}


def _finish(config, workdir: Path, prepared: Prepared, test: bool = True):
  """Trains, unless the same run has already finished in `workdir`."""
  result, stored = workdir / "result.json", workdir / "config.json"
  if result.exists() and stored.exists():
    found, before = json.loads(result.read_text()), json.loads(stored.read_text())
    # Random weights have a seed beside what is prepared; the config compares it.
    same = prepared.backbone.items() <= found["backbone"].items()
    digest = trainer.data_digest(config, prepared.data, test)
    same &= found.get("data_sha256") == digest
    if same and not config_lib.difference(config, before):
      return found
  return trainer.train(config, workdir, prepared=prepared, test=test)


def _with(config: ConfigDict, **changes: Any) -> ConfigDict:
  """Returns a copy with some of method, seed, lr, wd and train_split changed."""
  copy = config.copy_and_resolve_references()
  for key, value in changes.items():
    section = {"lr": copy.optim, "wd": copy.optim, "train_split": copy.data}
    section.get(key, copy)[key] = value
  return copy
