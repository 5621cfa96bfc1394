"""A finished run, loaded to be used: predictions, prompts, features.

`load_run` needs the run's directory and its backbone, one device and nothing else:
no training data, no TensorFlow, whatever it was trained on.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import os
from pathlib import Path
import re
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int16, UInt8
import numpy as np

from insvp_jax import config as config_lib
from insvp_jax import methods, trees
from insvp_jax.checkpoints import adapters
from insvp_jax.checkpoints.files import (
  FOLDER,
  Damaged,
  check_leaves,
  find_steps,
  load_json,
  newest_good,
  read_arrays,
  read_meta,
  verify,
)
from insvp_jax.checkpoints.items import ALWAYS_STORED
from insvp_jax.data import decode, preprocess
from insvp_jax.data.label_maps import LabelMap, MaskStyle
from insvp_jax.errors import printable
from insvp_jax.models import quantized, weights
from insvp_jax.models.classifier import (
  PromptedClassifier,
  PromptedSegmenter,
  create_model,
)
from insvp_jax.train import microbatch
from insvp_jax.train import state as state_lib
from insvp_jax.train import windows as windows_lib
from insvp_jax.train.objectives import Classification, Segmentation, segmentation

FORMAT = 1
# Batches are padded to one of these sizes, so that few programs are compiled.
BATCH_SIZES = (1, 8, 32)
# Begins the name of a repository of Hugging Face.
_HUB = "hf-hub:"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A trained model, ready to be used.

  `images` are one uint8 image [h, w, 3], a batch [b, h, w, 3], a path, an image of
  Pillow, or a list of these, of different sizes. They are resized and normalised
  exactly as those that the run was evaluated on; `data.preprocess.Resized` ones are
  resized already, as what a split holds.

  Attributes:
    model: the classifier.
    params: {"backbone", "prompter", "head"} on one device.
    class_names: one name per class, in the order of the probabilities.
    preset: how images become inputs.
    meta: the description of the run in its checkpoint; see `checkpoints`.
    result: the contents of result.json, or None for a run that has not finished.
    workdir: where it lies.
  """

  model: PromptedClassifier
  params: Mapping[str, Any]
  class_names: tuple[str, ...]
  preset: preprocess.Preset
  meta: Mapping[str, Any]
  result: Mapping[str, Any] | None
  workdir: Path

  def predict(self, images: Any) -> Float32[np.ndarray, "b k"]:
    """Returns the probability of each class for each image.

    Raises:
      ValueError, FileNotFoundError: not an image; see `Run`. Or the run is one of
        segmentation.
    """
    if self.segments:
      raise ValueError("this run classifies pixels, not images; use segment.")

    def probabilities(params: Any, inputs: Array) -> Array:
      return jax.nn.softmax(self.model.apply({"params": params}, inputs))

    return self._apply("predict", probabilities, images)

  @property
  def segments(self) -> bool:
    """Whether it classifies pixels, by `segment`, and not images, by `predict`."""
    return isinstance(self.model, PromptedSegmenter)

  @property
  def metric(self) -> str:
    """What it is judged by, as keys of its result name it: "accuracy" or "miou"."""
    return (Segmentation if self.segments else Classification).METRIC

  @functools.cached_property
  def mask_style(self) -> MaskStyle:
    """Values and colours of the classes in the masks that it was trained on."""
    num_classes = len(self.class_names)
    if stored := self.meta.get("masks"):
      return MaskStyle.from_json(stored, num_classes)
    # Runs of before have none: values are then those of the classes.
    section = self.meta["config"].get("data", {})
    reduces = section.get("reduce_zero_label", False)
    return LabelMap(reduce_zero_label=reduces).style(num_classes)

  def segment(self, images: Any, **changes: Any) -> list[Int16[np.ndarray, "h w"]]:
    """Returns the class of each pixel of each image, at the image's own size.

    Args:
      images: see `Run`; they are not resized before they come.
      **changes: fields of the config's section `segment` that are not as in the run:
        `scales`, `flips`, `stride`, `resize`, `batch_size`.

    Raises:
      ValueError: the run is none of segmentation, an unknown field, or not an image.
    """
    windows = self.windows(**changes)
    logits_of = segmentation.logits_function(
      lambda batch: self.window_logits(batch["images"]), windows, None
    )
    return [
      windows_lib.segment(image, logits_of, windows)
      for image in _read_images(images, self.decode_options)
    ]

  def read_images(self, images: Any) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Returns images as pixels of their own size; see `Run`.

    Raises:
      ValueError, FileNotFoundError: not an image.
    """
    return list(_read_images(images, self.decode_options))

  def windows(self, **changes: Any) -> windows_lib.Windows:
    """Returns how a segmenter's images are covered by windows.

    Raises:
      ValueError: as `segment`, which takes the same changes.
    """
    self._check_segments()
    settings = config_lib.defaults().segment.to_dict()
    settings |= self.meta["config"].get("segment", {})
    for name in changes:
      trees.lookup(settings, name, "field of config.segment")
    objective = Segmentation(len(self.class_names), self.preset, settings | changes)
    return objective.windows(self.model.input_size)

  def window_logits(self, pixels: UInt8[Any, "n s s 3"]) -> Float32[Array, "n s s k"]:
    """Returns the logits of each pixel of windows that are as large as the input.

    Raises:
      ValueError: the run is none of segmentation.
    """
    self._check_segments()

    def logits(params: Any, pixels: Array) -> Array:
      inputs = preprocess.normalise(self.preset, pixels)
      return self.model.apply({"params": params}, inputs)

    return self.compiled("window_logits", logits)(self.params, pixels)

  def _check_segments(self) -> None:
    if not self.segments:
      raise ValueError("this run classifies images, not pixels; use predict.")

  def features(self, images: Any) -> Float[np.ndarray, "b d"]:
    """Returns the feature that the head sees, for each image.

    Raises:
      ValueError, FileNotFoundError: as `predict`.
    """
    if self.segments:
      raise ValueError(
        "this run classifies pixels: its head sees maps, not a feature of an image."
      )

    def features(params: Any, inputs: Array) -> Array:
      return self.model.apply({"params": params}, inputs, method="features")

    return self._apply("features", features, images)

  def prompts(self, images: Any) -> dict[str, np.ndarray]:
    """Returns the prompts that the method makes for the images, by name.

    InsVP has "patch", "global" and "image" (their fusion, which is added to the
    normalised image), [b, h, w, 3]; "specific" [b, p, d]; "feature" [l, b, p, d],
    the tokens of each prompted block. Prompts that the method lacks are left out.
    """

    def batch_first(params: Any, inputs: Array) -> dict[str, Array]:
      prompts = dict(self.model.apply({"params": params}, inputs, method="prompts"))
      if "feature" in prompts:  # [b, l, p, d], as batches are joined on axis 0
        prompts["feature"] = jnp.swapaxes(prompts["feature"], 0, 1)
      return prompts

    prompts = self._apply("prompts", batch_first, images)
    if "feature" in prompts:  # [l, b, p, d]
      prompts["feature"] = np.swapaxes(prompts["feature"], 0, 1)
    return prompts

  def prompted(self, images: Any) -> Float[np.ndarray, "b h w 3"]:
    """Returns the images as the backbone sees them: normalised and prompted."""

    def prompted(params: Any, inputs: Array) -> Array:
      return self.model.apply({"params": params}, inputs, method="prompt_image")

    return self._apply("prompted", prompted, images)

  def preprocess(self, images: Any) -> Float32[np.ndarray, "b h w 3"]:
    """Returns the normalised inputs of the model."""
    return self._apply("preprocess", lambda params, inputs: inputs, images)

  def to_pixels(self, inputs: Float[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "..."]:
    """Returns normalised inputs as pixels in [0, 1], clipped, to be shown."""
    mean, std = np.asarray(self.preset.mean), np.asarray(self.preset.std)
    return np.clip(np.asarray(inputs) * std + mean, 0, 1)

  @functools.cached_property
  def decode_options(self) -> decode.DecodeOptions:
    """How files become pixels: as those that the run was trained on."""
    return decode.DecodeOptions.from_config(self.meta["config"].get("data", {}))

  @functools.cached_property
  def _compiled(self) -> dict[str, Callable]:
    """The compiled functions by name, filled by `compiled`."""
    return {}

  @property
  def _platform(self) -> str:
    (device,) = jax.tree.leaves(self.params)[0].devices()
    return device.platform

  def compiled(self, name: str, function: Callable) -> Callable:
    """Returns a function compiled; the first one of a name is kept with the run."""
    if name not in self._compiled:
      options = quantized.compiler_options(self.params, self._platform)
      self._compiled[name] = jax.jit(function, compiler_options=options)
    return self._compiled[name]

  def _resized(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """Returns an image as the run's splits hold it."""
    image_size = self.model.input_size
    if not isinstance(image, preprocess.Resized):
      return preprocess.resize(self.preset, image, image_size)
    side = self.preset.stored_size(image_size)
    if image.shape[:2] != (side, side):
      raise ValueError(
        f"a resized image is {image.shape[0]} x {image.shape[1]} pixels, expected "
        f"{side} x {side}."
      )
    return np.asarray(image)

  def _batch_sizes(self) -> list[int]:
    """Returns the sizes of `BATCH_SIZES` that the device computes at once."""
    if self._platform != "cpu":
      return list(BATCH_SIZES)
    most = microbatch.images_at_once(self.model.backbone.spec)
    return [size for size in BATCH_SIZES if size <= max(most, BATCH_SIZES[1])]

  def _apply(self, name: str, function: Callable, images: Any) -> Any:
    """Applies `function(params, inputs)` to images of any number and size.

    Args:
      name: under which the compiled function is kept.
      function: of parameters and inputs [b, h, w, 3]; returns arrays [b, ...].
      images: see `Run`.
    """
    image_size = self.model.input_size

    def preprocess_and_apply(params: Any, pixels: Array) -> Any:
      inputs = preprocess.eval_preprocess(self.preset, pixels, image_size)
      return function(params, inputs)

    compiled = self.compiled(name, preprocess_and_apply)
    pixels = [
      self._resized(image) for image in _read_images(images, self.decode_options)
    ]
    sizes, outputs = self._batch_sizes(), []
    for start in range(0, len(pixels), sizes[-1]):
      batch = pixels[start : start + sizes[-1]]
      batch_size = next(size for size in sizes if size >= len(batch))
      padding = [batch[-1]] * (batch_size - len(batch))
      output = compiled(self.params, np.stack(batch + padding))
      outputs.append(jax.device_get(output))
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *outputs)
    # Only the last batch is padded.
    return jax.tree.map(lambda array: array[: len(pixels)], joined)


