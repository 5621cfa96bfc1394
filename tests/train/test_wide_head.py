"""Heads with more columns than classes: nothing changes but what is compiled."""

import contextlib
import json

from hypothesis import given
from hypothesis import strategies as st
import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import numpy as np
import pytest
from test_config import load
from test_suite import write_noah
from test_trainer import assert_same, at_step, run_to_state, stop_by, stored
from tiny_training import CLASSES, make_data, prepare, tiny_config

from insvp_jax.checkpoints.files import find_step, read_arrays
from insvp_jax.data import GROUPS, TASKS, tasks
from insvp_jax.distributed.stopping import Stopped
from insvp_jax.models.heads import Head
from insvp_jax.run import load_run
from insvp_jax.search import suite, tune
from insvp_jax.tools import plan
from insvp_jax.train import losses, preparation
from insvp_jax.train.trainer import train

WIDTH = 8
K = len(CLASSES)
# All that touches a head's weights; the large eps keeps AdamW from making steps out of
# rounding errors.
SETTINGS = {
  "adamw": {"optim__eps": 1e-4, "optim__wd": 0.1, "optim__grad_clip_norm": 1.0},
  "sgd": {"optim__name": "sgd", "optim__wd": 0.1, "optim__accumulate_steps": 2},
}
SOFT = {"loss__label_smoothing": 0.1, "loss__mixup_alpha": 0.8, "head_init": "vpt"}


@given(
  labels=st.lists(st.integers(0, 2), min_size=1, max_size=5),
  smoothing=st.sampled_from([0.0, 0.1, 0.7]),
  spare=st.integers(0, 4),
)
def test_spare_columns_have_no_target(labels, smoothing, spare):
  labels = jnp.array(labels, jnp.int32)
  found = losses.targets(labels, K + spare, smoothing, jnp.int32(K))
  expected = losses.targets(labels, K, smoothing)
  np.testing.assert_allclose(found[:, :K], expected, rtol=1e-6)
  assert not np.any(found[:, K:])


def test_spare_columns_get_neither_probability_nor_gradient():
  rng = np.random.default_rng(0)
  params = {"kernel": rng.normal(size=(4, WIDTH)), "bias": rng.normal(size=WIDTH)}
  params = jax.tree.map(lambda x: jnp.asarray(100 * x, jnp.float32), params)
  features = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
  numbers = {"num_classes": jnp.int32(K)}

  def loss(params, width=WIDTH, **collections):
    logits = Head(width).apply({"params": params, **collections}, features)
    targets = losses.targets(jnp.arange(5) % K, width)
    return jnp.sum(losses.cross_entropy(logits, targets)), logits

  wide = jax.value_and_grad(loss, has_aux=True)
  (value, logits), grads = wide(params, numbers=numbers)
  narrow = jax.tree.map(lambda x: x[..., :K], params)
  (expected, _), slopes = jax.value_and_grad(loss, has_aux=True)(narrow, K)
  assert value == pytest.approx(float(expected), rel=1e-6)
  assert not np.any(jax.nn.softmax(logits)[:, K:])
  for name, leaf in grads.items():
    assert not np.any(leaf[..., K:]), name
    np.testing.assert_allclose(leaf[..., :K], slopes[name], rtol=1e-5, atol=1e-6)


def config_of(method="linear", width=WIDTH, **changes):
  changes = {**SETTINGS["adamw"], "eval_every_epochs": 1.0, **changes}
  return tiny_config(method, head_width=width, **changes)


