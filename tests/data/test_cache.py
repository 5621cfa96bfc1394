import os
from pathlib import Path
import subprocess
import sys
import time

from data_fixtures import pixels
import numpy as np
import pytest

from insvp_jax import paths
from insvp_jax.data import ArraySplit, TaskData, cache


def _data(number=3):
  images = np.stack([pixels(i) for i in range(number)])
  split = ArraySplit(images, np.arange(number, dtype=np.int32))
  names = tuple(f"c{i}é" for i in range(number))
  return TaskData("t", names, {"train": split, "test": split}, 4, "source 1.0")


def _fail():
  raise ValueError("a broken image")


def _forbidden():
  raise AssertionError("the cache should have been used")


def _check(data):
  expected = _data()
  assert data.class_names == expected.class_names
  assert (data.name, data.skipped, data.source) == ("t", 4, "source 1.0")
  assert list(data.splits) == ["train", "test"]
  for name, split in data.splits.items():
    np.testing.assert_array_equal(split.images, expected.splits[name].images)
    np.testing.assert_array_equal(split.labels, expected.splits[name].labels)


def test_equal_keys_are_read_once(tmp_path):
  folder = str(tmp_path / "deep" / "cache")
  _check(cache.cached_task({"a": 1}, _data, folder))
  _check(cache.cached_task({"a": 1}, _forbidden, folder))
  with pytest.raises(AssertionError, match="should have been used"):
    cache.cached_task({"a": 2}, _forbidden, folder)


def test_nothing_is_kept_of_a_failed_read(tmp_path):
  with pytest.raises(ValueError, match="a broken image"):
    cache.cached_task({}, _fail, str(tmp_path))
  assert not list(tmp_path.iterdir())
  _check(cache.cached_task({}, _data, str(tmp_path)))


def test_off_writes_nothing(tmp_path, monkeypatch):
  monkeypatch.setenv("INSVP_CACHE", str(tmp_path))
  _check(cache.cached_task({}, _data, "off"))
  assert not list(tmp_path.iterdir())


def test_the_default_folder_keeps_only_what_takes_time(tmp_path, monkeypatch):
  monkeypatch.setenv("INSVP_CACHE", str(tmp_path))
  cache.cached_task({}, _data)
  assert not list(tmp_path.iterdir())
  monkeypatch.setattr(cache, "_MIN_SECONDS", 0.0)
  cache.cached_task({}, _data)
  _check(cache.cached_task({}, _forbidden))
  assert [path.parent for path in tmp_path.rglob("*.npz")] == [tmp_path / "data"]


def test_without_a_home_nothing_is_kept_and_one_line_says_so(monkeypatch, caplog):
  for name in ("INSVP_CACHE", "HOME", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
  with caplog.at_level("WARNING", "absl"):
    _check(cache.cached_task({}, _data))
  assert len(caplog.records) == 1 and "Set INSVP_CACHE" in caplog.text


def test_the_cache_is_below_home_by_default(monkeypatch):
  monkeypatch.delenv("INSVP_CACHE", raising=False)
  assert paths.cache_dir("data") == Path.home() / ".cache" / "insvp_jax" / "data"
  monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
  assert paths.cache_dir("data") == Path("/elsewhere/insvp_jax/data")
  monkeypatch.setenv("INSVP_CACHE", "~/mine")
  assert paths.cache_dir("jax") == Path.home() / "mine" / "jax"


def test_large_sets_are_not_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(cache, "_MAX_BYTES", 100)
  cache.cached_task({}, _data, str(tmp_path))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "flip", "other", "empty", "pickle"])
def test_a_damaged_file_is_read_anew_and_mended(tmp_path, damage):
  cache.cached_task({}, _data, str(tmp_path))
  (path,) = tmp_path.iterdir()
  raw = path.read_bytes()
  if damage == "cut":
    path.write_bytes(raw[: len(raw) // 2])
  elif damage == "flip":
    at = raw.index(pixels(1).tobytes())
    path.write_bytes(raw[:at] + b"\xff" + raw[at + 1 :])
  elif damage == "other":
    np.savez(path, something=np.zeros(3))
  elif damage == "empty":
    path.write_bytes(b"")
  else:
    np.savez(path, meta=np.array({"x": _fail}, object))
  _check(cache.cached_task({}, _data, str(tmp_path)))
  _check(cache.cached_task({}, _forbidden, str(tmp_path)))
  assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
  blocked = tmp_path / "file"
  blocked.write_text("in the way")
  _check(cache.cached_task({}, _data, str(blocked)))
  _check(cache.cached_task({}, _data, str(blocked / "below")))


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
  def full(file, **arrays):
    file.write(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", full)
  _check(cache.cached_task({}, _data, str(tmp_path)))
  assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_writers_are_removed(tmp_path):
  old, new = tmp_path / "old.tmp", tmp_path / "new.tmp"
  for path in (old, new):
    path.write_bytes(b"half")
  os.utime(old, (0, time.time() - 2 * 24 * 3600))
  _check(cache.cached_task({}, _data, str(tmp_path)))
  assert not old.exists() and new.exists()  # the new one may still be written


_WRITER = """
import sys, time, numpy as np
from insvp_jax.data import ArraySplit, TaskData, cache
images = np.full((400, 32, 32, 3), 7, np.uint8)
split = ArraySplit(images, np.zeros(400, np.int32))
data = TaskData("t", ("a",), {"train": split})
print("ready", flush=True)
sys.stdin.readline()
for key in range(int(sys.argv[2])):
  got = cache.cached_task({"key": key}, lambda: data, sys.argv[1])
  assert (got.splits["train"].images == 7).all()
"""


def _start_writer(folder, rounds):
  process = subprocess.Popen(
    [sys.executable, "-c", _WRITER, str(folder), str(rounds)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    cwd=Path(__file__).parents[2],
    text=True,
  )
  assert process.stdout.readline() == "ready\n"
  return process


def test_two_processes_and_a_killed_writer(tmp_path):
  writer, killed = _start_writer(tmp_path, 6), _start_writer(tmp_path, 1000)
  for process in (writer, killed):
    process.stdin.write("\n")
    process.stdin.flush()
  while not list(tmp_path.glob("*.npz")):
    assert killed.poll() is None
  killed.kill()
  writer.communicate(timeout=60)
  assert writer.returncode == 0
  killed.communicate(timeout=60)
  # Whatever the killed one left unfinished has a name that no reader looks for.
  for path in tmp_path.glob("*.npz"):
    with np.load(path, allow_pickle=False) as stored:
      assert (stored["train_images"] == 7).all()
  assert len(list(tmp_path.glob("*.npz"))) >= 6


def test_fingerprints(tmp_path):
  path = tmp_path / "x.npz"
  np.savez(path, a=np.arange(3))
  first = cache.file_fingerprint(path)
  os.utime(path, (1, 1))
  assert cache.file_fingerprint(path) == first
  np.savez(path, a=np.arange(1, 4))
  assert cache.file_fingerprint(path) != first
  plain = tmp_path / "x.bin"
  plain.write_bytes(b"1")
  first = cache.file_fingerprint(plain)
  plain.write_bytes(b"12")
  assert cache.file_fingerprint(plain) != first


def test_others_can_read_what_is_cached_in_a_shared_folder(tmp_path):
  before = os.umask(0o022)
  try:
    cache.cached_arrays({}, lambda: {"a": np.zeros(3)}, str(tmp_path))
  finally:
    os.umask(before)
  (path,) = tmp_path.iterdir()
  assert path.stat().st_mode & 0o777 == 0o644
