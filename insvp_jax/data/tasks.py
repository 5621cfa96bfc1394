"""The table of published tasks: data sets, splits, label rules, numbers of classes.

`TASKS["svhn"]` and so on; `GROUPS` names several tasks together. Every row is plain
data, readable without TensorFlow. Sizes and numbers of classes are constants, because a
training set may lack classes and TFDS knows no sizes before it has prepared a set.

Sources: google-research/task_adaptation (VTAB-1k), KMnP/vpt (FGVC), the tables of
InsVP and DAM-VP (HTA), kaidic/LDAM-DRW (CIFAR-100-LT).
"""

from collections.abc import Mapping
import dataclasses
import types
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Subset:
  """Which of a task's training images are used, and how.

  Attributes:
    rule: how train and val are drawn; see `subsets.draw_train_val`.
      "slices": train and val are TFDS expressions, `Task.train` and `Task.val`.
      "lists": train and val are listed by name in VPT-style train.json and val.json.
      "stratified": val is drawn from the official train split, its share of each
        class, seeded by `data.split_seed`.
      "first": train is the first `train` images in the order of the original files, val
        is the rest.
      "shuffled": as "first", after `random.Random(3407).shuffle`.
      "long_tail": of class c the first int(500 * imbalance ** (-c / 99)) images are
        kept, shuffled by numpy's legacy generator with seed 0; val is drawn from them
        as in "stratified".
    train: number of training images.
    val: number of images that hyper-parameters are chosen on.
    retrain: whether the final model is trained on train + val, or on train alone.
    imbalance: size of the largest class divided by that of the smallest, for a long
      tail.
  """

  rule: str
  train: int
  val: int
  retrain: bool = True
  imbalance: int = 1


@dataclasses.dataclass(frozen=True)
class Task:
  """One task of a benchmark.

  Attributes:
    name: the task's name, as a user types it.
    benchmark: "vtab", "fgvc", "hta" or "cifar100_lt".
    group: "natural", "specialized" or "structured" for VTAB; else the benchmark.
    spec: the TFDS builder, with the versions that hold the published data; "" where
      TFDS has none.
    num_classes: k.
    train: TFDS expression of the training images, or of those that train and val are
      drawn from.
    val: TFDS expression of the 200 (VTAB) or official validation images; "" where val
      is drawn.
    test: TFDS expression of the test split.
    num_test: number of test images.
    subsets: the named choices of training images; the first one is the default.
    label_rule: how labels are computed, a key of `labels.LABEL_RULES`.
    id_feature: the TFDS feature that names an example, for rules that need names.
    folder_format: how the task can be read from image files below `data.root`: "noah"
      (`sources.vtab_folder`), "lists" (`sources.fgvc_folder`), "gtsrb"
      (`sources.gtsrb`), or "" for not at all.
    folder_name: name of the task's folder where several tasks' folders lie together.
    ordered: whether the classes are grades of one thing, the next one the nearest.
  """

  name: str
  benchmark: str
  group: str
  spec: str
  num_classes: int
  train: str
  val: str
  test: str
  num_test: int
  subsets: Mapping[str, Subset]
  label_rule: str = "label"
  id_feature: str = ""
  folder_format: str = ""
  folder_name: str = ""
  ordered: bool = False

  def subset(self, name: str = "") -> Subset:
    """Returns a named choice of training images.

    Args:
      name: a key of `subsets`, as config.data.subset; "" takes the default.

    Raises:
      ValueError: if the task has no such choice.
    """
    if name and name not in self.subsets:
      raise ValueError(
        f"config.data.subset is {name!r}, but {self.name} has "
        f"{', '.join(self.subsets)}. Leave it empty for the first one."
      )
    return self.subsets[name or next(iter(self.subsets))]

  def final_split(self, subset: str = "") -> str:
    """Returns the split that the protocol's final model is trained on.

    Args:
      subset: the choice of training images; "" takes the default.
    """
    return "train_val" if self.subset(subset).retrain else "train"

  def unpublished_sizes(self, sizes: Mapping[str, int], subset: str = "") -> list[str]:
    """Returns a line of warning for each split that has not its published size.

    Args:
      sizes: number of images of each split; only train, val and test are looked at.
      subset: the choice of training images; "" takes the default.
    """
    chosen = self.subset(subset)
    published = {"train": chosen.train, "val": chosen.val, "test": self.num_test}
    return [
      f"{self.name}: the {name} split has {sizes[name]} images, published are {number}"
      for name, number in published.items()
      if name in sizes and sizes[name] != number
    ]


