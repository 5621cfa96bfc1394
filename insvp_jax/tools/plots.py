"""Draws what was computed elsewhere: maps, points, curves, parameters against accuracy.

Each function takes arrays and returns a `matplotlib.figure.Figure` that belongs to no
window. Figures are as wide as a column of a paper, 3.3 inches, where their content lets
them, with letters of 8 points and colours that the colour-blind can tell apart. Names
are written as they are: no dollar sign starts a formula.
"""

import bisect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import functools
import math
from typing import Any, NamedTuple

from jaxtyping import Float, Int
import numpy as np

from insvp_jax.tools import visualize
from insvp_jax.train import objectives

# Okabe and Ito's colours, which the colour-blind can tell apart; no yellow on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
STYLES = ("-", "--", ":")
MARKERS = ("o", "^", "s")
# How many curves or classes can be told apart: colours times styles, or markers.
MAX_LABELS = len(COLORS) * len(STYLES)
COLUMN_INCHES = 3.3
FONT_SIZE = 8
DPI = 300
# About what a line of `FONT_SIZE` takes.
LINE_INCHES = 0.16
# Points of a curve: more of them are averaged, as the loss of one batch is noisy.
NUM_POINTS = 40
# A picture of more rows would be more pixels than a file may have.
MAX_ROWS = 100
_PANEL_INCHES = (0.8, 1.1)
_MAP_ALPHA = 0.5

_OF_TRAIN = {"linewidth": 0.8, "alpha": 0.7}
_OF_VAL = {"linewidth": 1.2, "marker": "o", "markersize": 3}

Curve = tuple[np.ndarray, np.ndarray]


def _styled(draw: Callable) -> Callable:
  """Makes a function draw with the letters of this module, whatever the user's are."""

  @functools.wraps(draw)
  def styled(*args: Any, **kwargs: Any) -> Any:
    with style():
      return draw(*args, **kwargs)

  return styled


@contextlib.contextmanager
def style() -> Iterator[None]:
  """Sets the look of what is drawn within.

  Raises:
    ValueError: matplotlib is not installed.
  """
  visualize.check_matplotlib()
  import matplotlib

  sizes = ("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize")
  sizes += ("xtick.labelsize", "ytick.labelsize")
  with matplotlib.rc_context(
    {
      **dict.fromkeys(sizes, FONT_SIZE),
      **{"text.parse_math": False, "legend.frameon": False, "lines.linewidth": 1.2},
      **{"axes.linewidth": 0.6, "axes.grid": False, "axes.axisbelow": True},
    }
  ):
    yield


def text_inches(text: str) -> float:
  """Returns the width of a text in letters of `FONT_SIZE`."""
  from matplotlib.font_manager import FontProperties
  from matplotlib.textpath import text_to_path

  font = FontProperties(size=FONT_SIZE)
  width, *_ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
  return float(width) / 72


def shortened(text: str, inches: float) -> str:
  """Returns a text that is at most so wide, its end cut off if need be."""
  if text_inches(text) <= inches:
    return text
  most = bisect.bisect(
    range(1, len(text)), inches, key=lambda n: text_inches(f"{text[:n]}…")
  )
  return f"{text[: max(1, most)]}…"


# --- Maps over images.


class Maps(NamedTuple):
  """The maps of one run: a column of a figure.

  Attributes:
    pixels: the images as the run sees them, in [0, 1].
    values: of each image's positions; not negative.
    captions: a line below each.
  """

  pixels: Float[np.ndarray, "b h w 3"]
  values: Float[np.ndarray, "b gh gw"]
  captions: Sequence[str]


