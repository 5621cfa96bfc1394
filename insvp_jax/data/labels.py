"""How an example's features become its label, task by task.

The rules are numpy, so that they can be checked over all values without TensorFlow.

Source: google-research/task_adaptation, data/{clevr,kitti,dsprites,smallnorb}.py.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

# CLEVR: distance of the closest object, in the units of TFDS's pixel_coords.
_CLEVR_BOUNDS = np.array([0, 8, 8.5, 9, 9.5, 10, 100], np.float64)
# KITTI: distance of the closest vehicle in metres; 1000 stands for none.
_KITTI_BOUNDS = np.array([-100, 8, 20, 999], np.float64)
_KITTI_NO_VEHICLE = 1000.0
# Car, van and truck come first among KITTI's types.
_KITTI_NUM_VEHICLES = 3


# A class index, or those of many examples.
Label = int | np.integer | np.ndarray


@dataclasses.dataclass(frozen=True)
class LabelRule:
  """One rule.

  Attributes:
    features: the TFDS features it reads, as `tfrecords.pick` names them.
    compute: maps these features of one example to a class index; where all of them
      are single numbers, those of many examples at once, too.
    class_names: one name per class; None takes those of TFDS's feature.
  """

  features: Mapping[str, Any]
  compute: Callable[[Mapping[str, Any]], Label]
  class_names: Sequence[str] | None = None


def _feature(name: str) -> LabelRule:
  """Returns the rule that takes a class label as it stands."""
  return LabelRule({name: True}, lambda example: example[name])


def clevr_count(example: Mapping[str, Any]) -> int:
  """Returns the number of objects minus 3: scenes have 3 to 10 objects."""
  return len(example["objects"]["size"]) - 3


def clevr_distance(example: Mapping[str, Any]) -> int:
  """Returns the bin of the closest object's distance.

  A bin is open at its lower bound: 8.0 is in bin 0, 8.01 in bin 1. What lies in none,
  such as a scene without objects, gets an invalid class: -1 or 6.
  """
  depths = np.asarray(example["objects"]["pixel_coords"], np.float32)[:, 2]
  return _bin(min(depths.tolist(), default=np.inf), _CLEVR_BOUNDS)


def kitti_distance(example: Mapping[str, Any]) -> int:
  """Returns the bin of the closest car's, van's or truck's distance.

  Bins are open at their lower bound: 0 is up to 8 m, 1 up to 20 m, 2 beyond; 3 means
  no vehicle. -1, an invalid class, stands for what is no distance.
  """
  types = np.asarray(example["objects"]["type"])
  depths = np.asarray(example["objects"]["location"], np.float32)[:, 2]
  depths = depths[types < _KITTI_NUM_VEHICLES]
  return _bin(float(min([*depths, _KITTI_NO_VEHICLE])), _KITTI_BOUNDS)


def _bin(value: float, bounds: np.ndarray) -> int:
  """Returns the largest i with bounds[i] < value; -1 where there is none."""
  return int(np.count_nonzero(bounds < value)) - 1


def dsprites_location(example: Mapping[str, Any]) -> Label:
  """Returns one of 16 equal bins of the 32 x positions."""
  return example["label_x_position"] // 2


def dsprites_orientation(example: Mapping[str, Any]) -> Label:
  """Returns one of 16 bins of the 40 orientations, 3 and 2 wide in turn."""
  return example["label_orientation"] * 16 // 40


LABEL_RULES: dict[str, LabelRule] = {
  "label": _feature("label"),
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
    tuple(
      f"orientation {-(-5 * i // 2)}-{-(-5 * (i + 1) // 2) - 1} of 40"
      for i in range(16)
    ),
  ),
  "smallnorb_azimuth": dataclasses.replace(
    _feature("label_azimuth"), class_names=tuple(f"{20 * i} degrees" for i in range(18))
  ),
  "smallnorb_elevation": dataclasses.replace(
    _feature("label_elevation"),
    class_names=tuple(f"{30 + 5 * i} degrees" for i in range(9)),
  ),
}
