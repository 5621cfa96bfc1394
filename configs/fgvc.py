"""FGVC: five fine-grained tasks, choose on val, report test.

  python -m insvp_jax.main --config=configs/fgvc.py:cub,root=/path/to/CUB_200_2011

`task` is cub, nabirds, oxford_flowers, stanford_dogs, stanford_cars, or all. The
training images are those of VPT's train.json and val.json: beside the images
(`data.root`), or in a folder of their own (`data.lists`) with the images from TFDS
(`data.data_dir`; cub and stanford_dogs). Without the lists, --config.data.subset=drawn
draws as many of each class; oxford_flowers needs neither.

As in VPT the final model is trained on train alone. Images: shorter side to 256,
random crop of 224 and flip; centre crop in evaluation; ImageNet's mean.
"""

from insvp_jax.config import parse_arg, published, select


def get_config(arg=""):
  arg = parse_arg(arg, task="cub")
  config = published()
  task = arg["task"].removeprefix("fgvc_")
  config.task = "fgvc" if task in ("all", "fgvc") else f"fgvc_{task}"
  config.data.preset = "insvp_release"
  config.tune.seeds = (42, 44, 82, 100, 800)
  return select(config, arg)