def load_run(
  path: str | os.PathLike,
  *,
  backbone: str | os.PathLike | None = None,
  device: jax.Device | None = None,
  method: type[methods.Method] | None = None,
  frozen_dtype: str | None = None,
) -> Run:
  """Loads a run, wherever and on however many devices it was trained.

  Args:
    path: the run's workdir, its checkpoints directory, or that of one step. If the
      newest checkpoint is damaged, the one before it is loaded, with a warning. Or the
      folder of an exported adapter, or its repository, "hf-hub:user/name@revision".
    backbone: the backbone's file, if it has moved: a path, or a repository or https
      address to request, which the run's own description alone may not ask for. It must
      be the same file: its digest is compared.
    device: of the parameters; None is the first local device.
    method: its class, where the run was trained with a method of your own.
    frozen_dtype: how frozen weights are stored: "float32", "bfloat16" or "int8"; None
      is as in training.

  Raises:
    FileNotFoundError: there is no run, or its backbone was not found. Of a folder of
      runs the error lists them: one has to be chosen.
    ValueError: all checkpoints are damaged, or the checkpoint does not fit its own
      description, or the backbone is not the one that the run was trained on.
  """
  sharding = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
  if os.fspath(path).startswith(_HUB):
    path = weights.hub_folder(os.fspath(path), (adapters.CONFIG, adapters.ARRAYS))
  is_exported = adapters.is_adapter(path)
  stored = _open_adapter(Path(path)) if is_exported else _open_steps(path, sharding)
  meta = stored.meta
  if method is not None:
    methods.register(method)
  _check_meta(meta, stored.where)
  stored_as = meta["config"].get("backbone", {}).get("frozen_dtype", "float32")
  dtype = stored_as if frozen_dtype is None else frozen_dtype
  if dtype not in config_lib.FROZEN_DTYPES:
    known = ", ".join(map(repr, config_lib.FROZEN_DTYPES))
    raise ValueError(f"frozen_dtype is {dtype!r}, expected one of {known}.")
  model = create_model(**meta["model"])
  shapes = trees.flatten(state_lib.param_shapes(model))
  names = {*meta["trainable"], *stored.leaves}
  expected = {
    name: leaf
    for name, leaf in shapes.items()
    if name in names or re.fullmatch(ALWAYS_STORED, name)
  }
  check_leaves(stored.leaves, expected, stored.name, dtypes=False)
  adapter = stored.read(expected)
  frozen_shapes = {name: leaf for name, leaf in shapes.items() if name not in adapter}
  frozen = {}
  # None are frozen if the run trained the whole backbone.
  if frozen_shapes:
    loaded = trees.flatten({"backbone": _load_backbone(meta, model, backbone)})
    frozen = {n: state_lib.cast_weight(n, loaded[n], dtype) for n in frozen_shapes}
    check_leaves(frozen, frozen_shapes, "the backbone", dtypes=False)
  params = jax.device_put({**frozen, **adapter}, sharding)
  return Run(
    model=model,
    params=trees.unflatten(params),
    class_names=tuple(map(printable, meta["class_names"])),
    preset=preprocess.get_preset(meta["preset"]),
    meta=meta,
    result=stored.result,
    workdir=stored.workdir,
  )


