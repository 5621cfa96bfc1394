"""Pruning in a search: which masks of a method are tried, and which one is kept.

After the grid, a method with masks that train (`Method.MASKS`) goes on so:

1. The chosen point is trained, masks and all: `<method>/unpruned`.
2. Each entry of a mask gets its score: the gradient of the loss with respect to it, its
   sign kept, mean over the training images. See `mask_gradients`.
3. For each percentage of `tune.prune`, so many entries of each row are pruned, those of
   the lowest score first, and each mask keeps its least number of entries.
4. Every combination of such masks is a trial: trained from scratch, masks frozen at 0
   and 1. All share one compiled step, and train together where that is faster.
5. The best on val is kept, of equals the one with fewer entries left.

Source: Han et al. 2023, "E2VPT", section 3.3, and its published code, which scores
while it goes on training; here nothing moves, and dropout is off.
"""

from collections.abc import Iterable, Mapping, Sequence
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import trees
from insvp_jax.config_variants import variants_of
from insvp_jax.data import pipeline, preprocess
from insvp_jax.distributed.processes import print_once
from insvp_jax.methods import METHODS, parts_of
from insvp_jax.models.classifier import PromptedClassifier
from insvp_jax.run import load_run
from insvp_jax.search import trials
from insvp_jax.search.outlook import Row
from insvp_jax.train import report, trainer

# What E2VPT's published code tries of tokens and of pieces.
PERCENTS = tuple(range(10, 100, 10))


def masks_of(method: str) -> dict[str, int]:
  """Returns {mask: entries of a row that are kept} of one method or of several."""
  return {n: k for part in parts_of(method) for n, k in METHODS[part].MASKS.items()}


def check_keys(config: ConfigDict) -> None:
  """Checks `config.tune.prune`.

  Raises:
    ValueError: a mask that no method of the search has, or no percentage.
  """
  methods = dict.fromkeys(variant.method for variant in variants_of(config))
  known = {name for method in methods for name in masks_of(method)}
  for name, values in config.tune.prune.items():
    if values and name not in known:
      raise ValueError(
        f"config.tune.prune.{name} is {values}, but {', '.join(methods)} has no such "
        "mask; leave it None."
      )
    for value in values or ():
      if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 100:
        raise ValueError(
          f"config.tune.prune.{name} has {value!r}, expected whole percents, e.g. "
          f'--config.tune.prune.{name}="(30, 60)".'
        )


def percents_of(config: ConfigDict, default: bool) -> dict[str, tuple[int, ...]]:
  """Returns the percentages to be tried of each mask that is pruned.

  Args:
    config: the whole configuration, of one method.
    default: whether None stands for `PERCENTS`, not for no pruning.
  """
  tried = {}
  for part in parts_of(config.method):
    for name in METHODS[part].MASKS:
      values = config.tune.prune[name]
      values = (PERCENTS if default else ()) if values is None else values
      # A mask that is given does not train.
      if values and config[part][name] is None:
        tried[name] = tuple(values)
  return tried


