"""Adapts the backbone in the box to handwritten digits, three ways side by side.

  python -m insvp_jax.main --config=configs/quickstart.py

Needs nothing but the package: the digits are scikit-learn's, the backbone is
`insvp_jax/assets/boxed.npz`. InsVP is its preset `tuned`. Ends with a table,
runs/quickstart/table.md, and a picture of the prompts,
runs/quickstart/insvp/seed0/prompts.png.
"""

from insvp_jax.config import defaults, parse_arg, select


def get_config(arg=""):
  arg = parse_arg(arg, task="digits")
  config = defaults()
  config.task = arg["task"]
  config.backbone.name = "boxed"
  config.batch_size = 0  # 32, or less where there are few images
  config.total_epochs = 12.0
  config.optim.lr = 1e-2
  config.optim.wd = 1e-4
  config.optim.warmup_epochs = 1.0
  config.insvp.preset = "tuned"
  config.vpt_deep.prompt_length = 9
  config.tune.methods = ("insvp", "linear", "vpt_deep")
  config.tune.seeds = (0,)
  config.prompt_images = 6
  return select(config, arg)
