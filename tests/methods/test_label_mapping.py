"""Label mappings: the fast greedy form is the published, iterative one."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from insvp_jax.methods.ops import label_mapping


def iterative(counts, m):
  """The published loop: the largest entry, m k times."""
  left, found = counts.astype(np.int64), [[] for _ in range(counts.shape[1])]
  for _ in range(m * counts.shape[1]):
    source, target = np.unravel_index(np.argmax(left), left.shape)
    found[target].append(source)
    left[source] = -1
    if len(found[target]) == m:
      left[:, target] = -1
  return np.asarray(found)


@settings(max_examples=200, deadline=None)
@given(
  num_target=st.integers(1, 6),
  m=st.integers(1, 3),
  more=st.integers(0, 8),
  largest=st.sampled_from([0, 1, 3, 100]),
  seed=st.integers(0, 2**32 - 1),
)
def test_the_sorted_form_is_the_iterative_one(num_target, m, more, largest, seed):
  shape = (num_target * m + more, num_target)
  counts = np.random.default_rng(seed).integers(0, largest + 1, shape)
  expected = iterative(counts, m)
  np.testing.assert_array_equal(label_mapping.greedy_mapping(counts, m), expected)
  ascending = label_mapping.greedy_mapping(counts, m, ascending=True)
  np.testing.assert_array_equal(ascending, np.sort(expected, axis=1))


def test_imagenet_21k_is_mapped_at_once():
  rng = np.random.default_rng(0)
  predictions, labels = rng.integers(0, 21_843, 50_000), rng.integers(0, 555, 50_000)
  counts = label_mapping.count_predictions(predictions, labels, 21_843, 555)
  assert counts.sum() == 50_000
  mapping = label_mapping.greedy_mapping(counts)
  assert mapping.shape == (555, 1) and len(np.unique(mapping)) == 555


def test_too_few_source_classes_are_refused():
  with pytest.raises(ValueError, match="need 6 of them, but the backbone's head has 5"):
    label_mapping.greedy_mapping(np.zeros((5, 3), int), 2)
  with pytest.raises(ValueError, match="are 4 wide and those of target classes 3"):
    label_mapping.semantic_mapping(np.ones((5, 4)), np.ones((2, 3)))
