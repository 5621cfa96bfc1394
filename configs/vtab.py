"""VTAB-1k: choose on val200, retrain on all 1,000 images, report test.

  python -m insvp_jax.main --config=configs/vtab.py:svhn \
      --config.data.data_dir=/path/to/tensorflow_datasets

  python -m insvp_jax.main --mode=tune --config=configs/vtab.py:task=svhn,method=insvp

The second line does the same. With --config.tune.lr='()' --config.tune.wd='()' it tries
the method's own grid in place of these; VPT's is one for SGD:
--config.optim.name=sgd --config.optim.schedule=cosine_epochwise. Trials train together
where the device gains by it: --config.tune.population=1 trains them one by one.

`task` is one of the 19, or natural, specialized, structured or all: one run per task
and one table. `method` is one of insvp, vpt_deep, linear, ...; several side by side:
--config.tune.methods="('insvp', 'vpt_deep', 'linear')".

The images come from TFDS (`python -m insvp_jax.tools.prepare_data --task=svhn`), or
from folders in NOAH's form: --config.data.root=/path/to/vtab-1k.

ViT-B/16 pre-trained on ImageNet-21k (`vit_b16_i21k`, downloaded on first use) and the
`vtab` preset. VPT's papers normalise by ImageNet's mean: --config.data.preset=vpt.
"""

from insvp_jax.config import parse_arg, published, select


def get_config(arg=""):
  arg = parse_arg(arg, task="cifar100")
  config = published()
  config.task = {"all": "vtab"}.get(arg["task"], arg["task"])
  config.data.preset = "vtab"
  # The seeds of VPT's protocol.
  config.tune.seeds = (42, 44, 82, 100, 800)
  return select(config, arg)
