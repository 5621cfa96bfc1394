"""The table of published tasks: where the data are, how they are split, labels.

Every row is plain data, readable without TensorFlow. Sizes and classes are constants:
a training set may lack classes, and TFDS knows no sizes before it has prepared a set.

Sources: google-research/task_adaptation (VTAB-1k), KMnP/vpt (FGVC), the tables of
InsVP and DAM-VP (HTA), kaidic/LDAM-DRW (CIFAR-100-LT).
"""

from collections.abc import Mapping
import dataclasses
import types


@dataclasses.dataclass(frozen=True)
class Subset:
  """Which of a task's training images are used, and how.

  Attributes:
    rule: how train and val are drawn.
      "slices": both are expressions over the official splits, as they stand.
      "lists": listed by name, in VPT-style train.json and val.json.
      "stratified": val is drawn from the official train split, each class its
        share, seeded by `data.split_seed`.
      "first": the first `train` images in the order of the original files; val is
        the rest.
      "shuffled": as "first", after `random.Random(3407).shuffle`.
      "long_tail": from class c the first int(500 * imbalance ** (-c / 99)) of its
        images, shuffled by numpy's legacy generator with seed 0; val is drawn from
        them as in "stratified".
    train: number of training images.
    val: number of images that choose hyper-parameters.
    retrain: whether the final model is trained on train + val, or on train alone.
    imbalance: largest over smallest class of a long tail.
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
    name: what a user types.
    benchmark: "vtab", "fgvc", "hta" or "cifar100_lt".
    group: VTAB's "natural", "specialized", "structured"; else the benchmark.
    spec: the TFDS builder, with the versions that hold the published data; "" where
      TFDS has none.
    num_classes: k.
    train: TFDS expression of the training images, or of those that train and val
      are drawn from.
    val: TFDS expression of the 200 (VTAB) or official validation images; "" where
      val is drawn.
    test: TFDS expression of the test split.
    num_test: its size.
    subsets: the named choices of training images; the first one is the default.
    label_rule: a key of `labels.LABEL_RULES`.
    id_feature: the TFDS feature that names an example, for rules that need names.
    folder: how the task is read from files (`data.root`): "noah", "lists", "gtsrb",
      or "" for not at all.
    folder_name: name of the task's folder in such a collection.
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
  folder: str = ""
  folder_name: str = ""

  def subset(self, name: str = "") -> Subset:
    """Returns a named choice of training images; "" is the default.

    Raises:
      ValueError: the task has no such choice.
    """
    if name and name not in self.subsets:
      raise ValueError(
        f"config.data.subset is {name!r}, but {self.name} has "
        f"{', '.join(self.subsets)}. Leave it empty for the first one."
      )
    return self.subsets[name or next(iter(self.subsets))]

  def final_split(self, subset: str = "") -> str:
    """Returns what the final model of the protocol is trained on."""
    return "train_val" if self.subset(subset).retrain else "train"

  def unpublished_sizes(self, sizes: Mapping[str, int], subset: str = "") -> list[str]:
    """Returns a line for each split that has not its published size."""
    chosen = self.subset(subset)
    published = {"train": chosen.train, "val": chosen.val, "test": self.num_test}
    return [
      f"{self.name}: the {name} split has {sizes[name]} images, published are {number}"
      for name, number in published.items()
      if name in sizes and sizes[name] != number
    ]


def _subsets(**subsets: Subset) -> Mapping[str, Subset]:
  return types.MappingProxyType(subsets)


_VAL, _TEST = "validation[:200]", "test"
_DIABETIC = "diabetic_retinopathy_detection/btgraham-300:3.*.*"

# (name, TFDS builder, classes, val, test, size of test, label rule, folder in the
# collections that others distribute). Every split is a plain slice of TFDS's order.
# oxford_iiit_pet's 3.* is gone from TFDS; 4.0.0 holds the same images in that order.
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


def _vtab(group: str, row: tuple) -> Task:
  name, spec, num_classes, val, test, num_test = row
  own_rule = group == "structured" and name != "dmlab"
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
    label_rule=name if own_rule else "label",
    folder="noah",
    folder_name=_NOAH_NAMES.get(name, name),
  )


# Data sets of FGVC and HTA: (TFDS builder, classes, train, val, test, size of test,
# feature that names an example, kind of folder, name of the folder).
_SETS = {
  "dtd": ("dtd:3.*.*", 47, "train", "validation", "test", 1880, "file_name", "", ""),
  "cub": (
    "caltech_birds2011:0.*.*",
    200,
    "train",
    "",
    "test",
    5794,
    "image/filename",
    "lists",
    "CUB_200_2011",
  ),
  # TFDS has no NABirds, and of GTSRB only a copy without test labels.
  "nabirds": ("", 555, "", "", "", 24633, "", "lists", "nabirds"),
  "stanford_dogs": (
    "stanford_dogs:0.*.*",
    120,
    "train",
    "",
    "test",
    8580,
    "image/filename",
    "lists",
    "stanford-dogs",
  ),
  "oxford_flowers": (
    "oxford_flowers102:2.*.*",
    102,
    "train",
    "validation",
    "test",
    6149,
    "file_name",
    "lists",
    "OxfordFlower",
  ),
  "stanford_cars": (
    "cars196:2.*.*",
    196,
    "train",
    "",
    "test",
    8041,
    "",
    "lists",
    "stanford-cars",
  ),
  "food101": (
    "food101:2.*.*",
    101,
    "train",
    "",
    "validation",  # what TFDS calls Food-101's test split
    25250,
    "id",
    "",
    "",
  ),
  "cifar100": ("cifar100:3.*.*", 100, "train", "", "test", 10000, "id", "", ""),
  "cifar10": ("cifar10:3.*.*", 10, "train", "", "test", 10000, "id", "", ""),
  "gtsrb": ("", 43, "", "", "", 12630, "", "gtsrb", "gtsrb"),
  "svhn": ("svhn_cropped:3.*.*", 10, "train", "", "test", 26032, "id", "", ""),
}

# VPT trains FGVC on its 90% alone, never again on all. Its lists are not ours to
# distribute: "vpt" reads them, "drawn" draws as many of each class without them.
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
# The standard sizes of the tail, floor(500 * imbalance ** (-c / 99)) summed over c;
# a tenth of them is val while choosing, and all of them train the final model.
_TAILS = {10: 19573, 50: 12608, 100: 10847}


def _of_set(
  benchmark: str, name: str, data_set: str, subsets: Mapping[str, Subset]
) -> Task:
  spec, num_classes, train, val, test, num_test, id_feature, folder, folder_name = (
    _SETS[data_set]
  )
  return Task(
    name=name,
    benchmark=benchmark,
    group=benchmark,
    spec=spec,
    num_classes=num_classes,
    train=train,
    val=val,
    test=test,
    num_test=num_test,
    subsets=subsets,
    id_feature=id_feature,
    folder=folder,
    folder_name=folder_name,
  )


def _tail(imbalance: int, total: int) -> Task:
  val = total // 10
  subset = Subset("long_tail", total - val, val, imbalance=imbalance)
  name = f"cifar100_lt{imbalance}"
  return _of_set("cifar100_lt", name, "cifar100", _subsets(official=subset))


def _table() -> dict[str, Task]:
  rows = [_vtab("natural", row) for row in _NATURAL]
  rows += [_vtab("specialized", row) for row in _SPECIALIZED]
  rows += [_vtab("structured", row) for row in _STRUCTURED]
  for benchmark, sets in (("fgvc", _FGVC), ("hta", _HTA)):
    rows += [_of_set(benchmark, f"{benchmark}_{s}", s, sub) for s, sub in sets.items()]
  rows += [_tail(imbalance, total) for imbalance, total in _TAILS.items()]
  return {task.name: task for task in rows}


TASKS: dict[str, Task] = _table()


def _groups() -> dict[str, tuple[str, ...]]:
  groups: dict[str, list[str]] = {}
  for task in TASKS.values():
    groups.setdefault(task.group, []).append(task.name)
  vtab = [name for name, task in TASKS.items() if task.benchmark == "vtab"]
  return {name: tuple(names) for name, names in {**groups, "vtab": vtab}.items()}


# What stands for several tasks: VTAB's three groups and each benchmark.
GROUPS: dict[str, tuple[str, ...]] = _groups()