class _Stored(NamedTuple):
  """What is stored of a run: in a checkpoint, or in an exported adapter.

  Attributes:
    where: it lies.
    name: of the arrays, for messages.
    meta: the description of the run.
    leaves: the arrays by name, or no more than their shapes.
    read: `expected -> arrays`, called once the shapes are known to be right.
    result: the contents of result.json, or None.
    workdir: of the run.
  """

  where: Path
  name: str
  meta: dict[str, Any]
  leaves: Mapping[str, Any]
  read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
  result: Mapping[str, Any] | None
  workdir: Path


def _open_adapter(folder: Path) -> _Stored:
  """Returns an exported adapter; its arrays are not read yet."""
  meta, result, shapes, read = adapters.open_adapter(folder)
  arrays = str(folder / adapters.ARRAYS)
  return _Stored(folder, arrays, meta, shapes, read, result, folder.absolute())


def _open_steps(path: str | os.PathLike, sharding: jax.sharding.Sharding) -> _Stored:
  """Returns the newest checkpoint that is whole."""

  def read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    verify(checkpoint, warnings.warn)
    meta = read_meta(checkpoint)
    return meta, read_arrays(checkpoint, "adapter", sharding=sharding)

  where, (meta, arrays) = newest_good(find_steps(path), read, warnings.warn)
  item = f"'adapter' of the checkpoint {where}"
  result, workdir = _read_result(where), where.parents[1]
  return _Stored(where, item, meta, arrays, lambda expected: arrays, result, workdir)


