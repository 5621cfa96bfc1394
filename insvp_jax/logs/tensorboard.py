"""TensorBoard's event file: scalars, text, images and the trials of a search."""

from collections.abc import Mapping
import io
from pathlib import Path
import time
import types
from typing import Any

from jaxtyping import UInt8
import numpy as np

from insvp_jax.logs.appended_file import AppendedFile


class EventFile:
  """A TensorBoard event file, written with tensorboardX's records and summaries.

  Not with its `SummaryWriter`, whose thread loses what a killed process had not written
  yet, and keeps a full disk to itself.
  """

  def __init__(self, workdir: Path, start_step: int = 0):
    """Opens a new file; events after `start_step` in older ones are void."""
    # Runs without an event file do not wait for this import.
    from tensorboardX import record_writer, summary
    from tensorboardX.proto import event_pb2

    self._event, self._summary = event_pb2.Event, summary
    # Records are made in memory, so that each is written in one piece.
    self._record = io.BytesIO()
    memory = types.SimpleNamespace(open=lambda _: self._record)
    record_writer.register_writer_factory("memory", memory)
    self._records = record_writer.RecordWriter("memory:")
    # The time in ns keeps apart what a resumed run writes within one second.
    name = f"events.out.tfevents.{time.time_ns():020d}.insvp_jax"
    self._file = AppendedFile(workdir / name)
    self._add(file_version="brain.Event:2")
    status = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(session_log=status, step=start_step + 1)

  def write(self, step: int, scalars: Mapping[str, float | int]) -> None:
    """Appends the scalars of one step."""
    summary = self._summary.Summary()
    for name, value in scalars.items():
      summary.value.add(tag=name, simple_value=value)
    self._add(summary=summary, step=step)

  def text(self, step: int, name: str, markdown: str) -> None:
    """Appends a text, which TensorBoard shows as Markdown."""
    summary = self._summary.text(name, markdown)
    summary.value[0].tag = name  # without the library's suffix
    self._add(summary=summary, step=step)

  def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
    """Appends an image."""
    summary = self._summary.image(name, pixels, dataformats="HWC")
    self._add(summary=summary, step=step)

  def trial(
    self,
    hparams: Mapping[str, float | int | bool | str],
    metrics: Mapping[str, float | int],
    *,
    failed: bool = False,
  ) -> None:
    """Appends a whole trial: a row of the tab HPARAMS, where each file is one.

    Args:
      hparams: of the trial.
      metrics: what came of it.
      failed: whether it did not come to its end.
    """
    from tensorboardX.proto import api_pb2, plugin_hparams_pb2

    # Without the description of the experiment: the tab would show the hparams and
    # metrics that its first trial had, not those that any has.
    _, start, end = self._summary.hparams(dict(hparams), dict(metrics))
    self._add(summary=start, step=0)
    self.write(0, metrics)
    if failed:
      # tensorboardX knows successes alone.
      plugin = end.value[0].metadata.plugin_data
      content = plugin_hparams_pb2.HParamsPluginData.FromString(plugin.content)
      content.session_end_info.status = api_pb2.Status.Value("STATUS_FAILURE")
      plugin.content = content.SerializeToString()
    self._add(summary=end, step=0)

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _add(self, **fields: Any) -> None:
    event = self._event(wall_time=time.time(), **fields)
    self._records.write(event.SerializeToString())
    self._file.append(self._record.getvalue())
    self._record.seek(0)
    self._record.truncate()
