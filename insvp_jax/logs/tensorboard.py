"""TensorBoard's event file: scalars, text and images."""

from collections.abc import Mapping
import io
from pathlib import Path
import time
from typing import Any

from jaxtyping import UInt8
import numpy as np

from insvp_jax.logs.appended_file import AppendedFile


class EventFile:
  """A TensorBoard event file.

  Written with TensorBoard's own record writer: the other writers (clu's, and
  TensorBoard's EventFileWriter) import TensorFlow, seconds that no run needs.
  """

  def __init__(self, workdir: Path, start_step: int = 0):
    """Opens a new file; events after `start_step` in older ones are void.

    Raises:
      ModuleNotFoundError: the package tensorboard is not installed.
    """
    try:
      from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
      from tensorboard.summary.writer.record_writer import RecordWriter
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError(
        f"TensorBoard's files need a package that is not installed: {error}. Run "
        "'pip install tensorboard', or set --config.tensorboard=False."
      ) from error
    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    self._metadata, self._tensor = summary_pb2.SummaryMetadata, tensor_pb2.TensorProto
    # The time in ns keeps apart what a resumed run writes within one second.
    name = f"events.out.tfevents.{time.time_ns():020d}.insvp_jax"
    self._record = io.BytesIO()
    self._records = RecordWriter(self._record)
    self._file = AppendedFile(workdir / name)
    self._add(file_version="brain.Event:2")
    status = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(session_log=status, step=start_step + 1)

  def write(self, step: int, scalars: Mapping[str, float | int]) -> None:
    """Appends the scalars of one step."""
    values = [
      self._summary.Value(tag=name, simple_value=value)
      for name, value in scalars.items()
    ]
    self._add(summary=self._summary(value=values), step=step)

  def text(self, step: int, name: str, markdown: str) -> None:
    """Appends a text, which TensorBoard shows as Markdown."""
    plugin = self._metadata.PluginData(plugin_name="text")
    value = self._summary.Value(
      tag=name,
      metadata=self._metadata(plugin_data=plugin),
      # 7 is DT_STRING.
      tensor=self._tensor(dtype=7, string_val=[markdown.encode()]),
    )
    self._add(summary=self._summary(value=[value]), step=step)

  def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
    """Appends an image."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    height, width, _ = pixels.shape
    image = self._summary.Image(
      height=height, width=width, colorspace=3, encoded_image_string=png.getvalue()
    )
    value = self._summary.Value(tag=name, image=image)
    self._add(summary=self._summary(value=[value]), step=step)

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _add(self, **fields: Any) -> None:
    event = self._event(wall_time=time.time(), **fields)
    self._records.write(event.SerializeToString())
    self._file.append(self._record.getvalue())
    self._record.seek(0)
    self._record.truncate()
