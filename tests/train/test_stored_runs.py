"""Runs that version 0.1.0 left half done load, and go on to the end that they had.

`stored_runs.zip` has two runs of `tiny_config`, each stopped by SIGTERM at step 4, the
backbone's file, and the adapters that the same runs had ended with when nothing stopped
them. Both have what later versions left out: a head wider than its classes (adamw), a
count of updates for the schedule, and frozen prompters in bfloat16 (sgd).
"""

import zipfile

import numpy as np
import pytest
from tiny_training import make_data, prepare, stored, tiny_config

from insvp_jax import trees
from insvp_jax.run import load_run
from insvp_jax.train.trainer import train

SETTINGS = {
  "adamw": {"optim__grad_clip_norm": 1.0, "optim__warmup_epochs": 0.5},
  "sgd": {
    "insvp__preset": "release",
    "backbone__frozen_dtype": "bfloat16",
    "optim__name": "sgd",
    "optim__nesterov": True,
    "optim__accumulate_steps": 2,
    "optim__lr_scale_by_batch": 16,
    "optim__schedule": "cosine_epochwise",
    "optim__warmup_epochs": 1.0,
    "total_epochs": 3.0,
  },
}
EVERY = {"eval_every_epochs": 1 / 3, "checkpoint_every_epochs": 2 / 3}


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
  folder = tmp_path_factory.mktemp("stored")
  with zipfile.ZipFile(root / "tests" / "train" / "stored_runs.zip") as file:
    file.extractall(folder)
  return folder


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_run_of_version_0_1_goes_on_to_the_end_that_it_had(folder, name):
  workdir, backbone = folder / name, folder / "backbone.npz"
  config = tiny_config("insvp", **EVERY, **SETTINGS[name])
  config.backbone.weights = str(backbone)
  before = load_run(workdir, backbone=backbone)
  probabilities = before.predict(make_data().splits["test"].images)
  np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
  train(config, workdir, prepared=prepare(config))
  _, _, _, arrays = stored(workdir)
  with np.load(folder / f"{name}_expected.npz") as expected:
    assert set(expected.files) == set(arrays["adapter"])
    start = trees.flatten(before.params)
    moved = 0.0
    for leaf_name in expected.files:
      leaf = np.asarray(arrays["adapter"][leaf_name], np.float32)
      # AdamW makes steps of the size of lr = 0.01 out of gradients that are nearly 0:
      # another processor or compiler moves some leaves by 4e-4.
      np.testing.assert_allclose(
        leaf, expected[leaf_name], rtol=1e-2, atol=1e-3, err_msg=leaf_name
      )
      first = np.asarray(start[leaf_name], np.float32)
      moved = max(moved, float(np.abs(leaf - first).max()))
  # What is compared is more than where the run stood.
  assert moved > 5e-3
