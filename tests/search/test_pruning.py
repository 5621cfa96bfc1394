"""Pruning: which masks are tried, by which scores, and the schedule as a whole."""

import json

import jax
import numpy as np
import pytest
from tiny_commands import make_place
from tiny_runs import draw_backbone
from tiny_training import make_data, tiny_config

from insvp_jax import create_model, load_run, trees
from insvp_jax.methods import METHODS
from insvp_jax.search import pruning, trials, tune
from insvp_jax.train import trainer
from insvp_jax.train.state import param_shapes

pytestmark = pytest.mark.usefixtures("one_device")

WHOLE = {"token_mask": (40,), "piece_mask": (25, 90)}


def pruned_config(method="e2vpt", prune=WHOLE, **changes):
  changes = {"tune__lr": (0.01, 0.03), "backbone__depth": 1, **changes}
  config = tiny_config(method, total_epochs=1.0, **changes)
  config.tune.population = 1
  config.e2vpt.kv_length = 2
  for name, values in prune.items():
    config.tune.prune[name] = values
  return config


@pytest.fixture(autouse=True)
def _data(monkeypatch):
  monkeypatch.setattr(trainer, "load_data", lambda *_: make_data())


@pytest.mark.parametrize(
  ("num_entries", "keeps", "expected"),
  [
    (16, 4, [1, 3, 4, 6, 8, 9, 11, 12]),
    (10, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    (5, 1, [0, 1, 2, 3, 4]),
    (1, 1, [0]),
    (3, 4, [0]),
  ],
)
def test_the_published_percents_and_the_least_that_is_kept(
  num_entries, keeps, expected
):
  assert pruning.counts(num_entries, keeps, pruning.PERCENTS) == expected


def test_the_lowest_scores_go_first_in_each_row_with_their_sign():
  scores = {"a": [0.5, -2.0, 0.1, 0.1], "b": [[1, -1, 0, 2], [0, 0, 0, 0]]}
  found = pruning.combinations(
    scores, {"a": 1, "b": 2}, {"a": (0, 50, 80), "b": (30, 100)}
  )
  assert len(found) == 3 * 2
  assert [each["a"] for each in found[::2]] == [
    [1, 1, 1, 1],
    [1, 0, 0, 1],
    [1, 0, 0, 0],
  ]
  assert [each["b"] for each in found[:2]] == [
    [[1, 0, 1, 1], [0, 1, 1, 1]],
    [[1, 0, 0, 1], [0, 0, 1, 1]],
  ]


def test_a_mask_is_pruned_where_it_trains_and_percents_are_given():
  config = pruned_config(prune={})
  assert pruning.percents_of(config, default=False) == {}
  both = dict.fromkeys(("token_mask", "piece_mask"), pruning.PERCENTS)
  assert pruning.percents_of(config, default=True) == both
  config.tune.prune.token_mask = ()
  assert set(pruning.percents_of(config, default=True)) == {"piece_mask"}
  config.e2vpt.piece_mask = ()
  assert pruning.percents_of(config, default=True) == {}
  assert pruning.percents_of(tiny_config("insvp"), default=True) == {}
  for name, method in METHODS.items():
    assert set(method.MASKS) <= set(tiny_config(name).tune.prune)


@pytest.mark.parametrize(
  ("method", "values", "message"),
  [
    (
      "linear",
      (50,),
      "config.tune.prune.token_mask is .*, but linear has no such mask",
    ),
    ("e2vpt", (0.5,), "config.tune.prune.token_mask has 0.5, expected whole percents"),
    ("e2vpt", (101,), "config.tune.prune.token_mask has 101, expected whole percents"),
  ],
)
def test_wrong_percents_are_one_line(method, values, message, tmp_path):
  config = pruned_config(method, {"token_mask": values})
  with pytest.raises(ValueError, match=message):
    tune.run(config, tmp_path)


def test_pruning_needs_val_even_where_the_lr_is_given(monkeypatch, tmp_path):
  monkeypatch.setattr(trainer, "load_data", lambda *_: make_data(("val", "train_val")))
  config = pruned_config()
  config.tune.lr = ()
  message = "no val split to choose token_mask and piece_mask .*prune.piece_mask to "
  with pytest.raises(ValueError, match=message):
    tune.run(config, tmp_path)


def test_scores_are_means_over_images_and_exact_where_float32_is_not():
  model = create_model(
    "mu/4",
    "e2vpt",
    num_classes=3,
    image_size=8,
    head_init="torch",
    method_kwargs={"prompt_length": 4, "kv_length": 1},
  )
  images = np.random.default_rng(0).normal(size=(5, 8, 8, 3)).astype(np.float32)
  labels = np.array([0, 1, 2, 1, 0])
  params = draw_backbone(param_shapes(model))
  names = ("token_mask", "piece_mask")
  for name in names:
    params["prompter"][name] = np.ones_like(params["prompter"][name])
  whole = [{"images": images, "labels": labels}]
  scores = pruning.mask_gradients(model, params, whole, names)
  padded = [
    {"images": images[:3], "labels": labels[:3]},
    {
      "images": np.concatenate([images[3:], images[:1]]),
      "labels": np.array([1, 0, 2]),
      "mask": np.array([1.0, 1.0, 0.0]),
    },
  ]
  in_parts = pruning.mask_gradients(model, params, padded, names)
  assert not jax.config.jax_enable_x64
  for name in names:
    assert scores[name].dtype == np.float64
    error = np.abs(in_parts[name] - scores[name]).max()
    # The head computes in float32.
    assert error < 1e-6 * np.abs(scores[name]).max()
  # A token's score is what is left when those of its channels cancel.
  assert np.abs(scores["token_mask"]).max() < 0.01 * np.abs(scores["piece_mask"]).max()
  total = scores["piece_mask"].sum(axis=1)
  np.testing.assert_allclose(scores["token_mask"], total, rtol=1e-5)


def accuracies(summary):
  return [trial["val_accuracy"] for trial in summary["trials"]] + [
    trial["val_accuracy"] for trial in summary["pruning"]["trials"]
  ]


def test_the_whole_schedule_killed_twice_and_resumed(monkeypatch, tmp_path):
  calls, original = [], tune.train_trials
  kill_at = [3]

  def train_trials(configs, *args, **kwargs):
    if len(calls) in kill_at:
      kill_at.clear()
      raise KeyboardInterrupt
    calls.append(configs[0].e2vpt.to_dict())
    return original(configs, *args, **kwargs)

  monkeypatch.setattr(tune, "train_trials", train_trials)
  backbone = make_place(tmp_path / "place") / "backbone0.npz"
  config = pruned_config(backbone__weights=str(backbone))
  # One by one, so that there is a second one to be killed in.
  config.tune.population, config.tune.seeds = 1, (0, 1)
  scored, original_scores = [], pruning.mask_gradients

  def mask_gradients(*args):
    scored.append(1)
    if len(scored) == 1:
      raise KeyboardInterrupt
    return original_scores(*args)

  monkeypatch.setattr(pruning, "mask_gradients", mask_gradients)
  # In the scoring, in the second of the pruned trials, not at all.
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      tune.run(config, tmp_path)
  summary = tune.run(config, tmp_path)["e2vpt"]
  # Two of the grid and two combinations, none of them twice.
  assert len(calls) == 4 and len(scored) == 2
  assert [call["token_mask"] is None for call in calls] == [True, True, False, False]
  text = (tmp_path / "e2vpt" / trials.FILE).read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert [("scores" in line) for line in lines] == [False, False, True, False, False]

  kept = [(t["token_mask"], t["piece_mask"]) for t in summary["pruning"]["trials"]]
  assert kept == [(3, 5 * 12), (3, 5 * 4)]
  best = max(accuracies(summary)[2:])
  assert summary["val_accuracy"] == best
  # Of equals the one with fewer entries left.
  expected = [
    k for k, a in zip(kept, accuracies(summary)[2:], strict=True) if a == best
  ]
  assert tuple(summary["pruning"]["kept"].values()) == min(expected)
  # What was chosen is what the final runs have.
  for seed in (0, 1):
    run = load_run(tmp_path / "e2vpt" / f"seed{seed}")
    assert run.model.prompter.token_mask == tuple(summary["token_mask"])
    assert set(run.params["prompter"]) == {"common_prompt", "kv_prompt"}
    assert run.meta["config"]["data"]["train_split"] == "train_val"
  unpruned = load_run(tmp_path / "e2vpt" / "unpruned")
  assert unpruned.result["test_accuracy"] is None
  assert np.any(unpruned.params["prompter"]["token_mask"] != 1)
  assert summary["prompter_params"] == trees.count(run.params["prompter"])
  assert "token_mask" not in (tmp_path / "table.md").read_text()

  # Uninterrupted, at that lr, and the trials together: masks are data of one compiled
  # step.
  config.optim.lr, config.tune.lr = summary["lr"], ()
  config.tune.population, config.tune.seeds = 2, (0,)
  together = tune.run(config, tmp_path / "together")["e2vpt"]
  # What is left is known beforehand, as far as there are scores.
  search, folder = tune.Search(config, "auto", None), tmp_path / "together" / "e2vpt"
  lines = (folder / trials.FILE).read_text().splitlines(keepends=True)
  for count, left in ((3, (0, 0)), (2, (1, 1)), (0, (3, 1))):
    (folder / trials.FILE).write_text("".join(lines[:count]))
    assert search.left(folder) == left
  assert together["pruning"]["scores"].keys() == WHOLE.keys()
  for name, score in together["pruning"]["scores"].items():
    np.testing.assert_allclose(score, summary["pruning"]["scores"][name], rtol=1e-3)
  assert accuracies(together) == pytest.approx(accuracies(summary)[2:], abs=0.11)
