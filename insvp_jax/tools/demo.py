"""Serves a page to try runs on one's own images.

insvp demo --run=runs/folder/insvp/seed0
insvp demo --run=runs/folder/insvp/seed0 --run=runs/folder/vpt_deep/seed0 --port=8000

For an image that is dropped on it the page shows, for each run, the most probable
classes, the prompts as `visualize` draws them, and Grad-CAM; of a segmenter the classes
that most pixels have, and what `visualize` draws.

The page is Gradio's, for this machine alone unless --host says otherwise: it loads
nothing from elsewhere, sends nothing to elsewhere and keeps no image. `demo_server` has
what sees to that.

Without the command `insvp` it is python -m insvp_jax.tools.demo.
"""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import html
import io
from pathlib import Path
import shutil
import sys
from typing import Any

from jaxtyping import UInt8
import numpy as np

from insvp_jax import errors, files, paths, tools
from insvp_jax.data import decode, preprocess
from insvp_jax.tools import attribution, demo_server, plots, predict, visualize
from insvp_jax.train import objectives

MOST_RUNS = 4
_DPI = 150
_PICTURE = "max-width: 100%; max-height: 22rem; margin: 0.5rem auto"
_ALERT = "color: #b3261e; font-weight: 600"
_TITLE = "font-size: 1.1rem; overflow-wrap: anywhere"


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a run says of an image.

  Attributes:
    classes: names and probabilities in [0, 1], the most probable one first; of a
      segmenter shares of the pixels.
    pictures: (what it shows, PNG) each.
  """

  classes: Sequence[tuple[str, float]]
  pictures: Sequence[tuple[str, bytes]]


def answer(run: Any, image: Any, top: int = 5) -> Answer:
  """Returns the most probable classes of an image and pictures of why.

  Args:
    run: from `load_run`.
    image: one, as for `Run.predict`.
    top: how many classes.

  Raises:
    ValueError: the run has diverged.
  """
  if run.segments:
    return _segmented(run, image, top)
  classes = next(predict.top_classes(run, [image], top))
  pictures = []
  if visualize.image_prompts(run):
    pictures.append(("the prompts", _png(visualize.prompt_figure(run, [image]))))
  name = classes[0][0]
  maps = attribution.grad_cam(run, [image])
  inputs, prompted = run.preprocess([image]), run.prompted([image])
  # The map is of what the backbone sees, which may be the image in a frame.
  seen = inputs if inputs.shape == prompted.shape else prompted
  column = plots.Maps(run.to_pixels(seen), maps, [f"for {name}"])
  figure = plots.maps_figure({"Grad-CAM": column}, [""], "Grad-CAM")
  pictures.append((f"Grad-CAM for {name}", _png(figure)))
  return Answer(classes, pictures)


def _segmented(run: Any, image: Any, top: int) -> Answer:
  """Returns the classes that most pixels have, and the picture of `mask_figure`."""
  labels = run.segment(image)[0]
  shares = np.bincount(labels.ravel(), minlength=len(run.class_names)) / labels.size
  most = [k for k in np.argsort(-shares, kind="stable")[:top] if shares[k]]
  classes = [(run.class_names[k], float(shares[k])) for k in most]
  picture = _png(visualize.mask_figure(run, [image]))
  return Answer(classes, [("the classes of the pixels", picture)])


def read_upload(
  run: Any, path: Path, name: str
) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
  """Returns an image that a stranger may have sent, and what is to be said of it.

  Args:
    run: from `load_run`; it says how files are decoded. Its limits may be lower than
      the package's own, not higher.
    path: of the file.
    name: what it was called; errors say so.

  Returns:
    The pixels, `preprocess.Resized` or, for a segmenter, as they are; and a line or "".

  Raises:
    ValueError: it is too large, or no image; the message can be shown.
  """
  options = dataclasses.replace(
    run.decode_options,
    max_pixels=min(run.decode_options.max_pixels, decode.MAX_PIXELS),
    max_bytes=max_bytes([run]),
    # Of this image alone, whatever was sent before.
    range_16bit=decode.Range16Bit(),
  )
  data = files.read_bytes(path, options.max_bytes)
  with decode.decoded(data, name, options) as pixels:
    if run.segments:
      return np.array(pixels), options.unused_bits()
    square = preprocess.resize(run.preset, pixels, run.model.input_size)
  return square.view(preprocess.Resized), options.unused_bits()


def max_bytes(runs: Sequence[Any]) -> int:
  """Returns how many bytes an image may have that all runs take."""
  limits = [run.decode_options.max_bytes for run in runs]
  return min(decode.MAX_FILE_MB * 2**20, *limits)


class Responder:
  """Answers uploads: a line of HTML, then classes and pictures of each run.

  Attributes:
    runs: by the title of their column.
    folder: where uploads lie; nothing else is read, and each is removed.
    top: classes that are shown.
  """

  def __init__(self, runs: Mapping[str, Any], folder: Path, top: int = 5):
    self.runs, self.folder, self.top = runs, folder.resolve(), top

  def __call__(self, upload: Mapping[str, Any] | None) -> list[Any]:
    """Returns the file that the field keeps, none, and what the page shows.

    Args:
      upload: a file as Gradio describes it; None for none.
    """
    try:
      return [None, *self.respond(upload)]
    except (MemoryError, RuntimeError) as error:
      if not errors.is_out_of_memory(error):
        raise
      return [None, *self._failed("there is too little memory for it.")]
    except errors.INPUT_ERRORS as error:
      if not errors.is_ours(error):
        raise
      return [None, *self._failed(errors.one_line(error))]
    finally:
      self.remove(upload)

  def respond(self, upload: Mapping[str, Any] | None) -> list[Any]:
    """Returns what the page shows: the line, and for each run classes and pictures.

    Raises:
      ValueError: no file was sent, or it is no image; see `read_upload`.
    """
    path = self._path(upload)
    if path is None:
      raise ValueError("no image came; choose a file.")
    name = errors.printable(str((upload or {}).get("orig_name") or path.name))
    shown, notes = [], []
    for run in self.runs.values():
      image, note = read_upload(run, path, name)
      answered = answer(run, image, self.top)
      notes.append(note)
      shown += [dict(answered.classes), pictures_html(answered)]
    lines = [name, *dict.fromkeys(filter(None, notes))]
    return ["<br>".join(map(escape, lines)), *shown]

  def remove(self, upload: Mapping[str, Any] | None) -> None:
    """Removes an upload, and what an interrupted one has left."""
    path = self._path(upload)
    if path is not None:
      path.unlink(missing_ok=True)
      if path.parent != self.folder:
        shutil.rmtree(path.parent, ignore_errors=True)
    demo_server.remove_old(self.folder)

  def _path(self, upload: Mapping[str, Any] | None) -> Path | None:
    """Returns where an upload lies; None for one that is not in the folder."""
    given = (upload or {}).get("path")
    if not isinstance(given, str) or "\0" in given:
      return None
    path = Path(given).resolve()
    return path if self.folder in path.parents and path.is_file() else None

  def _failed(self, message: str) -> list[Any]:
    line = f'<p role="alert" style="{_ALERT}">No answer: {escape(message)}</p>'
    return [line, *([None, ""] * len(self.runs))]


def escape(text: str) -> str:
  """Returns a text as HTML that shows it, also where it would be a template's."""
  shown = html.escape(text)
  # Gradio's page takes these for the start of an expression.
  return shown.replace("$", "&#36;").replace("{", "&#123;")


