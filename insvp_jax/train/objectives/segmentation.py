"""One class for each pixel: cross-entropy, and the mean intersection over union."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int64
from ml_collections import ConfigDict
import numpy as np

from insvp_jax.data import mask_batches, pipeline, preprocess
from insvp_jax.data.label_maps import IGNORED
from insvp_jax.data.mask_batches import Crops
from insvp_jax.data.masks import MaskSplit
from insvp_jax.data.splits import Split
from insvp_jax.train.objectives.base import Batch, Objective
from insvp_jax.train.windows import LogitsOf, Windows, score


@dataclasses.dataclass(frozen=True)
class EvalImages:
  """The images of a split, each to be looked at once, and how.

  Attributes:
    split: images with masks.
    windows: how an image is covered.
    sharding: of a batch of windows, by its leading axis; None for the default device.
  """

  split: MaskSplit
  windows: Windows
  sharding: jax.sharding.Sharding | None


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation(Objective):
  """Images with a class for each pixel.

  Attributes:
    num_classes: k.
    preset: how pixels are normalised; its resize and crops are not used.
    settings: the config's section `segment`.
    smoothing: share of a target that is spread over all classes.
    class_weights: float32 [k], by which the loss of a pixel of each class counts; None
      counts all alike.
  """

  METRIC: ClassVar[str] = "miou"
  TITLE: ClassVar[str] = "mIoU"
  ONE_FEATURE: ClassVar[bool] = False

  num_classes: int
  preset: preprocess.Preset
  settings: Mapping[str, Any]
  smoothing: float = 0.0
  class_weights: np.ndarray | None = None

  @classmethod
  def create(
    cls,
    config: ConfigDict,
    num_classes: int,
    class_weights: np.ndarray | None = None,
  ) -> "Segmentation":
    for name in ("mixup_alpha", "cutmix_alpha"):
      if config.loss[name]:
        raise ValueError(
          f"config.loss.{name} is {config.loss[name]:g}, but masks are not mixed; set "
          "it to 0."
        )
    if config.data.sampling != "uniform":
      raise ValueError(
        f"config.data.sampling is {config.data.sampling!r}, but an image has pixels of "
        "several classes; set it to 'uniform', and loss.class_weights if need be."
      )
    return cls(
      num_classes,
      preprocess.get_preset(config.data.preset),
      config.segment.to_dict(),
      config.loss.label_smoothing,
      class_weights,
    )

  @classmethod
  def model_kwargs(cls, config: ConfigDict) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"channels": config.segment.channels}
    if config.segment.aux_blocks is not None:
      kwargs["blocks"] = tuple(config.segment.aux_blocks)
    return {"head": "setr", "head_kwargs": kwargs}

  def inputs(self, batch: Batch, key: Array) -> tuple[Array, Any, str | None]:
    del key
    return preprocess.normalise(self.preset, batch["images"]), batch["masks"], None

  def loss(self, output: Any, targets: Any) -> Array:
    """Returns the loss of the main head and the weighted ones of the auxiliary heads.

    Each is the mean over the pixels that count, of all images together.
    """
    main, *others = (self._head_loss(logits, targets) for logits in output)
    return main + self.settings["aux_weight"] * sum(others)

  def _head_loss(
    self, logits: Float[Array, "b h w k"], labels: Int[Array, "b h w"]
  ) -> Float32[Array, ""]:
    is_real = labels != IGNORED
    labels = jnp.where(is_real, labels, 0).astype(jnp.int32)
    logits = logits.astype(jnp.float32)
    # Not by rows of probabilities, which would be k times the size of the mask.
    norm = jax.nn.logsumexp(logits, axis=-1)
    nats = norm - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    if self.smoothing:
      spread = norm - jnp.mean(logits, axis=-1)
      nats = (1 - self.smoothing) * nats + self.smoothing * spread
    if self.class_weights is not None:
      nats = nats * jnp.asarray(self.class_weights)[labels]
    # A batch whose pixels are all ignored has the loss 0.
    return jnp.sum(nats * is_real) / jnp.maximum(jnp.sum(is_real), 1)

  def accuracy(self, output: Any, batch: Batch) -> Array:
    labels = batch["masks"]
    is_real = labels != IGNORED
    is_correct = (jnp.argmax(output[0], axis=-1) == labels) & is_real
    return jnp.sum(is_correct) / jnp.maximum(jnp.sum(is_real), 1).astype(jnp.float32)

  def eval_inputs(self, images: Array, image_size: int) -> Array:
    del image_size
    return preprocess.normalise(self.preset, images)

  def outcome(self, output: Any, batch: Batch) -> Array:
    """Returns the logits of each pixel, float32 [b, h, w, k]."""
    del batch
    return output

  def train_batches(
    self,
    examples: Any,
    *,
    batch_size: int,
    seed: int,
    image_size: int,
    start_step: int,
    sharding: jax.sharding.Sharding | None,
    balanced_classes: int = 0,
  ) -> Iterator[Batch]:
    del balanced_classes  # `create` has none of it.
    crops = Crops(
      resize=self.settings["resize"],
      scales=tuple(self.settings["train_scales"]),
      max_share=self.settings["max_share"],
      flip=self.settings["flip"],
      # Runs of before have none.
      photometric=self.settings.get("photometric", False),
      fill=self._fill(),
    )
    return mask_batches.train_batches(
      examples,
      batch_size=batch_size,
      seed=seed,
      crops=crops,
      image_size=image_size,
      start_step=start_step,
      sharding=sharding,
    )

  def windows(self, image_size: int, num_devices: int = 1) -> Windows:
    """Returns how images are covered in evaluation.

    Args:
      image_size: side of the model's input in pixels.
      num_devices: that a batch of windows is split over.
    """
    settings = self.settings
    stride = settings["stride"] or max(1, image_size * 2 // 3)
    if stride > image_size:
      raise ValueError(
        f"config.segment.stride is {stride}, expected at most {image_size}, the side "
        "of a window: there would be pixels that no window sees."
      )
    return Windows(
      size=image_size,
      stride=stride,
      resize=settings["resize"],
      scales=tuple(settings["scales"]),
      flips=settings["flips"],
      fill=self._fill(),
      batch=-(-settings["batch_size"] // num_devices) * num_devices,
    )

  def _fill(self) -> tuple[int, int, int]:
    """Returns the pixel that is about 0 when it is normalised."""
    return tuple(round(255 * mean) for mean in self.preset.mean)

  def eval_batches(
    self,
    split: Split,
    *,
    batch_size: int,
    image_size: int,
    sharding: jax.sharding.Sharding | None,
  ) -> EvalImages:
    """Returns the images; `batch_size` is that of windows: `segment.batch_size`."""
    del batch_size
    num_devices = 1 if sharding is None else len(sharding.device_set)
    return EvalImages(split, self.windows(image_size, num_devices), sharding)

  def abstract_targets(self, batch_size: int, side: int) -> dict[str, Any]:
    return {"masks": jax.ShapeDtypeStruct((batch_size, side, side), jnp.int16)}

  def evaluate(
    self, eval_step: Callable[[Batch], Any], batches: EvalImages
  ) -> dict[str, Any]:
    """Returns what `metrics` does, num_examples and loss: each pixel counts once.

    The loss is the mean cross-entropy, in nats, of what is averaged over windows,
    scales and mirrored images; weights of classes and smoothing are not in it.

    Args:
      eval_step: maps a batch of windows, with a "mask", to their logits.
      batches: from `eval_batches`.
    """
    split, windows = batches.split, batches.windows
    apply = logits_function(eval_step, windows, batches.sharding)
    confusion = np.zeros((self.num_classes, self.num_classes), np.int64)
    sum_of_nats = 0.0
    with contextlib.closing(split.pairs(range(len(split)))) as pairs:
      for image, labels in pairs:
        classes, nats = score(image, labels, apply, windows)
        confusion += confusion_of(labels, classes, self.num_classes)
        sum_of_nats += nats
    found = metrics(confusion)
    loss = sum_of_nats / int(confusion.sum())
    return {**found, "loss": loss, "num_examples": len(split)}

  def scalars(self, found: Mapping[str, Any]) -> dict[str, float]:
    names = ("miou", "pixel_accuracy", "mean_accuracy", "loss")
    return {name: found[name] for name in names}

  def by_class(
    self,
    found: Mapping[str, Any],
    class_names: Sequence[str],
    train_count: Sequence[int],
    *,
    ordered: bool = False,
  ) -> dict[str, Any]:
    """Returns pixel and mean accuracy, and of each class its IoU and pixels."""
    del train_count, ordered
    iou = [None if np.isnan(x) else float(x) for x in found["class_iou"]]
    rows = zip(class_names, iou, found["class_pixels"], strict=True)
    return {
      "pixel_accuracy": found["pixel_accuracy"],
      "mean_accuracy": found["mean_accuracy"],
      "classes": [{"name": n, "iou": x, "pixels": int(p)} for n, x, p in rows],
    }


def logits_function(
  eval_step: Callable[[Batch], Any],
  windows: Windows,
  sharding: jax.sharding.Sharding | None,
) -> LogitsOf:
  """Returns the function that maps windows to their logits, by a jitted step.

  The logits stay where the step leaves them. Batches are filled up to a power of two
  times the number of devices, so that few programs are compiled.

  Args:
    eval_step: jitted; of a batch {"images", "mask"}.
    windows: how images are covered.
    sharding: of a batch, by its leading axis; None for the default device.
  """
  num_devices = 1 if sharding is None else len(sharding.device_set)

  def logits_of(images: np.ndarray) -> Any:
    size = num_devices
    while size < len(images):
      size *= 2
    size = min(size, windows.batch)
    rows = pipeline.local_rows(sharding, size)
    padding = [(0, size - len(images)), (0, 0), (0, 0), (0, 0)]
    batch = {
      "images": np.pad(images, padding)[rows],
      "mask": (np.arange(size) < len(images)).astype(np.float32)[rows],
    }
    return eval_step(pipeline.put_rows(batch, rows, size, sharding))

  return logits_of


def confusion_of(
  labels: Int[np.ndarray, "h w"], found: Int[np.ndarray, "h w"], num_classes: int
) -> Int64[np.ndarray, "k k"]:
  """Returns how many pixels of each class (rows) were found to be of each (columns).

  Args:
    labels: the class of each pixel; `IGNORED` ones are not counted.
    found: by the model.
    num_classes: k.
  """
  is_real = labels != IGNORED
  pairs = labels[is_real].astype(np.int64) * num_classes + found[is_real]
  return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def metrics(confusion: Int64[np.ndarray, "k k"]) -> dict[str, Any]:
  """Returns what a confusion matrix is worth.

  Args:
    confusion: from `confusion_of`, of all images together.

  Returns:
    `miou`: the mean over the classes that any pixel has or was found to have;
    `pixel_accuracy`; `mean_accuracy`, over the classes that any pixel has; all in
    [0, 1]. Also `class_iou`, NaN for a class that is nowhere, and `class_pixels`, [k].

  Raises:
    ValueError: no pixel was counted.
  """
  right, pixels = np.diag(confusion), confusion.sum(axis=1)
  union = pixels + confusion.sum(axis=0) - right
  if not pixels.any():
    raise ValueError("evaluation found no pixel that counts; all masks are ignored.")
  iou = np.full(len(right), np.nan)
  np.divide(right, union, out=iou, where=union > 0)
  is_there = pixels > 0
  return {
    "miou": float(np.mean(iou[union > 0])),
    "pixel_accuracy": float(right.sum() / pixels.sum()),
    "mean_accuracy": float(np.mean(right[is_there] / pixels[is_there])),
    "class_iou": iou,
    "class_pixels": pixels,
  }
