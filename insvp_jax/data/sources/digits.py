"""The handwritten digits that scikit-learn carries: real images, no download."""

import importlib.metadata
import importlib.util
from pathlib import Path

import ml_collections
import numpy as np

from insvp_jax.data import preprocess
from insvp_jax.data.splits import ArraySplit, TaskData, concatenate
from insvp_jax.data.subsets import stratified_mask

_NUM_TRAIN, _NUM_VAL = 800, 200


def load(data_config: ml_collections.ConfigDict, image_size: int) -> TaskData:
  """Reads 1,797 digits of 8 x 8 pixels: train 800, val 200, test 797.

  Each class keeps its share in each split.

  Args:
    data_config: the section config.data; `split_seed` draws the splits, `preset` says
      how images are enlarged.
    image_size: side of the model's input in pixels.

  Source: UCI "Optical Recognition of Handwritten Digits", the test part, as
    `sklearn.datasets.load_digits` returns it.
  """
  # To import scikit-learn takes longer than to import JAX, for one of its files.
  package = importlib.util.find_spec("sklearn").submodule_search_locations[0]
  rows = np.loadtxt(Path(package, "datasets/data/digits.csv.gz"), delimiter=",")
  # Grey levels are 0 to 16 in the file; the last column is the digit.
  grey = np.rint(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  images = np.repeat(grey[..., None], 3, axis=-1)
  preset = preprocess.get_preset(data_config.preset)
  everything = ArraySplit(
    preprocess.resize_all(preset, images, image_size), rows[:, -1].astype(np.int32)
  )
  seed = data_config.split_seed
  is_train_val = stratified_mask(everything.labels, _NUM_TRAIN + _NUM_VAL, seed)
  train_val = everything.take(np.flatnonzero(is_train_val))
  is_val = stratified_mask(train_val.labels, _NUM_VAL, seed)
  train = train_val.take(np.flatnonzero(~is_val))
  val = train_val.take(np.flatnonzero(is_val))
  splits = {
    "train": train,
    "val": val,
    "train_val": concatenate(train, val),
    "test": everything.take(np.flatnonzero(~is_train_val)),
  }
  version = importlib.metadata.version("scikit-learn")
  return TaskData(
    "digits", tuple("0123456789"), splits, source=f"scikit-learn {version} load_digits"
  )
