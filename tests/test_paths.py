"""Caches lie where one variable says, or where the platform has them."""

import argparse
from pathlib import Path

import jax
import pytest

from insvp_jax import main, paths
from insvp_jax.tools import runs


def test_one_variable_moves_all_caches(monkeypatch, tmp_path):
  monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path))
  assert paths.cache_dir() == tmp_path and paths.cache_dir("data") == tmp_path / "data"
  assert paths.compiled_dir().parent == tmp_path / "jax"
  monkeypatch.delenv(paths.CACHE_VARIABLE)
  assert paths.cache_dir("jax").parts[-2:] == ("insvp_jax", "jax")
  monkeypatch.setenv(paths.CACHE_VARIABLE, "~/kept")
  assert paths.cache_dir() == Path.home() / "kept"


@pytest.fixture
def nowhere(monkeypatch):
  """A user without a home folder, and no folder that is named for caches."""
  for name in (paths.CACHE_VARIABLE, "HOME", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)

  def no_entry(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

  monkeypatch.setattr("pwd.getpwuid", no_entry)
  return monkeypatch


def test_without_a_home_the_caches_are_those_that_are_named(nowhere, tmp_path):
  with pytest.raises(OSError, match=f"no home folder. Set {paths.CACHE_VARIABLE}"):
    paths.cache_dir("data")
  nowhere.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert paths.cache_dir() == tmp_path / "insvp_jax"
  nowhere.setenv(paths.CACHE_VARIABLE, str(tmp_path / "mine"))
  assert paths.cache_dir("data") == tmp_path / "mine" / "data"


@pytest.mark.parametrize("where", ["no home", "a file", "named for JAX"])
def test_compiled_programs_are_not_kept_where_no_folder_can_be(
  nowhere, tmp_path, capsys, where
):
  seen = {}
  nowhere.setattr(jax.config, "update", seen.__setitem__)
  if where == "a file":
    (tmp_path / "file").write_text("")
    nowhere.setenv(paths.CACHE_VARIABLE, str(tmp_path / "file" / "caches"))
  if where == "named for JAX":
    nowhere.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  paths.cache_compiled_programs()
  assert "jax_compilation_cache_dir" not in seen
  said = capsys.readouterr().err
  assert said.count("\n") == (where != "named for JAX")
  assert not said or said.startswith("note: compiled programs are not kept: ")


def test_a_run_is_in_float32_whatever_jax_is_told(capsys):
  with pytest.MonkeyPatch.context() as patch:
    seen = {}
    patch.setattr(jax.config, "update", seen.__setitem__)
    with jax.enable_x64():
      main._use_float32()
    said = capsys.readouterr().err
    assert seen == {"jax_enable_x64": False}
    assert said == "note: JAX_ENABLE_X64 is ignored: all is computed in float32\n"
    seen.clear()
    main._use_float32()
    assert not seen and capsys.readouterr().err == ""


def test_another_processor_has_another_cache(monkeypatch):
  here = paths.compiled_dir()
  assert paths.compiled_dir() == here
  monkeypatch.setattr(Path, "read_text", lambda path, **_: "flags\t\t: fpu sse9\n")
  assert paths.compiled_dir() != here


@pytest.mark.parametrize("is_set", [False, True])
def test_compiled_programs_are_kept_and_what_the_user_set_stays(monkeypatch, is_set):
  seen = {}
  monkeypatch.setattr(jax.config, "update", seen.__setitem__)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
  if is_set:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
  paths.cache_compiled_programs()
  directory = {} if is_set else {"jax_compilation_cache_dir": str(paths.compiled_dir())}
  assert seen == {**directory, "jax_persistent_cache_min_compile_time_secs": 0.0}


def test_tools_keep_what_they_compile_too(monkeypatch, tmp_path):
  calls = []
  monkeypatch.setattr(paths, "cache_compiled_programs", lambda: calls.append("kept"))
  parser = argparse.ArgumentParser()
  runs.add_arguments(parser)
  args = parser.parse_args([f"--run={tmp_path / 'none'}"])
  with pytest.raises(FileNotFoundError):
    runs.load(args)
  assert calls == ["kept"]


def test_configs_are_found_in_a_checkout(root):
  assert paths.configs_dir() == root / "configs"
