"""Several processes: the same numbers as one, and no silent or endless end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types

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

CLUSTER_VARIABLES = (
  "JAX_COORDINATOR_ADDRESS",
  "JAX_NUM_PROCESSES",
  "JAX_PROCESS_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_STEP_NUM_TASKS",
  "OMPI_MCA_orte_hnp_uri",
  "TPU_WORKER_HOSTNAMES",
  "MEGASCALE_COORDINATOR_ADDRESS",
  "KUBERNETES_SERVICE_HOST",
)
STEP = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "8"}
TWO_DEVICES, FOUR_DEVICES = (
  {
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count={count}"
  }
  for count in (2, 4)
)


@pytest.fixture
def plain_host(monkeypatch):
  for name in CLUSTER_VARIABLES:
    monkeypatch.delenv(name, raising=False)
  return monkeypatch


@pytest.mark.parametrize(
  "environ,cluster",
  [
    ({}, None),
    ({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}, "slurm"),
    ({"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # salloc without srun
    # A shell, or one program, inside of a larger job; and a step of several of its own.
    ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, None),
    ({**STEP, "SLURM_STEP_NUM_TASKS": "4"}, "slurm"),
    # mpirun inside of a job: the step is that of its daemons.
    (
      {
        **STEP,
        "SLURM_STEP_NUM_TASKS": "2",
        "OMPI_MCA_orte_hnp_uri": "1.0;tcp",
        "OMPI_COMM_WORLD_SIZE": "8",
      },
      "openmpi",
    ),
    ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp", "OMPI_COMM_WORLD_SIZE": "4"}, "openmpi"),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a:1"}, "tpu"),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    (
      {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
      "kubernetes",
    ),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "manual"),
  ],
)
def test_clusters_are_detected_by_their_variables(environ, cluster):
  assert processes.detect_cluster(environ) == cluster


def test_a_single_host_joins_nothing(plain_host):
  assert processes.initialize_distributed() is False
  plain_host.setenv("SLURM_STEP_NODELIST", "node[1-2]")
  plain_host.setenv("SLURM_NTASKS", "2")
  assert processes.initialize_distributed(multihost=False) is False


def test_a_step_of_a_larger_slurm_job_waits_for_its_own_tasks_alone(plain_host):
  joined = []
  plain_host.setattr(jax.distributed, "initialize", lambda **kw: joined.append(kw))
  for name, value in {**STEP, "SLURM_STEP_NUM_TASKS": "4"}.items():
    plain_host.setenv(name, value)
  assert processes.initialize_distributed() is True
  plain_host.setenv("SLURM_STEP_NUM_TASKS", "1")
  assert processes.initialize_distributed() is False
  plain_host.delenv("SLURM_STEP_NUM_TASKS")
  assert processes.initialize_distributed() is True
  assert joined == [{"num_processes": 4}, {"num_processes": 8}]


@pytest.mark.parametrize("text", ["two", "2.0", "-1", "\u00b2", "9" * 20])
def test_a_variable_of_the_launcher_that_is_no_number_is_named(plain_host, text):
  plain_host.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
  plain_host.setenv("JAX_NUM_PROCESSES", text)
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is .*a whole number"):
    processes.initialize_distributed()


def test_who_waits_in_vain_is_told_how_to_be_alone(monkeypatch, capfd):
  def leave(status):
    raise Left(status)

  monkeypatch.setattr(processes.os, "_exit", leave)
  with pytest.raises(Left, match="2"):
    processes._end_for_want_of_others(7)
  said = capfd.readouterr().err
  assert said.count("\n") == 1
  assert "within 7 s" in said and "--config.multihost=False" in said


def test_asking_for_a_cluster_where_none_is_says_how_to_start_one(plain_host):
  def fail():
    raise ValueError("coordinator_address should be defined.")

  plain_host.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(ValueError, match="multihost=True.*coordinator.*SLURM"):
    processes.initialize_distributed(multihost=True)


def test_a_single_process_has_nobody_to_differ_from(plain_host):
  processes.check_same("anything", {"a": 1})
  processes.wait("nobody")
  with processes.joined(None, join_timeout=1, lost_timeout=1) as watch:
    assert watch is None
  assert processes.is_main_process()


class Store:
  """The key-value store that processes share."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.values
    self.values[key] = value

  def key_value_dir_get(self, key):
    return [(k, v) for k, v in self.values.items() if k.startswith(key)]

  def wait_at_barrier(self, name, timeout_in_ms):
    pass