def _subsets(**subsets: Subset) -> Mapping[str, Subset]:
  """Returns the subsets by name, read-only: rows of the table are shared."""
  return types.MappingProxyType(subsets)


# --- VTAB-1k. Every task trains on the first 800 images of TFDS's train split and
# chooses on 200 others; every split is a plain slice of TFDS's order. A row is (name,
# TFDS builder, number of classes, val, test, number of test images).

_VAL, _TEST = "validation[:200]", "test"
_DIABETIC = "diabetic_retinopathy_detection/btgraham-300:3.*.*"

# Where TFDS has no validation split, val is the first 200 images after those that
# task_adaptation trains on. oxford_iiit_pet's 3.* is gone from TFDS; 4.0.0 holds the
# same images in that order.
_NATURAL = (
  ("caltech101", "caltech101:3.*.*", 102, "train[2754:2954]", _TEST, 6084),
  ("cifar100", "cifar100:3.*.*", 100, "train[45000:45200]", _TEST, 10000),
  ("dtd", "dtd:3.*.*", 47, _VAL, _TEST, 1880),
  ("oxford_flowers102", "oxford_flowers102:2.*.*", 102, _VAL, _TEST, 6149),
  ("oxford_iiit_pet", "oxford_iiit_pet:4.*.*", 37, "train[2944:3144]", _TEST, 3669),
  ("svhn", "svhn_cropped:3.*.*", 10, "train[65931:66131]", _TEST, 26032),
  ("sun397", "sun397/tfds:4.*.*", 397, _VAL, _TEST, 21750),
)
_SPECIALIZED = (
  ("patch_camelyon", "patch_camelyon:2.*.*", 2, _VAL, _TEST, 32768),
  ("eurosat", "eurosat/rgb:2.*.*", 10, "train[16200:16400]", "train[21600:]", 5400),
  ("resisc45", "resisc45:3.*.*", 45, "train[18900:19100]", "train[25200:]", 6300),
  ("diabetic_retinopathy", _DIABETIC, 5, _VAL, _TEST, 42670),
)
# CLEVR's own test split has no labels; smallNORB's val comes from its test split.
_CLEVR = ("clevr:3.*.*", "train[63000:63200]", "validation", 15000)
_DSPRITES = ("dsprites:2.*.*", "train[589824:590024]", "train[663552:]", 73728)
_NORB = ("smallnorb:2.*.*", "test[:200]", "test[50%:]", 12150)
_STRUCTURED = (
  ("clevr_count", _CLEVR[0], 8, *_CLEVR[1:]),
  ("clevr_distance", _CLEVR[0], 6, *_CLEVR[1:]),
  ("dmlab", "dmlab:2.0.1", 6, _VAL, _TEST, 22735),
  ("kitti_distance", "kitti:3.*.*", 4, _VAL, _TEST, 711),
  ("dsprites_location", _DSPRITES[0], 16, *_DSPRITES[1:]),
  ("dsprites_orientation", _DSPRITES[0], 16, *_DSPRITES[1:]),
  ("smallnorb_azimuth", _NORB[0], 18, *_NORB[1:]),
  ("smallnorb_elevation", _NORB[0], 9, *_NORB[1:]),
)
# Names of the folders that NOAH's download script makes, where they differ.
_NOAH_NAMES = {
  "cifar100": "cifar",
  "clevr_distance": "clevr_dist",
  "kitti_distance": "kitti",
  "dsprites_location": "dsprites_loc",
  "dsprites_orientation": "dsprites_ori",
  "smallnorb_azimuth": "smallnorb_azi",
  "smallnorb_elevation": "smallnorb_ele",
}
_THOUSAND = _subsets(official=Subset("slices", 800, 200))


