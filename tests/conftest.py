"""Settings and fixtures that all tests share.

The package must not be imported at the top of this file: pytest's jaxtyping plugin
has to see its first import, to check the annotations.

In-process tests run on 4 simulated CPU devices and with full float32 matrix products.
Programs started as subprocesses inherit neither, but are compiled as quickly.
"""

from collections.abc import Callable
import functools
import gc
import hashlib
import importlib.util
import json
import os
from pathlib import Path
import platform
import re
import shutil
import signal
import socket
import types
from typing import Any

import hypothesis
import jax
from jaxlib.version import __version_info__ as version_info
import jaxtyping
import numpy as np
import pytest
import type_checks

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# The files that take longest come first: the processes that share the files then end at
# about the same time.
SLOW_FILES = (
  *("test_every_method", "test_golden_methods", "test_processes", "test_killed"),
  "test_benchmarks",
  *("test_main", "test_population", "test_steps", "test_plan", "test_readme"),
  *("test_vit", "test_docs", "test_segmentation", "test_architectures"),
  *("test_sharding", "test_trainer", "test_tfds_vtab", "test_tfds_stream"),
  *("test_stored_runs", "test_notebook", "test_gradient_economy", "test_tune"),
  *("test_batches", "test_soak", "test_attention", "test_run", "test_features"),
)


def _processor() -> str:
  """Returns a digest of what decides whether a compiled program runs here."""
  parts = [jax.__version__, platform.machine()]
  cpuinfo = Path("/proc/cpuinfo")
  if cpuinfo.exists():
    parts += re.findall(r"^(?:flags|Features).*", cpuinfo.read_text(), re.M)[:1]
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _compile_quickly() -> None:
  """Says so to this process, and to those that it starts.

  Most programs of tests run for a moment, so few optimizations are worth their time.
  XLA's older emitters compile a train step in less than half the time; later jaxlibs
  have the newer ones alone, and XLA ends a process with flags that it does not know.
  Cutting a program into 32 parts for as many threads, of which two are there, costs a
  sixth.
  """
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "True"
  jax.config.update("jax_disable_most_optimizations", True)
  flags = ["--xla_cpu_parallel_codegen_split_count=1"]
  if version_info <= (0, 11, 0):
    flags.append("--xla_cpu_use_fusion_emitters=false")
  # The last of two settings counts: the user's.
  os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()


def _configure_jax() -> None:
  # Through the environment, so that subprocesses have it too: the platform and the
  # cache of compiled programs. What the user set stays.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  cache = ROOT / ".pytest_cache" / "jax" / _processor()
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
  # JAX read the environment when it was imported, so tell it again.
  jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
  jax.config.update(
    "jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"]
  )
  jax.config.update(
    "jax_persistent_cache_min_compile_time_secs",
    float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
  )
  jax.config.update("jax_num_cpu_devices", 4)
  jax.config.update("jax_default_matmul_precision", "highest")


def _write_to_memory() -> None:
  """Has tests write their files to memory, where there is enough of it.

  They write tens of thousands; on a slow disk each takes a millisecond to make and
  another to delete.
  """
  memory = Path("/dev/shm")
  if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def _forbid_network() -> None:
  """Makes a connection to any other machine fail at once, naming it."""
  connect = socket.socket.connect

  def guarded(self: socket.socket, address: Any) -> None:
    internet = self.family in (socket.AF_INET, socket.AF_INET6)
    if internet and not re.fullmatch(r"localhost|127\..*|::1", str(address[0])):
      raise PermissionError(f"tests do without the network, but {address} was wanted")
    connect(self, address)

  socket.socket.connect = guarded