def pictures_html(answered: Answer) -> str:
  """Returns the pictures as HTML that holds them: no file is written for the page."""
  parts = []
  for title, png in answered.pictures:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    parts.append(f'<img src="{source}" alt="{escape(title)}" style="{_PICTURE}">')
  return "\n".join(parts)


def titles(workdirs: Sequence[str | Path], runs: Sequence[Any]) -> list[str]:
  """Returns a title for each run: its workdir, its method and its metric on test."""
  texts = []
  for workdir, run in zip(workdirs, runs, strict=True):
    parts = [str(workdir), str(run.meta.get("method"))]
    value = (run.result or {}).get(f"test_{run.metric}")
    if isinstance(value, float):
      parts.append(f"test {objectives.title_of(run.metric)} {100 * value:.2f}%")
    texts.append(errors.printable(", ".join(parts)))
  return texts


def build(responder: Responder) -> Any:
  """Returns the page, a `gradio.Blocks`; see `demo_server.imported` for Gradio."""
  gradio = demo_server.imported()
  with gradio.Blocks(title="insvp_jax", analytics_enabled=False) as page:
    gradio.HTML(
      "<h1>Try it on your own image</h1>"
      "<p>What is dropped here is read, answered and removed.</p>"
    )
    # Not Gradio's field for images, which opens them by itself.
    image = gradio.File(label="Image", elem_id="image", height=140)
    line = gradio.HTML(elem_id="line")
    outputs = [image, line]
    with gradio.Row():
      for number, title in enumerate(responder.runs):
        with gradio.Column(elem_id=f"run{number}"):
          gradio.HTML(f'<h2 style="{_TITLE}">{escape(title)}</h2>')
          outputs.append(gradio.Label(label="Classes", num_top_classes=responder.top))
          outputs.append(gradio.HTML())
    demo_server.only_uploads(image)
    image.upload(
      responder,
      [image],
      outputs,
      # The file as it was sent.
      preprocess=False,
      api_visibility="undocumented",
      api_name="answer",
      # One image at a time: a laptop has not the memory for more.
      concurrency_limit=1,
    )
  return page


