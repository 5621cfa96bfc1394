import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from joined_processes import run_together
import numpy as np
import pytest

from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.train import losses


@pytest.fixture
def four_devices():
  if len(jax.devices()) < 4:
    pytest.skip("needs 4 devices; tests/conftest.py simulates them on CPU")
  return mesh_lib.create_mesh(jax.devices()[:4])


def test_mesh_has_one_axis_over_all_devices():
  mesh = mesh_lib.create_mesh()
  assert mesh.axis_names == ("data",)
  assert list(mesh.devices.flat) == jax.devices()
  assert mesh.axis_types == (AxisType.Auto,)


def test_a_batch_is_split_and_parameters_are_replicated(four_devices):
  images = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
  batch = jax.device_put(images, mesh_lib.batch_sharding(four_devices))
  assert [s.data.shape for s in batch.addressable_shards] == [(2, 3)] * 4
  kernel = jax.device_put(images, mesh_lib.replicated(four_devices))
  assert [s.data.shape for s in kernel.addressable_shards] == [(8, 3)] * 4


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
      jax.device_put(kernel, mesh_lib.replicated(mesh)),
      jax.device_put(batch, mesh_lib.batch_sharding(mesh)),
    )
    results.append(np.asarray(gradient))
  np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_batch_sizes_that_split_are_accepted(four_devices):
  # 0 is automatic: one of them.
  for size in (0, 4, 8, 64):
    mesh_lib.check_batch_size(size, four_devices)


@pytest.mark.parametrize(
  "size,advice", [(10, "Use 8 or 12"), (3, "Use 4"), (-4, "Use 4")]
)
def test_other_batch_sizes_name_the_nearest_that_split(four_devices, size, advice):
  with pytest.raises(
    ValueError, match=rf"eval_batch_size is {size},.* 4 dev.*{advice}\."
  ):
    mesh_lib.check_batch_size(size, four_devices, "eval_batch_size")


WORKER = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from insvp_jax.distributed import mesh as mesh_lib, processes
assert processes.initialize_distributed() is True
mesh = mesh_lib.create_mesh()
rank = jax.process_index()
assert processes.is_main_process() == (rank == 0)
rows = np.arange(4.0) + 4 * rank
x = jax.make_array_from_process_local_data(mesh_lib.batch_sharding(mesh), rows)
scale = jax.device_put(np.float32(2), mesh_lib.replicated(mesh))
total = jax.jit(lambda x, s: (x * s).sum())(x, scale)
print(jax.process_count(), x.shape, float(total))
"""


def test_two_processes_share_one_batch():
  assert run_together(WORKER) == 2 * ["2 (8,) 56.0"]
