"""The label rules, over all values that a feature can have."""

import numpy as np
import pytest

from insvp_jax.data.labels import LABEL_RULES
from insvp_jax.data.tasks import TASKS


def _label(rule, **example):
  return LABEL_RULES[rule].compute(example)


def _clevr(*depths):
  coordinates = np.array([[50.0, 60.0, d] for d in depths], np.float32).reshape(-1, 3)
  return {"pixel_coords": coordinates, "size": np.zeros(len(depths), np.int64)}


def _kitti(*objects):
  """From pairs of type and distance."""
  location = np.array([[1.0, 2.0, d] for _, d in objects], np.float32).reshape(-1, 3)
  return {"type": np.array([t for t, _ in objects], np.int64), "location": location}


def test_a_plain_label_is_taken_as_it_stands():
  assert [_label("label", label=np.int64(i)) for i in range(397)] == list(range(397))


@pytest.mark.parametrize("count", range(3, 11))
def test_clevr_counts_3_to_10_objects(count):
  assert _label("clevr_count", objects=_clevr(*[9.0] * count)) == count - 3
  assert LABEL_RULES["clevr_count"].class_names[count - 3] == f"{count} objects"


@pytest.mark.parametrize(
  ("depth", "label"),
  [(0.1, 0), (8.0, 0), (8.01, 1), (8.5, 1), (8.51, 2), (9.0, 2), (9.01, 3), (9.5, 3)]
  + [(9.51, 4), (10.0, 4), (10.01, 5), (100.0, 5)],
)
def test_clevr_bins_are_open_below(depth, label):
  assert _label("clevr_distance", objects=_clevr(depth)) == label
  # The closest object counts, wherever it stands in the list.
  for others in [(depth, 100.0, 99.0), (100.0, depth, 99.0), (100.0, 99.0, depth)]:
    assert _label("clevr_distance", objects=_clevr(*others)) == label


@pytest.mark.parametrize("depths", [(), (0.0,), (-3.0, 9.0), (100.5,), (np.nan,)])
def test_what_is_no_distance_of_clevr_gets_no_class(depths):
  label = _label("clevr_distance", objects=_clevr(*depths))
  assert label < 0 or label >= 6


@pytest.mark.parametrize(
  ("depth", "label"),
  [(-5.0, 0), (0.0, 0), (8.0, 0), (8.01, 1), (20.0, 1), (20.01, 2), (150.0, 2)],
)
@pytest.mark.parametrize("kind", range(3))
def test_kitti_bins_are_open_below(kind, depth, label):
  assert _label("kitti_distance", objects=_kitti((kind, depth))) == label
  others = [(kind, 160.0), (3, 1.0), (kind, depth), (7, 1.0)]
  assert _label("kitti_distance", objects=_kitti(*others)) == label


@pytest.mark.parametrize("kind", range(3, 8))
def test_kitti_counts_cars_vans_and_trucks_only(kind):
  assert _label("kitti_distance", objects=_kitti((kind, 4.0))) == 3
  assert _label("kitti_distance", objects=_kitti((kind, 4.0), (0, 30.0))) == 2


def test_kitti_without_objects_has_no_vehicle():
  assert _label("kitti_distance", objects=_kitti()) == 3


def test_kitti_far_below_the_ground_gets_no_class():
  assert _label("kitti_distance", objects=_kitti((0, -101.0))) == -1


def test_dsprites_positions_fall_into_16_equal_bins():
  labels = [_label("dsprites_location", label_x_position=i) for i in range(32)]
  assert labels == [int(np.floor(i / 2.0)) for i in range(32)]
  assert np.bincount(labels).tolist() == [2] * 16


def test_dsprites_orientations_fall_into_bins_of_3_and_2():
  labels = [_label("dsprites_orientation", label_orientation=i) for i in range(40)]
  assert labels == [int(np.floor(i / 2.5)) for i in range(40)]
  assert np.bincount(labels).tolist() == [3, 2] * 8
  # The names say which orientations a bin holds.
  for label, name in enumerate(LABEL_RULES["dsprites_orientation"].class_names):
    members = [i for i, found in enumerate(labels) if found == label]
    assert name == f"orientation {members[0]}-{members[-1]} of 40"


def test_smallnorb_labels_are_tfds_own():
  azimuths = [_label("smallnorb_azimuth", label_azimuth=i) for i in range(18)]
  elevations = [_label("smallnorb_elevation", label_elevation=i) for i in range(9)]
  assert (azimuths, elevations) == (list(range(18)), list(range(9)))


@pytest.mark.parametrize("name", TASKS)
def test_a_rule_that_names_its_classes_names_all_of_a_task(name):
  names = LABEL_RULES[TASKS[name].label_rule].class_names
  if names is not None:
    assert len(names) == len(set(names)) == TASKS[name].num_classes
  else:
    assert TASKS[name].label_rule == "label"