def _png(figure: Any) -> bytes:
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  figure.set_dpi(_DPI)
  buffer = io.BytesIO()
  FigureCanvasAgg(figure).print_png(buffer)
  return buffer.getvalue()


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  parser = tools.argument_parser(__doc__, "demo", prog)
  parser.add_argument(
    "--run",
    action="append",
    required=True,
    help=f"{tools.RUN_HELP}; several, up to {MOST_RUNS}, are shown side by side",
  )
  parser.add_argument("--backbone", help=tools.BACKBONE_HELP)
  parser.add_argument("--top", type=int, default=5, help="how many classes to show")
  parser.add_argument(
    "--host",
    default="127.0.0.1",
    help="the address to listen at; this machine's own, 127.0.0.1, without it",
  )
  parser.add_argument(
    "--port", type=int, default=7860, help="the port, 7860 without it; 0: any free one"
  )
  parser.add_argument(
    "--check",
    action="store_true",
    help="answer one grey image, and end in place of serving",
  )
  args = parser.parse_args(argv)

  def work() -> None:
    if args.top < 1:
      raise ValueError(f"--top is {args.top}, expected at least 1.")
    if len(args.run) > MOST_RUNS:
      raise ValueError(f"there are {len(args.run)} runs, expected at most {MOST_RUNS}.")
    # Checked before the runs are loaded, which takes longer.
    visualize.check_matplotlib()
    demo_server.check_gradio()
    with demo_server.listen(args.host, args.port) as listening:
      from insvp_jax.run import load_run

      paths.cache_compiled_programs()
      runs = [load_run(path, backbone=args.backbone) for path in args.run]
      by_title = dict(zip(titles(args.run, runs), runs, strict=True))
      limit = max_bytes(runs)
      with demo_server.upload_folder() as folder:
        responder = Responder(by_title, folder, args.top)
        # Compiled now, so that the first image need not wait for it.
        for title, run in by_title.items():
          grey = np.full((32, 32, 3), 128, np.uint8)
          print(f"{title}: ready, e.g. {answer(run, grey).classes[0][0]} for grey")
        app = demo_server.create_app(build(responder), args.host, limit)
        if not args.check:
          demo_server.serve(app, listening)

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())
