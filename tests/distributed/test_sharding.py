"""Frozen backbones split over devices: the same numbers from a part of the bytes."""

import jax
from jax.sharding import PartitionSpec
from joined_processes import run_together
import numpy as np
import pytest
from test_trainer import at_step, metrics, stop_by, stored
from tiny_runs import make_params
from tiny_training import make_data, make_split, prepare, tiny_config

from insvp_jax import trees
from insvp_jax.data import pipeline, resident
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.distributed import sharding as sharding_lib
from insvp_jax.distributed.stopping import Stopped
from insvp_jax.run import load_run
from insvp_jax.train import program as program_lib
from insvp_jax.train.trainer import train

# Wide enough for kernels that are worth splitting.
WIDE = {"width": 128, "mlp_dim": 256, "num_heads": 4}
# All blocks are compiled alike: one will do.
UNROLLED = {"backbone__scan": False, "backbone__depth": 1}


def wide_config(fsdp=1, **changes):
  sizes = {f"backbone__{name}": size for name, size in WIDE.items()}
  defaults = {
    "method": "vpt_deep",
    "backbone__scan": True,
    "optim__wd": 0.0,
    # AdamW would make steps out of the rounding errors of gradients that are 0.
    "optim__eps": 1e-5,
    "checkpoint_every_epochs": 2 / 3,
  }
  return tiny_config(backbone__fsdp=fsdp, **{**defaults, **sizes, **changes})


def first_batch(config, program):
  return next(
    pipeline.train_batches(
      make_data().splits["train"],
      batch_size=config.batch_size,
      seed=0,
      sharding=mesh_lib.batch_sharding(program.mesh),
    )
  )


@pytest.fixture(scope="module")
def prepared():
  """What is compiled for each fsdp."""
  return {fsdp: prepare(wide_config(fsdp), devices=4) for fsdp in (1, 2, 4)}


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory):
  """Uninterrupted runs: {fsdp: (workdir, result)}."""
  done = {}
  for fsdp, shared in prepared.items():
    workdir = tmp_path_factory.mktemp(f"fsdp{fsdp}")
    done[fsdp] = workdir, train(wide_config(fsdp), workdir, prepared=shared)
  return done


