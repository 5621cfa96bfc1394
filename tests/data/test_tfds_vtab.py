"""All 19 tasks of VTAB-1k at their published sizes, from TFRecords to pixels."""

import dataclasses
import functools
import math
from typing import Any

from data_fixtures import data_config, png
import numpy as np
import pytest
from tfds_fixtures import (
  UNSEEN,
  Copies,
  bit_image,
  coloured,
  features_of,
  import_tfds,
  jpeg,
  number_in,
  places,
  prepare,
  record,
  shards_of,
)

from insvp_jax.data import load_data, splits
from insvp_jax.data.sources import tfds, tfds_builder
from insvp_jax.data.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class Published:
  """A task as task_adaptation defines it, written down apart from the table.

  Attributes:
    builder: TFDS's name.
    splits: size of each split that TFDS prepares.
    val: split and place of the first of the 200.
    test: split and place of the first, to the split's end.
    classes: k.
    sides: of the images.
  """

  builder: str
  splits: dict[str, int]
  val: tuple[str, int]
  test: tuple[str, int]
  classes: int
  sides: tuple[int, int]


def _plain(builder, classes, sides, train, test, val="", start=0) -> Published:
  """A set whose val is its own split, or lies in train from `start` on."""
  splits = {"train": train, "test": test} | ({"validation": val} if val else {})
  place = ("validation", 0) if val else ("train", start)
  return Published(builder, splits, place, ("test", 0), classes, sides)


def _one_split(builder, classes, sides, total, val, test) -> Published:
  where = ("train", val), ("train", test)
  return Published(builder, {"train": total}, *where, classes, sides)


def _clevr(classes) -> Published:
  splits = {"train": 70_000, "validation": 15_000}
  where = ("train", 63_000), ("validation", 0)
  return Published("clevr", splits, *where, classes, (16, 24))


def _norb(classes) -> Published:
  splits = {"train": 24_300, "test": 24_300}
  where = ("test", 0), ("test", 12_150)
  return Published("smallnorb", splits, *where, classes, (96, 96))


_DIABETIC = "diabetic_retinopathy_detection/btgraham-300"
_DSPRITES = _one_split("dsprites", 16, (64, 64), 737_280, 589_824, 663_552)
VTAB = {
  "caltech101": _plain("caltech101", 102, (48, 64), 3060, 6084, start=2754),
  "cifar100": _plain("cifar100", 100, (32, 32), 50_000, 10_000, start=45_000),
  "dtd": _plain("dtd", 47, (32, 40), 1880, 1880, 1880),
  "oxford_flowers102": _plain("oxford_flowers102", 102, (40, 32), 1020, 6149, 1020),
  "oxford_iiit_pet": _plain("oxford_iiit_pet", 37, (16, 24), 3680, 3669, start=2944),
  "svhn": _plain("svhn_cropped", 10, (32, 32), 73_257, 26_032, start=65_931),
  "sun397": _plain("sun397/tfds", 397, (24, 16), 76_127, 21_750, 10_875),
  "patch_camelyon": _plain("patch_camelyon", 2, (96, 96), 262_144, 32_768, 32_768),
  "eurosat": _one_split("eurosat/rgb", 10, (64, 64), 27_000, 16_200, 21_600),
  "resisc45": _one_split("resisc45", 45, (256, 256), 31_500, 18_900, 25_200),
  "diabetic_retinopathy": _plain(_DIABETIC, 5, (40, 48), 35_126, 42_670, 10_906),
  "clevr_count": _clevr(8),
  "clevr_distance": _clevr(6),
  "dmlab": _plain("dmlab", 6, (360, 480), 65_550, 22_735, 22_628),
  "kitti_distance": _plain("kitti", 4, (16, 56), 6347, 711, 423),
  "dsprites_location": _DSPRITES,
  "dsprites_orientation": _DSPRITES,
  "smallnorb_azimuth": _norb(18),
  "smallnorb_elevation": _norb(9),
}
# Kept as JPEG by TFDS or by those who distribute them.
_JPEG = ("caltech101", "resisc45", "dmlab", _DIABETIC)

