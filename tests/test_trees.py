"""Names, masks, splits."""

from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
import numpy as np
import pytest

from insvp_jax import trees

PARAMS = {
  "backbone": {"cls": np.zeros((1, 1, 4)), "norm": {"bias": np.ones(4)}},
  "head": {"bias": np.zeros(3), "kernel": np.ones((4, 3))},
}


def test_flatten_and_unflatten_are_inverse():
  flat = trees.flatten(PARAMS)
  assert set(flat) == {"backbone/cls", "backbone/norm/bias", "head/bias", "head/kernel"}
  assert trees.flatten(trees.unflatten(flat)).keys() == flat.keys()


def test_mask_matches_whole_names():
  mask = trees.flatten(trees.mask(PARAMS, ("head/.*", ".*/bias")))
  assert [name for name, chosen in mask.items() if not chosen] == ["backbone/cls"]
  # A part of a name is not a match.
  with pytest.raises(ValueError, match="'head' matches no parameter"):
    trees.mask(PARAMS, ("head",))


def test_a_pattern_without_a_match_is_named_with_the_nearest():
  with pytest.raises(ValueError, match=r"'head/kernal'.*Did you mean 'head/kernel'\?"):
    trees.mask(PARAMS, ("head/bias", "head/kernal"))


@given(st.sets(st.sampled_from(sorted(trees.flatten(PARAMS)))))
def test_split_and_merge_are_inverse(chosen):
  mask = trees.unflatten({name: name in chosen for name in trees.flatten(PARAMS)})
  trainable, frozen = trees.split(PARAMS, mask)
  assert set(trainable) == chosen
  merged = trees.flatten(trees.merge(trainable, frozen))
  for name, leaf in trees.flatten(PARAMS).items():
    assert merged[name] is leaf


def test_count():
  assert trees.count(PARAMS) == 4 + 4 + 3 + 12


def test_digest_sees_names_shapes_and_values():
  base = trees.digest(PARAMS)
  assert base == trees.digest(dict(reversed(PARAMS.items())))
  moved = {**PARAMS, "head": {"bias": np.zeros(3), "kernel": np.ones((3, 4))}}
  changed = {**PARAMS, "head": {"bias": np.ones(3), "kernel": np.ones((4, 3))}}
  renamed = {"backbone": PARAMS["backbone"], "tail": PARAMS["head"]}
  assert len({base, *map(trees.digest, (moved, changed, renamed))}) == 4


def test_lookup_lists_the_known_names():
  with pytest.raises(ValueError, match="unknown fruit 'aple'.*'apple'.*apple, pear"):
    trees.lookup({"apple": 1, "pear": 2}, "aple", "fruit")


def test_lookup_names_the_nearest_of_a_long_table():
  table = dict.fromkeys(f"task{i:02d}" for i in range(12))
  with pytest.raises(ValueError, match="Known: task00, .*, task11[.]$"):
    trees.lookup(table, "task", "task", "the list")
  table["other"] = None
  with pytest.raises(ValueError) as found:
    trees.lookup(table, "othr", "task", "the list")
  nearest = str(found.value).removeprefix("unknown task 'othr'. Nearest: other, ")
  # Always five, however far they are.
  assert nearest.count(", ") == 3 and nearest.endswith("; all of them: the list.")
  with pytest.raises(ValueError, match="Nearest: .*; 13 are known[.]$"):
    trees.lookup(table, "", "task")


def test_the_nearest_tasks_and_backbones_are_named():
  from insvp_jax.data import load_data
  from insvp_jax.models.weights.releases import architecture_of

  with pytest.raises(ValueError, match="'svnh'. Nearest: svhn, .*: insvp prepare --l"):
    load_data("svnh", ConfigDict(), 32)
  with pytest.raises(ValueError, match="of them, such as 'caltech101'; .* --task=vtab"):
    load_data("vtab", ConfigDict(), 32)
  with pytest.raises(ValueError, match="'vit_b16'. Nearest: vit_b16_i21k, .*BACKBONES"):
    architecture_of("vit_b16")
