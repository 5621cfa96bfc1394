"""tools/scores: what predictions are worth, against plain counting."""

import csv
import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from insvp_jax.tools import scores

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def predictions(seed, classes=3, count=20):
  rng = np.random.default_rng(seed)
  probabilities = rng.dirichlet(np.full(classes, 0.7), count).astype(np.float32)
  return rng.integers(0, classes, count), probabilities


@settings(max_examples=60)
@given(
  seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 7), count=st.integers(1, 40)
)
def test_scores_are_those_of_plain_counting(seed, classes, count):
  labels, probabilities = predictions(seed, classes, count)
  found = scores.score(labels, probabilities, NAMES[:classes])
  predicted = [max(range(classes), key=lambda c: row[c]) for row in probabilities]
  confusion = np.zeros((classes, classes), int)
  for label, guess in zip(labels, predicted, strict=True):
    confusion[label, guess] += 1
  assert found["confusion"] == confusion.tolist()
  recalls, f1s = [], []
  for i, row in enumerate(found["classes"]):
    right, true, guessed = confusion[i, i], confusion[i].sum(), confusion[:, i].sum()
    assert (row["name"], row["num_examples"]) == (NAMES[i], true)
    if not true:
      assert row["recall"] is row["precision"] is row["f1"] is None
      continue
    recalls.append(right / true)
    f1s.append(2 * right / (true + guessed))
    assert row["recall"] == pytest.approx(recalls[-1])
    assert row["precision"] == pytest.approx(right / guessed if guessed else 0)
    assert row["f1"] == pytest.approx(f1s[-1])
  assert found["accuracy"] == pytest.approx(np.trace(confusion) / count)
  assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
  assert found["macro_f1"] == pytest.approx(np.mean(f1s))
  low, high = found["accuracy_interval"]
  assert 0 <= low <= found["accuracy"] <= high <= 1
  ranks = np.argsort(-probabilities, axis=1)[:, :5]
  top = (ranks == labels[:, None]).any(axis=1)
  assert found["top_5_accuracy"] == (np.mean(top) if classes > 5 else None)
  of_label = probabilities[range(count), labels].astype(float)
  assert found["loss"] == pytest.approx(-np.log(np.maximum(of_label, 1.2e-38)).mean())
  assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_calibration_is_the_distance_of_confidence_and_accuracy():
  # Two bins: at 0.9 of confidence half are right, at 0.55 all are.
  confidence = np.array([0.9, 0.9, 0.55, 0.55])
  is_correct = np.array([True, False, True, True])
  error = scores.calibration_error(confidence, is_correct)
  assert error == pytest.approx((2 * 0.4 + 2 * 0.45) / 4)
  assert scores.calibration_error(np.ones(3), np.ones(3, bool)) == 0


def test_the_interval_is_that_of_resampled_images():
  is_correct = np.arange(200) < 170
  rng = np.random.default_rng(1)
  resampled = [rng.choice(is_correct, 200).mean() for _ in range(4000)]
  low, high = scores._interval(is_correct)
  expected = np.quantile(resampled, [0.025, 0.975])
  assert (low, high) == pytest.approx(tuple(expected), abs=0.006)
  assert scores._interval(np.ones(5, bool)) == [1, 1]


def test_a_near_grade_costs_less_than_a_far_one():
  labels = np.repeat(np.arange(5), 8)
  near, far = (np.eye(5, dtype=np.float32)[labels] for _ in range(2))
  near[:8] = np.eye(5)[1]
  far[:8] = np.eye(5)[4]
  kappas = []
  for predicted in (near, far):
    found = scores.score(labels, predicted, NAMES[:5], ordered=True)
    kappas.append(found["quadratic_kappa"])
    guesses = predicted.argmax(axis=1)
    by_chance = np.mean((labels[:, None] - guesses) ** 2)
    assert kappas[-1] == pytest.approx(1 - np.mean((labels - guesses) ** 2) / by_chance)
  assert kappas[1] < kappas[0] < 1
  assert scores.score(labels, near, NAMES[:5])["quadratic_kappa"] is None


def test_text_names_what_there_is_alone():
  labels, probabilities = predictions(0, 7)
  text = scores.format_scores(scores.score(labels, probabilities, NAMES, ordered=True))
  for word in ("95% interval", "top-5", "macro-F1", "quadratic kappa", "calibration"):
    assert word in text
  few = scores.format_scores(scores.score(*predictions(0), NAMES[:3]))
  assert "top-5" not in few and "kappa" not in few
  table = scores.format_classes(
    scores.score(np.zeros(2, int), np.eye(2), ("a", "b\x1b"))
  )
  assert len(table.splitlines()) == 2 and "\x1b" not in table
  assert table.splitlines()[1].split() == ["a", "100.00%", "50.00%", "66.67%", "2"]


def test_the_confusion_matrix_as_numbers_and_as_a_picture(tmp_path):
  found = scores.score(*predictions(3), NAMES[:3])
  scores.write_confusion(found, tmp_path / "confusion.csv")
  lines = (tmp_path / "confusion.csv").read_text().splitlines()
  head, *rows = list(csv.reader(lines))
  assert head[1:] == list(NAMES[:3]) == [row[0] for row in rows]
  counts = [[int(cell) for cell in row[1:]] for row in rows]
  assert counts == found["confusion"]
  figure = scores._confusion_figure(np.array(counts), NAMES[:3])
  axis = figure.axes[0]
  shares = np.array(counts) / np.sum(counts, axis=1, keepdims=True)
  np.testing.assert_allclose(axis.images[0].get_array(), shares)
  drawn = {t.get_position()[::-1]: int(t.get_text()) for t in axis.texts}
  assert drawn == {
    (i, j): counts[i][j] for i in range(3) for j in range(3) if counts[i][j]
  }
  scores.write_confusion(found, tmp_path / "confusion.png")
  assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
  with pytest.raises(ValueError, match="confusion.txt"):
    scores.write_confusion(found, tmp_path / "confusion.txt")
  assert len(list(tmp_path.iterdir())) == 2
