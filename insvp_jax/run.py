"""A finished run, loaded to be used: predictions, prompts, features.

`load_run` needs the run's directory and its backbone, one device and nothing else:
no training data, no TensorFlow, whatever it was trained on.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
import os
from pathlib import Path
import re
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8
import numpy as np

from insvp_jax import trees
from insvp_jax.checkpoints.files import (
  FOLDER,
  check_leaves,
  find_steps,
  newest_good,
  read_arrays,
  read_json,
  verify,
)
from insvp_jax.checkpoints.items import ALWAYS_STORED
from insvp_jax.data import decode, preprocess
from insvp_jax.models.classifier import PromptedClassifier, create_model
from insvp_jax.models.weights import load as weights_lib
from insvp_jax.train import state as state_lib

FORMAT = 1
# Batches are padded to one of these sizes, so that at most so many are compiled.
BATCH_SIZES = (1, 8, 32)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A trained model with all that its use needs.

  Wherever it says `images`: one uint8 image [h, w, 3], a batch [b, h, w, 3], a list
  of images of different sizes, a path, or a list of paths. They are resized and
  normalised exactly as those that the run was evaluated on.

  Attributes:
    model: the classifier.
    params: {"backbone", "prompter", "head"} on one device.
    class_names: one name per class, in the order of the probabilities.
    preset: how images become inputs.
    meta: what the run stored about itself; see `checkpoints`.
    result: the contents of result.json, or None for a run that has not finished.
  """

  model: PromptedClassifier
  params: Mapping[str, Any]
  class_names: tuple[str, ...]
  preset: preprocess.Preset
  meta: Mapping[str, Any]
  result: Mapping[str, Any] | None

  def predict(self, images: Any) -> Float32[np.ndarray, "b k"]:
    """Returns the probability of each class for each image.

    Raises:
      ValueError, FileNotFoundError: what came is no image; see `Run`.
    """

    def probabilities(params: Any, inputs: Array) -> Array:
      return jax.nn.softmax(self.model.apply({"params": params}, inputs))

    return self._map("predict", probabilities, images)

  def features(self, images: Any) -> Float[np.ndarray, "b d"]:
    """Returns the feature that the head sees, for each image."""

    def features(params: Any, inputs: Array) -> Array:
      return self.model.apply({"params": params}, inputs, method="features")

    return self._map("features", features, images)

  def prompts(self, images: Any) -> dict[str, np.ndarray]:
    """Returns the prompts that the method makes for the images, by name.

    InsVP has "patch", "global" and "image" (their fusion, which is added to the
    normalised image), [b, h, w, 3]; "specific" [b, p, d]; "feature" [l, b, p, d],
    the tokens of each prompted block. What the method does not have is not there.
    """

    def prompts(params: Any, inputs: Array) -> dict[str, Array]:
      found = dict(self.model.apply({"params": params}, inputs, method="prompts"))
      if "feature" in found:  # the batch has to come first while batches are joined
        found["feature"] = jnp.swapaxes(found["feature"], 0, 1)
      return found

    found = self._map("prompts", prompts, images)
    if "feature" in found:
      found["feature"] = np.swapaxes(found["feature"], 0, 1)
    return found

  def prompted(self, images: Any) -> Float[np.ndarray, "b h w 3"]:
    """Returns the images as the backbone sees them: normalised and prompted."""

    def prompt_image(model: PromptedClassifier, inputs: Array) -> Array:
      return model.prompter.prompt_image(inputs)

    def prompted(params: Any, inputs: Array) -> Array:
      return self.model.apply({"params": params}, inputs, method=prompt_image)

    return self._map("prompted", prompted, images)

  def preprocess(self, images: Any) -> Float32[np.ndarray, "b h w 3"]:
    """Returns the normalised inputs of the model."""
    return self._map("preprocess", lambda params, inputs: inputs, images)

  def to_pixels(self, inputs: Float[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "..."]:
    """Returns normalised inputs as pixels in [0, 1], clipped, to be shown."""
    mean, std = np.asarray(self.preset.mean), np.asarray(self.preset.std)
    return np.clip(np.asarray(inputs) * std + mean, 0, 1)

  @functools.cached_property
  def _compiled(self) -> dict[str, Callable]:
    return {}

  def _map(self, name: str, function: Callable, images: Any) -> Any:
    """Applies `function(params, inputs)` to images of any number and size."""
    size = self.model.backbone.image_size
    if name not in self._compiled:

      def compiled(params: Any, stored: Array) -> Any:
        inputs = preprocess.eval_preprocess(self.preset, stored, size)
        return function(params, inputs)

      self._compiled[name] = jax.jit(compiled)
    pixels = [preprocess.resize(self.preset, image, size) for image in _read(images)]
    parts = []
    for start in range(0, len(pixels), BATCH_SIZES[-1]):
      chunk = pixels[start : start + BATCH_SIZES[-1]]
      padded = next(size for size in BATCH_SIZES if size >= len(chunk))
      batch = np.stack([*chunk, *[chunk[-1]] * (padded - len(chunk))])
      parts.append(jax.device_get(self._compiled[name](self.params, batch)))
    # Only the last batch is padded.
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    return jax.tree.map(lambda array: array[: len(pixels)], joined)


def load_run(
  path: str | os.PathLike,
  *,
  backbone: str | os.PathLike | None = None,
  device: jax.Device | None = None,
) -> Run:
  """Loads a run to be used, wherever and on however many devices it was trained.

  Args:
    path: the run's workdir, its checkpoints directory, or that of one step. A
      damaged newest checkpoint is warned of, and the one before it is loaded.
    backbone: where the backbone's file is now, if it has moved. It must be the
      same file: its digest is compared.
    device: where the parameters go; None is the first local device.

  Raises:
    FileNotFoundError: there is no run, or its backbone is not to be found.
    ValueError: the checkpoint is damaged, and so are older ones, or does not fit its
      own description, or the backbone is not the one that the run was trained on.
  """
  sharding = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])

  def read(where: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    verify(where)
    return read_json(where, "meta"), read_arrays(where, "adapter", sharding=sharding)

  where, (meta, adapter) = newest_good(find_steps(path), read, warnings.warn)
  meta = _check_meta(meta, where)
  model = create_model(**meta["model"])
  shapes = trees.flatten(state_lib.param_shapes(model))
  trained = {*meta["trainable"], *adapter}
  expected = {
    name: leaf
    for name, leaf in shapes.items()
    if name in trained or re.fullmatch(ALWAYS_STORED, name)
  }
  check_leaves(adapter, expected, f"'adapter' of the checkpoint {where}", dtypes=False)
  rest = {name: leaf for name, leaf in shapes.items() if name not in adapter}
  frozen = {}
  # A run that trained all of the backbone holds all of it.
  if rest:
    loaded = trees.flatten({"backbone": _load_backbone(meta, model, backbone)})
    dtype = meta["config"].get("backbone", {}).get("frozen_dtype", "float32")
    frozen = {name: jnp.asarray(loaded[name], dtype) for name in rest}
    check_leaves(frozen, rest, "the backbone", dtypes=False)
  params = jax.device_put({**frozen, **adapter}, sharding)
  return Run(
    model=model,
    params=trees.unflatten(params),
    class_names=tuple(meta["class_names"]),
    preset=preprocess.get_preset(meta["preset"]),
    meta=meta,
    result=_read_result(where),
  )


def _load_backbone(
  meta: Mapping[str, Any],
  model: PromptedClassifier,
  override: str | os.PathLike | None,
) -> Mapping[str, Any]:
  """Returns the backbone's parameters after comparing its digest."""
  identity = meta["backbone"]
  if identity["id"] == "random" and override is None:
    # On the CPU, as another device may round the drawn numbers differently.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
      init = identity.get("init", "default")
      params = state_lib.init_params(model, identity["seed"], init=init)["backbone"]
    _compare_digest(
      trees.digest(params),
      identity,
      "drawing it again gave",
      "Use the versions of JAX and Flax that the run was trained with: "
      f"{meta.get('versions')}.",
    )
    return params
  path = _find_backbone(identity, override)
  _compare_digest(
    weights_lib.file_digest(path),
    identity,
    f"{path} has",
    "Pass load_run(..., backbone=<path>) with the file that the run was trained on.",
  )
  return weights_lib.load_backbone(str(path), model)


def _find_backbone(
  identity: Mapping[str, Any], override: str | os.PathLike | None
) -> Path:
  if override is not None:
    return weights_lib.resolve(os.fspath(override))
  try:
    return weights_lib.resolve(identity["id"])
  except FileNotFoundError as error:
    source = identity.get("source")
    if source and Path(source).is_file():
      return Path(source)
    raise FileNotFoundError(
      f"the run's backbone {identity['id']!r} (sha256 {identity.get('sha256')}) is "
      f"not to be found: {error} If it has moved, pass load_run(..., "
      "backbone=<path>), or --backbone=<path> to a tool."
    ) from error


def _compare_digest(
  got: str, identity: Mapping[str, Any], what: str, mend: str
) -> None:
  expected = identity.get("sha256")
  if expected and got != expected:
    raise ValueError(
      f"this is not the backbone {identity['id']!r} that the run was trained on: "
      f"{what} sha256 {got}, expected {expected}. {mend}"
    )


def _check_meta(meta: dict[str, Any], where: Path) -> dict[str, Any]:
  """Returns a run's description if it is complete and of a known format."""
  if meta.get("format") != FORMAT:
    raise ValueError(
      f"the run at {where} has format {meta.get('format')!r}, expected {FORMAT}; it "
      "was written by another version of this package."
    )
  keys = ("model", "backbone", "class_names", "preset", "trainable", "config")
  missing = [key for key in keys if key not in meta]
  if missing:
    raise ValueError(f"the description of the run at {where} lacks {missing}.")
  names, num_classes = meta["class_names"], meta["model"].get("num_classes")
  if len(names) != num_classes:
    raise ValueError(
      f"the run at {where} has {len(names)} class names for {num_classes} classes."
    )
  return meta


def _read_result(where: Path) -> dict[str, Any] | None:
  if where.parent.name != FOLDER:
    return None
  file = where.parents[1] / "result.json"
  return json.loads(file.read_text()) if file.is_file() else None


def _read(images: Any) -> list[UInt8[np.ndarray, "h w 3"]]:
  """Returns what `Run` takes for images as a list of arrays."""
  if isinstance(images, str | os.PathLike):
    images = [images]
  elif hasattr(images, "ndim"):
    images = np.asarray(images)
    images = images if images.ndim == 4 else [images]
  if not hasattr(images, "__len__") or len(images) == 0:
    raise ValueError(f"no images: got {images!r}, expected arrays or paths.")
  return [_read_one(image) for image in images]


def _read_one(image: Any) -> UInt8[np.ndarray, "h w 3"]:
  if isinstance(image, str | os.PathLike):
    return decode.read_image(image)
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    raise ValueError(
      f"an image is {image.dtype}{list(image.shape)}, expected uint8[h, w, 3] with "
      "pixels in [0, 255]. Give paths to have files decoded."
    )
  if 0 in image.shape:
    raise ValueError(f"an image has no pixels: its shape is {list(image.shape)}.")
  return image
