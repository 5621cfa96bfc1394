"""VTAB-1k: choose on val200, retrain on all 1,000 images, report test.

  python -m insvp_jax.main --config=configs/vtab.py:task=cifar100 \
      --config.data.data_dir=/path/to/tensorflow_datasets

ViT-B/16 pre-trained on ImageNet-21k (`vit_b16_i21k`, downloaded on first use), the
`vtab` preset, InsVP. Another method: --config.method=vpt_deep; several side by side:
--config.tune.methods="('insvp', 'vpt_deep', 'linear')".
"""

from insvp_jax.config import defaults, parse_arg


def get_config(arg=""):
  config = defaults()
  config.task = parse_arg(arg, task="cifar100")["task"]
  config.backbone.name = "vit_b16_i21k"
  config.image_size = 224
  config.batch_size = 64
  config.total_epochs = 100.0
  config.optim.warmup_epochs = 10.0
  config.data.preset = "vtab"
  config.tune.lr = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
  config.tune.wd = (1e-4, 1e-2)
  # The seeds of VPT's protocol.
  config.tune.seeds = (42, 44, 82, 100, 800)
  return config
