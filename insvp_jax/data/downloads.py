"""What getting each data set takes: packages, files that only a person can fetch.

Plain data, readable without TensorFlow. What is not here TFDS fetches by itself.

Sources: the builders of tensorflow-datasets 4.9.10; KMnP/vpt's README (its lists);
torchvision's GTSRB.
"""

from collections.abc import Mapping
import dataclasses

from insvp_jax.data.tasks import Task


@dataclasses.dataclass(frozen=True)
class Manual:
  """Files that TFDS does not fetch.

  Attributes:
    what: they are.
    where: they are to be had.
    how: they have to lie; "{manual_dir}" stands for the folder.
    needs: patterns below that folder, each of which has to match a file.
  """

  what: str
  where: str
  how: str
  needs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Builder:
  """What TFDS needs to prepare one data set.

  Attributes:
    packages: that have to be importable while it is prepared.
    manual: what TFDS does not fetch.
    gone: why TFDS can no longer fetch what it wants to.
    version: to prepare, where TFDS would take another one that the tasks allow.
    note: what else a user has to know.
    keys: for each split its size and the format of its examples' keys, where a key is
      made of the row number in the original files. (`subsets.tfds_order` orders keys.)
  """

  packages: tuple[str, ...] = ()
  manual: Manual | None = None
  gone: str = ""
  version: str = ""
  note: str = ""
  keys: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)


# What pip calls a package that is imported by another name.
PIP_NAMES = {
  "PIL": "pillow",
  "cv2": "opencv-python-headless",
  "importlib_resources": "importlib-resources",
}
# TFDS imports it whatever it prepares, and does not declare it.
ALWAYS = ("importlib_resources",)

_RESISC = Manual(
  what="NWPU-RESISC45.rar",
  where="https://1drv.ms/u/s!AmgKYzARBl5ca3HNaHIlzp_IXjs",
  how="extracted to {manual_dir}/NWPU-RESISC45/<class>/*.jpg",
  needs=("NWPU-RESISC45/*/*.jpg",),
)
_DIABETIC = Manual(
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
_CARS = Manual(
  what=", ".join(_CARS_FILES),
  where="a mirror (TFDS checks their checksums)",
  how="as they are in {manual_dir}",
  needs=_CARS_FILES,
)

# By TFDS's name of the data set.
BUILDERS: dict[str, Builder] = {
  "caltech101": Builder(
    note="TFDS draws the training images in the order in which the file system lists "
    "them, so another machine may draw others"
  ),
  "cifar10": Builder(keys={"train": (50000, "{}"), "test": (10000, "{}")}),
  "cifar100": Builder(keys={"train": (50000, "{}"), "test": (10000, "{}")}),
  "oxford_flowers102": Builder(packages=("scipy",)),
  "svhn_cropped": Builder(
    packages=("scipy",), keys={"train": (73257, "{}"), "test": (26032, "{}")}
  ),
  "sun397": Builder(packages=("cv2",)),
  "patch_camelyon": Builder(
    packages=("h5py",),
    keys={
      "train": (262144, "train_{}"),
      "validation": (32768, "valid_{}"),
      "test": (32768, "test_{}"),
    },
  ),
  "eurosat": Builder(note="its host, madm.dfki.de, is known for time-outs"),
  "resisc45": Builder(manual=_RESISC),
  "diabetic_retinopathy_detection": Builder(packages=("cv2",), manual=_DIABETIC),
  "clevr": Builder(
    keys={
      "train": (70000, "CLEVR_train_{:06d}.png"),
      "validation": (15000, "CLEVR_val_{:06d}.png"),
    }
  ),
  "kitti": Builder(packages=("cv2",)),
  "dsprites": Builder(packages=("h5py",), keys={"train": (737280, "{}")}),
  "smallnorb": Builder(keys={"train": (24300, "{}"), "test": (24300, "{}")}),
  "caltech_birds2011": Builder(packages=("cv2",)),
  "stanford_dogs": Builder(packages=("scipy",)),
  "cars196": Builder(
    packages=("scipy", "PIL"),
    manual=_CARS,
    gone="the hosts that TFDS fetches it from are gone",
  ),
  # 2.0.0 has no ids, by which the release of InsVP orders the training images.
  "food101": Builder(version="2.1.0"),
}

LISTS = (
  "VPT's train.json, val.json and test.json (https://cornell.box.com/v/vptfgvcsplits)"
)
# What a folder holds that a task is read from, by `Task.folder`.
_FOLDERS = {
  "noah": "train800.txt, val200.txt, train800val200.txt, test.txt and images/, as "
  "NOAH's get_vtab1k.py makes them",
  "lists": f"the images as they are unpacked and {LISTS}",
  "gtsrb": "GTSRB/Training/<class>/*.ppm, GTSRB/Final_Test/Images/*.ppm and "
  "GT-final_test.csv, as torchvision unpacks them",
}
# Where the images are to be had that TFDS does not fetch, by `Task.folder_name`.
_HOMES = {
  "nabirds": "https://dl.allaboutbirds.org/nabirds",
  "gtsrb": "GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and "
  "GTSRB_Final_Test_GT.zip of "
  "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370",
}


def builder_name(task: Task) -> str:
  """Returns TFDS's name of the task's data set; "" where it has none."""
  return task.spec.split(":")[0].split("/")[0]


def builder(task: Task) -> Builder:
  """Returns what preparing the task's data set takes."""
  return BUILDERS.get(builder_name(task), Builder())


def prepared_spec(task: Task) -> str:
  """Returns the TFDS builder to prepare, with its version."""
  version = builder(task).version
  return f"{task.spec.split(':')[0]}:{version}" if version else task.spec


def folder_content(task: Task) -> str:
  """Returns what a folder of files has to hold that the task is read from."""
  home = _HOMES.get(task.folder_name)
  images = f"; images: {home}" if home else ""
  return f"{task.folder_name}/ with {_FOLDERS[task.folder]}{images}"


def by_hand(task: Task) -> str:
  """Returns in a few words what only a person can fetch; "" for nothing."""
  found = builder(task)
  if not task.spec:
    return "the images" + (" and VPT's lists" if task.folder == "lists" else "")
  needed = []
  if found.manual:
    needed.append(found.manual.what)
  if task.subset().rule == "lists":
    needed.append("VPT's lists")
  return " and ".join(needed)