def _heed_signals() -> None:
  """Lets programs that tests start be interrupted.

  A shell that starts the tests in the background has them ignore SIGINT, and whoever
  they start inherits that.
  """
  if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
  """Sets the process up, before any test file is imported."""
  del config
  _heed_signals()
  os.environ["MPLBACKEND"] = "Agg"
  _compile_quickly()
  _configure_jax()
  _write_to_memory()
  type_checks.install()
  _forbid_network()
  hypothesis.settings.register_profile(
    "insvp_jax", max_examples=25, deadline=None, derandomize=True, database=None
  )
  hypothesis.settings.load_profile("insvp_jax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Sorts the files: slow ones first, the others as they come."""

  def position(item: pytest.Item) -> int:
    name = item.path.stem
    return SLOW_FILES.index(name) if name in SLOW_FILES else len(SLOW_FILES)

  items.sort(key=position)


def pytest_collection_finish() -> None:
  """Has Python look for garbage among what the tests make, and less often.

  Tracing makes many small objects, and at each search for cycles Python would go
  through those of all modules: a tenth of the tests' time.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory):
  """Keeps what tests write under the user's home folder, such as caches, away."""
  with pytest.MonkeyPatch.context() as patch:
    # Matplotlib's list of fonts takes seconds to make: leave it where it is.
    fonts = os.environ.get("MPLCONFIGDIR") or ROOT / ".pytest_cache" / "matplotlib"
    patch.setenv("MPLCONFIGDIR", str(fonts))
    patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    patch.delenv("XDG_CACHE_HOME", raising=False)
    yield


@pytest.fixture(scope="module", autouse=True)
def _forget_older_objects():
  """Keeps searches for garbage short: what earlier files made is not gone through.

  JAX's caches keep all that was ever traced: late in the tests a whole search would
  take longer than most tests do.
  """
  gc.collect(1)
  gc.freeze()


@pytest.fixture
def unchecked():
  """The package without the tests' checks of annotations, which users have not."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def root() -> Path:
  """The root of the repository."""
  return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
  """The folder of golden outputs and real images beside the repository."""
  if not SHARED.is_dir():
    pytest.skip(f"no {SHARED.name}/ beside the repository: golden outputs, real images")
  return SHARED


@pytest.fixture(scope="session")
def golden(shared_dir: Path) -> Callable[[str], dict[str, Any]]:
  """Reads a golden file, such as "vpt_deep", into a dict of arrays by name.

  Its "config" is parsed; a file of real weights has none: what it pins tells what
  it is.
  """

  def load(name: str) -> dict[str, Any]:
    with np.load(shared_dir / "golden" / f"{name}.npz", allow_pickle=False) as file:
      content: dict[str, Any] = {key: file[key] for key in file.files}
    if "config" in content:
      content["config"] = json.loads(str(content["config"]))
    else:
      content["config"] = dict.fromkeys(content)
    return content

  return load


@pytest.fixture(scope="session")
def recipe(shared_dir: Path) -> types.ModuleType:
  """golden/recipe.py: draws the parameters and images behind the golden outputs."""
  path = shared_dir / "golden" / "recipe.py"
  spec = importlib.util.spec_from_file_location("golden_recipe", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _use_devices(patch: pytest.MonkeyPatch, number: int) -> None:
  from insvp_jax.distributed import mesh

  create, few = mesh.create_mesh, jax.devices()[:number]

  def create_mesh(devices=None, *, fsdp=1):
    return create(few if devices is None else devices, fsdp=fsdp)

  patch.setattr(mesh, "create_mesh", create_mesh)


@pytest.fixture
def use_devices(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
  """Has runs that prepare themselves train on so many devices, not on all four.

  For one, programs compile sooner.
  """
  return functools.partial(_use_devices, monkeypatch)


@pytest.fixture(scope="module")
def one_device():
  """Has the runs of a file that prepare themselves train on one device."""
  with pytest.MonkeyPatch.context() as patch:
    _use_devices(patch, 1)
    yield


@pytest.fixture(scope="session")
def make_mesh() -> Callable[[int], jax.sharding.Mesh]:
  """Makes a mesh with the axis "data" over the first so many devices."""

  def make(num_devices: int) -> jax.sharding.Mesh:
    devices = jax.devices()
    if len(devices) < num_devices:
      pytest.skip(f"{num_devices} devices wanted, {len(devices)} there")
    return jax.make_mesh(
      (num_devices,),
      ("data",),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=devices[:num_devices],
    )

  return make


@pytest.fixture(scope="session")
def mesh(make_mesh: Callable[[int], jax.sharding.Mesh]) -> jax.sharding.Mesh:
  """A mesh over 4 devices."""
  return make_mesh(4)
