"""Adapts a backbone to your own images: a folder or a .zip.

  python -m insvp_jax.main --config=configs/folder.py:root=photos.zip

The images lie in train/<class>/, and optionally val/<class>/ and test/<class>/.
Without these the splits are drawn from train: stratified, seeded, stored with the
run. InsVP, VPT-Deep and a linear head each choose their lr on val, are trained
again on train + val with three seeds, and are reported on test. InsVP is its preset
`tuned` (docs/insvp.md); --config.insvp.preset=paper is its paper's equations.

Where a CSV says what the images are of: --config.data.labels=labels.csv besides the
root, or in place of it.

One method: --config=configs/folder.py:root=photos.zip,method=insvp. One run of it, with
nothing to choose: --mode=train --config.optim.lr=0.003 besides.
"""

from insvp_jax.config import defaults, parse_arg, select


def get_config(arg=""):
  arg = parse_arg(arg, task="folder")
  config = defaults()
  config.task = arg["task"]
  config.backbone.name = "boxed"
  config.batch_size = 0  # 32, or less where there are few images
  config.total_epochs = 20.0
  config.optim.wd = 1e-4
  config.optim.warmup_epochs = 2.0
  config.insvp.preset = "tuned"
  config.vpt_deep.prompt_length = 9
  config.tune.methods = ("insvp", "vpt_deep", "linear")
  config.tune.lr = (3e-3, 1e-2)
  config.tune.seeds = (0, 1, 2)
  config.prompt_images = 6
  return select(config, arg)
