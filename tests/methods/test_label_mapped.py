"""ILM-VP and AutoVP: the frame, the scale, and mappings that live with the run."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import (
  CLASSES,
  SIZE,
  at_step,
  make_data,
  prepare,
  stop_by,
  stored,
  tiny_config,
)

from insvp_jax import trees
from insvp_jax.distributed.stopping import Stopped
from insvp_jax.methods import BackboneSpec, create_method
from insvp_jax.methods.ops import frame, label_mapping
from insvp_jax.run import load_run
from insvp_jax.train import trainer
from insvp_jax.train.program import input_size

SPEC = BackboneSpec(
  *(8, 1, 16, 1),
  **{"patch_size": 4, "image_size": 16, "head_classes": 6},
  **{"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)},
)


def config_of(method, **fields):
  """Returns a config whose images are framed by four pixels on each side."""
  config = tiny_config(method, image_size=SIZE + 8, backbone__head_classes=7)
  config[method].update(inner_size=SIZE, **fields)
  return config


@pytest.mark.parametrize("inner", [8, 9])
def test_the_frame_lies_around_the_image_in_pixels(inner):
  method = create_method("ilm_vp", SPEC, 2, inner_size=inner)
  mean, std = np.float32(SPEC.mean), np.float32(SPEC.std)
  pixels = np.random.default_rng(0).random((2, inner, inner, 3), np.float32)

  @jax.jit
  def prompt(images):
    key = jax.random.key(0)
    return method.init_with_output(key, images, method="prompt_image")

  prompted, variables = jax.device_get(prompt((pixels - mean) / std))
  assert variables["params"]["delta"].shape == (16, 16, 3)
  prompted, start = prompted * std + mean, (16 - inner + 1) // 2
  inside = prompted[:, start : start + inner, start : start + inner]
  np.testing.assert_allclose(inside, pixels, atol=1e-6)
  # Grey at the start.
  np.testing.assert_allclose(prompted[:, :start], 0.5, atol=1e-6)
  np.testing.assert_allclose(prompted[:, :, start + inner :], 0.5, atol=1e-6)


def test_an_image_that_is_not_scaled_is_padded():
  images = np.random.default_rng(0).standard_normal((2, 7, 7, 3), np.float32)
  padded = np.asarray(jax.jit(frame.pad, static_argnums=1)(images, 12))
  assert not padded[:, :3].any() and not padded[:, 10:].any()
  scaled = jax.jit(frame.pad_scaled, static_argnums=1)(images, 12, np.float32(1))
  np.testing.assert_array_equal(scaled, padded)


def test_the_scale_stays_within_its_bounds():
  method = create_method("autovp", SPEC, 2, inner_size=8)
  params = {"prompter/scale": jnp.float32(4.5)}
  for update, expected in ((0.2, 0.2), (3.0, 0.5), (-9.0, -4.4)):
    updates = {"prompter/scale": jnp.float32(update)}
    adjusted = method.adjust_updates(updates, params=params, grads={}, lr=1.0)
    np.testing.assert_allclose(adjusted["prompter/scale"], expected, rtol=1e-5)


def counted(run):
  """Returns the mapping of what a run takes its training images for."""
  data = make_data().splits["train"]

  @jax.jit
  def source_logits(params, images):
    return run.model.apply({"params": params}, images, method="source_logits")

  logits = source_logits(run.params, run.preprocess(data.images))
  predictions = np.argmax(jax.device_get(logits), axis=-1)
  counts = label_mapping.count_predictions(predictions, data.labels, 7, len(CLASSES))
  return label_mapping.greedy_mapping(counts)


def test_a_mapping_is_counted_each_epoch_and_survives_a_stop(monkeypatch, tmp_path):
  config = config_of("ilm_vp")
  config.optim.name, config.optim.lr = "sgd", 30.0
  config.steps_per_call = 1
  mappings = []
  original = trainer.refresh_state

  def refresh_state(*args):
    state = original(*args)
    mappings.append(np.asarray(state.params["prompter"]["label_mapping"]))
    return state

  monkeypatch.setattr(trainer, "refresh_state", refresh_state)
  prepared = prepare(config)
  trainer.train(config, tmp_path / "whole", prepared=prepared)
  assert len(mappings) == 2 and not np.array_equal(*mappings)
  adapter = stored(tmp_path / "whole")[3]["adapter"]
  assert not any(name.startswith("head/") for name in adapter)
  np.testing.assert_array_equal(adapter["prompter/label_mapping"], mappings[1])
  for step in (2, 3):
    workdir = tmp_path / f"stopped{step}"
    with monkeypatch.context() as patch:
      at_step(patch, step, stop_by(signal.SIGTERM))
      with pytest.raises(Stopped):
        trainer.train(config, workdir, prepared=prepared)
    trainer.train(config, workdir, prepared=prepared)
    resumed = trees.flatten(stored(workdir)[3])
    for name, leaf in trees.flatten(stored(tmp_path / "whole")[3]).items():
      assert np.asarray(leaf).tobytes() == np.asarray(resumed[name]).tobytes(), name

  run = load_run(tmp_path / "whole")
  assert run.predict(make_data().splits["test"].images).shape == (13, len(CLASSES))
  # Of any size; and the frame is there.
  assert run.prompted(np.zeros((1, 30, 20, 3), np.uint8)).shape == (1, 24, 24, 3)


def test_a_frequency_is_counted_once_of_the_parameters_at_the_start(tmp_path):
  config = config_of("autovp", mapping="frequency", resize=False)
  config.optim.lr, config.total_epochs = 0.0, 1.0
  trainer.train(config, tmp_path, prepared=prepare(config))
  run = load_run(tmp_path)
  mapping = np.asarray(run.params["prompter"]["label_mapping"])
  np.testing.assert_array_equal(mapping, counted(run))


def test_classes_are_mapped_by_their_embeddings(tmp_path):
  rng = np.random.default_rng(0)
  source = rng.normal(size=(7, 5)).astype(np.float32)
  wanted = np.asarray([4, 1, 6])
  path = tmp_path / "embeddings.npz"
  np.savez(path, source=source, target=2 * source[wanted])
  config = config_of("autovp", mapping="semantic", embeddings=str(path), resize=False)
  prepared = prepare(config)
  params = prepared.prepare_params(config, prepared.first_params(config))
  np.testing.assert_array_equal(params["prompter"]["label_mapping"][:, 0], wanted)

  np.savez(path, source=source[1:], target=source[wanted])
  with pytest.raises(ValueError, match="of 6 source and 3 target classes, expected 7"):
    prepared.prepare_params(config, prepared.first_params(config))


def test_methods_whose_images_differ_in_size_do_not_share_data(monkeypatch):
  sizes = []

  def load_data(task, data_config, image_size):
    sizes.append(image_size)
    return make_data()

  monkeypatch.setattr(trainer, "load_data", load_data)
  config = tiny_config("linear", image_size=SIZE + 8, backbone__head_classes=7)
  first = trainer.prepare(config)
  framed = config_of("ilm_vp")
  assert input_size(framed) == SIZE
  second = trainer.prepare(framed, like=first)
  framed.ilm_vp.mapping = "fixed"
  third = trainer.prepare(framed, like=second)
  assert sizes == [SIZE + 8, SIZE]
  assert third.data is second.data is not first.data


@pytest.mark.parametrize(
  ("method", "fields", "message"),
  [
    ("ilm_vp", {"inner_size": 17}, "expected an integer from 1 to 16"),
    ("ilm_vp", {"mapping": "full"}, "expected one of 'iterative'"),
    ("autovp", {"mapping": "semantic"}, "set embeddings to an .npz file"),
    ("autovp", {"scale_init": 0.05}, "expected a number from 0.1 to 5.0"),
    (
      "autovp",
      {"mapping": "fixed", "sources_per_target": 4},
      "need 8 of them, but the backbone's head has 6",
    ),
    ("ilm_vp+vp", {}, "images of a size of its own"),
    ("ilm_vp+autovp", {}, "both have their own input size"),
  ],
)
def test_what_does_not_fit_is_refused(method, fields, message):
  with pytest.raises(ValueError, match=message):
    create_method(method, SPEC, 2, **fields)
