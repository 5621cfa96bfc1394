"""What getting each data set takes: packages, and files that only a person can fetch.

The tables are plain data, readable without TensorFlow. A data set that is not in
`REQUIREMENTS` TFDS downloads and prepares by itself.

Sources: the builders of tensorflow-datasets 4.9.10; KMnP/vpt's README (its lists);
torchvision's GTSRB.
"""

from collections.abc import Mapping
import dataclasses

from insvp_jax.data.tasks import Task


@dataclasses.dataclass(frozen=True)
class ManualFiles:
  """Files that TFDS needs and a person has to fetch.

  Attributes:
    what: which files they are, in words.
    where: the address that they are to be had from.
    how: how they have to lie, in words; "{manual_dir}" stands for the folder.
    needs: patterns below that folder, each of which has to match a file.
  """

  what: str
  where: str
  how: str
  needs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Requirements:
  """What TFDS needs to prepare one data set.

  Attributes:
    packages: names of the modules that have to be importable while it is prepared.
    manual: the files that a person has to fetch; None for none.
    gone: why TFDS can no longer fetch the files; "" where it can.
    version: the version to prepare; "" for the one that TFDS takes by itself.
    note: what else a user has to know, in words.
    keys: for each split (number of examples, format of their keys), where a key is made
      of the row number in the original files; see `original_rows`.
  """

  packages: tuple[str, ...] = ()
  manual: ManualFiles | None = None
  gone: str = ""
  version: str = ""
  note: str = ""
  keys: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)


# Names that pip knows packages by, where they are imported by others.
PIP_NAMES = {
  "PIL": "pillow",
  "cv2": "opencv-python-headless",
  "importlib_resources": "importlib-resources",
}
# TFDS imports this whatever it prepares, and does not declare it.
ALWAYS_NEEDED = ("importlib_resources",)

_RESISC = ManualFiles(
  what="NWPU-RESISC45.rar",
  where="https://1drv.ms/u/s!AmgKYzARBl5ca3HNaHIlzp_IXjs",
  how="extracted to {manual_dir}/NWPU-RESISC45/<class>/*.jpg",
  needs=("NWPU-RESISC45/*/*.jpg",),
)
_DIABETIC = ManualFiles(
  what="Kaggle's train, test, sample and trainLabels.csv",
  where="https://www.kaggle.com/c/diabetic-retinopathy-detection/data",
  how="unpacked to {manual_dir}/train/*.jpeg, test/*.jpeg, sample/*.jpeg and "
  "trainLabels.csv",
  needs=("train/*.jpeg", "test/*.jpeg", "sample/*.jpeg", "trainLabels.csv"),
)
_CARS_FILES = (
  "cars_train.tgz",
  "cars_test.tgz",
  "car_devkit.tgz",
  "cars_test_annos_withlabels.mat",
)
_CARS = ManualFiles(
  what=", ".join(_CARS_FILES),
  where="a mirror (TFDS checks their checksums)",
  how="as they are in {manual_dir}",
  needs=_CARS_FILES,
)

# By TFDS's name of the data set.
REQUIREMENTS: dict[str, Requirements] = {
  "caltech101": Requirements(
    note="TFDS draws the training images in the order in which the file system lists "
    "them, so another machine may draw others"
  ),
  "cifar10": Requirements(keys={"train": (50000, "{}"), "test": (10000, "{}")}),
  "cifar100": Requirements(keys={"train": (50000, "{}"), "test": (10000, "{}")}),
  "oxford_flowers102": Requirements(packages=("scipy",)),
  "svhn_cropped": Requirements(
    packages=("scipy",), keys={"train": (73257, "{}"), "test": (26032, "{}")}
  ),
  "sun397": Requirements(packages=("cv2",)),
  "patch_camelyon": Requirements(
    packages=("h5py",),
    keys={
      "train": (262144, "train_{}"),
      "validation": (32768, "valid_{}"),
      "test": (32768, "test_{}"),
    },
  ),
  "eurosat": Requirements(note="its host, madm.dfki.de, is known for time-outs"),
  "resisc45": Requirements(manual=_RESISC),
  "diabetic_retinopathy_detection": Requirements(packages=("cv2",), manual=_DIABETIC),
  "clevr": Requirements(
    keys={
      "train": (70000, "CLEVR_train_{:06d}.png"),
      "validation": (15000, "CLEVR_val_{:06d}.png"),
    }
  ),
  "kitti": Requirements(packages=("cv2",)),
  "dsprites": Requirements(packages=("h5py",), keys={"train": (737280, "{}")}),
  "smallnorb": Requirements(keys={"train": (24300, "{}"), "test": (24300, "{}")}),
  "caltech_birds2011": Requirements(packages=("cv2",)),
  "stanford_dogs": Requirements(packages=("scipy",)),
  "cars196": Requirements(
    packages=("scipy", "PIL"),
    manual=_CARS,
    gone="the hosts that TFDS fetches it from are gone",
  ),
  # 2.0.0 has no ids, by which the release of InsVP orders the training images.
  "food101": Requirements(version="2.1.0"),
}

# What a user is told about the lists that define VPT's splits of FGVC.
VPT_LISTS = (
  "VPT's train.json, val.json and test.json (https://cornell.box.com/v/vptfgvcsplits)"
)
# What a folder holds that a task is read from, by `Task.folder_format`.
_FOLDER_CONTENTS = {
  "noah": "train800.txt, val200.txt, train800val200.txt, test.txt and images/, as "
  "NOAH's get_vtab1k.py makes them",
  "lists": f"the images as they are unpacked and {VPT_LISTS}",
  "gtsrb": "GTSRB/Training/<class>/*.ppm, GTSRB/Final_Test/Images/*.ppm and "
  "GT-final_test.csv, as torchvision unpacks them",
}
# Where images that TFDS does not fetch are to be had, by `Task.folder_name`.
_IMAGE_SOURCES = {
  "nabirds": "https://dl.allaboutbirds.org/nabirds",
  "gtsrb": "GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and "
  "GTSRB_Final_Test_GT.zip of "
  "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370",
}


def builder_name(task: Task) -> str:
  """Returns TFDS's name of the task's data set; "" where TFDS has none."""
  return task.spec.split(":")[0].split("/")[0]


def requirements(task: Task) -> Requirements:
  """Returns what preparing the task's data set takes."""
  return REQUIREMENTS.get(builder_name(task), Requirements())


def prepared_spec(task: Task) -> str:
  """Returns the TFDS builder to prepare, with its version."""
  version = requirements(task).version
  return f"{task.spec.split(':')[0]}:{version}" if version else task.spec


def folder_content(task: Task) -> str:
  """Returns in words what a folder holds that the task can be read from."""
  source = _IMAGE_SOURCES.get(task.folder_name)
  images = f"; images: {source}" if source else ""
  return f"{task.folder_name}/ with {_FOLDER_CONTENTS[task.folder_format]}{images}"


def fetched_by_hand(task: Task) -> str:
  """Returns in a few words what only a person can fetch; "" for nothing."""
  if not task.spec:
    return "the images" + (" and VPT's lists" if task.folder_format == "lists" else "")
  parts = []
  if manual := requirements(task).manual:
    parts.append(manual.what)
  if task.subset().rule == "lists":
    parts.append("VPT's lists")
  return " and ".join(parts)
