"""CIFAR-100-LT: training sets with a long tail, the balanced test set.

  python -m insvp_jax.main --config=configs/cifar100_lt.py:imbalance=100 \
      --config.data.data_dir=/path/to/tensorflow_datasets

`imbalance` (largest over smallest class) is 10, 50, 100 or all. The images are those
of the standard selection: 19,573, 12,608 or 10,847. A tenth of them, drawn class by
class, chooses lr and wd; the final model is trained on all of them.
"""

from insvp_jax.config import defaults, parse_arg


def get_config(arg=""):
  arg = parse_arg(arg, imbalance="100", method="insvp")
  config = defaults()
  every = arg["imbalance"] == "all"
  config.task = "cifar100_lt" if every else f"cifar100_lt{arg['imbalance']}"
  config.method = arg["method"]
  config.backbone.name = "vit_b16_i21k"
  config.image_size = 224
  config.batch_size = 64
  config.total_epochs = 100.0
  config.optim.warmup_epochs = 10.0
  config.data.preset = "insvp_release"
  config.tune.lr = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
  config.tune.wd = (1e-4, 1e-2)
  config.tune.seeds = (0, 1, 2)
  return config
