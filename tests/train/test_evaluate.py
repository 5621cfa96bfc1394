"""Every example counts exactly once, whatever the batch size."""

from clu.metrics import Average
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from insvp_jax.data import ArraySplit, pipeline
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.train.evaluate import balanced, by_group, class_scores, evaluate


def numbered_split(number):
  """Returns images that tell their number, with classes 0 to 4 in turn."""
  images = np.zeros((number, 1, 2, 3), np.uint8)
  images[:, 0, 0, 0] = np.arange(number) % 256
  return ArraySplit(images, np.arange(number, dtype=np.int32) % 5)


@jax.jit
def averages(correct, nats, count):
  """Returns what an eval step does, from its sums."""
  return {
    "accuracy": Average(total=jnp.int32(correct), count=jnp.int32(count)),
    "loss": Average(total=jnp.float32(nats), count=jnp.int32(count)),
    # As if all were of one class.
    "class_accuracy": Average(
      total=jnp.int32(correct)[..., None], count=jnp.int32(count)[..., None]
    ),
    "class_prediction": Average(
      total=jnp.int32(0 * count)[..., None], count=jnp.int32(correct)[..., None]
    ),
  }


def counting_step(seen, right):
  """Returns an eval step that is right about the examples numbered in `right`."""

  def eval_step(batch):
    real = np.asarray(batch["mask"]) > 0
    numbers = np.asarray(batch["images"])[real, 0, 0, 0]
    seen.extend(numbers.tolist())
    correct = np.isin(numbers, list(right)).sum()
    return averages(correct, np.float32(numbers.sum()), real.sum())

  return eval_step


@given(number=st.integers(1, 60), batch_size=st.integers(1, 70), data=st.data())
def test_every_example_counts_once(number, batch_size, data):
  right = data.draw(st.sets(st.integers(0, number - 1)))
  seen = []
  batches = pipeline.eval_batches(numbered_split(number), batch_size=batch_size)
  found = evaluate(counting_step(seen, right), batches)
  assert seen == list(range(number))
  assert found == {
    "accuracy": len(right) / number,
    "loss": pytest.approx((number - 1) / 2),
    "num_correct": len(right),
    "num_examples": number,
    "class_accuracy": [len(right) / number],
    "class_precision": [float(bool(right))],
    "class_f1": [2 * len(right) / (number + len(right))],
    "class_count": [number],
    "quadratic_kappa": pytest.approx(np.nan, nan_ok=True),
  }


@pytest.mark.parametrize("number, batch_size", [(3, 8), (21, 8), (32, 4)])
def test_on_four_devices_the_counts_are_the_same(mesh, number, batch_size):
  def eval_step(batch):
    real = batch["mask"] > 0
    right = (batch["labels"] == 0) & real
    return averages(jnp.sum(right), jnp.sum(batch["mask"]), jnp.sum(real))

  rows = mesh_lib.batch_sharding(mesh)
  step = jax.jit(eval_step, in_shardings=(rows,))
  batches = pipeline.eval_batches(
    numbered_split(number), batch_size=batch_size, sharding=rows
  )
  found = evaluate(step, batches)
  assert found["num_correct"] == -(-number // 5)
  assert (found["num_examples"], found["loss"]) == (number, 1.0)


def test_nothing_to_evaluate_is_an_error():
  batches = pipeline.eval_batches(numbered_split(0), batch_size=4)
  with pytest.raises(ValueError, match="the split is empty"):
    evaluate(counting_step([], ()), batches)


def test_several_trials_are_evaluated_at_once():
  @jax.jit
  def eval_step(batch):
    real = batch["mask"] > 0
    right = (batch["labels"] == jnp.arange(2)[:, None]) & real
    nats = jnp.array([1.0, 2.0]) * jnp.sum(batch["mask"])
    return averages(jnp.sum(right, axis=1), nats, jnp.full(2, jnp.sum(real)))

  batches = pipeline.eval_batches(numbered_split(6), batch_size=4)
  result = evaluate(eval_step, batches)
  assert result["accuracy"].tolist() == [2 / 6, 1 / 6]
  assert result["loss"].tolist() == [1.0, 2.0]
  assert result["num_examples"] == 6


def test_classes_count_alike_in_balanced_accuracy():
  evaluated = {
    "class_accuracy": np.array([1.0, np.nan, 0.25, 0.25]),
    "class_f1": np.array([0.5, np.nan, 0.25, 0.75]),
    "class_count": np.array([96, 0, 4, 8]),
  }
  found = balanced(evaluated, ("cat", "dog", "elk", "fox"))
  assert found == {
    "balanced_accuracy": 0.5,
    "macro_f1": 0.5,
    "quadratic_kappa": None,
    "worst_class": {"name": "fox", "accuracy": 0.25, "num_examples": 8},
    "imbalance": 24.0,
    "groups": {},
  }


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_sums_of_each_class_give_the_figures_of_scikit_learn(pairs):
  labels, predicted = np.array(pairs).T
  confusion = np.zeros((5, 5), int)
  np.add.at(confusion, (labels, predicted), 1)
  found = class_scores(
    np.diag(confusion),
    confusion.sum(axis=1),
    confusion.sum(axis=0),
    confusion @ np.arange(5),
  )
  scores = balanced(found, "abcde", ordered=True)
  there = sorted({*labels.tolist()})
  precision, recall, f1, _ = metrics.precision_recall_fscore_support(
    labels, predicted, labels=there, zero_division=0
  )
  np.testing.assert_allclose(found["class_precision"][there], precision)
  np.testing.assert_allclose(found["class_accuracy"][there], recall)
  np.testing.assert_allclose(found["class_f1"][there], f1)
  assert np.isnan(np.delete(found["class_f1"], there)).all()
  assert scores["macro_f1"] == pytest.approx(f1.mean())
  assert scores["balanced_accuracy"] == pytest.approx(recall.mean())
  if len({*labels.tolist(), *predicted.tolist()}) > 1:
    kappa = metrics.cohen_kappa_score(
      labels, predicted, labels=range(5), weights="quadratic"
    )
    assert scores["quadratic_kappa"] == pytest.approx(kappa, abs=1e-12)
  else:
    assert scores["quadratic_kappa"] is None
  assert balanced(found, "abcde")["quadratic_kappa"] is None


def test_the_accuracies_of_many_medium_and_few_are_those_of_numpy():
  rng = np.random.default_rng(0)
  # The bounds on both sides, and a class without examples in test.
  train_count = [500, 101, 100, 20, 19, 1, 0, 60, 5]
  labels = rng.choice(8, 200)
  right = rng.random(200) < 0.6
  evaluated = {
    "class_accuracy": np.array(
      [right[labels == c].mean() for c in range(8)] + [np.nan]
    ),
    "class_count": np.bincount(labels, minlength=9),
  }
  found = by_group(evaluated, train_count)
  members = {"many": (0, 1), "medium": (2, 3, 7), "few": (4, 5, 6)}
  assert list(found) == list(members)
  for name, classes in members.items():
    means = [np.mean(right[labels == c]) for c in classes]
    assert found[name] == {
      "accuracy": pytest.approx(np.mean(means), rel=1e-12),
      "num_classes": len(classes),
      "num_examples": int(np.isin(labels, classes).sum()),
    }
  # Of one group, or of about one size.
  assert by_group(evaluated, [300, *[120] * 8]) == {}
  assert by_group(evaluated, [*[101] * 8, 99]) == {}
