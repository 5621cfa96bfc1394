"""The handwritten digits that scikit-learn carries: real images, no download."""

import ml_collections
import numpy as np

from insvp_jax.data import preprocess
from insvp_jax.data.arrays import ArraySplit, TaskData, concatenate
from insvp_jax.data.stratify import stratified_choice

_NUM_TRAIN, _NUM_VAL = 800, 200


def load(data_config: ml_collections.ConfigDict, image_size: int) -> TaskData:
  """Returns 1,797 digits of 8 x 8 pixels: train 800, val 200, test 797.

  Every digit keeps its share in each split.

  Args:
    data_config: `split_seed` draws the splits; `preset` says how to enlarge.
    image_size: side of the model's input in pixels.

  Source: UCI "Optical Recognition of Handwritten Digits", the test part, as
    `sklearn.datasets.load_digits` returns it.
  """
  import sklearn
  from sklearn import datasets

  stored = datasets.load_digits()
  grey = np.rint(stored.images * (255 / 16)).astype(np.uint8)  # 0..16 in the files
  images = np.repeat(grey[..., None], 3, axis=-1)
  preset = preprocess.get_preset(data_config.preset)
  everything = ArraySplit(
    preprocess.resize_all(preset, images, image_size), stored.target.astype(np.int32)
  )
  seed = data_config.split_seed
  chosen = stratified_choice(everything.labels, _NUM_TRAIN + _NUM_VAL, seed)
  train_val = everything.take(np.flatnonzero(chosen))
  is_val = stratified_choice(train_val.labels, _NUM_VAL, seed)
  train = train_val.take(np.flatnonzero(~is_val))
  val = train_val.take(np.flatnonzero(is_val))
  splits = {
    "train": train,
    "val": val,
    "train_val": concatenate(train, val),
    "test": everything.take(np.flatnonzero(~chosen)),
  }
  names = tuple(str(name) for name in stored.target_names)
  return TaskData(
    "digits", names, splits, source=f"scikit-learn {sklearn.__version__} load_digits"
  )
