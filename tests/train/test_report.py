"""What a run says of itself."""

import jax
import jax.numpy as jnp

from insvp_jax import trees
from insvp_jax.train.report import param_overview


def test_overview_marks_what_trains_and_adds_it_up():
  params = {
    "backbone": {"kernel": jnp.zeros((90, 10))},
    "head": {"kernel": jnp.zeros((10, 9)), "bias": jax.ShapeDtypeStruct((10,), "f4")},
  }
  table = param_overview(params, trees.mask(params, ["head/.*"])).splitlines()
  assert table[0].split() == ["name", "shape", "size"]
  assert table[1].split() == ["backbone/kernel", "[90,", "10]", "900"]
  assert table[2].split() == ["head/kernel", "[10,", "9]", "90", "trainable"]
  assert table[-1] == "trainable 100 (10%), frozen 900"
  assert len({line.rfind("]") for line in table[1:2]}) == 1