# Distance of the closest object and its bin, with the bounds of CLEVR's bins.
_CLEVR = [(7.5, 0), (8.0, 0), (8.01, 1), (8.5, 1), (9.0, 2), (9.5, 3), (10.0, 4)]
_CLEVR += [(10.01, 5), (99.0, 5)]
# Types and distances of KITTI's objects; car, van and truck are 0, 1 and 2.
_KITTI = [
  ([0, 1], [30.0, 8.0], 0),
  ([2, 3], [8.01, 2.0], 1),  # a pedestrian is closer
  ([1, 7, 6, 5, 4], [20.0, 1.0, 1.0, 1.0, 1.0], 1),
  ([0], [20.5], 2),
  ([3, 5], [4.0, 5.0], 3),
  ([], [], 3),
]


# Numbers that differ by as many have the same objects.
_TURNS = math.lcm(8, len(_CLEVR), len(_KITTI))


def _objects(builder: str, number: int) -> dict[str, Any]:
  """Returns the features from which an example's label is computed."""
  if builder == "clevr":
    closest = _CLEVR[number % len(_CLEVR)][0]
    depths = [closest + 1] * (number % 8 + 2) + [closest]
    coordinates = [[3.0, 4.0, depth] for depth in depths]
    return {"objects": {"pixel_coords": coordinates, "size": [1] * len(depths)}}
  if builder == "kitti":
    types, depths, _ = _KITTI[number % len(_KITTI)]
    location = [[1.0, 2.0, depth] for depth in depths]
    return {"objects": {"type": types, "location": location}}
  if builder == "dsprites":
    return {"label_x_position": number % 32, "label_orientation": number % 40}
  if builder == "smallnorb":
    # The third label is TFDS's own "supervised" one, which VTAB does not use.
    category = {"label_category": (number + 2) % 5}
    return {"label_azimuth": number % 18, "label_elevation": number % 9, **category}
  return {}


def _label(name: str, number: int) -> int:
  """Returns what the label of an example should be."""
  if name == "clevr_count":
    return number % 8
  if name == "clevr_distance":
    return _CLEVR[number % len(_CLEVR)][1]
  if name == "kitti_distance":
    return _KITTI[number % len(_KITTI)][2]
  if name == "dsprites_location":
    return [x for x in range(16) for _ in range(2)][number % 32]
  if name == "dsprites_orientation":
    # Bins of 3, 2, 3, 2, ... orientations.
    return [x for x in range(16) for _ in range(3 - x % 2)][number % 40]
  return number % VTAB[name].classes


def _image(builder: str, number: int, sides: tuple[int, int]) -> bytes:
  if builder == "dsprites":
    return png(bit_image(number, *sides, high=1))
  if builder == "smallnorb":
    return png(bit_image(number, *sides, low=3, high=200))
  image = coloured(bit_image(number, *sides))
  return jpeg(image) if builder in _JPEG else png(image)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Prepares the data set of a task once; returns TFDS's folder."""
  root = tmp_path_factory.mktemp("tfds")
  done = set()

  def make(name: str):
    task = VTAB[name]
    if task.builder in done:
      return root
    done.add(task.builder)
    # TFDS knows some sets in several versions: the newest of the task's.
    features = features_of(task.builder)

    # TFDS looks at every feature of an example, which takes long: records whose objects
    # are the same are copies of one.
    @functools.cache
    def copies(turn: int) -> Copies:
      return Copies(record(features, **_objects(task.builder, turn)))

    def example(number: int) -> bytes:
      given = {"image": _image(task.builder, number, task.sides)}
      if "label" in features:
        given["label"] = number % task.classes
      if "image2" in features:
        given["image2"] = png(bit_image(number + 1, *task.sides))
      if "objects" in features:
        return copies(number % _TURNS)(**given)
      return copies(0)(**given, **_objects(task.builder, number))

    splits = {
      split: shards_of(total, _seen(task, split, total), example)
      for split, total in task.splits.items()
    }
    prepare(root, task.builder, splits, unseen=example(UNSEEN))
    return root

  return make


