"""Whether a task's data are available here, and if not what getting them takes.

`check_task` looks, and downloads nothing; `prepare_task` lets TFDS download and prepare
a data set. `tools.prepare_data` prints what they return.
"""

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
from insvp_jax.data.sources import tfds_builder, tfrecords
from insvp_jax.data.splits import TaskData
from insvp_jax.data.tasks import Task

# How many absent classes a warning names.
_NUM_NAMED = 5
# Images stay in their files, so their size does not matter.
_IMAGE_SIZE = 224


@dataclasses.dataclass(frozen=True)
class Locations:
  """Where data are or go, and which training images are meant.

  Attributes:
    data_dir: TFDS's folder; "" for its default.
    root: folder or archive of image files, as config.data.root; "" for none.
    lists: folder with VPT's lists, or with a folder of lists for each data set; "" for
      none.
    subset: the choice of training images, as config.data.subset.
    manual_dir: folder of the files that TFDS does not fetch; "" for downloads/manual in
      TFDS's folder.
  """

  data_dir: str = ""
  root: str = ""
  lists: str = ""
  subset: str = ""
  manual_dir: str = ""


@dataclasses.dataclass(frozen=True)
class Availability:
  """Whether a task can be read here.

  Attributes:
    task: a row of `tasks.TASKS`.
    status: "ready"; "downloadable": TFDS can prepare the data set; "manual": a person
      has to fetch files; "unavailable": it cannot be had; "broken": what is there
      cannot be read; "failed": preparing it failed.
    text: what is where, or what getting it takes, in words.
    data: the splits of a task that is ready, streamed, so no image is decoded.
    notes: what else a user should know, one line each.
    missing_packages: names of the modules that preparing the data set lacks.
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

  def summary(self) -> str:
    """Returns one line: task, status, and what is where or what it takes."""
    return f"{self.task.name}: {self.status}: {self.text}"


def check_task(task: Task, locations: Locations) -> Availability:
  """Finds out whether a task can be read; downloads nothing.

  A task that can be read from image files is looked for in `locations.root` first.

  Args:
    task: a row of `tasks.TASKS`.
    locations: where to look.

  Raises:
    ValueError: if the task has no such subset.
  """
  task.subset(locations.subset)
  if not task.spec and not locations.root:
    content = downloads.folder_content(task)
    return Availability(
      task, "manual", f"TFDS does not have it; give --root with {content}"
    )
  if not locations.root or not task.folder_format:
    return _check_tfds(task, locations)
  files = _check_files(task, locations)
  if files.status != "manual" or not task.spec:
    return files
  # The folder has not this task, but TFDS may have it.
  tfds = _check_tfds(task, locations)
  if tfds.ready:
    return dataclasses.replace(tfds, notes=(*tfds.notes, f"not there: {files.text}"))
  # Whoever names a folder of files does not ask for a download.
  return dataclasses.replace(
    files, text=f"{files.text} Or leave --root out: {tfds.status}: {tfds.text}"
  )


def _check_files(task: Task, locations: Locations) -> Availability:
  """Finds out whether a task can be read from image files below `locations.root`."""
  try:
    data = _load(task, locations, locations.root)
  except FileNotFoundError as error:
    needed = downloads.folder_content(task)
    return Availability(task, "manual", f"{_one_line(error)} It needs {needed}.")
  except (ValueError, OSError) as error:
    return Availability(task, "broken", _one_line(error))
  return _ready(task, locations, data, data.source)


def _check_tfds(task: Task, locations: Locations) -> Availability:
  """Finds out whether a task can be read from what TFDS prepared, or could prepare."""
  try:
    builder = tfds_builder.find_builder(task, locations.data_dir)
  except FileNotFoundError:  # not prepared yet
    return _unprepared(task, locations)
  except ValueError as error:  # without TFDS, or unknown to it
    return Availability(task, "unavailable", _one_line(error))
  if lists := _missing_lists(task, locations):
    return Availability(
      task, "manual", f"{builder.info.full_name} is prepared, but {lists}"
    )
  try:
    data = _load(task, locations, "")
  except (ValueError, OSError) as error:
    advice = f"for TFDS to prepare it anew, delete {builder.data_dir} first"
    return Availability(task, "broken", _one_line(error), notes=(advice,))
  return _ready(task, locations, data, f"{data.source} in {builder.data_dir}")


def _missing_lists(task: Task, locations: Locations) -> str:
  """Returns in words which lists of VPT's a subset needs and lacks; "" for none."""
  if task.subset(locations.subset).rule != "lists":
    return ""
  unlisted = [name for name, subset in task.subsets.items() if subset.rule != "lists"]
  instead = f", or take --subset={unlisted[0]}" if unlisted else ""
  if not task.id_feature:
    # VPT's lists name these images in another way than TFDS.
    return f"its images have no names to list; give --root with files{instead}"
  if (
    not locations.lists
    or not _list_folder(task, locations).joinpath("train.json").is_file()
  ):
    name = locations.subset or next(iter(task.subsets))
    return (
      f"its subset {name} is listed in {downloads.VPT_LISTS}; give --lists{instead}"
    )
  return ""


def _list_folder(task: Task, locations: Locations) -> Path:
  """Returns the folder of the task's lists: `locations.lists`, or a folder in it."""
  folder = Path(locations.lists).expanduser()
  inner = folder / (task.folder_name or task.name)
  return inner if inner.is_dir() else folder


