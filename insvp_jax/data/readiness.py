"""Whether tasks can be read here, and if not what that takes."""

from collections.abc import Sequence
import contextlib
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from absl import logging
from jaxtyping import Int
import ml_collections
import numpy as np

from insvp_jax import config
from insvp_jax.data import downloads, load_data
from insvp_jax.data.arrays import TaskData
from insvp_jax.data.sources import tfds_builder, tfrecords
from insvp_jax.data.tasks import Task

# Absent classes that a warning names.
_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Places:
  """Where data lie or go, and which of them are meant.

  Attributes:
    data_dir: TFDS's folder; "" for its default.
    root: folder or archive of image files, as `config.data.root`; "" for none.
    lists: folder with VPT's lists, or with a folder of lists for each data set.
    subset: as `config.data.subset`.
    manual_dir: of files that TFDS does not fetch; "" for downloads/manual in its
      folder.
  """

  data_dir: str = ""
  root: str = ""
  lists: str = ""
  subset: str = ""
  manual_dir: str = ""


@dataclasses.dataclass(frozen=True)
class State:
  """Whether a task can be read.

  Attributes:
    task: a row of the table.
    status: "ready"; "downloadable", TFDS can prepare it; "manual", a person has to
      fetch files; "unavailable"; "broken", what is there cannot be read; "failed",
      preparing it did.
    text: says what is where, or what it takes.
    data: the splits of a task that is ready; no image is decoded.
    notes: what else a user should know.
    missing_packages: that preparing it needs.
  """

  task: Task
  status: str
  text: str
  data: TaskData | None = None
  notes: tuple[str, ...] = ()
  missing_packages: tuple[str, ...] = ()

  @property
  def ready(self) -> bool:
    """Returns whether the task can be read."""
    return self.status == "ready"

  def describe(self) -> str:
    """Returns one line."""
    return f"{self.task.name}: {self.status}: {self.text}"


def check(task: Task, places: Places) -> State:
  """Says whether a task can be read; fetches nothing.

  A task that can be read from files is looked for in `places.root` first.

  Args:
    task: a row of the table.
    places: where to look.

  Raises:
    ValueError: the task has no such subset.
  """
  task.subset(places.subset)
  if not task.spec and not places.root:
    content = downloads.folder_content(task)
    return State(task, "manual", f"TFDS does not have it; give --root with {content}")
  if not places.root or not task.folder:
    return _check_tfds(task, places)
  files = _check_files(task, places)
  if files.status != "manual" or not task.spec:
    return files
  tfds = _check_tfds(task, places)
  if tfds.ready:
    return dataclasses.replace(tfds, notes=(*tfds.notes, f"not there: {files.text}"))
  # Whoever names a folder of files does not ask for a download.
  return dataclasses.replace(
    files, text=f"{files.text} Or leave --root out: {tfds.status}: {tfds.text}"
  )


def _check_files(task: Task, places: Places) -> State:
  try:
    data = _load(task, places, places.root)
  except FileNotFoundError as error:
    needed = downloads.folder_content(task)
    return State(task, "manual", f"{_text(error)} It needs {needed}.")
  except (ValueError, OSError) as error:
    return State(task, "broken", _text(error))
  return _ready(task, places, data, data.source)


def _check_tfds(task: Task, places: Places) -> State:
  if importlib.util.find_spec("tensorflow_datasets") is None:
    text = "reading it takes tensorflow-datasets and tensorflow, not installed here"
    return State(task, "unavailable", text)
  try:
    builder = tfds_builder.find_builder(task, places.data_dir)
  except FileNotFoundError:
    return _unprepared(task, places)
  except ValueError as error:
    return State(task, "unavailable", _text(error))
  if lists := _missing_lists(task, places):
    return State(task, "manual", f"{builder.info.full_name} is prepared, but {lists}")
  try:
    data = _load(task, places, "")
  except (ValueError, OSError) as error:
    mend = f"for TFDS to prepare it anew, delete {builder.data_dir} first"
    return State(task, "broken", _text(error), notes=(mend,))
  return _ready(task, places, data, f"{data.source} in {builder.data_dir}")


def _missing_lists(task: Task, places: Places) -> str:
  """Returns which lists a subset of TFDS's images needs and has not; "" for none."""
  if task.subset(places.subset).rule != "lists":
    return ""
  other = [name for name, subset in task.subsets.items() if subset.rule != "lists"]
  instead = f", or take --subset={other[0]}" if other else ""
  if not task.id_feature:
    # Their lists name images in another way than TFDS.
    return f"its images have no names to list; give --root with files{instead}"
  if not places.lists or not (Path(_lists(task, places)) / "train.json").is_file():
    name = places.subset or next(iter(task.subsets))
    return f"its subset {name} is listed in {downloads.LISTS}; give --lists{instead}"
  return ""


def _lists(task: Task, places: Places) -> str:
  """Returns the folder of the task's lists."""
  own = Path(places.lists).expanduser() / (task.folder_name or task.name)
  return str(own) if own.is_dir() else str(Path(places.lists).expanduser())