def _vtab_task(group: str, row: tuple) -> Task:
  """Returns the task of a row of `_NATURAL`, `_SPECIALIZED` or `_STRUCTURED`."""
  name, spec, num_classes, val, test, num_test = row
  # The structured tasks compute their labels, except dmlab, which has them in TFDS.
  has_rule = group == "structured" and name != "dmlab"
  return Task(
    name=name,
    benchmark="vtab",
    group=group,
    spec=spec,
    num_classes=num_classes,
    train="train[:800]",
    val=val,
    test=test,
    num_test=num_test,
    subsets=_THOUSAND,
    label_rule=name if has_rule else "label",
    folder_format="noah",
    folder_name=_NOAH_NAMES.get(name, name),
    ordered=name == "diabetic_retinopathy",
  )


# --- FGVC and HTA: the data sets, and for each benchmark the subsets of them.


class _DataSet(NamedTuple):
  """What the tasks of one data set share; the fields are those of `Task`."""

  spec: str
  num_classes: int
  num_test: int
  train: str = "train"
  val: str = ""
  test: str = "test"
  id_feature: str = ""
  folder_format: str = ""
  folder_name: str = ""


_DATA_SETS = {
  "dtd": _DataSet("dtd:3.*.*", 47, 1880, val="validation", id_feature="file_name"),
  "cub": _DataSet(
    "caltech_birds2011:0.*.*",
    200,
    5794,
    id_feature="image/filename",
    folder_format="lists",
    folder_name="CUB_200_2011",
  ),
  # TFDS has no NABirds.
  "nabirds": _DataSet(
    "", 555, 24633, train="", test="", folder_format="lists", folder_name="nabirds"
  ),
  "stanford_dogs": _DataSet(
    "stanford_dogs:0.*.*",
    120,
    8580,
    id_feature="image/filename",
    folder_format="lists",
    folder_name="stanford-dogs",
  ),
  "oxford_flowers": _DataSet(
    "oxford_flowers102:2.*.*",
    102,
    6149,
    val="validation",
    id_feature="file_name",
    folder_format="lists",
    folder_name="OxfordFlower",
  ),
  "stanford_cars": _DataSet(
    "cars196:2.*.*", 196, 8041, folder_format="lists", folder_name="stanford-cars"
  ),
  # TFDS calls Food-101's test split "validation".
  "food101": _DataSet("food101:2.*.*", 101, 25250, test="validation", id_feature="id"),
  "cifar100": _DataSet("cifar100:3.*.*", 100, 10000, id_feature="id"),
  "cifar10": _DataSet("cifar10:3.*.*", 10, 10000, id_feature="id"),
  # TFDS has only a copy of GTSRB without test labels.
  "gtsrb": _DataSet(
    "", 43, 12630, train="", test="", folder_format="gtsrb", folder_name="gtsrb"
  ),
  "svhn": _DataSet("svhn_cropped:3.*.*", 10, 26032, id_feature="id"),
}

# VPT trains FGVC on 90% of the official train split and never again on all of it. Its
# lists are not ours to distribute: "vpt" reads them, "drawn" draws as many images of
# each class without them.
_FGVC = {
  "cub": _subsets(
    vpt=Subset("lists", 5394, 600, retrain=False),
    drawn=Subset("stratified", 5394, 600, retrain=False),
  ),
  "nabirds": _subsets(vpt=Subset("lists", 21536, 2393, retrain=False)),
  # VPT's lists are the official splits here.
  "oxford_flowers": _subsets(vpt=Subset("slices", 1020, 1020, retrain=False)),
  "stanford_dogs": _subsets(
    vpt=Subset("lists", 10800, 1200, retrain=False),
    drawn=Subset("stratified", 10800, 1200, retrain=False),
  ),
  "stanford_cars": _subsets(
    vpt=Subset("lists", 7329, 815, retrain=False),
    drawn=Subset("stratified", 7329, 815, retrain=False),
  ),
}
# "official" retrains on every official training image; "insvp_release" is what the
# code of InsVP trains on.
_HTA = {
  "dtd": _subsets(
    official=Subset("slices", 1880, 1880),
    insvp_release=Subset("slices", 1880, 1880, retrain=False),
  ),
  "cub": _subsets(
    official=Subset("stratified", 5394, 600),
    insvp_release=Subset("lists", 5394, 600, retrain=False),
  ),
  "nabirds": _subsets(
    official=Subset("lists", 21536, 2393),
    insvp_release=Subset("lists", 21536, 2393, retrain=False),
  ),
  "stanford_dogs": _subsets(
    official=Subset("stratified", 10800, 1200),
    insvp_release=Subset("lists", 10800, 1200, retrain=False),
  ),
  "oxford_flowers": _subsets(
    official=Subset("slices", 1020, 1020),
    insvp_release=Subset("slices", 1020, 1020, retrain=False),
  ),
  "food101": _subsets(
    official=Subset("stratified", 68175, 7575),
    insvp_release=Subset("shuffled", 60600, 15150, retrain=False),
  ),
  "cifar100": _subsets(
    official=Subset("stratified", 45000, 5000),
    insvp_release=Subset("first", 40000, 10000, retrain=False),
  ),
  "cifar10": _subsets(
    official=Subset("stratified", 45000, 5000),
    insvp_release=Subset("first", 40000, 10000, retrain=False),
  ),
  "gtsrb": _subsets(
    official=Subset("stratified", 23976, 2664),
    insvp_release=Subset("shuffled", 21312, 5328, retrain=False),
  ),
  "svhn": _subsets(
    official=Subset("stratified", 65931, 7326),
    insvp_release=Subset("first", 58605, 14652, retrain=False),
  ),
}


