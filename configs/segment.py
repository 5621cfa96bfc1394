"""Segmentation: SETR's head on a frozen ViT, as in VPT's table 3.

  python -m insvp_jax.main --config=configs/segment.py:root=photos.zip,method=vpt_deep

The images lie in images/<split>/, their masks in masks/<split>/; ADE20K is such a
folder as it is unpacked: --config=configs/segment.py:ade20k,root=ADEChallengeData2016
is the published set-up, ViT-L/16 at 512 px for 160,000 steps of 16 crops. Methods of
table 3: linear (the head alone), bias, vpt_deep, vpt_deep+bias and full; or insvp.

Without ":ade20k" it is a short run of the backbone that is given.
"""

from insvp_jax.config import defaults, parse_arg, select


def get_config(arg=""):
  arg = parse_arg(arg, task="segment_folder")
  config = defaults()
  is_published = arg["task"] == "ade20k"
  config.task = "segment_folder" if is_published else arg["task"]
  config.method = "vpt_deep"
  config.backbone.name = "boxed"
  config.batch_size = 0  # 32, or less where there are few images
  config.total_epochs = 20.0
  config.optim.lr = 1e-3
  config.optim.wd = 1e-4
  config.optim.warmup_epochs = 1.0
  config.vpt_deep.prompt_length = 10
  if is_published:
    config.backbone.name = "vit_l16_i21k"
    config.data.reduce_zero_label = True
    # Validation is what published numbers are of: nothing is drawn from train.
    config.data.val_fraction = 0.0
    config.data.test_fraction = 0.0
    config.batch_size = 16
    config.total_epochs = 0.0
    config.total_steps = 160_000
    config.eval_every_epochs = 12.6  # of 20,210 images: about every 16,000 steps
    config.checkpoint_every_epochs = 1.0
    # mmsegmentation's SETR: SGD, polynomial decay, the head ten times as fast. It ends
    # at 1e-4, which is the hundredth part of the head's.
    config.optim.schedule = "polynomial"
    config.optim.end_lr_factor = 0.01
    config.segment.photometric = True
    config.optim.name = "sgd"
    config.optim.lr = 1e-3
    config.optim.head_lr = 1e-2
    config.optim.wd = 0.0
    config.optim.warmup_epochs = 0.0
    config.backbone.dtype = "bfloat16"
    config.backbone.scan = True
  config = select(config, arg)
  if is_published:
    config.image_size = 512
  return config
