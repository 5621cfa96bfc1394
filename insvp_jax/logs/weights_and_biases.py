"""Weights & Biases: what TensorBoard gets, as a run of a project.

Its own environment variables say the rest: with WANDB_MODE=offline all is written to
the workdir alone (`wandb sync` sends it later), with WANDB_MODE=disabled nothing is.
"""

from collections.abc import Mapping
import functools
import importlib.util
from pathlib import Path
import re
import secrets
from typing import Any

from jaxtyping import UInt8
import numpy as np

from insvp_jax import files
from insvp_jax.distributed import processes
from insvp_jax.errors import one_line

# In the workdir: which run of which project this is.
FILE = "wandb.json"
_PROJECT = r"([\w.-]{1,64}/)?[\w.-]{1,128}"
_ID = r"[\w-]{1,64}"


@functools.cache
def check_project(project: str) -> None:
  """Checks that a project can be written to; call it before anything long.

  What has passed is not asked for again: a search calls it for each row.

  Raises:
    ValueError: its name is none, wandb is not installed, or does not know the user.
  """
  if not project:
    return
  if not re.fullmatch(_PROJECT, project):
    raise ValueError(
      f"config.wandb is {project!r}, expected a project, or entity/project: letters, "
      "digits, '-', '_' and '.'."
    )
  if not importlib.util.find_spec("wandb"):
    raise ValueError(
      f"config.wandb is {project!r}, but wandb is not installed: pip install "
      "'insvp_jax[wandb]'"
    )
  if not processes.is_main_process():
    return
  import wandb

  try:
    is_local = wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
    # Of offline runs nobody is asked who they are.
    is_known = is_local or wandb.login(prompt=False)
  except (wandb.Error, ValueError) as error:
    raise _cannot_start(error) from error
  if not is_known:
    raise ValueError(
      "Weights & Biases does not know who writes: call `wandb login`, set "
      "WANDB_API_KEY, or set WANDB_MODE=offline to write to the workdir alone."
    )


class WandbRun:
  """One run of a project.

  Attributes:
    identity: its "id" and "project", to be stored as `FILE` in the workdir.
  """

  def __init__(
    self,
    workdir: Path,
    project: str,
    *,
    name: str,
    config: Mapping[str, Any],
    start_step: int = 0,
  ):
    """Starts a run, or goes on with the one that the workdir names.

    Args:
      workdir: of the run, which gets a folder `wandb/`, and is its name.
      project: "project" or "entity/project".
      name: of the runs that differ by their seed.
      config: the whole configuration.
      start_step: the step resumed from; with 0 it is a new run.

    Raises:
      ValueError: Weights & Biases refuses it.
    """
    import wandb

    self._image_of = wandb.Image
    stored = _stored_id(workdir / FILE, project) if start_step else None
    self.identity = {"id": stored or secrets.token_hex(4), "project": project}
    entity, _, project_name = project.rpartition("/")
    try:
      self._run = wandb.init(
        entity=entity or None,
        project=project_name,
        id=self.identity["id"],
        resume="allow",
        dir=str(workdir),
        name=str(workdir),
        group=name,
        config=dict(config),
        # What may change when a run goes on, such as how often it logs.
        allow_val_change=True,
        # Whatever else this process logs.
        reinit="create_new",
        settings=wandb.Settings(console="off", quiet=True),
      )
    except (wandb.Error, ValueError) as error:
      raise _cannot_start(error) from error

  def write(self, step: int, scalars: Mapping[str, float | int]) -> None:
    """Writes the scalars of one step, which are those of before or later."""
    self._run.log(dict(scalars), step=step)

  def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes an image."""
    self._run.log({name: self._image_of(pixels)}, step=step)

  def close(self, *, failed: bool = False) -> None:
    """Ends the run, and waits until all of it is written."""
    self._run.finish(exit_code=int(failed))


def _cannot_start(error: Exception) -> ValueError:
  return ValueError(
    f"Weights & Biases cannot start: {one_line(error)[:300]} Set WANDB_MODE=offline to "
    "write to the workdir alone, or leave config.wandb empty."
  )


def _stored_id(path: Path, project: str) -> str | None:
  """Returns the id of the run that a workdir names, if it is of the same project."""
  try:
    stored = files.parse_json(files.read_bytes(path))
    is_same = stored["project"] == project and re.fullmatch(_ID, stored["id"])
  except (OSError, ValueError, KeyError, TypeError):
    # There is none, or it is damaged: the curve goes on as another run.
    return None
  return stored["id"] if is_same else None