@_styled
def maps_figure(
  maps: Mapping[str, Maps], labels: Sequence[str], unit: str = "map"
) -> Any:
  """Returns a figure with a row for each image: the image, and each run's map over it.

  A map is divided by its largest value: maps tell where, not how much.

  Args:
    maps: by the name of the run; all of the same images.
    labels: a line below each image; "" for none.
    unit: what a map is, for the colour bar.

  Raises:
    ValueError: there are more than `MAX_ROWS` images.
  """
  from matplotlib.cm import ScalarMappable
  from matplotlib.figure import Figure

  rows, columns = len(labels), 1 + len(maps)
  check_rows(rows)
  least, most = _PANEL_INCHES
  panel = min(most, max(least, COLUMN_INCHES / columns))
  captions = [labels, *(column.captions for column in maps.values())]
  lines = max(text.count("\n") + bool(text) for texts in captions for text in texts)
  row_inches = panel + 0.9 * lines * LINE_INCHES
  size = (columns * panel, rows * row_inches + 0.7)
  figure = Figure(figsize=size, layout="constrained")
  figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, hspace=0.0, wspace=0.0)
  grid = figure.add_gridspec(
    rows + 1, columns, height_ratios=[*[row_inches] * rows, 0.07]
  )
  first = next(iter(maps.values())).pixels
  for i, label in enumerate(labels):
    axis = figure.add_subplot(grid[i, 0])
    _panel(axis, first[i], "image" if i == 0 else "", label, panel)
    for j, (name, column) in enumerate(maps.items(), 1):
      axis, pixels = figure.add_subplot(grid[i, j]), column.pixels[i]
      _panel(axis, pixels, name if i == 0 else "", column.captions[i], panel)
      axis.imshow(
        relative(column.values[i]),
        **{"extent": (0, pixels.shape[1], pixels.shape[0], 0), "vmin": 0, "vmax": 1},
        **{"alpha": _MAP_ALPHA, "cmap": "viridis", "interpolation": "bilinear"},
      )
  scale = ScalarMappable(cmap="viridis")
  scale.set_clim(0, 1)
  bar = figure.colorbar(
    scale, cax=figure.add_subplot(grid[-1, :]), orientation="horizontal"
  )
  bar.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])
  bar.set_label(f"{unit}, share of its maximum")
  return figure


def check_rows(rows: int) -> None:
  """Checks the number of images of a figure with a row for each.

  Raises:
    ValueError: there are none or too many.
  """
  if not 1 <= rows <= MAX_ROWS:
    raise ValueError(
      f"num_images is {rows}, expected 1 to {MAX_ROWS}: each gets a row of the figure."
    )


