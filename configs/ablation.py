"""Ablations: rows that differ in one thing, side by side in one table.

  python -m insvp_jax.main --config=configs/ablation.py:table5,root=photos.zip
  python -m insvp_jax.main --config=configs/ablation.py:lr,method=vpt_deep,task=svhn
  insvp figure --run=runs/ablation --output=ablation.png

The first word is one of `ABLATIONS`: `lr`, `warmup`, `epochs`, `wd`, `dropout`, `scale`
and `shots` of any `method`; the others keep to the rows of the method that is given.
The images lie as for configs/folder.py, or `task` is digits, svhn, ... Each row chooses
its lr on val, is trained again with three seeds on train + val (in `scale` and `shots`
on train alone), and is reported on test: judge by val.
How long: --config.total_epochs=10. Which backbone: --config.backbone.name=..., or
backbone=... after the colon, by which `depth` and `fig7_depth` know the depth: 6 blocks
for boxed, 12 for others. Rows of your own:

  --config.tune.variants="(('9 tokens', 'vpt_deep', (('vpt_deep.prompt_length', 9),)),
      ('3 tokens', 'vpt_deep', (('vpt_deep.prompt_length', 3),)))"
"""

from insvp_jax.config import defaults, parse_arg, select

# Blocks of the backbone in the box; ViTs of the sizes Ti, S and B have 12.
_BLOCKS = {"boxed": 6}


def get_config(arg=""):
  name, _, rest = arg.partition(",")
  if not name or "=" in name:
    name, rest = "table5", arg
  if name not in ABLATIONS:
    raise ValueError(
      f"unknown ablation {name!r}; expected one of {', '.join(ABLATIONS)}, and then "
      f"task=..., e.g. table5,root=photos.zip."
    )
  arg = parse_arg(rest, task="folder")
  config = defaults()
  config.task = arg["task"]
  config.backbone.name = "boxed"
  config.batch_size = 0  # 32, or less where there are few images
  config.total_epochs = 20.0
  config.optim.wd = 1e-4
  config.optim.warmup_epochs = 2.0
  # A border of 8 pixels makes whole patches of 4 and of 16 pixels.
  config.vpt_shallow.prompt_length = config.vpt_deep.prompt_length = 8
  config.tune.lr = (1e-3, 3e-3, 1e-2)
  config.tune.seeds = (0, 1, 2)
  select(config, arg)
  create_rows, _ = ABLATIONS[name]
  rows = create_rows(config)
  kept = tuple(row for row in rows if arg["method"] in ("", row[1]))
  if not kept:
    methods = ", ".join(dict.fromkeys(method for _, method, _ in rows))
    raise ValueError(f"{name} is an ablation of {methods}, not of {arg['method']}.")
  config.tune.variants = kept
  return config


def _each(key, values, method=""):
  """Returns rows that differ in one key; METHOD in it stands for the method's name."""

  def create_rows(config):
    name = method or config.method
    changed = key.replace("METHOD", name)
    title = changed.split(".")[-1]
    texts = [value if isinstance(value, str) else f"{value:g}" for value in values]
    return tuple(
      (f"{title} {text}", name, ((changed, value),))
      for text, value in zip(texts, values, strict=True)
    )

  return create_rows


def _insvp(label, *components):
  """Returns the row of InsVP with these components."""
  off = {"patch", "global", "common", "specific"} - {*components}
  return (label, "insvp", tuple((f"insvp.use_{each}", False) for each in sorted(off)))


def _components(config):
  del config
  return (
    ("none", "linear", ()),
    # As in table 5, one more from row to row.
    _insvp("patch", "patch"),
    _insvp("patch+global", "patch", "global"),
    _insvp("patch+global+common", "patch", "global", "common"),
    _insvp("all", "patch", "global", "common", "specific"),
    # One alone, and the tokens without the image prompts.
    _insvp("global", "global"),
    _insvp("common", "common"),
    _insvp("specific", "specific"),
    _insvp("common+specific", "common", "specific"),
  )


def _presets(config):
  del config
  tuned, vpt = ("insvp.preset", "tuned"), "vpt_deep.prompt_init"
  return (
    *((name, "insvp", (("insvp.preset", name),)) for name in ("paper", "release")),
    ("tuned", "insvp", (tuned,)),
    ("tuned, patch tokens", "insvp", (tuned, ("insvp.prompt_init", "patch_tokens"))),
    ("vpt_deep", "vpt_deep", ()),
    ("vpt_deep, patch tokens", "vpt_deep", ((vpt, "patch_tokens"),)),
    *((method, method, ()) for method in ("lora", "linear", "full")),
  )


