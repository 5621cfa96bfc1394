"""A file that grows by whole records, whatever happens to the process or the disk."""

from pathlib import Path

from insvp_jax import files


class AppendedFile:
  """Each record is there in full or not at all."""

  def __init__(self, path: Path, size: int = 0):
    """Opens the file for appending, cut to `size` bytes.

    Raises:
      ValueError: to write to it would change another file, or it is none.
    """
    files.check_writable_in_place(path)
    self._path, self._size = path, size
    # Unbuffered: what was written is there even if the process is killed, and
    # nothing is left to be written when the file is closed.
    self._file = path.open("ab", buffering=0)
    self._file.truncate(size)

  def append(self, record: bytes) -> None:
    """Writes one record.

    Raises:
      OSError: the disk is full; the records before stay as they are.
    """
    try:
      written = 0
      while written < len(record):
        written += self._file.write(record[written:])
    except OSError as error:
      self._file.truncate(self._size)
      raise cannot_write(self._path, error) from error
    self._size += len(record)

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def cannot_write(path: Path, error: OSError) -> OSError:
  """Returns the error that names a file and how to mend it."""
  return OSError(
    f"{path} could not be written: {error.strerror}. Free some space, or choose "
    "another workdir, and start again to resume."
  )
