"""The figures of finished runs: what each kind computes, draws and writes as data.

A function for each kind takes a `Request` and returns a `Drawn`. What is computed and
what is drawn are elsewhere: `attribution`, `tsne`, `run_files`; `plots`, `visualize`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from insvp_jax import trees
from insvp_jax.errors import printable
from insvp_jax.logs.writers import write_bytes, write_text
from insvp_jax.run import Run, load_run
from insvp_jax.search import tables
from insvp_jax.tools import attribution, plots, run_data, run_files, tsne, visualize


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be drawn.

  Attributes:
    runs: workdirs by the name that the figure gives them.
    backbone: the runs' backbone's file, if it has moved.
    images: files; of these some at even distances are taken. Without any, test images
      of the first run's task.
    num_images: how many at most.
    class_name: that Grad-CAM is of; None for the class predicted.
    vectors: of `tsne.VECTORS`.
    seed: of the draw of test images, and of t-SNE.
  """

  runs: Mapping[str, Path]
  backbone: str | None = None
  images: Sequence[Any] = ()
  num_images: int = 6
  class_name: str | None = None
  vectors: str = "features"
  seed: int = 0


class Drawn(NamedTuple):
  """A figure, and the data that it shows.

  Attributes:
    figure: a `matplotlib.figure.Figure`.
    data: rows of a table, the titles first; or arrays by name.
  """

  figure: Any
  data: list[tuple] | dict[str, np.ndarray]


def labels_of(paths: Sequence[str]) -> list[str]:
  """Returns a name for each workdir: the last parts of its path that tell them apart.

  Raises:
    ValueError: a workdir is there twice.
  """
  parts = [Path(path).resolve().parts for path in paths]
  for depth in range(1, max(map(len, parts)) + 1):
    names = [printable("/".join(part[-depth:])) for part in parts]
    if len(set(names)) == len(names):
      return names
  twice = next(path for path in paths if parts.count(Path(path).resolve().parts) > 1)
  raise ValueError(f"--run={twice} is there twice.")


def write_data(path: str | os.PathLike, data: Any) -> None:
  """Writes what a figure shows to a file that is complete or not there at all.

  Args:
    path: ends with what `data_suffix` says of the data.
    data: of a `Drawn`.

  Raises:
    OSError: the disk is full or read-only.
  """
  if not isinstance(data, dict):
    write_text(path, tables.csv_text(data))
    return
  file = io.BytesIO()
  np.savez_compressed(file, **data)
  write_bytes(path, file.getvalue())


# --- Figures of images: a row each.


def _load(request: Request) -> dict[str, Run]:
  """Returns the runs.

  Raises:
    ValueError: one of them segments: these figures are of classes of images.
  """
  runs = {
    name: load_run(path, backbone=request.backbone)
    for name, path in request.runs.items()
  }
  for run in runs.values():
    if run.segments:
      raise ValueError(
        f"the run at {run.workdir} segments, and this kind of figure is of runs that "
        "classify images; insvp visualize draws its prompts and masks, --kind=curves "
        "and --kind=parameters its numbers."
      )
  return runs


def _images(run: Run, request: Request) -> tuple[Any, list[str] | None]:
  """Returns the images that are shown, and their classes where these are known."""
  if request.images:
    return visualize.evenly_spaced(request.images, request.num_images), None
  return run_data.sample_images(run, request.num_images, request.seed)


def _images_for(run: Run, first: Run, images: Any) -> Any:
  """Returns images of the first run for another one."""
  is_alike = run.preset == first.preset and (
    run.model.input_size == first.model.input_size
  )
  # What one run has resized is an image like any other to one of another size.
  return images if is_alike or isinstance(images, list) else np.asarray(images)


def _draw_maps(
  request: Request, compute: Callable[[Run, Any], Any], captions: Callable, unit: str
) -> Drawn:
  """Returns the figure of maps over images, side by side for all runs.

  Args:
    request: what is to be drawn.
    compute: `(run, images) -> maps [b, gh, gw]`.
    captions: `(run, probabilities [b, k], maps) -> [a line for each image]`.
    unit: what a map is.
  """
  plots.check_rows(request.num_images)
  runs = _load(request)
  first = next(iter(runs.values()))
  images, classes = _images(first, request)
  maps: dict[str, plots.Maps] = {}
  data = {"runs": np.array(list(runs)), "classes": np.array(classes or [], str)}
  for i, (name, run) in enumerate(runs.items()):
    own = _images_for(run, first, images)
    values, probabilities = compute(run, own), run.predict(own)
    pixels = run.to_pixels(run.preprocess(own))
    if run.model.prompter.prompted_size() != run.model.input_size:
      # The method makes images of another size, which the map is of.
      pixels = run.to_pixels(run.prompted(own))
    maps[name] = plots.Maps(pixels, values, captions(run, probabilities, values))
    data |= {f"maps_{i}": values, f"images_{i}": pixels}
    data |= {f"probabilities_{i}": probabilities}
  labels = [""] * len(probabilities) if classes is None else list(classes)
  return Drawn(plots.maps_figure(maps, labels, unit), data)


