"""CIFAR-100-LT: training sets with a long tail, the balanced test set.

  python -m insvp_jax.main --config=configs/cifar100_lt.py:imbalance=100 \
      --config.data.data_dir=/path/to/tensorflow_datasets

`imbalance` (largest over smallest class) is 10, 50, 100 or all. The images are those
of the standard selection: 19,573, 12,608 or 10,847. A tenth of them, drawn class by
class, chooses lr and wd; the final model is trained on all of them.

Results have the accuracy of the classes with many (more than 100), medium and few
(fewer than 20) training images, too. `imbalance=all` makes a table of error rates at
10, 50 and 100, as papers report them, and one of these groups. Methods side by side:

  python -m insvp_jax.main --config=configs/cifar100_lt.py:imbalance=all \
      --config.tune.methods="('vpt_deep', 'lion', 'insvp')"
"""

from insvp_jax.config import parse_arg, published, select


def get_config(arg=""):
  arg = parse_arg(arg, imbalance="100")
  config = published()
  imbalance = "" if arg["imbalance"] == "all" else arg["imbalance"]
  config.task = arg["task"] or f"cifar100_lt{imbalance}"
  config.data.preset = "insvp_release"
  config.tune.seeds = (0, 1, 2)
  return select(config, arg)