def _load(task: Task, places: Places, root: str) -> TaskData:
  """Opens the splits as training would, but leaves all images in their files."""
  data_config: ml_collections.ConfigDict = config.defaults().data
  data_config.root, data_config.data_dir = root, places.data_dir
  data_config.lists = _lists(task, places) if places.lists else ""
  data_config.subset, data_config.resident_mb = places.subset, 0
  with _without_warnings():
    return load_data(task.name, data_config, image_size=224)


@contextlib.contextmanager
def _without_warnings():
  """Silences what loading logs and a `State` says."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _ready(task: Task, places: Places, data: TaskData, text: str) -> State:
  sizes = {name: len(split) for name, split in data.splits.items()}
  notes = task.unpublished_sizes(sizes, places.subset)
  for name in (data.final_split, "test"):
    counts = class_counts(data, name)
    absent = [data.class_names[i] for i in np.flatnonzero(counts == 0)]
    if absent:
      named = ", ".join(absent[:_NAMED]) + (", ..." if len(absent) > _NAMED else "")
      notes.append(
        f"{name} has no image of {len(absent)} of {data.num_classes} classes: {named}"
      )
  return State(task, "ready", text, data, tuple(notes))


def class_counts(data: TaskData, split: str) -> Int[np.ndarray, "k"]:
  """Returns how many images of each class a split has."""
  return np.bincount(data.splits[split].labels, minlength=data.num_classes)


def _unprepared(task: Task, places: Places) -> State:
  """Says what it takes that TFDS prepares a data set."""
  needs = downloads.builder(task)
  builder = _builder(task, places)
  name, found = builder.info.full_name, _found_only(builder)
  notes = [found] if found else []
  if needs.note:
    notes.append(needs.note)
  if lists := _missing_lists(task, places):
    notes.append(f"when it is prepared: {lists}")
  manual_dir = _manual_dir(builder, places)
  by_hand = needs.manual
  if by_hand and any(not any(manual_dir.glob(p)) for p in by_hand.needs):
    how = by_hand.how.format(manual_dir=manual_dir)
    text = f"{name} is made of {by_hand.what} from {by_hand.where}, {how}"
    if not needs.gone:
      return State(task, "manual", text, notes=tuple(notes))
    text = f"{needs.gone}; {text}, or give --root with {downloads.folder_content(task)}"
    return State(task, "unavailable", text, notes=tuple(notes))
  packages = (*downloads.ALWAYS, *needs.packages)
  missing = tuple(p for p in packages if importlib.util.find_spec(p) is None)
  made = f"makes {name} in {builder.data_dir_root}"
  if by_hand:
    text = f"TFDS {made} of the files in {manual_dir}"
  else:
    text = f"TFDS downloads {_download_size(builder)} and {made}"
  if needs.packages:
    text += f"; it needs {', '.join(needs.packages)}, "
    text += f"not here: {_install(missing)}" if missing else "installed here"
  return State(task, "downloadable", text, None, tuple(notes), missing)


def _builder(task: Task, places: Places) -> Any:
  """Returns TFDS's builder of the version that would be prepared."""
  tfds = tfds_builder.import_tfds()
  data_dir = str(Path(places.data_dir).expanduser()) if places.data_dir else None
  return tfds.builder(downloads.prepared_spec(task), data_dir=data_dir)


def _found_only(builder: Any) -> str:
  """Returns which other versions are on disk."""
  folder = Path(builder.data_dir).parent
  versions = sorted(p.parent.name for p in folder.glob("*/dataset_info.json"))
  return f"prepared before: only {', '.join(versions)} in {folder}" if versions else ""


def _manual_dir(builder: Any, places: Places) -> Path:
  if places.manual_dir:
    return Path(places.manual_dir).expanduser()
  return Path(builder.data_dir_root) / "downloads" / "manual"


def _download_size(builder: Any) -> str:
  total = sum(info.size for info in (builder.url_infos or {}).values())
  return f"up to {total / 1e9:.2f} GB"


def _install(packages: Sequence[str]) -> str:
  names = [downloads.PIP_NAMES.get(name, name) for name in packages]
  return f"pip install {' '.join(names)}"


def prepare(state: State, places: Places) -> str:
  """Lets TFDS download and prepare a data set that is "downloadable".

  Returns:
    What went wrong, in one line; "" if nothing did.
  """
  if state.missing_packages:
    return (
      f"not begun, because packages are missing: {_install(state.missing_packages)}"
    )
  tfds = tfds_builder.import_tfds()
  builder = _builder(state.task, places)
  manual_dir = _manual_dir(builder, places)
  try:
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir))
    )
  except Exception as error:  # whatever TFDS raises, other data sets can go on
    text = f"{type(error).__name__}: {tfrecords.first_line(error)}."
    files = sorted(
      {info.filename for info in (builder.url_infos or {}).values()} - {None}
    )
    if files:
      text += f" TFDS also takes {', '.join(files)} from {manual_dir}, if laid there."
    return text
  return ""


def _text(error: BaseException) -> str:
  """Returns a message of `load_data` in one line, with this tool's flags."""
  text = str(error).replace("config.data.", "--").replace("data.root", "--root")
  return " ".join(text.split())
