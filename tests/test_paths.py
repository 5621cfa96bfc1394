"""Caches lie where one variable says, or where the platform has them."""

from pathlib import Path

import jax
import pytest

from insvp_jax import main, paths


def test_one_variable_moves_all_caches(monkeypatch, tmp_path):
  monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path))
  assert paths.cache_dir() == tmp_path and paths.cache_dir("data") == tmp_path / "data"
  assert paths.compiled_dir().parent == tmp_path / "jax"
  monkeypatch.delenv(paths.CACHE_VARIABLE)
  assert paths.cache_dir("jax").parts[-2:] == ("insvp_jax", "jax")
  monkeypatch.setenv(paths.CACHE_VARIABLE, "~/kept")
  assert paths.cache_dir() == Path.home() / "kept"


def test_another_processor_has_another_cache(monkeypatch):
  here = paths.compiled_dir()
  assert paths.compiled_dir() == here
  monkeypatch.setattr(Path, "read_text", lambda path: "flags\t\t: fpu sse9\n")
  assert paths.compiled_dir() != here


@pytest.mark.parametrize("is_set", [False, True])
def test_compiled_programs_are_kept_and_what_the_user_set_stays(monkeypatch, is_set):
  seen = {}
  monkeypatch.setattr(jax.config, "update", seen.__setitem__)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
  if is_set:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
  main._cache_compiled_programs()
  directory = {} if is_set else {"jax_compilation_cache_dir": str(paths.compiled_dir())}
  assert seen == {**directory, "jax_persistent_cache_min_compile_time_secs": 0.3}


def test_configs_are_found_in_a_checkout(root):
  assert paths.configs_dir() == root / "configs"