def relative(values: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
  """Returns a map divided by its largest value; zeros where all are."""
  largest = values.max()
  return values / largest if largest > 0 else np.zeros_like(values)


def _panel(axis: Any, pixels: np.ndarray, title: str, text: str, inches: float) -> None:
  height, width = pixels.shape[:2]
  axis.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
  axis.set_xticks([])
  axis.set_yticks([])
  axis.set_title(shortened(title, inches), pad=3)
  lines = [shortened(line, inches) for line in text.split("\n")]
  axis.set_xlabel("\n".join(lines), labelpad=2)


# --- Points in the plane.


@_styled
def points_figure(
  points: Float[np.ndarray, "n 2"],
  labels: Int[np.ndarray, "n"],
  class_names: Sequence[str],
  title: str,
) -> Any:
  """Returns a figure of points coloured by class, as of `tsne.tsne`.

  Of more than `MAX_LABELS` classes a legend would tell nothing: each class has its
  shade then, in their order.

  Args:
    points: of the images.
    labels: the class of each.
    class_names: of all classes; the legend has those that occur.
    title: of the figure.
  """
  from matplotlib import colormaps
  from matplotlib.figure import Figure

  present = np.unique(labels)
  has_legend = len(present) <= MAX_LABELS
  names = [shortened(class_names[k], COLUMN_INCHES - 0.4) for k in present]
  columns = _legend_columns(names)
  lines = -(-len(present) // columns) if has_legend else 0
  size = (COLUMN_INCHES, 2.9 + lines * LINE_INCHES)
  figure = Figure(figsize=size, layout="constrained")
  axis = figure.subplots()
  shades = colormaps["viridis"](np.linspace(0, 0.95, len(present)))
  for i, (k, name) in enumerate(zip(present, names, strict=True)):
    color, marker = shades[i], "o"
    if has_legend:
      color, marker = COLORS[i % len(COLORS)], MARKERS[i // len(COLORS)]
    axis.plot(
      *points[labels == k].T,
      marker,
      **{"color": color, "label": name, "alpha": 0.8, "markersize": 3},
      **{"markeredgewidth": 0},
    )
  axis.set_xticks([])
  axis.set_yticks([])
  axis.set_xlabel("t-SNE, first dimension")
  axis.set_ylabel("t-SNE, second dimension")
  count = "" if has_legend else f"; {len(present)} classes, a shade each"
  axis.set_title(shortened(f"{title}{count}", 1.15 * COLUMN_INCHES))
  if has_legend:
    _legend_below(figure, *axis.get_legend_handles_labels(), columns)
  return figure


def _legend_columns(names: Sequence[str]) -> int:
  """Returns how many columns of a legend fit into a column of a paper."""
  widest = max(map(text_inches, names)) + 0.45
  return max(1, min(len(names), int(COLUMN_INCHES / widest)))


def _legend_below(figure: Any, handles: Any, names: Any, columns: int) -> None:
  figure.legend(
    handles,
    names,
    **{"loc": "outside lower center", "ncols": columns, "handletextpad": 0.5},
    **{
      "columnspacing": 1.0,
      "borderpad": 0.1,
      "labelspacing": 0.25,
      "markerscale": 1.5,
    },
    handlelength=1.6,
  )


# --- Curves by epoch.


@_styled
def curves_figure(curves: Mapping[str, Mapping[str, Curve]], x: str = "epoch") -> Any:
  """Returns a figure of runs while they train: losses, and below them the metric.

  Args:
    curves: by run, (x, y) of "loss" and "val_loss" in nats and of the metric on val,
      such as "val_accuracy", in [0, 1], as far as there are such.
    x: what x counts.

  Raises:
    ValueError: more runs than `MAX_LABELS`, several metrics, or no curve at all.
  """
  from matplotlib.figure import Figure
  from matplotlib.lines import Line2D

  if len(curves) > MAX_LABELS:
    raise ValueError(
      f"curves of {len(curves)} runs, expected at most {MAX_LABELS}: more could not be "
      "told apart."
    )
  kinds = {name for run in curves.values() for name in run}
  if not kinds:
    raise ValueError("no run has a finite loss or accuracy to draw.")
  metric = _one_metric({name[4:] for name in kinds - {"loss", "val_loss"}})
  has_metric, has_loss = bool(metric), bool(kinds & {"loss", "val_loss"})
  names = [shortened(name, COLUMN_INCHES - 0.5) for name in curves]
  columns = _legend_columns(names)
  lines = -(-len(names) // columns) + 1
  panels = has_metric + has_loss
  size = (COLUMN_INCHES, 0.4 + 1.6 * panels + lines * LINE_INCHES)
  figure = Figure(figsize=size, layout="constrained")
  axes = list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
  loss_axis, metric_axis = axes[0], axes[-1]
  handles = []
  for i, run in enumerate(curves.values()):
    look = {"color": COLORS[i % len(COLORS)]}
    look["linestyle"] = STYLES[i // len(COLORS) % len(STYLES)]
    handles.append(Line2D([], [], **look))
    if "loss" in run:
      loss_axis.plot(*run["loss"], **look, **_OF_TRAIN)
    look |= _OF_VAL
    if "val_loss" in run:
      loss_axis.plot(*run["val_loss"], **look)
    if f"val_{metric}" in run:
      epochs, values = run[f"val_{metric}"]
      metric_axis.plot(epochs, 100 * values, **look)
  if has_loss:
    loss_axis.set_ylabel("loss, nats")
  if has_metric:
    metric_axis.set_ylabel(f"{objectives.title_of(metric)} on val, %")
  axes[-1].set_xlabel(x)
  for axis in axes:
    axis.grid(color="0.92")
  if {"loss", "val_loss"} <= kinds:
    # In neutral colour: what the points mean, of every run.
    kinds_of_loss = [
      Line2D([], [], color="0.3", **look, label=label)
      for label, look in (("train", _OF_TRAIN), ("val", _OF_VAL))
    ]
    loss_axis.legend(handles=kinds_of_loss, ncols=2, borderpad=0.1, loc="best")
  _legend_below(figure, handles, names, columns)
  return figure


def _one_metric(metrics: Collection[str]) -> str:
  """Returns what all runs are judged by; "" where there is nothing.

  Raises:
    ValueError: they are judged by several things.
  """
  if len(metrics) > 1:
    names = " and ".join(sorted(map(objectives.title_of, metrics)))
    raise ValueError(f"the runs are judged by {names}; draw a figure of each.")
  return next(iter(metrics), "")


def averaged(curve: Curve) -> Curve:
  """Returns at most `NUM_POINTS` points: means over neighbours."""
  parts = min(NUM_POINTS, len(curve[0]))
  x, y = (
    np.array([part.mean() for part in np.array_split(values, parts)])
    for values in curve
  )
  return x, y


# --- Parameters against accuracy.


class Trained(NamedTuple):
  """A run, or a row of a search, as one point.

  Attributes:
    label: beside the point.
    params: trainable parameters, the head's too; at least 1.
    accuracy: in [0, 1]; of another metric that.
    std: of the accuracy over seeds; None of one run.
    metric: what the run is judged by, as keys name it.
  """

  label: str
  params: int
  accuracy: float
  std: float | None = None
  metric: str = "accuracy"


@_styled
def parameters_figure(trained: Sequence[Trained], split: str = "test") -> Any:
  """Returns a figure of accuracy against trainable parameters.

  Args:
    trained: a point each; labels are placed so that they do not overlap, with a line to
      their point where they stand apart.
    split: that the accuracy is of.

  Raises:
    ValueError: there is no point, or there are several metrics.
  """
  from matplotlib.figure import Figure
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  if not trained:
    raise ValueError("there is no run with trained parameters and an accuracy.")
  title = objectives.title_of(_one_metric({point.metric for point in trained}))
  size = (COLUMN_INCHES, min(7.0, 2.2 + 0.09 * len(trained)))
  # Letters are as wide as they will be only at the resolution that is written.
  figure = Figure(figsize=size, dpi=DPI, layout="constrained")
  axis = figure.subplots()
  axis.set_xscale("log")
  for i, point in enumerate(trained):
    axis.errorbar(
      *(point.params, 100 * point.accuracy),
      yerr=None if point.std is None else 100 * point.std,
      **{"fmt": MARKERS[i // len(COLORS) % len(MARKERS)], "markersize": 4.5},
      **{"color": COLORS[i % len(COLORS)], "capsize": 2, "elinewidth": 0.8},
    )
  # Room for the labels.
  params = [point.params for point in trained]
  room = max(1.6, (max(params) / min(params)) ** 0.12)
  low, high = min(params) / room, max(params) * room
  axis.set_xlim(low, high)
  axis.margins(y=0.2)
  # As many numbers as fit beside each other.
  decades = math.log10(high / low)
  subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 4 else (1.0,)
  axis.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
  axis.xaxis.set_minor_formatter(NullFormatter())
  axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: rounded(x)))
  axis.set_xlabel("trainable parameters, with the head")
  axis.set_ylabel(f"{title} on {split}, %")
  axis.grid(color="0.92")
  places = [(point.params, 100 * point.accuracy) for point in trained]
  texts = [shortened(point.label, COLUMN_INCHES / 2) for point in trained]
  bars = [
    (x, y - 100 * point.std, y + 100 * point.std)
    for (x, y), point in zip(places, trained, strict=True)
    if point.std
  ]
  _place_labels(figure, axis, places, texts, bars)
  return figure


def rounded(number: float | int) -> str:
  """Returns a number of parameters in few letters: 300, 30K, 1M."""
  for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
    if number >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.3g}"


# Distances of a label from its point, in points of 1/72 inch, nearest first, and where
# it may be: right, above, below and left, then between these.
_DISTANCES = (4, 6, 9, 12, 16, 20, 25, 30, 36, 42, 50, 58, 66, 74)
_LEADER_FROM = 12
_ANGLES = np.radians([0, 90, 270, 180, *(15 * i for i in range(24) if i % 6)])


def _place_labels(
  figure: Any,
  axis: Any,
  places: Sequence[tuple[float | int, float]],
  texts: Sequence[str],
  bars: Sequence[tuple[float | int, float, float]],
) -> None:
  """Writes a text beside each place, where it covers no other.

  Args:
    figure: the figure.
    axis: its only one.
    places: the points.
    texts: one for each.
    bars: what is not to be covered either: (x, lower y, upper y).
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  canvas = FigureCanvasAgg(figure)
  # The layout decides where places are on the paper; labels do not change it.
  figure.draw_without_rendering()
  renderer, scale = canvas.get_renderer(), figure.dpi / 72
  frame = tuple(axis.get_window_extent().extents)
  pixels = axis.transData.transform(places)
  radius = 3.5 * scale
  taken = [(x - radius, y - radius, x + radius, y + radius) for x, y in pixels]
  for x, low, high in bars:
    (left, bottom), (_, top) = axis.transData.transform([(x, low), (x, high)])
    taken.append((left - scale, bottom, left + scale, top))
  directions = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
  # The text's nearest side, or corner, is where its distance is measured.
  sides = np.sign(np.round(directions, 6))
  for i in np.argsort(pixels[:, 0], kind="stable"):
    note = axis.annotate(
      texts[i],
      places[i],
      **{"xytext": (0, 0), "textcoords": "offset points", "ha": "center"},
      **{"va": "center", "parse_math": False, "fontsize": FONT_SIZE},
    )
    note.set_in_layout(False)
    extent = note.get_window_extent(renderer)
    half = np.array([extent.width, extent.height]) / 2 + scale
    offsets = np.concatenate(
      [directions * distance * scale + sides * half for distance in _DISTANCES]
    )
    boxes = np.concatenate([pixels[i] + offsets - half, pixels[i] + offsets + half], 1)
    outside = 4 * half.prod() - _overlap(boxes, frame)
    covered = np.sum([_overlap(boxes, other) for other in taken], axis=0) + outside
    # The nearest of those that cover nothing; else what covers least.
    best = int(np.argmin(np.round(covered)))
    taken.append(tuple(boxes[best]))
    offset = offsets[best] / scale
    note.set_position(offset)
    if _DISTANCES[best // len(directions)] >= _LEADER_FROM:
      end = offset - sides[best % len(directions)] * half / scale
      axis.annotate(
        "",
        places[i],
        **{"xytext": end, "textcoords": "offset points"},
        arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0},
      ).set_in_layout(False)
  # As it was when the places were taken.
  figure.set_layout_engine("none")


def _overlap(
  boxes: Float[np.ndarray, "n 4"], box: Sequence[float | int]
) -> Float[np.ndarray, "n"]:
  """Returns the area that boxes (left, bottom, right, top) share with another one."""
  low, high = np.array(box[:2]), np.array(box[2:])
  shared = np.minimum(boxes[:, 2:], high) - np.maximum(boxes[:, :2], low)
  return np.prod(np.maximum(shared, 0), axis=1)