def _seen(task: Published, split: str, total: int) -> list[tuple[int, int]]:
  """Returns the places where slices start and end, with what lies next to them."""
  ranges = [(0, 803)] if split == "train" else []
  if split == task.val[0]:
    ranges.append((max(task.val[1] - 3, 0), task.val[1] + 203))
  if split == task.test[0]:
    start = task.test[1]
    ranges += [(max(start - 3, 0), start + 20), (total - 20, total)]
  merged: list[tuple[int, int]] = []
  for start, stop in sorted(ranges):
    if merged and start <= merged[-1][1]:
      merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
    else:
      merged.append((start, stop))
  return merged


def _check_pixels(name: str, images: np.ndarray):
  assert images.dtype == np.uint8 and images.shape[1:] == (8, 8, 3)
  if "label" in features_of(VTAB[name].builder):
    red, green, blue = np.moveaxis(images.astype(int), -1, 0)
    np.testing.assert_allclose(red + green, 255, atol=40)
    np.testing.assert_allclose(blue, 77, atol=40)
  elif VTAB[name].builder in ("dsprites", "smallnorb"):
    levels = [0, 255] if VTAB[name].builder == "dsprites" else [3, 200]
    assert np.unique(images).tolist() == levels
    assert (images == images[..., :1]).all()


@pytest.mark.parametrize("name", VTAB)
def test_a_task_has_the_published_examples_in_tfds_order(name, prepared, caplog):
  task = VTAB[name]
  # Large test splits stay in their files.
  config = data_config(data_dir=str(prepared(name)), resident_mb=1)
  data = load_data(name, config, 8)
  assert data.num_classes == task.classes == len(set(data.class_names))
  assert data.final_split == "train_val"
  assert not caplog.records  # neither our warnings nor TFDS's own
  val, test = task.val[1], task.test[1]
  num_test = task.splits[task.test[0]] - test
  assert len(data.splits["test"]) == num_test
  expected = {"train": range(800), "val": range(val, val + 200)}
  expected["train_val"] = [*expected["train"], *expected["val"]]
  first, last = np.arange(20), np.arange(num_test - 20, num_test)
  expected["test"] = (test + np.concatenate([first, last])).tolist()
  looked_at = {"test": np.concatenate([first, last])}
  for split, numbers in expected.items():
    part = splits.to_memory(data.splits[split], looked_at.get(split))
    assert [number_in(image) for image in part.images] == list(numbers), split
    assert part.labels.tolist() == [_label(name, i) for i in numbers], split
    assert part.labels.dtype == np.int32
    _check_pixels(name, part.images)


@pytest.mark.parametrize("name", ["resisc45", "smallnorb_azimuth", "sun397"])
def test_the_whole_test_split_follows_the_files(name, prepared):
  """Between the images that are looked at, too, by their places in the files."""
  task = VTAB[name]
  config = data_config(data_dir=str(prepared(name)))
  builder = tfds_builder.find_builder(TASKS[name], config.data_dir)
  test = tfds.records_of_splits(builder, TASKS[name], config)["test"]
  total = task.splits[task.test[0]]
  found = places(builder, task.test[0], test)
  np.testing.assert_array_equal(found, np.arange(task.test[1], total))


def test_every_task_of_vtab_is_here():
  import_tfds()
  assert list(VTAB) == [n for n, task in TASKS.items() if task.benchmark == "vtab"]


def test_a_set_of_another_size_is_warned_of(tmp_path, caplog):
  features = features_of("dtd")

  def example(number):
    image = png(coloured(bit_image(number, 8, 8)))
    return record(features, image=image, label=number % 47)

  splits = {"train": 805, "validation": 200, "test": 1879}
  shards = {name: shards_of(n, [], example) for name, n in splits.items()}
  prepare(tmp_path, "dtd", shards, unseen=example(0))
  load_data("dtd", data_config(data_dir=str(tmp_path)), 8)
  warned = [line.getMessage() for line in caplog.records]
  assert warned == ["dtd: the test split has 1879 images, published are 1880"]
