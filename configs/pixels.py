"""Prompts on the pixels: VP, ILM-VP and AutoVP, as published or with our optimizer.

  python -m insvp_jax.main --config=configs/pixels.py:method=ilm_vp,task=hta_cifar10 \
      --config.data.data_dir=/path/to/tensorflow_datasets

`method` is vp, ilm_vp or autovp. With `published=yes` (the default) there is one run
with the published optimizer: VP with SGD, lr 40, 1,000 epochs, and the backbone's own
classes in place of a head; ILM-VP and AutoVP with Adam and two falls of the lr in 200
epochs. (Their scripts report the best test epoch; here it is the last one.) With
`published=no` it is AdamW with a warm-up and a cosine for 100 epochs, its lr chosen on
val, and three seeds.

`search=yes` chooses AutoVP's size of the image, whether its scale is trained, and the
mapping on val, as its paper does: a grid over its fields, crossed with the lr. With
several source classes of a class the paper's grid is

  --config.tune.fields="(('autovp.inner_size', (64, 128, 192)),
      ('autovp.resize', (False, True)), ('autovp.sources_per_target', (1, 5, 10)),
      ('autovp.mapping', ('frequency', 'iterative')))"

(`semantic` is the fourth mapping: it needs --config.autovp.embeddings.)

The backbone is AugReg's ViT-B/16 with its 21,843 classes; on the one in the box, which
has ten: backbone=boxed.
"""

from insvp_jax.config import parse_arg, published, select

# (optimizer, lr, epochs, schedule, warm-up steps).
_PUBLISHED = {
  "vp": ("sgd", 40.0, 1000.0, "cosine", 1000),
  "ilm_vp": ("adamw", 1e-2, 200.0, "multistep", 0),
  "autovp": ("adamw", 1e-3, 200.0, "multistep", 0),
}
# Classes of the head, and pixels per side, by backbone.
_BACKBONES = {"boxed": (10, 32), "augreg_b16_i21k": (21_843, 224)}


def get_config(arg=""):
  arg = parse_arg(
    arg,
    **{"task": "hta_cifar100", "method": "vp", "published": "yes", "search": "no"},
  )
  for name in ("published", "search"):
    if arg[name] not in ("yes", "no"):
      raise ValueError(f"{name} is {arg[name]!r}, expected yes or no.")
  config = published()
  config.task = arg["task"]
  config.data.preset = "vpt"
  config.backbone.name = "augreg_b16_i21k"
  config.batch_size = 128
  config.tune.wd = (0.0,)
  config.optim.wd = 0.0
  config.tune.lr = (1e-3, 1e-2)
  config.tune.seeds = (0, 1, 2)
  select(config, arg)
  classes, side = _BACKBONES.get(config.backbone.name, (None, 224))
  config.backbone.head_classes = classes
  if arg["published"] == "yes":
    _as_published(config)
  if arg["search"] == "yes":
    base = side * 4 // 7
    config.tune.fields = (
      ("autovp.inner_size", (base // 2, base, base * 3 // 2)),
      ("autovp.resize", (False, True)),
      ("autovp.mapping", ("full", "frequency", "iterative")),
    )
  return config


def _as_published(config):
  config.tune.lr = config.tune.wd = config.tune.seeds = ()
  if config.method not in _PUBLISHED:
    return
  name, lr, epochs, schedule, warmup_steps = _PUBLISHED[config.method]
  config.optim.name, config.optim.lr = name, lr
  config.total_epochs = epochs
  config.optim.schedule = schedule
  config.optim.warmup_epochs, config.optim.warmup_steps = 0.0, warmup_steps
  config.vp.classifier = "source"