class Left(Exception):
  """Stands for the end of the process."""


@pytest.fixture
def now(monkeypatch):
  """A clock that stands still: `now.seconds` is what it shows."""
  now = types.SimpleNamespace(seconds=0.0)
  monkeypatch.setattr(processes.time, "monotonic", lambda: now.seconds)
  return now


@pytest.fixture
def watches(monkeypatch, now):
  """The watches of three processes, which look when they are told to."""

  def leave(status):
    raise Left(status)

  monkeypatch.setattr(processes.os, "_exit", leave)
  store = Store()
  return [Watch(store, i, 3, lost_timeout=10) for i in range(3)]


def test_who_lives_is_not_missed_and_who_is_silent_is_named(watches, now, capfd):
  for _ in range(3):
    now.seconds += 9
    for watch in watches:
      watch.look()
  watches[0].look()
  now.seconds += 9
  watches[0].look()
  assert capfd.readouterr().err == ""
  now.seconds += 2
  with pytest.raises(Left, match=str(LOST)):
    watches[0].look()
  said = capfd.readouterr().err
  assert said.startswith(
    "insvp_jax: processes [1, 2] of this run give no sign of life since 10 s: killed"
  )
  assert said.count("\n") == 1 and "Start the same command again" in said


def test_who_is_lost_is_named_by_all_before_process_0_ends(
  watches, now, monkeypatch, capfd
):
  waited = []
  monkeypatch.setattr(processes.time, "sleep", waited.append)
  for _ in range(2):
    for watch in (watches[0], watches[2]):
      watch.look()
    now.seconds += 9
  for watch in (watches[2], watches[0]):
    assert not waited
    with pytest.raises(Left, match=str(LOST)):
      watch.look()
    said = capfd.readouterr().err
    assert said.startswith("insvp_jax: process 1 of this run gives no sign of life")
  assert sum(waited) > watches[2]._interval


def test_who_fails_tells_the_others_why(watches, capfd, monkeypatch):
  waited = []
  monkeypatch.setattr(processes.time, "sleep", waited.append)
  with pytest.raises(Left, match="2"):
    watches[1].fail(2, "no images in x.")
  for other in (watches[2], watches[0]):
    assert not waited  # process 0 alone outlives the others
    with pytest.raises(Left, match="2"):
      other.look()
    said = capfd.readouterr().err
    assert said == "insvp_jax: process 1 stopped: no images in x.\n"
  assert waited == [1.0]


def test_an_error_of_the_devices_waits_for_a_lost_process(watches, monkeypatch):
  waited = []
  monkeypatch.setattr(processes.time, "sleep", waited.append)
  ours = OSError("not saved")
  for error in (ours, KeyError("x"), TypeError("a bug")):
    watches[0].await_verdict(error)
  assert not waited
  ours.__cause__ = jax.errors.JaxRuntimeError("connection closed by peer")
  for error in (ours, ValueError("UNKNOWN: Gloo all-reduce failed")):
    watches[0].await_verdict(error)
  assert len(waited) == 2 and min(waited) > 10


def test_a_coordinator_is_gone_when_it_refuses_or_does_not_answer(
  watches, now, monkeypatch
):
  first, second, _ = watches
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    state = types.SimpleNamespace(coordinator_address=address)
    monkeypatch.setattr(processes, "_jax_state", lambda: state)
    assert first.has_coordinator() and second.has_coordinator()
    # A frozen process still accepts connections.
    now.seconds += 11
    assert first.has_coordinator() and not second.has_coordinator()
    now.seconds -= 11
  assert first.has_coordinator() and not second.has_coordinator()


