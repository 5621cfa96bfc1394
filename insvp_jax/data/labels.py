"""How the label of each task is computed from the features of a TFDS example.

The rules are in numpy, so that they can be tested over all values without TensorFlow.
An index of a data set's records (`sources.tfrecords`) is cached under the name of the
rule's function: whoever changes what a function computes has to rename it.

Source: google-research/task_adaptation, data/{clevr,kitti,dsprites,smallnorb}.py.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

# CLEVR: bounds of the bins of the closest object's distance, in the units of TFDS's
# pixel_coords. Bin i is (bounds[i], bounds[i + 1]].
_CLEVR_BOUNDS = np.array([0, 8, 8.5, 9, 9.5, 10, 100], np.float64)
# KITTI: bounds of the bins of the closest vehicle's distance in metres. Negative
# distances, down to -100 m, belong to the first bin.
_KITTI_BOUNDS = np.array([-100, 8, 20, 999], np.float64)
# The distance that stands for "no vehicle": above the last bound.
_KITTI_NO_VEHICLE = 1000.0
# The first three of KITTI's types, car, van and truck, are vehicles.
_KITTI_NUM_VEHICLES = 3

# A class index, or the class indices of many examples.
Label = int | np.integer | np.ndarray


@dataclasses.dataclass(frozen=True)
class LabelRule:
  """How a label is computed.

  Attributes:
    features: the TFDS features that `compute` reads: {name: True}, or for a feature
      with features of its own {name: {name: True}}.
    compute: maps these features of one example to a class index. Where all of them are
      single numbers it also maps arrays of many examples to many class indices.
    class_names: one name per class; None takes the names of TFDS's feature.
  """

  features: Mapping[str, Any]
  compute: Callable[[Mapping[str, Any]], Label]
  class_names: Sequence[str] | None = None


def _class_label(name: str) -> LabelRule:
  """Returns the rule that takes a feature as the label."""
  return LabelRule({name: True}, lambda example: example[name])


def clevr_count(example: Mapping[str, Any]) -> int:
  """Returns the number of objects minus 3, since scenes have 3 to 10 objects."""
  return len(example["objects"]["size"]) - 3


def clevr_distance(example: Mapping[str, Any]) -> int:
  """Returns the bin of the closest object's distance.

  A bin is open at its lower bound: 8.0 is in bin 0, 8.01 in bin 1. A distance outside
  of all bins, such as that of a scene without objects, gets an invalid class, -1 or 6,
  which reading the data set reports.
  """
  # As float32, as TFDS stores them.
  depths = np.asarray(example["objects"]["pixel_coords"], np.float32)[:, 2]
  return _bin(min(depths.tolist(), default=np.inf), _CLEVR_BOUNDS)


def kitti_distance(example: Mapping[str, Any]) -> int:
  """Returns the bin of the closest car's, van's or truck's distance.

  Bins are open at their lower bound: 0 is up to 8 m, 1 up to 20 m, 2 beyond; 3 means
  that there is no vehicle. A distance below -100 m gets -1, an invalid class.
  """
  types = np.asarray(example["objects"]["type"])
  depths = np.asarray(example["objects"]["location"], np.float32)[:, 2]
  depths = depths[types < _KITTI_NUM_VEHICLES]
  return _bin(float(min([*depths, _KITTI_NO_VEHICLE])), _KITTI_BOUNDS)


def _bin(value: float, bounds: np.ndarray) -> int:
  """Returns the largest i with bounds[i] < value; -1 where there is none."""
  # The bounds ascend, so counting finds the place; NaN is above none of them.
  return int(np.count_nonzero(bounds < value)) - 1


def dsprites_location(example: Mapping[str, Any]) -> Label:
  """Returns which of 16 equal bins holds the x position, one of 32."""
  return example["label_x_position"] // 2


def dsprites_orientation(example: Mapping[str, Any]) -> Label:
  """Returns which of 16 bins holds the orientation, one of 40.

  The bins are 3 and 2 orientations wide in turn.
  """
  return example["label_orientation"] * 16 // 40


# By `Task.label_rule`.
LABEL_RULES: dict[str, LabelRule] = {
  "label": _class_label("label"),
  "clevr_count": LabelRule(
    {"objects": {"size": True}},
    clevr_count,
    tuple(f"{n} objects" for n in range(3, 11)),
  ),
  "clevr_distance": LabelRule(
    {"objects": {"pixel_coords": True}},
    clevr_distance,
    ("0-8", "8-8.5", "8.5-9", "9-9.5", "9.5-10", "10-100"),
  ),
  "kitti_distance": LabelRule(
    {"objects": {"type": True, "location": True}},
    kitti_distance,
    ("up to 8 m", "8-20 m", "beyond 20 m", "no vehicle"),
  ),
  "dsprites_location": LabelRule(
    {"label_x_position": True},
    dsprites_location,
    tuple(f"x {2 * i}-{2 * i + 1} of 32" for i in range(16)),
  ),
  "dsprites_orientation": LabelRule(
    {"label_orientation": True},
    dsprites_orientation,
    # The first orientation of bin i is 5 i / 2, rounded up.
    tuple(
      f"orientation {-(-5 * i // 2)}-{-(-5 * (i + 1) // 2) - 1} of 40"
      for i in range(16)
    ),
  ),
  "smallnorb_azimuth": dataclasses.replace(
    _class_label("label_azimuth"),
    class_names=tuple(f"{20 * i} degrees" for i in range(18)),
  ),
  "smallnorb_elevation": dataclasses.replace(
    _class_label("label_elevation"),
    class_names=tuple(f"{30 + 5 * i} degrees" for i in range(9)),
  ),
}
