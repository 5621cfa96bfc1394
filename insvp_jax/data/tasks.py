"""The table of published tasks: where the data are, how they are split, labels.

A row is plain data, readable without TensorFlow. `LABEL_RULES` names the rules
that are there; a task of another rule says so when it is asked for.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Task:
  """One task of a benchmark.

  Attributes:
    name: what a user types.
    group: "natural", "specialized" or "structured" (VTAB-1k's).
    spec: the TFDS builder, with the versions that hold the published data.
    num_classes: k; never inferred from the 1,000 training images, in which some
      classes of some tasks do not occur.
    val: TFDS expression of the 200 images that choose hyper-parameters.
    test: TFDS expression of the final test split.
    num_test: size of the test split.
    label_rule: how an example's features become its label.
    train: TFDS expression of the 800 training images.
  """

  name: str
  group: str
  spec: str
  num_classes: int
  val: str
  test: str
  num_test: int
  label_rule: str = "label"
  train: str = "train[:800]"


# What `tfds_source` can compute today: the feature `label` as it is.
LABEL_RULES = ("label",)

_VAL, _TEST = "validation[:200]", "test"
_DIABETIC = "diabetic_retinopathy_detection/btgraham-300:3.*.*"

# Source: google-research/task_adaptation, data/*.py. Every split is a plain slice
# of TFDS's own order. oxford_iiit_pet's 3.* is gone from TFDS; 4.0.0 holds the same
# images in the same order.
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
  ("clevr_count", _CLEVR[0], 8, *_CLEVR[1:], "clevr_count"),
  ("clevr_distance", _CLEVR[0], 6, *_CLEVR[1:], "clevr_distance"),
  ("dmlab", "dmlab:2.0.1", 6, _VAL, _TEST, 22735),
  ("kitti_distance", "kitti:3.*.*", 4, _VAL, _TEST, 711, "kitti_distance"),
  ("dsprites_location", _DSPRITES[0], 16, *_DSPRITES[1:], "dsprites_location"),
  ("dsprites_orientation", _DSPRITES[0], 16, *_DSPRITES[1:], "dsprites_orientation"),
  ("smallnorb_azimuth", _NORB[0], 18, *_NORB[1:], "smallnorb_azimuth"),
  ("smallnorb_elevation", _NORB[0], 9, *_NORB[1:], "smallnorb_elevation"),
)
_GROUPS = {
  "natural": _NATURAL,
  "specialized": _SPECIALIZED,
  "structured": _STRUCTURED,
}

TASKS: dict[str, Task] = {
  row[0]: Task(row[0], group, *row[1:])
  for group, rows in _GROUPS.items()
  for row in rows
}


def supported() -> tuple[str, ...]:
  """Returns the names of the tasks whose label rule is there."""
  return tuple(name for name, t in TASKS.items() if t.label_rule in LABEL_RULES)