def draw_gradcam(request: Request) -> Drawn:
  """Draws Grad-CAM: of the class predicted, or of one that is named.

  Raises:
    ValueError: a run knows no such class; and as `attribution.grad_cam`.
  """

  def index_of(run: Run) -> int | None:
    name = request.class_name
    if name is not None and name not in run.class_names:
      raise ValueError(
        f"the run at {run.workdir} knows no class {name!r}."
        f"{trees.did_you_mean(name, run.class_names)}"
      )
    return None if name is None else run.class_names.index(name)

  def captions(run: Run, probabilities: np.ndarray, values: Any) -> list[str]:
    del values
    index = index_of(run)
    indices = [row.argmax() if index is None else index for row in probabilities]
    return [
      f"{run.class_names[k]}\n{100 * row[k]:.0f}%"
      for row, k in zip(probabilities, indices, strict=True)
    ]

  return _draw_maps(
    request,
    lambda run, images: attribution.grad_cam(run, images, index_of(run)),
    captions,
    "Grad-CAM",
  )


def draw_rollout(request: Request) -> Drawn:
  """Draws attention roll-out, and how much of it the patches have.

  Raises:
    ValueError: as `attribution.attention_rollout`.
  """

  def captions(run: Run, probabilities: Any, values: np.ndarray) -> list[str]:
    del run, probabilities
    return [f"patches {100 * share:.0f}%" for share in values.sum(axis=(1, 2))]

  return _draw_maps(
    request, attribution.attention_rollout, captions, "attention roll-out"
  )


def draw_prompts(request: Request) -> Drawn:
  """Draws prompts, as `visualize`; the data are those of `Run.prompts` that are images.

  Raises:
    ValueError: the method makes no image prompts.
  """
  plots.check_rows(request.num_images)
  (run,) = _load(request).values()
  images, classes = _images(run, request)
  figure = visualize.prompt_figure(run, images, labels=classes)
  prompts = run.prompts(images)
  data = {name: prompts[name] for name in visualize.image_prompts(run)}
  data |= {
    "inputs": run.preprocess(images),
    "prompted": run.prompted(images),
    "probabilities": run.predict(images),
    "classes": np.array(classes or [], str),
  }
  return Drawn(figure, data)


# --- Figures of points and curves.


def draw_tsne(request: Request) -> Drawn:
  """Draws vectors of images by t-SNE: by class or, of files, by the class predicted.

  Raises:
    ValueError: as `tsne.vectors` and `tsne.tsne`.
  """
  ((name, run),) = _load(request).items()
  images, classes = _images(run, request)
  points = tsne.tsne(tsne.vectors(run, images, request.vectors), seed=request.seed)
  if classes is None:
    labels, colored = run.predict(images).argmax(axis=1), "predicted class"
    titles = [str(image) for image in images]
  else:
    labels = np.array([run.class_names.index(name) for name in classes])
    colored, titles = "class", [str(i) for i in range(len(labels))]
  figure = plots.points_figure(
    points,
    labels,
    run.class_names,
    f"{name}, {'specific prompts' if request.vectors == 'specific' else 'features'}",
  )
  data = [("image", colored.replace(" ", "_"), "x", "y")]
  for title, label, (x, y) in zip(titles, labels, points, strict=True):
    data.append((title, run.class_names[label], float(x), float(y)))
  return Drawn(figure, data)


def draw_curves(request: Request) -> Drawn:
  """Draws losses and accuracy by epoch, of runs and of searches' first final runs.

  Raises:
    ValueError, FileNotFoundError: as `run_files.read_curves` and `plots.curves_figure`.
  """
  curves: dict[str, dict[str, plots.Curve]] = {}
  for name, workdir in request.runs.items():
    for label, folder in run_files.run_folders(workdir, name).items():
      is_row = folder != workdir and len(request.runs) > 1
      found = run_files.read_curves(folder)
      if "loss" in found:
        found["loss"] = plots.averaged(found["loss"])
      curves[f"{name}, {label}" if is_row else label] = found
  data: list[tuple] = [("run", "curve", "epoch", "value")]
  for label, run in curves.items():
    for kind, (epochs, values) in run.items():
      data += [
        (label, kind, float(x), float(y)) for x, y in zip(epochs, values, strict=True)
      ]
  return Drawn(plots.curves_figure(curves), data)


def draw_parameters(request: Request) -> Drawn:
  """Draws test accuracy against trainable parameters, of runs and of searches' rows.

  Raises:
    ValueError, FileNotFoundError: as `run_files.read_trained` and
      `plots.parameters_figure`.
  """
  trained = [
    point
    for name, workdir in request.runs.items()
    for point in run_files.read_trained(workdir, name)
  ]
  figure = plots.parameters_figure(trained)
  data = [("label", "trainable_params", f"test_{trained[0].metric}", "std")]
  data += [point[:4] for point in trained]
  return Drawn(figure, data)


class Kind(NamedTuple):
  """A kind of figure.

  Attributes:
    draw: the function.
    flags: of the command, beside those of all kinds.
    several: whether it takes several runs.
    suffix: of the file of its data.
    num_images: how many at most by default.
  """

  draw: Callable[[Request], Drawn]
  flags: frozenset[str]
  several: bool
  suffix: str
  num_images: int = 6


_OF_IMAGES = frozenset({"backbone", "images", "num_images", "seed"})
KINDS = {
  "prompts": Kind(draw_prompts, _OF_IMAGES, False, ".npz"),
  "gradcam": Kind(draw_gradcam, _OF_IMAGES | {"label", "class_name"}, True, ".npz"),
  "rollout": Kind(draw_rollout, _OF_IMAGES | {"label"}, True, ".npz"),
  "tsne": Kind(draw_tsne, _OF_IMAGES | {"label", "vectors"}, False, ".csv", 500),
  "curves": Kind(draw_curves, frozenset({"label"}), True, ".csv"),
  "parameters": Kind(draw_parameters, frozenset({"label"}), True, ".csv"),
}
