"""Several processes: the same numbers as one, and no silent or endless end."""

import json
import os
import signal
import socket
import time

import jax
import joined_processes
from main_driver import Driver
import numpy as np
import pytest
from tiny_commands import base_flags, flags_of, make_place

from insvp_jax import trees
from insvp_jax.checkpoints.files import find_steps, read_arrays
from insvp_jax.distributed import processes
from insvp_jax.distributed.processes import LOST, Watch

TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
FOUR_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


class Store:
  """The key-value store that processes share."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.values
    self.values[key] = value

  def key_value_dir_get(self, key):
    return [(k, v) for k, v in self.values.items() if k.startswith(key)]


class Left(Exception):
  """Stands for the end of the process."""


def leave(status):
  raise Left(status)


@pytest.fixture
def watches():
  """The watches of two processes, which look when they are told to."""
  store = Store()
  return [Watch(store, i, 2, lost_timeout=0.2, leave=leave) for i in range(2)]


def test_who_lives_or_is_done_is_not_missed(watches, capsys):
  first, second = watches
  for _ in range(4):
    time.sleep(0.1)
    second.look()
    first.look()
  second.finish()
  time.sleep(0.3)
  first.look()
  assert first.explain_abort() is None
  assert capsys.readouterr().err == ""


def test_who_is_silent_is_named(watches, capsys):
  first, second = watches
  second.look()
  first.look()
  time.sleep(0.3)
  with pytest.raises(Left, match=str(LOST)):
    first.look()
  said = capsys.readouterr().err
  assert said.startswith("insvp_jax: process 1 of this run gives no sign of life since")
  assert said.count("\n") == 1 and "Start the same command again" in said


def test_who_fails_tells_the_others_why(watches, capsys):
  first, second = watches
  with pytest.raises(Left, match="2"):
    second.fail(2, "no images in x.")
  with pytest.raises(Left, match="2"):
    first.look()
  assert capsys.readouterr().err == "insvp_jax: process 1 stopped: no images in x.\n"
  # Nobody is left to wait for the coordinator.
  assert first._others() == [1] and second._others() == []


def test_an_error_of_the_devices_waits_for_the_lost_process(watches):
  first, _ = watches
  before = time.monotonic()
  first.await_verdict(ValueError("no images"))
  assert time.monotonic() - before < 0.2
  error = OSError("not saved")
  error.__cause__ = jax.errors.JaxRuntimeError("connection closed by peer")
  first.await_verdict(error)
  assert time.monotonic() - before > 0.2


def test_after_the_verdict_nothing_else_is_said(watches):
  first, second = watches
  second.look()
  first.look()
  time.sleep(0.3)
  with pytest.raises(Left):
    first.look()
  before = time.monotonic()
  # The process would have ended meanwhile.
  first.await_verdict(jax.errors.JaxRuntimeError("connection closed by peer"))
  assert time.monotonic() - before >= first._timeout


def test_an_abort_is_explained_by_a_silent_process_or_coordinator(watches, monkeypatch):
  first, second = watches
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(processes, "_coordinator", lambda: address)
    assert second.explain_abort() is None
  status, line = second.explain_abort()
  assert status == LOST and line.startswith("process 0 of this run gives no sign")
  time.sleep(3 * 0.25 + 0.1)
  status, line = first.explain_abort()
  assert status == LOST and line.startswith("process 1 of this run gives no sign")


def test_a_single_process_has_nobody_to_differ_from():
  processes.check_same("anything", {"a": 1})
  processes.wait("nobody")
  with processes.joined(False, join_timeout=1, lost_timeout=1) as watch:
    assert watch is None


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
  with Driver(tmp_path_factory.mktemp("cwd")) as driver:
    yield driver


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
  """A run of 72 steps, saved every 6 and logged every 2."""
  return [
    *base_flags(root, make_place(tmp_path_factory.mktemp("place"))),
    *flags_of(
      **{"batch_size": 8, "total_steps": 72},
      **{"checkpoint_every_epochs": 2, "log_every_steps": 2},
    ),
    "--lost_timeout=5",
  ]


def environs():
  """Returns the environments of two processes that find each other."""
  return [{**TWO_DEVICES, **environ} for environ in joined_processes.environs()]


def rows(workdir):
  """Returns the whole lines of metrics.jsonl: one may be under way."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(workdir):
  try:
    return rows(workdir)[-1]["step"]
  except (FileNotFoundError, IndexError):
    return 0


def interrupt(driver, command, workdir, *, index, signum, beyond):
  """Sends one of two processes a signal beyond a step; returns how both ended."""
  pids = driver.start(*command, envs=environs())
  deadline = time.monotonic() + 200
  while last_step(workdir) <= beyond and time.monotonic() < deadline:
    time.sleep(0.01)
  os.kill(pids[index], signum)
  return driver.wait()


