"""Compares every method on your own images, as far as a laptop can.

  python -m insvp_jax.main --config=configs/methods.py:root=photos.zip

The images lie as for configs/folder.py. Each method chooses its lr on val between the
two that an audit of 14 methods tuned over, and is trained again on train + val with
three seeds. Methods with prompts have 9 of them, as in InsVP's paper; all else is
each method's default. 3 epochs in batches of 16 are few: the papers train for 100.

Fewer methods: --config.tune.methods="('insvp', 'lora', 'vpt_deep+bias')".
"""

from insvp_jax.config import METHODS, defaults, parse_arg, select


def get_config(arg=""):
  arg = parse_arg(arg, task="folder")
  config = defaults()
  config.task = arg["task"]
  config.backbone.name = "boxed"
  config.batch_size = 16
  config.total_epochs = 3.0
  config.optim.wd = 1e-4
  config.optim.warmup_epochs = 0.3
  for method in ("vpt_shallow", "vpt_deep", "vfpt", "vapt", "gated"):
    config[method].prompt_length = 9
  # These need as many source classes as there are classes, and boxed has ten.
  config.tune.methods = tuple(m for m in METHODS if m not in ("ilm_vp", "autovp"))
  config.tune.lr = (1e-3, 1e-2)
  config.tune.seeds = (0, 1, 2)
  return select(config, arg)
