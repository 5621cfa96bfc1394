"""HTA: the ten data sets of the InsVP and DAM-VP tables.

  python -m insvp_jax.main --config=configs/hta.py:task=cifar100 \
      --config.data.data_dir=/path/to/tensorflow_datasets
  python -m insvp_jax.main --config=configs/hta.py:task=cifar100,subset=insvp_release

`task` is dtd, cub, nabirds, stanford_dogs, oxford_flowers, food101, cifar100, cifar10,
gtsrb, svhn, or all. With `subset=official` (the default) lr and wd are chosen on val
and the final model sees every official training image. `subset=insvp_release` trains
once, on the images and with the recipe of InsVP's published scripts: the release
preset of the method, per-data-set lr, wd, prompt length and SimAM, mixup, cutmix and
label smoothing, warm-up over a fifth of the steps, seed 3407. (The scripts report the
best test epoch; here it is the last one.)
"""

from insvp_jax.config import parse_arg, published, select

# (lr, wd, prompt length, SimAM) of InsVP's published scripts.
_RELEASE = {
  "dtd": (1e-3, 0.5, 16, False),
  "cub": (7e-4, 0.002, 9, True),
  "nabirds": (5e-3, 0.002, 16, False),
  "stanford_dogs": (5e-4, 0.005, 16, True),
  "oxford_flowers": (1e-3, 1.0, 16, False),
  "food101": (5e-4, 0.001, 16, False),
  "cifar100": (3e-3, 0.0005, 20, False),
  "cifar10": (2e-3, 0.001, 16, False),
  "gtsrb": (2e-3, 0.07, 16, False),
  "svhn": (4e-3, 0.001, 16, True),
}


def get_config(arg=""):
  arg = parse_arg(arg, task="cifar100", subset="official")
  task, subset = arg["task"].removeprefix("hta_"), arg["subset"]
  config = published()
  config.task = "hta" if task in ("all", "hta") else f"hta_{task}"
  config.data.preset = "insvp_release"
  config.data.subset = subset
  config.loss.label_smoothing = 0.1
  config.loss.mixup_alpha = 0.8
  config.loss.cutmix_alpha = 1.0
  # 20% of the steps, whatever `--warmup_epochs` of the scripts says.
  config.optim.warmup_epochs = 20.0
  if subset == "insvp_release":
    _release(config, task)
  else:
    config.tune.seeds = (0, 1, 2)
  return select(config, arg)


def _release(config, task):
  config.tune.lr = config.tune.wd = ()
  if task not in _RELEASE:
    raise ValueError(
      f"subset=insvp_release has a recipe of its own for each task; task is {task!r}, "
      f"expected one of {', '.join(_RELEASE)}."
    )
  config.optim.lr, config.optim.wd, length, simam = _RELEASE[task]
  config.insvp.preset = "release"
  config.insvp.prompt_length = length
  config.insvp.simam = simam
  config.insvp.specific_kernels = (9, 5, 3) if task == "cub" else (7, 9, 3)
  config.seed = 3407