def specs(shapes, trainable=(), fsdp=4):
  """Returns {name: spec} of flat shapes."""
  tree = trees.unflatten(
    {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
  )
  mask = trees.unflatten({name: name in trainable for name in shapes})
  mesh = mesh_lib.create_mesh(jax.devices()[:4], fsdp=fsdp)
  found = trees.flatten(sharding_lib.param_shardings(tree, mask, mesh))
  return {name: sharding.spec for name, sharding in found.items()}


def test_large_frozen_leaves_of_the_backbone_are_cut_and_nothing_else():
  shapes = {
    "backbone/embedding/kernel": (14, 14, 3, 128),
    "backbone/pos_embedding": (1, 196, 128),
    "backbone/Transformer/encoder_norm/scale": (128,),
    "backbone/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel": (128, 256),
    "backbone/Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel": (128, 256),
    "prompter/specific_prompter/kernel": (256, 256),
    "head/kernel": (256, 256),
  }
  block1 = "backbone/Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel"
  names = list(shapes)
  expected = {name: PartitionSpec() for name in shapes}
  expected[names[0]] = PartitionSpec(None, None, None, "fsdp")
  expected[names[1]] = PartitionSpec(None, "fsdp")
  expected[names[3]] = PartitionSpec("fsdp")
  assert specs(shapes, trainable=("head/kernel", block1)) == expected
  whole = {name: PartitionSpec() for name in shapes}
  assert specs(shapes, trainable=("head/kernel", block1), fsdp=1) == whole


def test_a_stack_of_blocks_is_never_cut_between_blocks():
  block = "backbone/Transformer/encoderblock"
  shapes = {
    f"{block}/MlpBlock_0/Dense_0/kernel": (64, 128, 256),
    f"{block}/MlpBlock_0/Dense_0/bias": (64, 256),
  }
  kernel, bias = specs(shapes).values()
  assert kernel == PartitionSpec(None, "fsdp")
  assert bias in (PartitionSpec(), PartitionSpec(None))


class Watched(np.ndarray):
  """An array that notes the sizes of the parts that are taken from it."""

  taken: list

  def __getitem__(self, index):
    part = np.asarray(self).__getitem__(index)
    self.taken.append(part.size)
    return part


def test_each_device_is_given_its_part_of_a_host_array_and_no_more():
  host = np.arange(128 * 256, dtype=np.float32).reshape(128, 256).view(Watched)
  host.taken = []
  mesh = mesh_lib.create_mesh(jax.devices()[:4], fsdp=4)
  cut = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp"))
  placed = sharding_lib.device_put({"kernel": host}, {"kernel": cut})["kernel"]
  np.testing.assert_array_equal(placed, np.asarray(host))
  assert host.taken and max(host.taken) == host.size // 4


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_devices_hold_parts_before_and_after_a_step(prepared, fsdp):
  config, program = wide_config(fsdp), prepared[fsdp].program
  params = prepared[fsdp].first_params(config)
  host = trees.flatten(params)
  before = {name: leaf.copy() for name, leaf in host.items()}
  state = program_lib.create_state(config, program, params)
  rows = mesh_lib.batch_sharding(program.mesh)
  arrays = resident.put_split(prepared[fsdp].data.splits["train"], rows)
  # The program of `runs`.
  arguments = arrays, np.uint32(0), np.int32(1)
  compiled = program.multi_step.lower(state, *arguments).compile()
  state, _ = compiled(state, *arguments)
  _, frozen = trees.split(state.params, program.mask)
  bytes_in_kernels = 0
  for name, leaf in frozen.items():
    parts = {shard.data.nbytes for shard in leaf.addressable_shards}
    is_cut = leaf.size / leaf.shape[0] >= 2**14
    assert parts == {leaf.nbytes // (fsdp if is_cut else 1)}, name
    bytes_in_kernels += leaf.nbytes if is_cut else 0
    np.testing.assert_array_equal(leaf, before[name], err_msg=name)
  # The step was donated what it was given: the caller's arrays are not a part of it.
  for name, leaf in host.items():
    np.testing.assert_array_equal(leaf, before[name], err_msg=name)
  total = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
  assert bytes_in_kernels > 0.8 * total
  expected = total - bytes_in_kernels * (1 - 1 / fsdp)
  # Each has all images.
  expected += sum(array.nbytes for array in arrays.values())
  given = compiled.memory_analysis().argument_size_in_bytes
  assert given == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("fsdp", [2, 4])
def test_a_split_backbone_trains_to_the_same_numbers(runs, fsdp):
  (whole, expected), (split, result) = runs[1], runs[fsdp]
  for key in ("val_accuracy", "test_accuracy", "trainable_params", "backbone"):
    assert result[key] == expected[key], key
  ours, theirs = stored(split), stored(whole)
  assert ours[:3] == theirs[:3]
  theirs = trees.flatten(theirs[3])
  for name, leaf in trees.flatten(ours[3]).items():
    np.testing.assert_allclose(leaf, theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)
  losses = [
    [row["loss"] for row in metrics(workdir) if "loss" in row]
    for workdir in (split, whole)
  ]
  np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
  "changes",
  [
    {**UNROLLED, "method": "bias", "backbone__frozen_dtype": "bfloat16"},
    {**UNROLLED, "backbone__remat": True, "backbone__pool": "map"},
    {"backbone__remat": True, "method": "linear"},
    # Hooks at every operation; and blocks that differ, though their leaves are stacked.
    {"method": "ssf", "backbone__frozen_dtype": "int8"},
    {"method": "transhp"},
  ],
)
def test_blocks_of_every_kind_compute_the_same_when_split(changes):
  found, params = [], None
  for fsdp in (1, 4):
    config = wide_config(fsdp, **changes)
    program = prepare(config, devices=4).program
    params = params or jax.device_get(make_params(program.model))
    state = program_lib.create_state(config, program, params)
    batch = first_batch(config, program)
    _, got = program.train_step(state, batch)
    found.append(jax.device_get([got["loss"], got["grad_norm"]]))
  np.testing.assert_allclose(*found, rtol=1e-4)


@pytest.mark.parametrize("resumed_on", [2, 4])
def test_a_split_run_resumes_split_the_same_way_or_another(
  prepared, runs, monkeypatch, tmp_path, resumed_on
):
  with monkeypatch.context() as patch:
    at_step(patch, 3, stop_by(15))
    with pytest.raises(Stopped):
      train(wide_config(2), tmp_path, prepared=prepared[2])
  train(wide_config(resumed_on), tmp_path, prepared=prepared[resumed_on])
  ours, theirs = stored(tmp_path), stored(runs[2][0])
  assert ours[:3] == theirs[:3]
  theirs = trees.flatten(theirs[3])
  rtol = 0 if resumed_on == 2 else 1e-3
  for name, leaf in trees.flatten(ours[3]).items():
    np.testing.assert_allclose(leaf, theirs[name], rtol, atol=rtol / 100, err_msg=name)


def test_a_split_run_is_loaded_on_one_device(runs):
  workdir, result = runs[4]
  run = load_run(workdir)
  leaves = jax.tree.leaves(run.params)
  assert {len(leaf.sharding.device_set) for leaf in leaves} == {1}
  test = make_data().splits["test"]
  predicted = run.predict(test.images).argmax(-1)
  assert float(np.mean(predicted == test.labels)) == result["test_accuracy"]


@pytest.mark.parametrize("fsdp", [2, 4])
def test_batches_are_split_over_both_axes(fsdp):
  split = make_split(24, 0)
  sharding = mesh_lib.batch_sharding(mesh_lib.create_mesh(jax.devices()[:4], fsdp=fsdp))
  for batches in (
    lambda s: pipeline.train_batches(split, batch_size=8, seed=0, sharding=s),
    lambda s: pipeline.eval_batches(split, batch_size=16, sharding=s),
  ):
    ours, alone = (next(batches(s)) for s in (sharding, None))
    for name, array in ours.items():
      rows = {shard.data.shape[0] for shard in array.addressable_shards}
      assert rows == {len(array) // 4}
      np.testing.assert_array_equal(array, alone[name])


def test_fsdp_has_to_divide_the_devices():
  with pytest.raises(
    ValueError, match="backbone.fsdp is 3, which does not divide 4.*Use 1 or 2 or 4"
  ):
    mesh_lib.create_mesh(jax.devices()[:4], fsdp=3)
  with pytest.raises(ValueError, match="does not divide 2 devices"):
    mesh_lib.create_mesh(jax.devices()[:2], fsdp=4)


WORKER = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from insvp_jax.distributed import mesh as mesh_lib, processes, sharding
assert processes.initialize_distributed() is True
mesh = mesh_lib.create_mesh(fsdp=4)
rank = jax.process_index()
kernel = np.arange(128 * 128, dtype=np.float32).reshape(128, 128)
tree, mask = ({"backbone": {"kernel": value}} for value in (kernel, False))
where = sharding.param_shardings(tree, mask, mesh)
params = sharding.device_put(tree, where)
parts = params["backbone"]["kernel"].addressable_shards
rows = np.ones((2, 128), np.float32) * rank
x = jax.make_array_from_process_local_data(mesh_lib.batch_sharding(mesh), rows)
total = jax.jit(lambda x, p: (x @ p["backbone"]["kernel"]).sum())(x, params)
print([part.data.shape for part in parts], float(total) == 2 * kernel.sum())
"""


def test_two_processes_share_one_backbone():
  assert run_together(WORKER) == 2 * ["[(32, 128), (32, 128)] True"]
