"""Plans: bytes as they turn out to be, without what they are about."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import first_batch, wide_config
from tiny_training import SIZE, SPLITS, prepare, tiny_config

from insvp_jax import trees
from insvp_jax.checkpoints.checkpointer import Checkpointer
from insvp_jax.checkpoints.files import find_steps
from insvp_jax.tools import plan
from insvp_jax.train import program as program_lib

DEPTH = 16
COUNTS = {"plan__num_classes": 3, "plan__num_train": SPLITS["train"]}


def real_state(config):
  program, rng = prepare(config, devices=4).program, np.random.default_rng(0)
  # Random, as zeros would be compressed to nothing in a checkpoint.
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), program.shapes
  )
  return program, program_lib.create_state(config, program, params)


def on_first_device(tree):
  """Returns the bytes of a tree of arrays that lie on the first device."""
  shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree)]
  return sum(shard.nbytes for shard in shards)


@pytest.fixture(scope="module")
def deep_plans():
  """Returns the plan of a scanned backbone for (fsdp, remat), on 4 devices."""

  @functools.cache
  def deep_plan(fsdp, remat):
    return plan.plan(deep_config(fsdp, remat), jax.devices()[:4])

  return deep_plan


def deep_config(fsdp, remat=False):
  return wide_config(fsdp, backbone__depth=DEPTH, backbone__remat=remat, **COUNTS)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_plan_has_the_bytes_of_the_real_state(deep_plans, fsdp):
  config, found = deep_config(fsdp), deep_plans(fsdp, False)
  program, state = real_state(config)
  trainable, frozen = trees.split(state.params, program.mask)
  batch = first_batch(config, program)
  assert found["arrays"] == {
    "frozen": on_first_device(frozen),
    "trainable": on_first_device(trainable),
    "optimizer": on_first_device(state.replace(params=None, rng=None)),
    "training_images": SPLITS["train"] * (SIZE * SIZE * 3 + 4),
    "training_features": 0,
  }
  assert found["train_step"]["batch"] == on_first_device(batch)
  # The compiled step takes what was planned, beside the random key.
  arguments = program.train_step.lower(state, batch).compile().memory_analysis()
  planned = found["train_step"]["total"] - found["train_step"]["temporaries"]
  planned -= found["arrays"]["training_images"]
  key = on_first_device(jax.random.key_data(state.rng))
  assert arguments.argument_size_in_bytes == planned + key
  # It is the program that runs, but for the compiler's effort.
  temporaries = arguments.temp_size_in_bytes
  assert found["train_step"]["temporaries"] == pytest.approx(temporaries, rel=0.1)


def test_a_plan_has_the_size_of_the_real_checkpoint(tmp_path):
  program, state = real_state(wide_config(method="full"))
  found = plan._checkpoint_bytes(program, state)
  rng = np.random.default_rng(0)

  def drawn(leaf):
    if leaf.dtype != jnp.float32:
      return leaf
    return jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)

  state = state.replace(opt_state=jax.tree.map(drawn, state.opt_state))
  with Checkpointer(tmp_path, mask=program.mask, meta={}) as checkpointer:
    checkpointer.save(state, progress={})
  for item in ("adapter", "optimizer"):
    files = [
      path for path in (find_steps(tmp_path)[0] / item).rglob("*") if path.is_file()
    ]
    stored = sum(path.stat().st_size for path in files)
    # Compressed by some per cent; names and shapes take some KiB.
    assert 0.9 * found[item] < stored < found[item] + 2**16, item


def test_where_features_are_computed_once_the_plan_has_them_in_place_of_images():
  found, without = (
    plan.plan(tiny_config("linear", cache_features=c, **COUNTS), jax.devices()[:1])
    for c in (True, False)
  )
  width, number = 16, SPLITS["train"]
  assert found["arrays"]["training_features"] == number * (4 * width + 4)
  assert found["arrays"]["training_images"] == 0
  assert found["train_step"]["batch"] == 8 * (4 * width + 4)
  assert found["flops"] < without["flops"] / 100
  # The pass over the images is as large as an evaluation, but for the head.
  passes = (each["eval_step"]["temporaries"] for each in (found, without))
  assert next(passes) == pytest.approx(next(passes), rel=0.05)
  lines = [" ".join(line.split()) for line in plan.format_plan(found).splitlines()]
  assert "bytes on each device training features" in lines
  assert "training features 1.59 KiB 1.59 KiB" in lines


@pytest.mark.parametrize("remat", [False, True])
def test_of_a_split_scanned_backbone_one_block_is_whole_at_a_time(deep_plans, remat):
  found = [deep_plans(fsdp, remat) for fsdp in (1, 4)]
  whole, split = (each["arrays"]["frozen"] for each in found)
  assert split < 0.3 * whole
  more = found[1]["train_step"]["temporaries"] - found[0]["train_step"]["temporaries"]
  assert more < 3 * whole / DEPTH
  assert found[0]["flops"] == found[1]["flops"]


def numbers(**changes):
  return plan._task_sizes(tiny_config(**changes))


def test_classes_and_images_come_from_the_table_of_tasks():
  assert numbers(task="svhn") == ("svhn", 10, 800)
  assert numbers(task="svhn", data__train_split="train_val") == ("svhn", 10, 1000)
  assert numbers(task="vtab") == ("sun397", 397, 800)
  assert numbers(task="hta_gtsrb", data__subset="insvp_release")[1:] == (43, 21312)
  assert numbers(task="digits")[1] == 10
  assert numbers(task="svhn", plan__num_classes=7) == ("svhn", 7, 800)
  assert numbers(task="folder", **COUNTS) == ("folder", 3, SPLITS["train"])


def test_a_plan_for_images_that_are_not_there_says_how_to_do_without(tmp_path):
  with pytest.raises(FileNotFoundError, match="config.plan.num_classes and"):
    numbers(task="folder", data__root=str(tmp_path / "none"))


def test_more_devices_than_there_are_need_a_new_process():
  assert plan.find_devices(0) == jax.devices()
  with pytest.raises(
    ValueError, match="plan for 64 devices needs a process of its own"
  ):
    plan.find_devices(64)


def test_a_plan_is_told_in_powers_of_1024():
  step = {"batch": 512, "temporaries": 3 * 2**20, "total": 5 * 2**30}
  found = {
    **dict.fromkeys(("task", "method", "backbone"), "x"),
    **dict.fromkeys(("image_size", "num_classes", "num_train", "batch_size"), 8),
    **{"eval_batch_size": 8, "devices": 4, "fsdp": 2, "params": 10**9},
    "microbatch_size": 4,
    **{"planned_on": "cpu", "scan": False, "remat": False},
    "dtypes": ["bfloat16", "float32"],
    "arrays": dict.fromkeys(
      ("frozen", "trainable", "optimizer", "training_images"), 1536
    )
    | {"training_features": 0},
    "train_step": step,
    "eval_step": step,
    "checkpoint": {"adapter": 2**42, "optimizer": 2**53},
    "flops": 8 * 10**12,
  }
  text = plan.format_plan(found)
  lines = [" ".join(line.split()) for line in text.splitlines()]
  assert "one batch 512 B 512 B" in lines
  assert "4 x cpu, fsdp 2; batches of 8 to train (4 at once) and 8 to evaluate" in lines
  assert "frozen parameters 1.50 KiB 1.50 KiB" in lines
  assert "all 5.00 GiB 5.00 GiB" in lines
  assert "checkpoint: adapter 4.00 TiB, optimizer 8192.00 TiB" in lines
  assert "a train step: 8 TFLOP, 2 on each device" in lines
  assert "unrolled" in text and "bfloat16" in text
  assert "training images 1.50 KiB 1.50 KiB" in lines
  found |= {"planned_on": "H100"}
  assert "unrolled" not in plan.format_plan(found)


def test_the_largest_vit_is_planned_without_room_for_it(root, tmp_path):
  argv = [sys.executable, "-m", "insvp_jax.main", "--plan=8", f"--workdir={tmp_path}"]
  argv += [f"--config={root / 'configs' / 'vtab.py'}:task=cifar100"]
  options = {
    "image_size": 518,
    "batch_size": 8,
    "eval_batch_size": 8,
    "backbone.name": "g/14",
    "backbone.scan": True,
    "backbone.remat": True,
    "backbone.fsdp": 8,
  }
  argv += [f"--config.{name}={value}" for name, value in options.items()]
  # Linux counts the memory of the process that starts a program as that program's, so
  # a small one stands between this one and the planning.
  code = (
    "import resource, subprocess, sys\n"
    "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, *argv],
    cwd=root,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  found = json.loads((tmp_path / "plan.json").read_text())["insvp"]
  parameters = 4 * found["params"]
  assert found["params"] > 1e9
  peak = 1024 * int(done.stdout)  # of the planning process, in bytes
  assert peak < parameters / 3
  assert found["arrays"]["frozen"] < parameters / 7
  assert found["train_step"]["total"] < 0.6 * parameters


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({}, 800),
    ({"data__shots": 4}, 40),
    ({"data__fraction": 0.1}, 80),
    ({"data__fraction": 1e-6}, 10),
  ],
)
def test_a_plan_counts_the_training_images_that_are_used(changes, expected):
  config = tiny_config("linear", task="svhn", **changes)
  assert plan._task_sizes(config) == ("svhn", 10, expected)
