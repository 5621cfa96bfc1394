"""Trains the backbone in the box: a small ViT on CIFAR-10, from scratch.

python -m insvp_jax.main --config=configs/pretrain.py:root=path/to/cifar10
"""

from insvp_jax.config import defaults, parse_arg, select


def get_config(arg=""):
  """Returns the configuration."""
  arg = parse_arg(arg, task="cifar10_npz")
  config = defaults()
  config.task = arg["task"]
  config.method = "full"
  config.total_epochs = 15.0
  config.batch_size = 64
  config.backbone.name = "mu/4"
  config.backbone.weights = "random"
  config.backbone.init = "mimetic"
  config.backbone.width = 128
  config.backbone.depth = 6
  config.backbone.mlp_dim = 256
  config.backbone.num_heads = 4
  config.backbone.pool = "gap"
  config.image_size = 32
  config.data.preset = "cifar"
  config.data.train_split = "train_val"
  config.optim.lr = 2e-3
  config.optim.wd = 0.05
  config.optim.b2 = 0.95
  config.optim.warmup_epochs = 1.0
  config.optim.grad_clip_norm = 1.0
  config.loss.label_smoothing = 0.1
  config.checkpoint_every_epochs = 1.0
  config.log_every_steps = 100
  return select(config, arg)