@pytest.mark.parametrize(
  "method, changes",
  [
    ("linear", SETTINGS["sgd"] | SOFT),
    ("vpt_deep", SETTINGS["adamw"] | SOFT),
  ],
)
def test_a_run_ends_as_with_a_head_of_its_classes(
  method, changes, monkeypatch, tmp_path
):
  ends, results = [], []
  for width in (0, WIDTH):
    config = config_of(method, width, **changes)
    _, end = run_to_state(monkeypatch, config, tmp_path / f"{width}", prepare(config))
    monkeypatch.undo()
    ends.append(end)
    results.append(json.loads((tmp_path / f"{width}" / "result.json").read_text()))
  narrow, wide = ends
  assert wide["head/kernel"].shape[-1] == WIDTH
  for name, leaf in narrow.items():
    if name.startswith("head/"):
      assert not np.any(wide[name][..., K:]), name
      wide[name] = wide[name][..., :K]
    np.testing.assert_allclose(wide[name], leaf, rtol=1e-3, atol=1e-5, err_msg=name)
  same = ("val_accuracy", "test_accuracy", "trainable_params", "total_params")
  assert [results[0][key] for key in same] == [results[1][key] for key in same]
  # What is stored does not show it.
  items = ("adapter", "optimizer")
  kept = [
    {
      f"{item}/{name}": leaf.shape
      for item in items
      for name, leaf in read_arrays(find_step(tmp_path / width), item).items()
    }
    for width in ("0", f"{WIDTH}")
  ]
  assert kept[0] == kept[1]


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_stopped_run_resumes_bit_for_bit(name, monkeypatch, tmp_path):
  config = config_of(**SETTINGS[name])
  prepared = prepare(config)
  train(config, tmp_path / "whole", prepared=prepared)
  with monkeypatch.context() as patch:
    at_step(patch, 3, stop_by(15))
    with pytest.raises(Stopped):
      train(config, tmp_path / "parts", prepared=prepared)
  train(config, tmp_path / "parts", prepared=prepared)
  assert_same(stored(tmp_path / "parts"), stored(tmp_path / "whole"))
  # On another number of devices what is read is the same.
  loaded = load_run(tmp_path / "parts")
  images = make_data().splits["test"].images
  assert loaded.predict(images).shape == (len(images), K)
  one = prepare(config, devices=1)
  assert train(config, tmp_path / "whole", prepared=one)["test_accuracy"] is not None


def test_a_search_that_trains_together_chooses_as_one_without(monkeypatch, tmp_path):
  monkeypatch.setattr(preparation, "load_data", lambda *_: make_data())
  summaries = []
  for width in (0, WIDTH):
    config = config_of(width=width, tune__population=3)
    config.tune.lr = (0.003, 0.01, 0.05)
    summaries.append(tune.run(config, tmp_path / f"{width}")["linear"])
  for key in ("lr", "val_accuracy", "test_accuracies", "trainable_params"):
    assert summaries[0][key] == summaries[1][key], key
  runs = [
    read_arrays(find_step(tmp_path / f"{w}/linear/seed0"), "adapter")
    for w in (0, WIDTH)
  ]
  for name, leaf in runs[0].items():
    np.testing.assert_allclose(runs[1][name], leaf, rtol=1e-3, atol=1e-5)


@contextlib.contextmanager
def fresh_cache(folder):
  """Keeps all programs that are compiled meanwhile in a folder."""
  before = {
    name: getattr(jax.config, name)
    for name in (
      "jax_compilation_cache_dir",
      "jax_persistent_cache_min_compile_time_secs",
    )
  }
  try:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_one_compilation_serves_tasks_of_different_classes(monkeypatch, tmp_path):
  monkeypatch.setitem(tasks.GROUPS, "natural", ("svhn", "dtd"))
  for name in GROUPS["natural"]:
    write_noah(tmp_path / "vtab", name)
  config = config_of("vpt_deep", 47, total_epochs=1.0, backbone__depth=1)
  config.task, config.data.root = "natural", str(tmp_path / "vtab")
  config.tune.lr = (0.01, 0.02)
  with fresh_cache(tmp_path / "cache"):
    found = suite.run(config, tmp_path / "run")
  assert [GROUPS["natural"], len(found)] == [("svhn", "dtd"), 2]
  kept = [path.name for path in (tmp_path / "cache").iterdir()]
  steps = ("_train_alone", "train_step", "eval_step")
  compiled = {step: sum(f"jit_{step}-" in name for name in kept) for step in steps}
  # Of the trials, of the final runs, of both.
  assert compiled == {"_train_alone": 1, "train_step": 1, "eval_step": 2}
  for name in found:
    run = load_run(tmp_path / "run" / name / "vpt_deep/seed0")
    assert run.params["head"]["bias"].shape == (TASKS[name].num_classes,)


def test_a_head_that_is_too_narrow_is_refused():
  with pytest.raises(ValueError, match="head_width is 2, but the task has 3 classes"):
    prepare(config_of(width=2))


def test_a_plan_says_what_a_wider_head_takes_and_what_is_stored():
  counts = {"plan__num_classes": K, "plan__num_train": 24}
  narrow, wide = (
    plan.plan(config_of(width=width, **counts), jax.devices()[:1])
    for width in (0, WIDTH)
  )
  assert wide["params"] == narrow["params"]
  more = 4 * (WIDTH - K) * (16 + 1)
  assert wide["arrays"]["trainable"] == narrow["arrays"]["trainable"] + more
  assert wide["checkpoint"] == narrow["checkpoint"]


@pytest.mark.parametrize("name", ["vtab", "fgvc", "hta"])
def test_the_configs_of_suites_have_room_for_their_widest_task(name, root):
  config = load(root, name, "task=all")
  assert config.head_width == max(TASKS[task].num_classes for task in GROUPS[name])
