import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from joined_processes import run_together
import numpy as np
import pytest

from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.train import losses

CLUSTER_VARIABLES = (
  "JAX_COORDINATOR_ADDRESS",
  "JAX_NUM_PROCESSES",
  "JAX_PROCESS_ID",
  "SLURM_STEP_NODELIST",
  "OMPI_MCA_orte_hnp_uri",
  "TPU_WORKER_HOSTNAMES",
  "MEGASCALE_COORDINATOR_ADDRESS",
  "KUBERNETES_SERVICE_HOST",
)


@pytest.fixture
def four_devices():
  if len(jax.devices()) < 4:
    pytest.skip("needs 4 devices; tests/conftest.py simulates them on CPU")
  return mesh_lib.create_mesh(jax.devices()[:4])


@pytest.fixture
def plain_host(monkeypatch):
  for name in CLUSTER_VARIABLES:
    monkeypatch.delenv(name, raising=False)
  return monkeypatch


def test_mesh_has_one_axis_over_all_devices():
  mesh = mesh_lib.create_mesh()
  assert mesh.axis_names == ("data",)
  assert list(mesh.devices.flat) == jax.devices()
  assert mesh.axis_types == (AxisType.Auto,)


def test_batch_is_split_and_parameters_are_replicated(four_devices):
  images = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
  batch = mesh_lib.put_batch({"images": images}, four_devices)
  assert batch["images"].sharding.spec == PartitionSpec("data")
  assert [s.data.shape for s in batch["images"].addressable_shards] == [(2, 3)] * 4
  np.testing.assert_array_equal(batch["images"], images)
  tree = {"head": {"kernel": images}, "rng": jax.random.key(0)}
  params = mesh_lib.put_replicated(tree, four_devices)
  kernel = params["head"]["kernel"]
  assert [s.data.shape for s in kernel.addressable_shards] == [(8, 3)] * 4
  assert params["rng"].sharding.is_fully_replicated


def test_step_gives_the_same_on_four_devices_as_on_one(four_devices):
  rng = np.random.default_rng(0)
  batch = {
    "images": rng.normal(size=(8, 4, 4, 3)).astype(np.float32),
    "labels": np.arange(8, dtype=np.int32) % 3,
  }
  kernel = rng.normal(size=(48, 3)).astype(np.float32)

  @jax.jit
  def loss(kernel, batch):
    targets = losses.targets(batch["labels"], 3, 0.1)
    images, targets = losses.mix(
      jax.random.key(2),
      batch["images"],
      targets,
      mixup_alpha=1.0,
      cutmix_alpha=0.0,
    )
    logits = images.reshape(len(images), -1) @ kernel
    return jnp.mean(losses.cross_entropy(logits, targets))

  results = []
  for mesh in (mesh_lib.create_mesh(jax.devices()[:1]), four_devices):
    gradient = jax.grad(loss)(
      mesh_lib.put_replicated(kernel, mesh), mesh_lib.put_batch(batch, mesh)
    )
    results.append(np.asarray(gradient))
  np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_batch_sizes_that_split_are_accepted(four_devices):
  for size in (4, 8, 64):
    mesh_lib.check_batch_size(size, four_devices)


@pytest.mark.parametrize(
  "size,advice", [(10, "Use 8 or 12"), (3, "Use 4"), (0, "Use 4"), (-4, "Use 4")]
)
def test_other_batch_sizes_name_the_nearest_that_split(four_devices, size, advice):
  with pytest.raises(
    ValueError, match=rf"eval_batch_size is {size},.* 4 dev.*{advice}\."
  ):
    mesh_lib.check_batch_size(size, four_devices, "eval_batch_size")


def test_rows_that_do_not_split_are_an_error(four_devices):
  with pytest.raises(ValueError, match="'images': 6.*4 devices"):
    mesh_lib.put_batch({"images": np.zeros((6, 2))}, four_devices)
  with pytest.raises(ValueError, match="'labels': 4"):
    mesh_lib.put_batch(
      {"images": np.zeros((8, 2)), "labels": np.zeros(4)}, four_devices
    )


@pytest.mark.parametrize(
  "environ,cluster",
  [
    ({}, None),
    ({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}, "slurm"),
    ({"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # salloc without srun
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
  assert mesh_lib.detect_cluster(environ) == cluster


def test_a_single_host_joins_nothing(plain_host):
  assert mesh_lib.initialize_distributed() is False
  plain_host.setenv("SLURM_STEP_NODELIST", "node[1-2]")
  plain_host.setenv("SLURM_NTASKS", "2")
  assert mesh_lib.initialize_distributed(multihost=False) is False


def test_asking_for_a_cluster_where_none_is_says_how_to_start_one(
  plain_host,
):
  def fail():
    raise ValueError("coordinator_address should be defined.")

  plain_host.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(ValueError, match="multihost=True.*coordinator.*SLURM"):
    mesh_lib.initialize_distributed(multihost=True)


def test_process_info_describes_this_process():
  info = mesh_lib.process_info()
  assert info["process_index"] == 0 and info["process_count"] == 1
  assert info["device_count"] == info["local_device_count"] == len(jax.devices())
  assert info["platform"] == jax.devices()[0].platform


WORKER = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from insvp_jax import partition
assert partition.initialize_distributed() is True
assert partition.initialize_distributed() is True
mesh = partition.create_mesh()
rank = jax.process_index()
batch = partition.put_batch({"x": np.arange(4.0) + 4 * rank}, mesh)
scale = partition.put_replicated(np.float32(2), mesh)
with jax.set_mesh(mesh):
  total = jax.jit(lambda x, s: (x * s).sum())(batch["x"], scale)
print(partition.process_info()["process_count"], batch["x"].shape, float(total))
"""


def test_two_processes_share_one_batch():
  assert run_together(WORKER) == 2 * ["2 (8,) 56.0"]