def last_line(done):
  return done.err.rstrip("\n").splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_two_interrupted_processes_train_as_one_with_as_many_devices(
  driver, base, tmp_path, kind
):
  # Calls of two steps: a notice may come between a call's first and last step.
  many = {"data__resident_mb": 1024, "steps_per_call": 2}
  more = flags_of(**(many if kind == "resident" else {"data__resident_mb": 0}))
  command = [*base, *more, f"--workdir={tmp_path / 'two'}"]
  alone = driver.run(*base, *more, f"--workdir={tmp_path / 'one'}", env=FOUR_DEVICES)
  assert alone.status == 0, alone.err
  # Killed is once the one that is also the coordinator.
  signum, stopped, statuses, victim = {
    "resident": (signal.SIGTERM, 1, [42, 42], 1),
    "streamed": (signal.SIGINT, 0, [130, 42], 0),
  }[kind]
  both = interrupt(
    driver, command, tmp_path / "two", index=stopped, signum=signum, beyond=6
  )
  assert [done.status for done in both] == statuses, both
  (step,) = {last_line(done).split("at step ")[1].split(";")[0] for done in both}
  assert find_steps(tmp_path / "two")[0].name == step
  both = interrupt(
    driver,
    command,
    tmp_path / "two",
    index=victim,
    signum=signal.SIGKILL,
    beyond=int(step) + 6,
  )
  killed, other = both[victim], both[1 - victim]
  assert (killed.status, other.status) == (-signal.SIGKILL, LOST), both
  expected = f"insvp_jax: process {victim} of this run gives no sign of life"
  assert last_line(other).startswith(expected), other.err
  driver.start(*command, envs=environs())
  both = driver.wait()
  assert [done.status for done in both] == [0, 0], both
  assert "resumed at step" in both[0].err
  assert both[1].err == ""
  one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
  for here, there in zip(one, two, strict=True):
    here.pop("images_per_second", None)
    there.pop("images_per_second", None)
    assert here == pytest.approx(there, rel=1e-4)
  assert_same_run(tmp_path / "one", tmp_path / "two")


def assert_same_run(one, two):
  """Asserts that two runs on four devices are the same, up to rounding."""
  results = [json.loads((w / "result.json").read_text()) for w in (one, two)]
  for key in ("val_accuracy", "test_accuracy", "steps", "devices", "data_sha256"):
    assert results[0][key] == results[1][key]
  assert results[1]["devices"] == 4
  for item in ("adapter", "optimizer"):
    first, second = (
      trees.flatten(read_arrays(find_steps(workdir)[0], item)) for workdir in (one, two)
    )
    assert first.keys() == second.keys()
    for name, leaf in first.items():
      np.testing.assert_allclose(leaf, second[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_share_cached_features(driver, base, tmp_path):
  command = [*base, *flags_of(method="linear", optim__lr=0.01)]
  alone = driver.run(*command, f"--workdir={tmp_path / 'one'}", env=FOUR_DEVICES)
  assert alone.status == 0, alone.err
  driver.start(*command, f"--workdir={tmp_path / 'two'}", envs=environs())
  both = driver.wait()
  assert [done.status for done in both] == [0, 0], both
  for done in (alone, both[0]):
    assert "features of the 24 training images are computed once" in done.err
  assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
  "flags, parts",
  [
    (
      ["--config.optim.lr=0.5", "--config.log_every_steps=3", "--config.data.root=x"],
      [
        "process 1 differs from process 0 in its settings",
        "config.optim.lr is 0.5, not 0.001",
        "config.log_every_steps is 3, not 2",
      ],
    ),
    (["--config.data.root=nowhere"], ["nowhere", "expected a folder or a .zip"]),
  ],
)
def test_what_is_wrong_with_one_process_ends_all(driver, base, tmp_path, flags, parts):
  driver.start(
    *base, f"--workdir={tmp_path / 'run'}", envs=environs(), extra=[[], flags]
  )
  first, second = driver.wait()
  assert (first.status, second.status) == (2, 2), (first, second)
  for part in parts:
    assert part in second.err and part in first.err
  assert "data.root is" not in second.err  # each host may have its own
  assert first.err.startswith("insvp_jax: process 1 stopped: ")
  assert first.err.count("\n") == second.err.count("\n") == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("index", [0, 1])
def test_who_waits_for_the_others_in_vain_says_so(driver, base, tmp_path, index):
  environ = environs()[index]
  done = driver.run(
    *base, f"--workdir={tmp_path / 'run'}", "--join_timeout=2", env=environ
  )
  assert done.status == 2, done.err
  address = environ["JAX_COORDINATOR_ADDRESS"]
  assert done.err.startswith(
    f"insvp_jax: not all processes met at the coordinator {address} within 2 s. "
  )
  assert done.err.count("\n") == 1
  assert not list(tmp_path.iterdir())