def counts(num_entries: int, keeps: int, percents: Iterable[int]) -> list[int]:
  """Returns how many entries of a row are pruned, each number once, ascending."""
  most = max(0, num_entries - keeps)
  return sorted({min(num_entries * percent // 100, most) for percent in percents})


def combinations(
  scores: Mapping[str, Any],
  keeps: Mapping[str, int],
  percents: Mapping[str, Iterable[int]],
) -> list[dict[str, list]]:
  """Returns every combination of masks of zeros and ones, as nested lists.

  Args:
    scores: of the entries of each mask; its last axis is pruned.
    keeps: entries of a row that are kept at least.
    percents: of the entries of a row that are pruned.
  """
  candidates = []
  for name, values in percents.items():
    score = np.asarray(scores[name])
    # Of equal scores the first entry goes first.
    order = np.argsort(score, axis=-1, kind="stable")
    candidates.append([])
    for count in counts(score.shape[-1], keeps[name], values):
      mask = np.ones(score.shape, int)
      np.put_along_axis(mask, order[..., :count], 0, axis=-1)
      candidates[-1].append(mask.tolist())
  return [
    dict(zip(percents, masks, strict=True)) for masks in itertools.product(*candidates)
  ]


def mask_gradients(
  model: PromptedClassifier,
  params: Mapping[str, Any],
  batches: Iterable[Mapping[str, Any]],
  names: Iterable[str],
  dtype: str = "float64",
) -> dict[str, np.ndarray]:
  """Returns the gradient of the mean cross-entropy with respect to masks, in float64.

  The scale of a whole token nearly cancels in the norm that it enters a block by: what
  is left of its gradient is the share of the norm's eps in the token's variance. So its
  score is far smaller than those of its pieces, and other types get it less exactly:
  tokens of similar scores would be pruned in another order (`benchmarks.mask_scores`).

  Args:
    model: the classifier; it is computed without dropout.
    params: all of its parameters, on one device or on the host.
    batches: of "images", normalised, "labels", and "mask" where some are padding.
    names: of the masks, which are parameters of the method.
    dtype: of the backbone's computation, in place of float64, to be compared with it.
  """
  backbone = model.backbone.clone(dtype=dtype, fused_attention=False)
  model = model.clone(backbone=backbone)
  number = np.float64 if dtype == "float64" else np.float32
  flat = {n: np.asarray(leaf, number) for n, leaf in trees.flatten(params).items()}
  masks = {n: x for n, x in flat.items() if n.split("/")[-1] in names}
  others = {n: x for n, x in flat.items() if n not in masks}

  def loss(masks, others, images, labels, weights):
    variables = {"params": trees.unflatten({**masks, **others})}
    log_probs = jax.nn.log_softmax(model.apply(variables, images))
    return -jnp.sum(log_probs[jnp.arange(len(labels)), labels] * weights)

  gradient = jax.jit(jax.grad(loss))
  with jax.enable_x64(True):
    others = jax.device_put(others)
  total, num_examples = {name: np.zeros(x.shape) for name, x in masks.items()}, 0.0
  for batch in batches:
    images, labels = batch["images"], batch["labels"]
    weights = np.asarray(batch.get("mask", np.ones(len(labels))), number)
    # Only here: batches are made as everywhere else.
    with jax.enable_x64(True):
      grads = jax.device_get(gradient(masks, others, images, labels, weights))
    total = {name: total[name] + grads[name] for name in total}
    num_examples += weights.sum()
  return {name.split("/")[-1]: x / num_examples for name, x in total.items()}


def num_trials(search: Any) -> int:
  """Returns how many runs the pruning of a search is."""
  if not search.percents:
    return 0
  leaves = trees.flatten(search.prepared.program.shapes["prompter"])
  lengths = {name.split("/")[-1]: leaf.shape[-1] for name, leaf in leaves.items()}
  keeps = masks_of(search.config.method)
  numbers = [
    len(counts(lengths[name], keeps[name], values))
    for name, values in search.percents.items()
  ]
  return 1 + math.prod(numbers)


def prune(
  search: Any, chosen: trials.Point, workdir: Path, row: Row
) -> tuple[dict[str, list], dict[str, Any]]:
  """Returns the masks that are best on val, and what the summary says of the choice.

  Finished trials and the scores are lines of `trials.jsonl`, found again by the same
  command.

  Args:
    search: the `tune.Search` of a method, with `percents` to try.
    chosen: a point of its grid.
    workdir: of the method.
    row: is told how far the runs are.

  Raises:
    ValueError: every trial diverged.
  """
  scores = _find_scores(search, chosen, workdir, row)
  masks, stage = _stage(search, chosen, scores)
  print_once(f"{len(masks)} combinations of pruned masks, scored by {_where(workdir)}")
  finished = stage.search(workdir, row)
  best, key = _best(masks, finished), trials.val_key(finished[0])
  rows = [
    {**_kept(mask), key: trial[key]}
    for mask, trial in zip(masks, finished, strict=True)
  ]
  summary = {"kept": _kept(masks[best]), "scores": scores, "trials": rows}
  return masks[best], {key: finished[best][key], "pruning": summary}


def left(
  search: Any, chosen: trials.Point, workdir: Path
) -> tuple[int, dict[str, list] | None]:
  """Returns how many runs of the pruning are missing, and the masks if none is.

  Args:
    search: as for `prune`.
    chosen: a point of its grid.
    workdir: of the method.

  Raises:
    ValueError: every trial diverged.
  """
  scores = _stored_scores(search, chosen, workdir)
  if scores is None:
    return num_trials(search), None
  masks, stage = _stage(search, chosen, scores)
  if missing := stage.missing(workdir):
    return len(missing), None
  return 0, masks[_best(masks, stage.finished(workdir))]


def _stage(
  search: Any, chosen: trials.Point, scores: Mapping[str, Any]
) -> tuple[list[dict[str, list]], Any]:
  """Returns every combination of masks, and the search among them."""
  masks = combinations(scores, masks_of(search.config.method), search.percents)
  points = [{**chosen, **each} for each in masks]
  return masks, type(search)(search.config, "auto", search.prepared, points)


def _kept(masks: Mapping[str, list]) -> dict[str, int]:
  return {name: int(np.sum(mask)) for name, mask in masks.items()}


def _best(
  masks: Sequence[Mapping[str, list]], finished: Sequence[Mapping[str, Any]]
) -> int:
  """Returns which of the combinations is best on val, of equals the smallest.

  Raises:
    ValueError: every trial diverged.
  """
  scored = [trial[trials.val_key(trial)] for trial in finished]
  indices = [i for i, value in enumerate(scored) if value is not None]
  if not indices:
    raise ValueError("every run with pruned masks diverged; lower config.tune.lr.")
  return min(indices, key=lambda i: (-scored[i], *_kept(masks[i]).values()))


def _where(workdir: Path) -> Path:
  """Returns the folder of the run whose masks are scored."""
  return workdir / "unpruned"


def _find_scores(
  search: Any, chosen: trials.Point, workdir: Path, row: Row
) -> dict[str, list]:
  """Returns the scores of the masks' entries, from the file or newly computed."""
  stored = _stored_scores(search, chosen, workdir)
  if stored is not None:
    row.keep(trials=1)
    return stored
  config, prepared = trials.at(search.config, **chosen), search.prepared_for(chosen)
  where = _where(workdir)
  with row.trials() as whole:
    trainer.train(config, where, prepared=prepared, test=False, whole=whole)
  run = load_run(where)
  split, mesh = prepared.data.splits["train"], prepared.program.mesh
  # On one device, and doubles take twice the memory.
  batch_size = max(1, config.batch_size // (2 * mesh.size))
  normalise = jax.jit(
    lambda pixels: preprocess.eval_preprocess(run.preset, pixels, run.model.input_size)
  )
  batches = (
    {**batch, "images": normalise(batch["images"])}
    for batch in pipeline.eval_batches(split, batch_size=batch_size)
  )
  gradients = mask_gradients(run.model, run.params, batches, search.percents)
  scores = {name: gradient.tolist() for name, gradient in gradients.items()}
  digest = _digest(search, chosen)
  trials.append(workdir / trials.FILE, {"scores": scores, "settings": digest})
  return scores


def _stored_scores(
  search: Any, chosen: trials.Point, workdir: Path
) -> dict[str, list] | None:
  """Returns the scores that the file has; None where it has none."""
  for line in trials.read(workdir / trials.FILE, _digest(search, chosen)):
    if line.get("scores", {}).keys() >= search.percents.keys():
      return line["scores"]
  return None


def _digest(search: Any, chosen: trials.Point) -> str:
  """Returns the `trials.settings` of what is scored."""
  config, prepared = trials.at(search.config, **chosen), search.prepared
  data_sha256 = report.data_digest(config, prepared.data, test=False)
  return trials.settings(config, (), prepared.backbone, data_sha256)