def _task_of_data_set(
  benchmark: str, name: str, data_set: str, subsets: Mapping[str, Subset]
) -> Task:
  """Returns a task on one of `_DATA_SETS`."""
  return Task(
    name=name,
    benchmark=benchmark,
    group=benchmark,
    subsets=subsets,
    **_DATA_SETS[data_set]._asdict(),
  )


# --- CIFAR-100-LT. The standard number of images by imbalance: floor(500 * imbalance
# ** (-c / 99)) summed over the classes c. A tenth of them is val while
# hyper-parameters are chosen, and all of them train the final model.

_LONG_TAILS = {10: 19573, 50: 12608, 100: 10847}


def _long_tail_task(imbalance: int, total: int) -> Task:
  """Returns the task CIFAR-100-LT of one imbalance."""
  val = total // 10
  subset = Subset("long_tail", total - val, val, imbalance=imbalance)
  name = f"cifar100_lt{imbalance}"
  return _task_of_data_set("cifar100_lt", name, "cifar100", _subsets(official=subset))


# --- The table.


def _table() -> dict[str, Task]:
  """Returns all tasks by name, benchmark after benchmark."""
  tasks = [_vtab_task("natural", row) for row in _NATURAL]
  tasks += [_vtab_task("specialized", row) for row in _SPECIALIZED]
  tasks += [_vtab_task("structured", row) for row in _STRUCTURED]
  for benchmark, data_sets in (("fgvc", _FGVC), ("hta", _HTA)):
    tasks += [
      _task_of_data_set(benchmark, f"{benchmark}_{data_set}", data_set, subsets)
      for data_set, subsets in data_sets.items()
    ]
  tasks += [
    _long_tail_task(imbalance, total) for imbalance, total in _LONG_TAILS.items()
  ]
  return {task.name: task for task in tasks}


TASKS: dict[str, Task] = _table()


def _groups() -> dict[str, tuple[str, ...]]:
  """Returns the names of each group's tasks, in the table's order."""
  groups: dict[str, list[str]] = {}
  for task in TASKS.values():
    groups.setdefault(task.group, []).append(task.name)
  vtab = [name for name, task in TASKS.items() if task.benchmark == "vtab"]
  return {name: tuple(names) for name, names in {**groups, "vtab": vtab}.items()}


def are_ordered(task: str, data_config: Any) -> bool:
  """Returns whether a task's classes are grades of one thing, in their order.

  Args:
    task: its name; of one's own images, that of their folder.
    data_config: the section config.data, or a stored one, a dict; its `ordered` says
      it of one's own images.
  """
  is_known = task in TASKS and TASKS[task].ordered
  return is_known or bool(data_config.get("ordered"))


# Names that stand for several tasks: VTAB's three groups and each benchmark.
GROUPS: dict[str, tuple[str, ...]] = _groups()