def _fusion(config):
  del config
  # beta_I is the global prompt's weight, beta_F the common prompts' (eq. 6 and 10).
  image = {beta: (round(1 - beta, 1), beta) for beta in (0.0, 0.3, 0.5, 1.0)}
  feature = {beta: (beta, round(1 - beta, 1)) for beta in (0.0, 0.3, 0.7, 1.0)}
  return (
    ("beta_I 0.7, beta_F 0.5", "insvp", ()),
    *(
      (f"beta_I {beta:g}", "insvp", (("insvp.image_fusion", weights),))
      for beta, weights in image.items()
    ),
    *(
      (f"beta_F {beta:g}", "insvp", (("insvp.feature_fusion", weights),))
      for beta, weights in feature.items()
    ),
  )


def _depths(config):
  """Returns a twelfth, a quarter, half, three quarters and all of the blocks."""
  depth = _BLOCKS.get(config.backbone.name, 12)
  # Rounded, with halves up.
  return sorted({max(1, (depth * n + 6) // 12) for n in (1, 3, 6, 9, 12)})


def _insvp_depth(config):
  return tuple(
    (f"blocks 1-{depth}", "insvp", (("insvp.prompted_blocks", depth),))
    for depth in _depths(config)
  )


def _vpt_depth(config):
  *depths, whole = _depths(config)
  first = [(f"blocks 1-{depth}", "first", depth) for depth in (*depths, whole)]
  last = [(f"blocks {whole - d + 1}-{whole}", "last", d) for d in depths]
  return tuple(
    (
      label,
      "vpt_deep",
      (("vpt_deep.prompted_blocks", depth), ("vpt_deep.prompted_from", end)),
    )
    for label, end, depth in (*first, *last)
  )


def _location(config):
  del config
  locations = {
    "vpt_shallow": ("prepend", "add", "add-1", "prepend-pixel", "pad", "below"),
    "vpt_deep": ("prepend", "add", "add-1"),
  }
  return tuple(
    (f"{method} {location}", method, ((f"{method}.location", location),))
    for method, names in locations.items()
    for location in names
  )


# (rows, what varies) by name. `_each` without a method is of any.
ABLATIONS = {
  "presets": (_presets, "InsVP's presets, beside other methods"),
  "table5": (_components, "InsVP's components: its table 5, and one by one"),
  "fig7_length": (
    _each("insvp.prompt_length", (1, 5, 9, 16, 20), "insvp"),
    "InsVP's prompt tokens per block",
  ),
  "fig7_depth": (_insvp_depth, "how many of the first blocks have InsVP's prompts"),
  "fig7_beta": (_fusion, "InsVP's fusion weights of image and feature prompts"),
  "lr": (_each("optim.lr", (3e-4, 1e-3, 3e-3, 1e-2)), "learning rate"),
  "warmup": (_each("optim.warmup_epochs", (0.0, 1.0, 2.0, 5.0)), "epochs of warm-up"),
  "epochs": (_each("total_epochs", (5.0, 10.0, 20.0, 40.0)), "epochs"),
  "wd": (_each("optim.wd", (0.0, 1e-4, 1e-2, 0.1, 1.0)), "weight decay"),
  "dropout": (_each("METHOD.dropout", (0.0, 0.1, 0.3, 0.5)), "the method's dropout"),
  "location": (_location, "where VPT's prompts are: its figure 5"),
  "depth": (_vpt_depth, "which blocks have VPT-Deep's prompts: its figure 8"),
  "pool": (
    _each("vpt_deep.pool", ("cls", "image", "prompt", "both"), "vpt_deep"),
    "what the head of VPT-Deep reads: its figure 7",
  ),
  "length": (
    _each("vpt_deep.prompt_length", (1, 5, 10, 50, 100, 200), "vpt_deep"),
    "VPT-Deep's prompt tokens: the lengths of its search",
  ),
  "scale": (
    _each("data.fraction", (0.1, 0.2, 0.4, 0.6, 0.8)),
    "share of the training images: VPT's figure 3",
  ),
  "shots": (_each("data.shots", (1, 2, 4, 8, 16)), "training images of each class"),
}
