"""What is opened, and how much of it, whatever it claims."""

import contextlib
import io
import json
import os
import socket
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from insvp_jax import files


def _irregular(folder):
  """Returns (path, what it is) of all that is there but no file."""
  (folder / "folder").mkdir()
  os.mkfifo(folder / "fifo")
  here = os.getcwd()
  os.chdir(folder)  # a socket's path is short
  with socket.socket(socket.AF_UNIX) as served:
    served.bind("socket")
  os.chdir(here)
  (folder / "zero").symlink_to("/dev/zero")
  (folder / "link").symlink_to(folder / "fifo")
  return {
    "folder": "a folder",
    "fifo": "a pipe",
    "socket": "a socket",
    "zero": "a device",
    "link": "a pipe",
  }


def test_only_regular_files_are_read(tmp_path):
  for name, kind in _irregular(tmp_path).items():
    with pytest.raises(ValueError, match=f"{name} is {kind}.*, expected a file"):
      files.read_bytes(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is {kind}.*, expected a file"):
      files.read_npz(tmp_path / name)
    assert not files.is_regular(tmp_path / name)
  with pytest.raises(FileNotFoundError):
    files.read_bytes(tmp_path / "none")
  assert not files.is_regular(tmp_path / "none")
  (tmp_path / "file").write_bytes(b"12345")
  (tmp_path / "alias").symlink_to("file")
  assert files.read_bytes(tmp_path / "alias", 5) == b"12345"
  assert files.is_regular(tmp_path / "alias")
  with pytest.raises(ValueError, match="alias has 0.0 MiB, expected at most 0.0"):
    files.read_bytes(tmp_path / "alias", 4)


def test_only_files_of_that_one_name_are_written_in_place(tmp_path):
  for name, kind in _irregular(tmp_path).items():
    kind = "a link to" if (tmp_path / name).is_symlink() else kind
    with pytest.raises(ValueError, match=f"{name} is {kind}"):
      files.check_writable_in_place(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is {kind}"):
      files.check_replaceable(tmp_path / name)
  files.check_writable_in_place(tmp_path / "none")
  (tmp_path / "file").write_text("")
  files.check_writable_in_place(tmp_path / "file")
  (tmp_path / "dangling").symlink_to("nowhere")
  with pytest.raises(ValueError, match="dangling is a link to nowhere"):
    files.check_writable_in_place(tmp_path / "dangling")
  os.link(tmp_path / "file", tmp_path / "second")
  with pytest.raises(ValueError, match="second has 2 names"):
    files.check_writable_in_place(tmp_path / "second")
  # Replaced, the other name keeps its content.
  files.check_replaceable(tmp_path / "second")
  # The folder may be a link.
  (tmp_path / "elsewhere").symlink_to("folder")
  (tmp_path / "folder" / "x").write_text("")
  files.check_writable_in_place(tmp_path / "elsewhere" / "x")


def test_json_of_any_depth_is_a_value_or_a_value_error():
  assert files.parse_json('{"a": [1]}') == {"a": [1]}
  for text in (b"[" * 10**6, '{"a":' * 10**5, b"\xff\xfe\x00", "", "nul"):
    with pytest.raises(ValueError):
      files.parse_json(text)


def _npy(shape, dtype="<f4", order=False, data=b"", major=1):
  """Returns a `.npy` file with any header."""
  text = f"{{'descr': {dtype!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
  length = struct.pack("<H" if major == 1 else "<I", len(text))
  return b"\x93NUMPY" + bytes([major, 0]) + length + text.encode() + data


def _archive(path, members, compression=zipfile.ZIP_DEFLATED):
  with zipfile.ZipFile(path, "w", compression) as archive:
    for name, data in members.items():
      archive.writestr(name, data)
  return path


_CLAIMS = {
  "terabytes": (_npy((2**40,)), "claims float32.*4398046511104 bytes, but holds 0"),
  "more than int64": (_npy((2**62, 2**62)), "bytes, but holds 0"),
  "a negative side": (_npy((-1, 4), data=bytes(16)), r"has the shape \(-1, 4\)"),
  "two of them": (_npy((-2, -2), data=bytes(16)), "has the shape"),
  "a byte more": (_npy((4,), data=bytes(15)), "16 bytes, but holds 15"),
  "a byte less": (_npy((4,), data=bytes(17)), "16 bytes, but holds 17"),
  "objects": (_npy((1,), "|O", data=bytes(8)), "holds pickled objects"),
  "long texts": (_npy((1,), "<U99999999"), "but holds 0"),
  "another version": (_npy((4,), data=bytes(16), major=3), "unknown format"),
  "half a shape": (_npy("(4", data=bytes(16)), "."),
  "a deep shape": (_npy("(" * 3000 + ")" * 3000), "."),
  "a long header": (_npy("x" * 20_000, major=2), "."),
  "a header of gigabytes": (b"\x93NUMPY\x02\0" + b"\xff" * 4 + bytes(2**25), "."),
  "no array": (b"no array", "magic"),
  "nothing": (b"", "."),
}


@contextlib.contextmanager
def _little_memory():
  """Fails where the with block takes more than some MiB."""
  tracemalloc.start()
  try:
    yield
    assert tracemalloc.get_traced_memory()[1] < 2**22
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize("name", _CLAIMS)
def test_what_a_header_claims_is_checked_before_memory_is_taken(tmp_path, name):
  member, expected = _CLAIMS[name]
  path = _archive(tmp_path / "x.npz", {"a.npy": member})
  for read in (files.npz_headers, files.read_npz):
    with _little_memory(), pytest.raises(ValueError, match=expected):
      read(path)


def test_what_unpacks_to_gigabytes_is_refused_unread(tmp_path):
  path = tmp_path / "x.npz"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    with archive.open("a.npy", "w", force_zip64=True) as member:
      member.write(_npy((2**25,)))
      for _ in range(2**7):
        member.write(bytes(2**20))
  assert path.stat().st_size < 2**18
  assert files.npz_headers(path)["a"].nbytes == 2**27
  tracemalloc.start()
  with pytest.raises(
    ValueError, match="take 134217728 bytes, expected at most 1048576"
  ):
    files.read_npz(path, max_bytes=2**20)
  assert tracemalloc.get_traced_memory()[1] < 2**22
  tracemalloc.stop()


def test_arrays_come_as_they_were_stored(tmp_path):
  arrays = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
    "nothing": np.zeros((0, 5)),
    "one": np.array(3),
    "é": np.array(["x", "yé"]),
  }
  for save in (np.savez, np.savez_compressed):
    save(tmp_path / "x.npz", **arrays)
    read = files.read_npz(tmp_path / "x.npz")
    assert list(read) == list(arrays)
    for name, array in arrays.items():
      np.testing.assert_array_equal(read[name], array)
      assert read[name].dtype == array.dtype
    headers = files.npz_headers(tmp_path / "x.npz")
    assert {n: h.shape for n, h in headers.items()} == {
      n: a.shape for n, a in arrays.items()
    }
    assert list(files.read_npz(tmp_path / "x.npz", ["one"])) == ["one"]
    with pytest.raises(ValueError, match="there is no array 'two'"):
      files.read_npz(tmp_path / "x.npz", ["two"])


def test_a_member_that_is_no_array_is_named(tmp_path):
  path = _archive(tmp_path / "x.npz", {"a.npy": _npy((0,)), "data.pkl": b"x"})
  with pytest.raises(ValueError, match=r"its member 'data.pkl' is no array"):
    files.read_npz(path)


def test_every_flipped_bit_of_the_values_is_noticed(tmp_path):
  stream = io.BytesIO()
  np.savez(stream, a=np.arange(9, dtype=np.uint8))
  data = stream.getvalue()
  start = data.index(bytes(range(9)))
  for at in range(start, start + 9):
    path = tmp_path / "x.npz"
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ValueError, match="CRC"):
      files.read_npz(path)


def test_texts_are_bounded(tmp_path):
  with (tmp_path / "x.json").open("wb") as file:
    file.truncate(2**42)
  with pytest.raises(ValueError, match="x.json has 4194304.0 MiB, expected at most"):
    json.loads(files.read_bytes(tmp_path / "x.json"))


def test_arrays_are_not_far_larger_than_their_file(tmp_path, monkeypatch):
  np.savez_compressed(tmp_path / "x.npz", x=np.zeros(2**20, np.uint8))
  assert files.npz_headers(tmp_path / "x.npz")
  monkeypatch.setattr(files, "_SMALL", 2**16)
  for read in (files.npz_headers, files.read_npz):
    with pytest.raises(ValueError, match="claim 1048704 bytes, in files of"):
      read(tmp_path / "x.npz")
