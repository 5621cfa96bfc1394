"""A run as one program: uint8 images in, probabilities out, without this package.

`jax.export` writes StableHLO for CPU, CUDA and TPU with the weights in it, for any
number of images, and `jax.export.deserialize` reads it; jax2onnx writes ONNX. Beside
either lies a description: the classes, and how images become the squares that the
program takes. docs/ship.md has the few lines that use both. The program of a segmenter
takes windows, and returns the logits of their pixels.
"""

from collections.abc import Callable, Mapping
import dataclasses
from importlib import metadata
import logging
from pathlib import Path
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from insvp_jax import trees
from insvp_jax.checkpoints import adapters
from insvp_jax.data import preprocess
from insvp_jax.methods.ops import conv
from insvp_jax.models import quantized, weights

PLATFORMS = ("cpu", "cuda", "tpu")
# Random images that a converted program is compared with `Run.predict` on, and by how
# much a probability may be off.
_CHECKED, _TOLERANCE = 3, 1e-4
# A serialized program is a FlatBuffer, whose offsets have 31 bits.
_MAX_BYTES = 2**31 - 2**26


def classifier(run: Any, auto_form: str = conv.PORTABLE) -> Callable[[Any], jax.Array]:
  """Returns `pixels -> probabilities`, for programs that run elsewhere.

  It computes what `Run.predict` does, for uint8 [b, s, s, 3] of the stored size s of
  the run's preset, by nothing that only one kind of device has; of a segmenter what
  `Run.window_logits` does. The method is not folded into the backbone.

  Args:
    run: from `load_run`.
    auto_form: what "auto" stands for in convolutions; see `conv.auto_is`.
  """
  model = run.model
  if getattr(model.backbone, "fused_attention", False):
    # That would be cuDNN's.
    model = model.clone(backbone=model.backbone.clone(fused_attention=False))

  def probabilities(pixels: Any) -> jax.Array:
    with conv.auto_is(auto_form):
      inputs = preprocess.eval_preprocess(run.preset, pixels, model.input_size)
      return jax.nn.softmax(model.apply({"params": run.params}, inputs))

  def logits(pixels: Any) -> jax.Array:
    with conv.auto_is(auto_form):
      inputs = preprocess.normalise(run.preset, pixels)
      return model.apply({"params": run.params}, inputs)

  return logits if run.segments else probabilities


def input_side(run: Any) -> int:
  """Returns the pixels per side of what the program takes."""
  size = run.model.input_size
  return size if run.segments else run.preset.stored_size(size)


def input_shape(run: Any) -> jax.ShapeDtypeStruct:
  """Returns what the program takes: uint8 [b, s, s, 3] with a symbolic b."""
  (b,) = export.symbolic_shape("b")
  side = input_side(run)
  return jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8)


def check_size(run: Any) -> None:
  """Checks that the weights fit into one file.

  Raises:
    ValueError: they do not.
  """
  num_bytes = sum(leaf.nbytes for leaf in trees.flatten(run.params).values())
  if num_bytes > _MAX_BYTES:
    raise ValueError(
      f"the weights have {num_bytes / 2**30:.2f} GiB, and a program with its weights "
      "in it holds less than 2; export the adapter (--format=adapter), which is loaded "
      "with its backbone."
    )


def write_stablehlo(run: Any, path: Path) -> dict[str, Any]:
  """Writes the program of a run as `jax.export` stores it; returns where it runs.

  Raises:
    ValueError: it is too large, or computes what only one kind of device can.
    OSError: the file cannot be written.
  """
  check_size(run)
  try:
    exporter = export.export(jax.jit(classifier(run)), platforms=PLATFORMS)
    data = exporter(input_shape(run)).serialize()
  except (ValueError, NotImplementedError) as error:
    raise _not_exported(run, f"for {', '.join(PLATFORMS)}", error) from error
  _write(path, data)
  return {"platforms": list(PLATFORMS), "exported_with": {"jax": jax.__version__}}


