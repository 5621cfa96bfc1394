"""Two real processes that segment: the same run as one with as many devices."""

import json

from joined_processes import run_together
import numpy as np
import pytest
from segment_fixtures import CLASSES, segment_config, write_shapes
from tiny_runs import make_params
from tiny_training import metrics, stored

from insvp_jax import trees
from insvp_jax.models import weights
from insvp_jax.models.classifier import create_model
from insvp_jax.train import program, trainer

PROCESS = """
import json, sys
sys.path[:0] = ["tests", "tests/distributed"]
import jax
jax.config.update("jax_num_cpu_devices", 2)
from jax.experimental import multihost_utils
from insvp_jax.distributed import processes
assert processes.initialize_distributed() is True
# Gloo waits for half a minute at the first collective, and one may compile for longer.
multihost_utils.sync_global_devices("ready")
from insvp_jax.train import trainer
from test_segmenting import create
result = trainer.train(create({root!r}), {workdir!r})
print(json.dumps(result))
"""


def create(root):
  """Returns the config of a run with an evaluation on the way."""
  changes = {"segment__batch_size": 3, "segment__flips": True}
  # A drawn one would be drawn in each process.
  changes["backbone__weights"] = f"{root}/backbone.npz"
  config = segment_config(root, "linear", eval_every_epochs=1.0, **changes)
  config.data.preset = "vtab"
  return config


@pytest.mark.slow
def test_two_processes_segment_as_one_with_as_many_devices(tmp_path):
  root = write_shapes(tmp_path / "shapes")
  one, two = tmp_path / "one", tmp_path / "two"
  model = create_model(**program.model_kwargs(create(root), len(CLASSES)))
  weights.save_backbone(make_params(model)["backbone"], root / "backbone.npz")
  expected = trainer.train(create(root), one)
  code = PROCESS.format(root=str(root), workdir=str(two))
  results = [json.loads(line) for line in run_together(code)]
  for result in results:
    assert result["devices"] == expected["devices"] == 4
    for key in ("val_miou", "test_miou"):
      assert result[key] == pytest.approx(expected[key], abs=0.01)
  rows = metrics(one), metrics(two)
  assert "val_loss" in rows[0][2] and len(rows[0]) == len(rows[1])
  for here, there in zip(*rows, strict=True):
    assert here.keys() == there.keys() and here["step"] == there["step"]
    for key in here.keys() & {"loss", "val_loss", "grad_norm"}:
      assert here[key] == pytest.approx(there[key], rel=1e-3), key
  adapters = [trees.flatten(stored(w)[3]["adapter"]) for w in (one, two)]
  assert adapters[0].keys() == adapters[1].keys()
  for name, leaf in adapters[0].items():
    other = adapters[1][name]
    np.testing.assert_allclose(leaf, other, rtol=2e-3, atol=1e-4, err_msg=name)