ABORTED = """
import os
from test_processes import Store
from insvp_jax.distributed.processes import Watch, _aborts_explained
watch = Watch(Store(), 0, 2, lost_timeout=0.5)
with _aborts_explained(watch):
  watch.start()
  os.abort()
"""


def test_an_abort_waits_for_a_lost_process(root):
  paths = os.pathsep.join(str(root / f) for f in (".", "tests", "tests/distributed"))
  done = subprocess.run(
    [sys.executable, "-c", ABORTED],
    env={**os.environ, "PYTHONPATH": paths},
    capture_output=True,
    text=True,
  )
  assert done.returncode == LOST, done.stderr
  assert done.stderr.startswith(
    "insvp_jax: process 1 of this run gives no sign of life"
  )


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
      batch_size=8,
      total_steps=72,
      checkpoint_every_epochs=2,
      log_every_steps=2,
    ),
    "--lost_timeout=3",
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
  sent = workdir.with_name(f"{workdir.name}_beyond_{beyond}")
  hold = {"beyond": beyond, "until": str(sent)}
  pids = driver.start(*command, envs=environs(), hold=hold)
  deadline = time.monotonic() + 200
  while last_step(workdir) <= beyond:
    if time.monotonic() > deadline or not all(map(is_there, pids)):
      for pid in filter(is_there, pids):
        os.kill(pid, signal.SIGKILL)
      pytest.fail(f"no step beyond {beyond}: {driver.wait()}")
    time.sleep(0.01)
  os.kill(pids[index], signum)
  sent.touch()
  return driver.wait()


def is_there(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def last_line(done):
  return done.err.rstrip("\n").splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
  "settings, signum, stopped, statuses, killed",
  [
    # Calls of two steps: a notice may come between a call's first and last step.
    (
      {"data__resident_mb": 1024, "steps_per_call": 2},
      *(signal.SIGTERM, 1, [42, 42], 1),
    ),
    # Killed is once the one that is also the coordinator.
    ({"data__resident_mb": 0}, signal.SIGINT, 0, [130, 42], 0),
  ],
  ids=["resident", "streamed"],
)
def test_two_interrupted_processes_train_as_one_with_as_many_devices(
  driver, base, tmp_path, settings, signum, stopped, statuses, killed
):
  base, one, two = [*base, *flags_of(**settings)], tmp_path / "one", tmp_path / "two"
  alone = driver.run(*base, f"--workdir={one}", env=FOUR_DEVICES)
  assert alone.status == 0, alone.err
  command = [*base, f"--workdir={two}"]
  both = interrupt(driver, command, two, index=stopped, signum=signum, beyond=6)
  assert [done.status for done in both] == statuses, both
  (step,) = {last_line(done).split("at step ")[1].split(";")[0] for done in both}
  assert find_steps(two)[0].name == step
  beyond = int(step) + 6
  both = interrupt(
    driver, command, two, index=killed, signum=signal.SIGKILL, beyond=beyond
  )
  other = both[1 - killed]
  assert (both[killed].status, other.status) == (-signal.SIGKILL, LOST), both
  expected = f"insvp_jax: process {killed} of this run gives no sign of life"
  assert last_line(other).startswith(expected), other.err
  driver.start(*command, envs=environs())
  both = driver.wait()
  assert [done.status for done in both] == [0, 0], both
  assert "resumed at step" in both[0].err
  assert both[1].err == ""
  for here, there in zip(rows(one), rows(two), strict=True):
    here.pop("images_per_second", None)
    there.pop("images_per_second", None)
    assert here == pytest.approx(there, rel=1e-4)
  assert_same_run(one, two)


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
  command = [*base, *flags_of(method="linear", optim__lr=0.01, total_steps=12)]
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
    *base, f"--workdir={tmp_path / 'run'}", "--join_timeout=1", env=environ
  )
  assert done.status == 2, done.err
  address = environ["JAX_COORDINATOR_ADDRESS"]
  assert done.err.startswith(
    f"insvp_jax: not all processes met at the coordinator {address} within 1 s. "
  )
  assert done.err.count("\n") == 1
  assert not list(tmp_path.iterdir())