def _load_backbone(
  meta: Mapping[str, Any],
  model: PromptedClassifier,
  path: str | os.PathLike | None,
) -> Mapping[str, Any]:
  """Returns the backbone's parameters after comparing its digest.

  Args:
    meta: the description of the run.
    model: the classifier.
    path: of the backbone's file; None for where it was in training.
  """
  identity = meta["backbone"]
  if identity["id"] == "random" and path is None:
    # On the CPU, as another device may round random numbers differently.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
      init = identity.get("init", "default")
      params = state_lib.init_params(model, identity["seed"], init=init)["backbone"]
    _compare_digest(
      trees.digest(params),
      identity,
      "drawing it again gave",
      hint="Use the versions of JAX and Flax that the run was trained with: "
      f"{meta.get('versions')}.",
    )
    return params
  file = _find_backbone(identity, path)
  if not identity.get("sha256"):
    warnings.warn(
      f"the run names no sha256 of its backbone, so whether {file} is the one that it "
      "was trained on is not known.",
      stacklevel=3,
    )
  _compare_digest(
    weights.file_digest(file),
    identity,
    f"{file} has",
    hint="Pass load_run(..., backbone=<path>) with the file that the run was trained "
    "on.",
  )
  return weights.load_backbone(str(file), model)


def _find_backbone(identity: Mapping[str, Any], path: str | os.PathLike | None) -> Path:
  """Returns the backbone's file: at `path`, or where it was in training.

  Of what a run names only releases are requested where they are not on this machine: a
  description is a stranger's, and must not make its reader's machine send requests.
  """
  if path is not None:
    return weights.resolve(os.fspath(path))
  try:
    name = identity["id"]
    return weights.resolve(name, download=name in weights.RELEASES)
  except FileNotFoundError as error:
    source = identity.get("source")
    if source and Path(source).is_file():
      return Path(source)
    raise FileNotFoundError(
      f"the run's backbone {identity['id']!r} (sha256 {identity.get('sha256')}) is "
      f"not to be found: {error} Pass load_run(..., backbone=<path>), or "
      "--backbone=<path> to a tool; a repository or an https address that you trust is "
      "requested if you pass it so."
    ) from error


