"""A method from outside the package, as docs/extending.md makes one."""

import re

import numpy as np
import pytest
from tiny_training import SIZE, make_data, tiny_config

import insvp_jax
from insvp_jax import config as config_lib
from insvp_jax.methods import METHODS, Method, register
from insvp_jax.methods.fields import field
from insvp_jax.train import trainer

# None of this is about devices, and for one all compiles sooner.
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(autouse=True)
def _registered():
  """Methods that a test registers are gone afterwards."""
  before = dict(METHODS)
  yield
  METHODS.clear()
  METHODS.update(before)


def test_the_documented_method_trains_and_is_loaded(root, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(trainer, "load_data", lambda *_: make_data())
  text = (root / "docs" / "extending.md").read_text()
  define, use, name = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  assert len([line for line in define.splitlines() if line]) <= 21
  names = {"__name__": "notebook"}
  exec(define, names)
  monkeypatch.setattr(config_lib, "defaults", lambda: tiny_config())
  exec(use, names)
  exec(name, names)
  assert config_lib.method_kwargs(names["config"]) == {"start": 0.9}
  run = names["run"]
  gates = run.params["prompter"]
  assert {n: leaf.shape for n, leaf in gates.items()} == {
    "attn": (2, 16),
    "mlp": (2, 16),
  }
  assert all(np.abs(leaf - 1).max() > 0 for leaf in gates.values())
  assert run.predict(np.zeros((SIZE, SIZE, 3), np.uint8)).shape == (1, 3)
  # The backbone in the box has other sizes.
  assert names["model"].prompter.spec.depth != 2
  # Without the class nobody knows what it was.
  METHODS.pop("gates")
  with pytest.raises(ValueError, match=r"method 'gates', .* load_run\(..., method="):
    insvp_jax.load_run("runs/gates")


def test_a_registered_method_has_its_section_and_no_second_one_its_name():
  class Tint(Method):
    strength: float | int = field(0.5, "how much", hparam=True)

  assert register(Tint) == "tint"
  config = config_lib.defaults()
  config.method = "tint"
  config.tint.strength = 0.25
  assert config_lib.method_kwargs(config) == {"strength": 0.25}
  assert "strength" in config.tune.grid
  assert register(Tint) == "tint"
  other = type("Tint", (Method,), {"__module__": "elsewhere"})
  with pytest.raises(ValueError, match="there is a method 'tint' already"):
    register(other)