def write_onnx(run: Any, path: Path) -> dict[str, Any]:
  """Writes the program of a run as ONNX; returns where it runs, and how precisely.

  It is written once ONNX Runtime has computed the same from it.

  Convolutions are the runtime's own; it has no Fourier transform of two axes. Kernels
  in 8 bits are written as the floats that they stand for.

  Raises:
    ValueError: the converter is not installed or cannot convert the method, the program
      is too large, or computes something else.
    OSError: the file cannot be written.
  """
  check_size(run)
  try:
    import jax2onnx
    import onnxruntime
  except ImportError as error:
    raise ValueError(
      "--format=onnx needs jax2onnx: pip install 'insvp_jax[onnx]', on Python 3.11 "
      "(with jax 0.11 and later it does not convert every method)."
    ) from error
  # It warns of plugins for libraries that are not used here.
  for name in ("jax2onnx", "onnx_ir"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  # The converter knows Flax's layers, of arrays alone.
  floats = dataclasses.replace(run, params=quantized.dequantize(run.params))
  shape, count = input_shape(run), _CHECKED
  if run.segments:
    # The converter enlarges no maps of any number of windows, only of one.
    count = 1
    shape = jax.ShapeDtypeStruct((1, *shape.shape[1:]), shape.dtype)
  pixels = np.random.default_rng(0).integers(
    0, 256, (count, *shape.shape[1:]), np.uint8
  )
  try:
    model = jax2onnx.to_onnx(
      classifier(floats, auto_form="plain"),
      inputs=[shape],
      input_names=["images"],
      output_names=["logits" if run.segments else "probabilities"],
    )
    data = model.SerializeToString()
    (found,) = onnxruntime.InferenceSession(data).run(None, {"images": pixels})
  except Exception as error:
    # Converter and runtime raise whatever they stumble over.
    raise _not_exported(run, "as ONNX", error) from error
  if run.segments:
    expected, what = np.asarray(run.window_logits(pixels)), "logits"
  else:
    expected = run.predict(pixels.view(preprocess.Resized))
    what = "probabilities"
  difference = np.abs(found - expected).max()
  # Logits are of any size.
  limit = _TOLERANCE * max(1.0, float(np.abs(expected).max()))
  if not difference <= limit:
    raise ValueError(
      f"the converted program computes something else: {what} of {count} random "
      f"images are up to {difference:.2g} off, expected at most {limit:g}. Export "
      "--format=stablehlo."
    )
  _write(path, data)
  versions = {n: metadata.version(n) for n in ("jax", "jax2onnx", "onnxruntime")}
  return {
    "platforms": ["onnxruntime"],
    "exported_with": versions,
    "largest_difference": float(difference),
    **(_input_and_output(run, "1") if run.segments else {}),
  }


def _write(path: Path, data: bytes | bytearray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with weights.atomic_file(path) as temporary:
    temporary.write_bytes(data)


def _not_exported(run: Any, how: str, error: Exception) -> ValueError:
  reason = (str(error).strip() or type(error).__name__).splitlines()[0]
  return ValueError(
    f"the method {run.meta.get('method')!r} cannot be exported {how}: {reason}"
  )


def describe_resize(run: Any) -> dict[str, Any]:
  """Returns how an image becomes a square that the program takes.

  Returns:
    filter: "BILINEAR" or "BICUBIC", as Pillow computes them with antialias, or "tf1".
    keep_aspect: whether it is the shorter side that becomes `side`, and the longer one
      in proportion, rounded down; else both do.
    side: pixels.
    square: side of the square that is cut out of the centre then.
    crop: side of the centre of it that the program looks at.
  """
  preset, size = run.preset, run.model.input_size
  name = "BICUBIC" if preset.resize.endswith("bicubic") else "BILINEAR"
  return {
    "filter": "tf1" if preset.resize == "tf1" else name,
    "keep_aspect": preset.keeps_aspect,
    "side": preset.resized_size(size),
    "square": preset.stored_size(size),
    "crop": size,
  }


def describe_windows(run: Any) -> dict[str, Any]:
  """Returns how a segmenter's run covers an image by windows; see `windows.Windows`.

  Returns:
    resize: "shorter" where an image is resized so that its shorter side is `size`,
      "none" where it stays as it is; size: pixels per side of a window; stride: from
      one to the next; fill: RGB of what is beyond an image; values: of the classes in
      files of masks.
  """
  windows = run.windows()
  return {
    "resize": windows.resize,
    "size": windows.size,
    "stride": windows.stride,
    "fill": list(windows.fill),
    "values": list(run.mask_style.values),
  }


def _input_and_output(run: Any, count: str = "b") -> dict[str, str]:
  """Returns what the program of a run takes, and what it returns."""
  side, num_classes = input_side(run), len(run.class_names)
  output = f"{count}, {num_classes}], probabilities"
  if run.segments:
    output = f"{count}, {side}, {side}, {num_classes}], logits of each pixel"
  return {
    "input": f"uint8[{count}, {side}, {side}, 3], RGB",
    "output": f"float32[{output}",
  }


def describe(run: Any, path: Path, written: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the description of a program that has been written.

  Args:
    run: from `load_run`.
    path: of the program.
    written: what `write_stablehlo` or `write_onnx` returned.
  """
  result = run.result or {}
  metric_key = f"test_{run.metric}"
  place = "windows" if run.segments else "resize"
  return {
    "file": path.name,
    "sha256": weights.file_digest(path),
    **_input_and_output(run),
    "class_names": list(run.class_names),
    place: describe_windows(run) if run.segments else describe_resize(run),
    "task": run.meta.get("task"),
    "method": run.meta.get("method"),
    "backbone": adapters.public({"backbone": run.meta["backbone"]})["backbone"],
    "preset": run.preset.name,
    metric_key: result.get(metric_key),
    "num_test_examples": result.get("num_test_examples"),
    "trained_with": run.meta.get("versions"),
    **written,
  }