def _compare_digest(
  actual: str, identity: Mapping[str, Any], source: str, *, hint: str
) -> None:
  """Checks that a backbone has the digest of the one that the run was trained on."""
  expected = identity.get("sha256")
  if expected and actual != expected:
    raise ValueError(
      f"this is not the backbone {identity['id']!r} that the run was trained on: "
      f"{source} sha256 {actual}, expected {expected}. {hint}"
    )


def _check_meta(meta: Mapping[str, Any], checkpoint: Path) -> None:
  """Checks that a run's description is complete and of a known format."""
  if meta.get("format") != FORMAT:
    raise ValueError(
      f"the run at {checkpoint} has format {meta.get('format')!r}, expected {FORMAT}; "
      "it was written by another version of this package."
    )
  needed = {
    "": ("model", "backbone", "class_names", "preset", "trainable", "config"),
    "model": ("backbone", "num_classes"),
    "backbone": ("id",),
  }
  if (meta.get("backbone") or {}).get("id") == "random":
    needed["backbone"] += ("seed",)
  missing = [
    f"{section}.{key}".lstrip(".")
    for section, keys in needed.items()
    for key in keys
    if ((meta.get(section) or {}) if section else meta).get(key) is None
  ]
  if missing:
    raise ValueError(f"the description of the run at {checkpoint} lacks {missing}.")
  name, sizes = meta["model"].get("backbone"), meta["model"].get("backbone_kwargs")
  if weights.is_remote(str(name)) and not weights.are_sizes_known(sizes or {}):
    raise ValueError(
      f"the description of the run at {checkpoint} leaves the sizes of its model to "
      f"{name!r}, which is not requested because a run names it."
    )
  own = set((meta["model"].get("method") or "insvp").split("+")) - set(methods.METHODS)
  if own:
    raise ValueError(
      f"the run at {checkpoint} was trained with the method {min(own)!r}, which is "
      "none of this package; pass load_run(..., method=<its class>)."
    )
  num_names, num_classes = len(meta["class_names"]), meta["model"].get("num_classes")
  if num_names != num_classes:
    raise ValueError(
      f"the run at {checkpoint} has {num_names} class names for {num_classes} classes."
    )


def _read_result(checkpoint: Path) -> dict[str, Any] | None:
  """Returns the contents of the workdir's result.json, or None."""
  file = checkpoint.parents[1] / "result.json"
  if checkpoint.parent.name != FOLDER or not file.is_file():
    return None
  try:
    return load_json(file)
  except Damaged as error:
    warnings.warn(f"{error} The run is loaded without its result.", stacklevel=3)
    return None


def _read_images(
  images: Any, options: decode.DecodeOptions
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
  """Yields `images` as `Run` takes them, one by one: files may be large."""
  if isinstance(images, str | os.PathLike) or hasattr(images, "getexif"):
    images = [images]
  elif hasattr(images, "ndim"):
    images = np.asanyarray(images)
    images = images if images.ndim == 4 else [images]
  if not hasattr(images, "__len__") or len(images) == 0:
    raise ValueError(f"no images: got {images!r}, expected arrays or paths.")
  return (_read_image(image, options) for image in images)


def _read_image(
  image: Any, options: decode.DecodeOptions
) -> UInt8[np.ndarray, "h w 3"]:
  if isinstance(image, str | os.PathLike):
    return decode.read_image(image, options)
  # What a tool has found in a folder or archive.
  if hasattr(image, "read_pixels"):
    return image.read_pixels(options)
  if hasattr(image, "getexif"):
    return decode.from_pillow(image, "an image", options)
  image = np.asanyarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    raise ValueError(
      f"an image is {image.dtype}{list(image.shape)}, expected uint8[h, w, 3] with "
      "pixels in [0, 255]. Give paths to have files decoded."
    )
  if 0 in image.shape:
    raise ValueError(f"an image has no pixels: its shape is {list(image.shape)}.")
  return image
