from insvp_jax import config as config_lib
from insvp_jax.models.classifier import create_model
from insvp_jax.train import state


def test_what_was_loaded_is_reported_in_one_line():
  config = config_lib.defaults()
  config.backbone.name = "boxed"
  model = create_model(backbone="boxed", method="linear", num_classes=2)
  lines = []
  weights, identity = state.load_weights(config, model, lines.append)
  assert identity["id"] == "boxed" and "embedding" in weights
  (line,) = lines
  assert line.startswith("backbone boxed: ") and "\n" not in line
  assert " parameters, from /" in line and "boxed.npz (big_vision's names" in line
  config.backbone.weights = "random"
  state.load_weights(config, model, lines.append)
  assert len(lines) == 1
