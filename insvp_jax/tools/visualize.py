"""Draws the prompts of a run: image, patch, global and fused prompt, prompted image.

Of a segmenter also the classes of the pixels, over the image, and what the masks have.

insvp visualize --run=runs/folder/insvp/seed0 --output=prompts.png
insvp visualize --run=runs/folder/insvp/seed0 --images photos/ one.jpg

Without the command `insvp` it is python -m insvp_jax.tools.visualize.

Prompts are signed and small, so each is stretched to the full range around grey;
the number below it is its largest absolute value, in grey levels of 255.
"""

from collections.abc import Mapping, Sequence
import io
import os
from pathlib import Path
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from insvp_jax import tools
from insvp_jax.logs.writers import write_bytes
from insvp_jax.tools import run_data, runs
from insvp_jax.tools.masks import colors_of, overlay

FORMATS = (".png", ".pdf", ".svg", ".jpg")
TITLES = {"patch": "patch prompt", "global": "global prompt", "image": "fused prompt"}
PANEL_INCHES = 1.9
# Classes of which a legend says the colour.
_MOST_COLORS = 24


def image_prompts(run: Any) -> list[str]:
  """Returns the keys of `TITLES` that a run's method makes; computes nothing.

  Args:
    run: from `load_run`.
  """
  model, size = run.model, run.model.input_size
  prompts = jax.eval_shape(
    lambda params, images: model.apply({"params": params}, images, method="prompts"),
    run.params,
    jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
  )
  return [name for name in TITLES if name in prompts]


def prompt_figure(run: Any, images: Any, labels: Sequence[str] | None = None) -> Any:
  """Returns a figure with one row per image and one column per kind of prompt.

  Args:
    run: from `load_run`, of a method that prompts images.
    images: as for `Run.predict`; a few, since each gets a row.
    labels: the images' true class names, written beside them.

  Returns:
    A `matplotlib.figure.Figure`; it belongs to no window.

  Raises:
    ValueError: the method makes no image prompts, or matplotlib is not installed.
  """
  check_matplotlib()
  names = image_prompts(run)
  if not names:
    raise ValueError(
      f"the method {run.meta.get('method')!r} makes no image prompts, so there is "
      "nothing to draw; a run of 'insvp' with its image prompts does."
    )
  from matplotlib.figure import Figure

  prompts, probabilities = run.prompts(images), run.predict(images)
  _check_finite(run, prompts)
  pixels = run.to_pixels(run.preprocess(images))
  prompted_pixels = run.to_pixels(run.prompted(images))
  columns, rows = len(names) + 2, len(pixels)
  size = (columns * PANEL_INCHES, rows * PANEL_INCHES + 0.4)
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots(rows, columns, squeeze=False)
  for i, row in enumerate(axes):
    _show(row[0], pixels[i], "image" if i == 0 else "")
    predicted = int(probabilities[i].argmax())
    text = f"{run.class_names[predicted]} {100 * probabilities[i, predicted]:.0f}%"
    if labels is not None:
      text += f"\n(is {labels[i]})"
    # Not parsed as mathematics: a class name may hold a dollar sign.
    row[0].set_ylabel(text, parse_math=False, fontsize=9)
    for axis, name in zip(row[1:-1], names, strict=True):
      stretched, text = _stretched(prompts[name][i], run.preset)
      _show(axis, stretched, TITLES[name] if i == 0 else "")
      axis.set_xlabel(text, fontsize=8)
    _show(row[-1], prompted_pixels[i], "prompted image" if i == 0 else "")
  return figure


def _check_finite(run: Any, prompts: Mapping[str, np.ndarray]) -> None:
  if not all(np.isfinite(prompts[name]).all() for name in TITLES if name in prompts):
    raise ValueError(
      f"prompts of the run at {run.workdir} are not finite: it has diverged; train it "
      "with a smaller lr."
    )


def mask_figure(run: Any, images: Sequence[Any], masks: Any = None) -> Any:
  """Returns a figure with a row per image: prompts, and the classes that are found.

  Args:
    run: from `load_run`, of segmentation. Prompts are those of the whole image as a
      square, where its method makes some.
    images: as for `Run.segment`; a few, since each gets a row.
    masks: the classes of the images' pixels, int16 [h, w] each; None for unknown.

  Returns:
    A `matplotlib.figure.Figure`; it belongs to no window.

  Raises:
    ValueError: matplotlib is not installed.
  """
  check_matplotlib()
  from matplotlib.figure import Figure
  from matplotlib.patches import Patch

  pixels = run.read_images(images)
  found, names = run.segment(pixels), image_prompts(run)
  prompts = run.prompts(pixels) if names else {}
  _check_finite(run, prompts)
  prompted = run.to_pixels(run.prompted(pixels)) if names else []
  titles = ["image", *(TITLES[name] for name in names)]
  titles += ["prompted image"] * bool(names) + ["predicted"]
  titles += ["mask"] * (masks is not None)
  size = (len(titles) * PANEL_INCHES, len(pixels) * PANEL_INCHES + 0.7)
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots(len(pixels), len(titles), squeeze=False)
  for i, row in enumerate(axes):
    panels = [(pixels[i], "")]
    for name in names:
      panels.append(_stretched(prompts[name][i], run.preset))
    panels += [(prompted[i], "")] if names else []
    shown = [found[i], *([] if masks is None else [masks[i]])]
    panels += [(overlay(pixels[i], labels, run.mask_style), "") for labels in shown]
    for axis, (panel, text), title in zip(row, panels, titles, strict=True):
      _show(axis, panel, title if i == 0 else "")
      axis.set_xlabel(text, fontsize=8)
  known = [*found, *([] if masks is None else masks)]
  classes = np.unique(np.concatenate([labels.ravel() for labels in known]))
  colors = colors_of(run.mask_style) / 255
  handles = [
    Patch(facecolor=colors[k], edgecolor="0.5", label=run.class_names[k])
    for k in classes[classes >= 0][:_MOST_COLORS]
  ]
  legend = figure.legend(
    handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False
  )
  for text in legend.get_texts():
    text.set_parse_math(False)
  return figure


