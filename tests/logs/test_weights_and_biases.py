"""Runs in Weights & Biases, offline: what is written, resumed, refused.

Skipped where wandb is not installed, but for what is said then.
"""

import importlib.util
import json
import os
import socket
import struct
import threading
import time

import jax
import numpy as np
import pytest
from tiny_training import make_data, prepare, tiny_config

from insvp_jax.logs import weights_and_biases
from insvp_jax.logs.writers import Writers
from insvp_jax.train import trainer


@pytest.fixture(autouse=True)
def _ask_again():
  weights_and_biases.check_project.cache_clear()


@pytest.fixture
def wandb(tmp_path, monkeypatch):
  """The module, offline, with a home of its own; nothing may ask for its server."""
  module = pytest.importorskip("wandb", reason="wandb is of the extra wandb")
  asked = []
  with socket.create_server(("127.0.0.1", 0)) as server:

    def listen():
      while True:
        try:
          connection, _ = server.accept()
        except OSError:
          return
        asked.append(connection.recv(100))
        connection.close()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY"):
      monkeypatch.setenv(name, address)
    for name in [n for n in os.environ if n.startswith("WANDB_") and "URL" not in n]:
      monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    # What an earlier test has set up has other settings.
    module.teardown()
    yield module
    module.teardown()
    server.shutdown(socket.SHUT_RDWR)
    thread.join(10)
  assert asked == []


def records(workdir):
  """Yields (run id, record) of all offline runs of a workdir, oldest first."""
  import wandb
  from wandb.proto import wandb_internal_pb2

  # The process that writes may be behind.
  wandb.teardown()
  for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
    # As in LevelDB's log: a header, then parts that do not cross blocks of 32 KiB.
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
      left = 2**15 - at % 2**15
      if left < 7:
        at += left
        continue
      _, size, kind = struct.unpack_from("<IHB", data, at)
      whole += data[at + 7 : at + 7 + size]
      at += 7 + size
      if kind in (1, 4):
        yield path.stem, wandb_internal_pb2.Record.FromString(whole)
        whole = b""


def history(workdir):
  """Returns (run id, {name: value}) of each step, without what depends on the clock."""
  found = []
  for run, record in records(workdir):
    if record.WhichOneof("record_type") == "history":
      row = {
        ".".join(item.nested_key) or item.key: json.loads(item.value_json)
        for item in record.history.item
      }
      clock = ("_timestamp", "_runtime")
      found.append((run, {k: v for k, v in row.items() if k not in clock}))
  return found


def write(workdir, steps, start_step=0, project="insects", **more):
  with Writers(
    workdir,
    total_steps=4,
    start_step=start_step,
    tensorboard=False,
    wandb=project,
    config={"optim": {"lr": 0.1}},
    name="insects insvp",
    **more,
  ) as found:
    for step in steps:
      found.train(step, {"loss": np.float32(1 / step)})
      if step == 4:
        assert found.shows_images
        found.images(step, {"prompts/0": np.zeros((4, 8, 3), np.uint8)})
  return json.loads((workdir / weights_and_biases.FILE).read_text())["id"]


def test_a_run_that_goes_on_is_one_run(wandb, tmp_path):
  workdir = tmp_path / "run"
  first = write(workdir, [1, 2, 3])
  # The folders of offline runs are named by the second.
  time.sleep(1.01)
  # Killed after step 3, of which step 2 was saved last.
  assert write(workdir, [3, 4], start_step=2) == first
  rows = history(workdir)
  assert [(run, row["_step"]) for run, row in rows] == [
    (f"run-{first}", step) for step in (1, 2, 3, 3, 4)
  ]
  assert [row["loss"] for _, row in rows] == pytest.approx(
    [1, 1 / 2, 1 / 3, 1 / 3, 1 / 4]
  )
  assert any(name.startswith("prompts/0") for name in rows[-1][1])
  runs = [r.run for _, r in records(workdir) if r.WhichOneof("record_type") == "run"]
  assert {(r.project, r.run_group, r.display_name) for r in runs} == {
    ("insects", "insects insvp", str(workdir))
  }
  assert any('"lr":0.1' in item.value_json for item in runs[0].config.update)
  # From the start, of another project, and with a damaged file it is another one.
  assert write(workdir, [1]) != first
  second = write(workdir, [2], start_step=1, project="other")
  (workdir / weights_and_biases.FILE).write_text('{"project": "other", "id": "../x"}')
  assert write(workdir, [3], start_step=2, project="other") not in (
    first,
    second,
    "../x",
  )


def test_how_a_run_ended_is_said(wandb, tmp_path, monkeypatch):
  ended, original = [], wandb.Run.finish

  def finish(run, exit_code=None, **more):
    ended.append(exit_code)
    original(run, exit_code=exit_code, **more)

  monkeypatch.setattr(wandb.Run, "finish", finish)
  write(tmp_path, [1])
  with pytest.raises(KeyError), Writers(tmp_path, total_steps=2, wandb="p"):
    raise KeyError
  assert ended == [0, 1]


def test_training_writes_what_metrics_jsonl_has(wandb, tmp_path):
  config = tiny_config("linear", wandb="me/insects", total_steps=3)
  trainer.train(config, tmp_path, prepared=prepare(config, make_data()))
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  last = {}
  for line in map(json.loads, lines):
    last.setdefault(line["step"], {}).update(line)
  rows = {row["_step"]: row for _, row in history(tmp_path)}
  assert rows.keys() == last.keys() and "test_accuracy" in rows[3]
  for step, row in rows.items():
    values = {name: value for name, value in row.items() if name != "_step"}
    assert values == pytest.approx({k: v for k, v in last[step].items() if k != "step"})


def test_disabled_and_on_other_processes_nothing_is_written(
  wandb, tmp_path, monkeypatch
):
  monkeypatch.setenv("WANDB_MODE", "disabled")
  write(tmp_path / "disabled", [1])
  assert not (tmp_path / "disabled" / "wandb").exists()
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with Writers(tmp_path / "other", total_steps=1, wandb="p") as found:
    found.train(1, {"loss": 1.0})
  assert not (tmp_path / "other").exists()


def test_who_is_not_known_is_told_before_anything_starts(wandb, monkeypatch):
  weights_and_biases.check_project("me/insects")
  monkeypatch.setenv("WANDB_MODE", "online")
  wandb.teardown()
  with pytest.raises(ValueError, match=r"does not know who writes: call `wandb login`"):
    trainer.prepare(tiny_config("linear", wandb="insects"))
  monkeypatch.setenv("WANDB_MODE", "sometimes")
  wandb.teardown()
  with pytest.raises(ValueError, match="Weights & Biases cannot start: .*sometimes"):
    weights_and_biases.check_project("insects")


@pytest.mark.parametrize("project", ["a/b/c", "a b", "../x\n", "/p", "p" * 200])
def test_a_wrong_name_is_named(project):
  with pytest.raises(ValueError, match=r"config\.wandb is .*, expected a project"):
    weights_and_biases.check_project(project)


def test_a_missing_package_is_one_line_before_data_are_read(monkeypatch):
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name)
  )
  config = tiny_config("linear", wandb="insects", task="no such task")
  with pytest.raises(ValueError, match=r"pip install 'insvp_jax\[wandb\]'"):
    trainer.prepare(config)
  config.wandb = ""
  with pytest.raises((ValueError, KeyError), match="no such task"):
    trainer.prepare(config)
