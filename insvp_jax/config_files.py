"""Config files: found by path or name, run, their mistakes told by file and line."""

from collections.abc import Callable
import os
from pathlib import Path
import re
import sys
import traceback
import types
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from insvp_jax import errors, paths

_LARGEST_CONFIG = 2**20  # bytes


class ConfigMistakeError(Exception):
  """A config file cannot be used; the message says where in it and why."""


class ConfigParser(flags.ArgumentParser):
  """Loads a config file and calls its `get_config`.

  In place of ml_collections' own, which keeps quiet about the file and line of a
  mistake, or about the mistake until something reads the config.
  """

  def parse(self, argument: str) -> ConfigDict:
    """Returns the config, locked.

    Args:
      argument: the file's path, and after a colon the argument of `get_config`.

    Raises:
      ConfigMistakeError: there is a mistake in the file, or in the argument.
    """
    path, *arg = argument.split(":", 1)
    try:
      config = _load(path)(*arg)
    except ConfigMistakeError:
      raise
    except (Exception, SystemExit) as error:
      raise ConfigMistakeError(_explain(error, argument)) from error
    if not isinstance(config, ConfigDict):
      raise ConfigMistakeError(
        f"get_config of {path} returns {_a_type(config)}, expected a ConfigDict; start "
        "it from insvp_jax.config.defaults(), and end with a return of it."
      )
    from insvp_jax import config_checks

    try:
      config_checks.check_keys(config)
    except ValueError as error:
      raise ConfigMistakeError(f"{path}: {error}") from error
    return config.lock()


def _load(path: str) -> Callable[..., Any]:
  """Returns the `get_config` of a file; what goes wrong in the file is raised."""
  if (size := os.path.getsize(path)) > _LARGEST_CONFIG:
    raise ConfigMistakeError(f"{path} has {size:,} bytes; it is no config file.")
  module = types.ModuleType("insvp_jax_config")
  module.__file__ = path
  # Where dataclasses look for the module of a class.
  sys.modules[module.__name__] = module
  # No bytecode is kept: it would go by the second of the file's last change.
  exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), vars(module))
  if not callable(get_config := getattr(module, "get_config", None)):
    raise ConfigMistakeError(f"{path} has no function get_config.")
  return get_config


def installed() -> dict[str, Path]:
  """Returns the configs that come with the package, by name."""
  return {path.stem: path for path in sorted(paths.configs_dir().glob("*.py"))}


def find(name: str) -> str:
  """Returns the path of a config that was given as a path or as a name.

  What follows a colon stays.

  Raises:
    ConfigMistakeError: there is no such file.
  """
  name, colon, arg = name.partition(":")
  if not name:
    raise ConfigMistakeError(
      "--config is empty; give a file, or one of the names "
      f"{', '.join(installed())}, e.g. --config=quickstart."
    )
  if Path(name).is_file():
    return name + colon + arg
  configs = installed()
  # "configs/vtab.py" means the installed one where there is no such folder.
  stem = re.fullmatch(r"(?:configs/)?(\w+)(?:\.py)?", name)
  if stem and stem[1] in configs:
    return f"{configs[stem[1]]}{colon}{arg}"
  from insvp_jax import trees

  raise ConfigMistakeError(
    f"there is no config file {name}"
    f"{', that is a folder' if Path(name).is_dir() else ''}; --config wants the path "
    "of one, or one of the "
    f"names {', '.join(configs)}.{trees.did_you_mean(name, configs)}"
  )


def _explain(error: BaseException, argument: str) -> str:
  """Returns where in a config file a mistake is, and what it is, in one line.

  Args:
    error: what loading the file or calling its `get_config` raised.
    argument: of --config: the path of the file and what follows a colon.
  """
  path = argument.split(":")[0]
  if isinstance(error, SyntaxError) and error.filename:
    return f"{error.filename}, line {error.lineno}: no Python: {error.msg}"
  # Lines of the file itself: what it calls stands in others.
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == path]
  text = without_fields(errors.one_line(error))[:500]
  if Path(path).resolve().parent == paths.configs_dir().resolve():
    # Nothing is wrong with the file, but with the argument.
    return f"--config={argument}: {text}"
  if not (lines and errors.is_ours(error) and isinstance(error, ValueError)):
    text = f"{type(error).__name__}: {text}".removesuffix(": ")
  return f"{path}{f', line {lines[-1]}' if lines else ''}: {text}"


def without_fields(text: str) -> str:
  """Returns the message of a locked ConfigDict without all of its fields."""
  return re.sub(r' Other fields present: "\{.*\}"', "", text)


def _a_type(value: Any) -> str:
  return "None" if value is None else f"a {type(value).__name__}"
