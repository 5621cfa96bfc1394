"""Folders of runs as the trainer and a search leave them, of accuracies at will."""

import json
import statistics

from insvp_jax import config as config_lib
from insvp_jax.config_variants import Variant
from insvp_jax.data import TASKS
from insvp_jax.tools.published import VIT

_DEFAULTS = config_lib.defaults()
# Of ViT-B/16.
BACKBONE_PARAMS = 85_798_656


def write_run(
  folder, task, method, accuracy, seed=0, *, backbone=VIT, settings=(), **result
):
  """Writes result.json and config.json of a run; returns its folder.

  Args:
    folder: its workdir.
    task: a published task, or any name with `num_test_examples` and so on in `result`.
    method: one or several, joined by +.
    accuracy: on test, in [0, 1]; None where it was not evaluated.
    seed: of the run.
    backbone: the id.
    settings: {key of the config: value}.
    **result: what result.json has besides; None leaves a key out.
  """
  config = _DEFAULTS.copy_and_resolve_references()
  config.task, config.method, config.seed = task, method, seed
  config.data.train_split = "train_val"
  config.backbone.name = backbone
  for key, value in dict(settings).items():
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
  trained = BACKBONE_PARAMS if method == "full" else 100_000
  row = TASKS.get(task)
  subset = row and row.subset()
  values = {
    "task": task,
    "method": method,
    "method_kwargs": config_lib.to_dict(config_lib.method_kwargs(config)),
    "preset": "vtab",
    "seed": seed,
    "train_split": "train_val",
    "lr": config.optim.lr,
    "wd": config.optim.wd,
    "steps": 100,
    "val_accuracy": None,
    "test_accuracy": accuracy,
    "num_test_examples": row.num_test if row else 50,
    "num_train_examples": subset.train + subset.retrain * subset.val if row else 20,
    "test_by_class": None,
    "trainable_params": trained + 7690,
    "prompter_params": 100_000,
    "total_params": BACKBONE_PARAMS + 107_690,
    "backbone_params": BACKBONE_PARAMS,
    "backbone": {"id": backbone, "sha256": "0" * 64},
    "data_sha256": f"{task:x<64}",
    "train_seconds": 1.0,
  } | result
  values = {key: v for key, v in values.items() if v is not None or v == accuracy}
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "result.json").write_text(json.dumps(values))
  (folder / "config.json").write_text(json.dumps(config_lib.stored(config)))
  return folder


def write_search(folder, task, rows, *, lr=0.01, **options):
  """Writes a search: its summary and the final runs of each row.

  Args:
    folder: its workdir.
    task: as for `write_run`.
    rows: {(label, method, changes): test accuracies of seeds 0, 1, ...}.
    lr: that val chose in each row, of two.
    **options: as for `write_run`.
  """
  summary = {}
  for (label, method, changes), accuracies in rows.items():
    where = folder / Variant(label, method).folder
    settings = {"optim.lr": lr, **changes}
    for seed, accuracy in enumerate(accuracies):
      write_run(
        where / f"seed{seed}",
        *(task, method, accuracy, seed),
        settings=settings,
        **options,
      )
    trials = [{"lr": x, "wd": 1e-4, "val_accuracy": 0.5} for x in (lr, 10 * lr)]
    summary[label] = {
      **{"method": method, "changes": config_lib.to_dict(changes)},
      **{"mean": statistics.mean(accuracies), "seeds": list(range(len(accuracies)))},
      "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
      **{"test_accuracies": list(accuracies), "val_accuracy": 0.5},
      **{"lr": lr, "wd": 1e-4, "searched": ["lr", "wd"], "trials": trials},
    }
  (folder / "summary.json").write_text(json.dumps(summary))
  return folder


def row(method, label="", **changes):
  """Returns the key of a row of `write_search`."""
  return _Row((label or method, method, changes))


class _Row(tuple):
  """A row whose changes are a dict, which has no hash."""

  def __hash__(self):
    return hash(self[:2])