def _stretched(prompt: np.ndarray, preset: Any) -> tuple[np.ndarray, str]:
  """Returns a prompt around grey, and its largest value in grey levels, as text."""
  # Prompts are added to normalised images; in grey levels of 255.
  levels = prompt * np.asarray(preset.std) * 255
  largest = float(np.abs(levels).max())
  return 0.5 + levels / (2 * max(largest, 1e-6)), f"± {largest:.3g} of 255"


def save_figure(figure: Any, path: str | os.PathLike, dpi: int = 150) -> None:
  """Writes a figure to a file that is either complete or not there at all.

  Args:
    figure: the figure.
    path: its file; the letters of a .pdf are text, of a kind that publishers accept.
    dpi: pixels per inch where it is of pixels.

  Raises:
    ValueError: the file's ending is not one of `FORMATS`; the file is a link, or none.
    OSError: the disk is full or read-only.
  """
  import matplotlib
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  path, stream = Path(path), io.BytesIO()
  check_format(path)
  # TrueType: publishers refuse matplotlib's default, Type 3.
  with matplotlib.rc_context({"pdf.fonttype": 42}):
    FigureCanvasAgg(figure).print_figure(
      stream, dpi=dpi, format=path.suffix[1:].lower()
    )
  write_bytes(path, stream.getvalue())


def check_matplotlib() -> None:
  """Checks that there is what draws; call it before anything long.

  Raises:
    ValueError: it is not installed; the message says how to install it.
  """
  try:
    import matplotlib  # noqa: F401
  except ModuleNotFoundError as error:
    raise ValueError(
      "drawing needs matplotlib: pip install 'insvp_jax[plots]'"
    ) from error


def check_format(path: Path) -> None:
  """Checks that a file's ending is one of `FORMATS`.

  Raises:
    ValueError: it is not; the message lists them.
  """
  if path.suffix.lower() not in FORMATS:
    raise ValueError(
      f"cannot write a figure to {str(path)!r}; its name has to end with one of "
      f"{', '.join(FORMATS)}."
    )


def evenly_spaced(items: Sequence[Any], count: int) -> list[Any]:
  """Returns at most `count` items at even distances.

  The first images of a folder would all be of one class.
  """
  count = min(count, len(items))
  return [items[i * len(items) // count] for i in range(count)]


def _show(axis: Any, pixels: np.ndarray, title: str) -> None:
  axis.imshow(pixels, interpolation="nearest")
  axis.set_xticks([])
  axis.set_yticks([])
  if title:
    axis.set_title(title, fontsize=9)


def draw(
  run: Any, path: str | os.PathLike, *, images: Sequence[Any] = (), rows: int = 6
) -> None:
  """Draws the prompts for some images and writes the figure.

  Args:
    run: from `load_run`.
    path: the figure's file.
    images: of these some at even distances are shown; if there are none, test images
      of the run's task, with their classes or masks.
    rows: how many images at most.

  Raises:
    ValueError, OSError: as `prompt_figure`, `mask_figure` and `save_figure`.
  """
  shown, labels = evenly_spaced(images, rows), None
  if not images:
    sample = run_data.sample_pairs if run.segments else run_data.sample_images
    shown, labels = sample(run, rows)
  create = mask_figure if run.segments else prompt_figure
  save_figure(create(run, shown, labels), path)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  parser = tools.argument_parser(__doc__, "visualize", prog)
  runs.add_arguments(parser)
  parser.add_argument(
    "--images",
    nargs="+",
    help="image files, or folders of them; test images of the run's task without it",
  )
  parser.add_argument("--output", default="prompts.png", help="the figure's file")
  parser.add_argument("--rows", type=int, default=6, help="how many images at most")
  args = parser.parse_args(argv)

  def work() -> None:
    if args.rows < 1:
      raise ValueError(f"--rows is {args.rows}, expected at least 1.")
    check_matplotlib()
    check_format(Path(args.output))
    images = tools.find_images(args.images) if args.images else []
    run = runs.load(args)
    draw(run, args.output, images=images, rows=args.rows)
    print(f"wrote {args.output}")

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())