def _load(task: Task, locations: Locations, root: str) -> TaskData:
  """Opens the splits as training would, but leaves all images in their files.

  Args:
    task: a row of `tasks.TASKS`.
    locations: where the data are.
    root: `locations.root` to read image files, "" to read from TFDS.
  """
  data_config: ml_collections.ConfigDict = config.defaults().data
  data_config.root, data_config.data_dir = root, locations.data_dir
  data_config.lists = str(_list_folder(task, locations)) if locations.lists else ""
  data_config.subset, data_config.resident_mb = locations.subset, 0
  with _without_warnings():
    return load_data(task.name, data_config, image_size=_IMAGE_SIZE)


@contextlib.contextmanager
def _without_warnings():
  """Silences warnings of loading; the notes of an `Availability` say the same."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _ready(task: Task, locations: Locations, data: TaskData, text: str) -> Availability:
  """Returns that a task is ready, with notes on what is unlike the published task."""
  sizes = {name: len(split) for name, split in data.splits.items()}
  notes = task.unpublished_sizes(sizes, locations.subset)
  # The two splits that a result depends on.
  for name in (data.final_split, "test"):
    counts = class_counts(data, name)
    absent = [data.class_names[i] for i in np.flatnonzero(counts == 0)]
    if absent:
      named = ", ".join(absent[:_NUM_NAMED])
      named += ", ..." if len(absent) > _NUM_NAMED else ""
      notes.append(
        f"{name} has no image of {len(absent)} of {data.num_classes} classes: {named}"
      )
  return Availability(task, "ready", text, data, tuple(notes))


def class_counts(data: TaskData, split: str) -> Int[np.ndarray, "k"]:
  """Returns how many images of each of the k classes a split of the data has."""
  return np.bincount(data.splits[split].labels, minlength=data.num_classes)


def _unprepared(task: Task, locations: Locations) -> Availability:
  """Returns what it takes that TFDS prepares a data set which is not prepared."""
  needs = downloads.requirements(task)
  builder = _builder_to_prepare(task, locations)
  name = builder.info.full_name
  notes = [note for note in (_other_versions(builder), needs.note) if note]
  if lists := _missing_lists(task, locations):
    notes.append(f"when it is prepared: {lists}")
  manual_dir = _manual_dir(builder, locations)
  manual = needs.manual
  if manual and any(not any(manual_dir.glob(p)) for p in manual.needs):
    how = manual.how.format(manual_dir=manual_dir)
    text = f"{name} is made of {manual.what} from {manual.where}, {how}"
    if not needs.gone:
      return Availability(task, "manual", text, notes=tuple(notes))
    text = f"{needs.gone}; {text}, or give --root with {downloads.folder_content(task)}"
    return Availability(task, "unavailable", text, notes=tuple(notes))
  packages = (*downloads.ALWAYS_NEEDED, *needs.packages)
  # Found without importing them, which may take long or start something.
  missing = tuple(p for p in packages if importlib.util.find_spec(p) is None)
  made = f"makes {name} in {builder.data_dir_root}"
  if manual:
    text = f"TFDS {made} of the files in {manual_dir}"
  else:
    text = f"TFDS downloads {_download_size(builder)} and {made}"
  if needs.packages:
    text += f"; it needs {', '.join(needs.packages)}, "
    text += f"not here: {_pip_install(missing)}" if missing else "installed here"
  return Availability(task, "downloadable", text, None, tuple(notes), missing)


def _builder_to_prepare(task: Task, locations: Locations) -> Any:
  """Returns TFDS's builder of the version that would be prepared."""
  tfds = tfds_builder.import_tfds()
  data_dir = str(Path(locations.data_dir).expanduser()) if locations.data_dir else None
  return tfds.builder(downloads.prepared_spec(task), data_dir=data_dir)


def _other_versions(builder: Any) -> str:
  """Returns a note on which other versions are prepared; "" for none."""
  folder = Path(builder.data_dir).parent
  versions = sorted(p.parent.name for p in folder.glob("*/dataset_info.json"))
  return f"prepared before: only {', '.join(versions)} in {folder}" if versions else ""


def _manual_dir(builder: Any, locations: Locations) -> Path:
  """Returns the folder of files that a person fetched."""
  if locations.manual_dir:
    return Path(locations.manual_dir).expanduser()
  return Path(builder.data_dir_root) / "downloads" / "manual"


def _download_size(builder: Any) -> str:
  """Returns in words how much TFDS downloads; files may be there already."""
  total = sum(info.size for info in (builder.url_infos or {}).values())
  return f"up to {total / 1e9:.2f} GB"


def _pip_install(packages: Sequence[str]) -> str:
  """Returns the command that installs modules by the names that pip knows."""
  names = [downloads.PIP_NAMES.get(name, name) for name in packages]
  return f"pip install {' '.join(names)}"


def prepare_task(availability: Availability, locations: Locations) -> str:
  """Lets TFDS download and prepare a data set that is "downloadable".

  Args:
    availability: what `check_task` returned.
    locations: where the data go.

  Returns:
    What went wrong, in one line; "" if nothing did.
  """
  if availability.missing_packages:
    command = _pip_install(availability.missing_packages)
    return f"not begun, because packages are missing: {command}"
  tfds = tfds_builder.import_tfds()
  builder = _builder_to_prepare(availability.task, locations)
  manual_dir = _manual_dir(builder, locations)
  try:
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir))
    )
  except Exception as error:
    # Whatever TFDS raises, other data sets can go on.
    text = f"{type(error).__name__}: {tfrecords.short_message(error)}."
    files = sorted(
      {info.filename for info in (builder.url_infos or {}).values()} - {None}
    )
    if files:
      text += f" TFDS also takes {', '.join(files)} from {manual_dir}, if laid there."
    return text
  return ""


def _one_line(error: BaseException) -> str:
  """Returns a message of `load_data` in one line, in terms of prepare_data's flags."""
  text = str(error).replace("config.data.", "--").replace("data.root", "--root")
  return " ".join(text.split())
