"""A batch in parts is the same step, with less memory."""

import types

from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
from tiny_runs import draw_backbone
from tiny_training import prepare, tiny_config

from insvp_jax import run, trees
from insvp_jax.models.classifier import create_backbone
from insvp_jax.train import batches, microbatch, report
from insvp_jax.train import program as program_lib

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def of_a_step(size, method, devices=1, **changes):
  """Returns (trainable parameters, metrics) after a step on one batch."""
  changes = {"optim__name": "sgd", "optim__warmup_epochs": 0.0, **changes}
  config = tiny_config(method, microbatch_size=size, **changes)
  prepared = prepare(config, devices=devices)
  program, split = prepared.program, prepared.data.splits["train"]
  weights = draw_backbone(program.shapes["backbone"])
  params = {**prepared.first_params(config), "backbone": weights}
  state = program_lib.create_state(config, program, params)
  batch = {"images": split.images[:8], "labels": split.labels[:8]}
  state, found = program.train_step(state, batch)
  trainable, _ = trees.split(state.params, program.mask)
  return jax.device_get((trainable, found))


def assert_alike(mine, theirs):
  for here, there in zip(mine, theirs, strict=True):
    assert here.keys() == there.keys()
    for name, value in there.items():
      np.testing.assert_allclose(here[name], value, err_msg=name, **CLOSE)


@pytest.mark.parametrize(
  "method, changes",
  [
    (
      "insvp",
      {"insvp__dropout": 0.0, "loss__mixup_alpha": 1.0, "loss__mix_prob": 1.0},
    ),
    # It has measures.
    ("gated", {"gated__dropout": 0.0, "loss__class_weights": True}),
    # It has a loss of its own.
    ("transhp", {}),
  ],
)
def test_a_step_in_parts_is_the_step_of_the_whole_batch(method, changes):
  assert_alike(of_a_step(2, method, **changes), of_a_step(8, method, **changes))


def test_parts_draw_alike_on_any_number_of_devices():
  changes = {"vpt_deep__dropout": 0.5, "backbone__depth": 1}
  one = of_a_step(4, "vpt_deep", **changes)
  assert_alike(of_a_step(4, "vpt_deep", devices=4, **changes), one)
  # Each part has draws of its own: they are not those of the whole batch.
  whole = of_a_step(8, "vpt_deep", **changes)
  assert one[1]["loss"] != pytest.approx(whole[1]["loss"], rel=1e-4)


def test_a_part_needs_less_memory_than_the_whole():
  def temporaries(size):
    changes = {"batch_size": 16, "backbone__mlp_dim": 512}
    config = tiny_config("vpt_deep", microbatch_size=size, **changes)
    program = prepare(config).program
    state = program_lib.abstract_state(config, program)
    batch = batches.abstract_batch(config, program, 16, train=True)
    compiled = program.train_step.trace(state, batch).lower().compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(2) < 0.4 * temporaries(16)


def parts_of(batch_size, size=0, *, devices=1, platform="cpu", needs_whole=False):
  config = tiny_config(batch_size=batch_size, microbatch_size=size)
  device = types.SimpleNamespace(platform=platform)
  mesh = types.SimpleNamespace(size=devices, devices=np.array([device] * devices))
  spec = create_backbone("B/16", 224).spec
  return microbatch.num_parts(config, spec, mesh, needs_whole=needs_whole)


def test_a_cpu_alone_computes_in_parts_by_itself(unchecked):
  assert parts_of(64) == 16 and parts_of(20) == 4 and parts_of(14) == 2
  # A prime number of images has no parts but single ones, which are slower.
  assert parts_of(13) == parts_of(6) == parts_of(1) == 1
  assert parts_of(64, devices=4) == parts_of(64, platform="gpu") == 1
  assert parts_of(64, needs_whole=True) == 1
  assert parts_of(64, 16, devices=4, platform="gpu") == 4
  assert parts_of(64, 64) == parts_of(64, 100) == 1


@pytest.mark.parametrize(
  "size, devices, needs_whole, expected",
  [
    (6, 1, False, r"6, which does not divide batches of 16 evenly; .*, 1, 2, 4, 8\."),
    (2, 4, False, r"2, which .* batches of 16 on 4 devices evenly; .*, 4, 8\."),
    (2, 16, False, r"expected 0 \(automatic\)\."),
    (4, 1, True, "such as BatchNorm's, from the whole batch; expected 0"),
  ],
)
def test_parts_that_would_not_be_equal_are_refused(
  unchecked, size, devices, needs_whole, expected
):
  with pytest.raises(ValueError, match=expected):
    parts_of(16, size, devices=devices, needs_whole=needs_whole)


def test_a_head_with_batch_norm_takes_whole_batches():
  hidden = {"mlp__hidden_layers": 1, "cache_features": False}
  with pytest.raises(ValueError, match="sets parameters without a gradient"):
    prepare(tiny_config("mlp", microbatch_size=4, **hidden))
  assert prepare(tiny_config("mlp", **hidden)).program


@given(batch_size=st.integers(1, 500), size=st.integers(0, 500))
def test_parts_are_equal_and_not_far_from_what_is_wanted(batch_size, size):
  wanted = size or 10
  found = microbatch._nearest_divisor(batch_size, wanted)
  assert batch_size % found == 0
  for other in (1, batch_size):
    assert max(found / wanted, wanted / found) <= max(other / wanted, wanted / other)


@pytest.mark.parametrize(
  "backbone, image_size, expected",
  [("B/16", 224, 5), ("S/14", 224, 4), ("mu/4", 32, 16), ("g/14", 518, 1)]
  + [("swin_t", 224, 5), ("resnet50", 224, 5), ("mu/4", 4, 1024)],
)
def test_how_many_images_a_cpu_computes_at_once(backbone, image_size, expected):
  assert microbatch.images_at_once(create_backbone(backbone, image_size).spec) == (
    expected
  )


def test_evaluation_takes_few_images_at_once_on_a_cpu():
  config = tiny_config("linear", image_size=64, eval_batch_size=0)
  program = prepare(config).program
  assert batches.eval_batch_size(config, program, 1000) == 4
  # Features are small.
  assert batches.eval_batch_size(config, program, 1000, of_features=True) == 256
  config.eval_batch_size = 100
  assert batches.eval_batch_size(config, program, 1000) == 100


@pytest.mark.parametrize(
  "size, words", [(2, "8 images (2 at once), lr"), (8, "8 images, lr")]
)
def test_a_run_says_how_many_images_it_computes_at_once(size, words):
  config = tiny_config(microbatch_size=size)
  prepared = prepare(config)
  assert words in report.run_text(config, prepared.program, prepared.data)


@pytest.mark.parametrize(
  "platform, backbone, image_size, expected",
  [("cpu", "mu/4", 16, [1, 8, 32]), ("cpu", "B/16", 224, [1, 8])]
  + [("gpu", "B/16", 224, [1, 8, 32])],
)
def test_a_loaded_run_takes_few_images_at_once_on_a_cpu(
  platform, backbone, image_size, expected
):
  model = types.SimpleNamespace(backbone=create_backbone(backbone, image_size))
  loaded = types.SimpleNamespace(_platform=platform, model=model)
  assert run.Run._batch_sizes(loaded) == expected
