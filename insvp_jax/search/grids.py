"""The grids of learning rate and weight decay that methods are tuned on by default.

`--mode=tune` takes them where `config.tune.lr` is empty. A grid belongs to a method
*and* its optimizer: SGD's learning rates are of no use to AdamW.

| grid | source |
|---|---|
| InsVP, AdamW | every lr and wd of InsVP's published scripts (sh/*.sh), unscaled |
| prompts, linear, MLP, SGD | VPT's tune_vtab.py; lr is per 256 images; momentum 0.9 |
| Sidetune, AdamW | VPT's finetune grid |
| full and partial, AdamW | VPT's finetune grid without its lr of 1e-3 and above |
| Adapter+, AdamW | its lr of 1e-3 and wd of 1e-4 (conf/train), and lrs around it |
| pixels, SGD | VP's lr of 40 and wd of 0 (main_vision.py), and smaller lrs |
| DAM-VP, SGD | VP's lrs, and DAM-VP's lr of the head (adapter.py) |
| LION, AdamW | nothing published could be read: decades around the audit's |
| others, AdamW | an audit of 14 methods, each tuned on VTAB-1k's val200 |

VPT: Jia et al., ECCV 2022; E2VPT, VFPT, VAPT and gated prompts took its grid over;
which one it gave to bias tuning and Sidetune its code does not say.
With an lr of 1e-3 and above full fine-tuning collapses on VTAB-1k (the audit: 58.5% on
average over the 19 tasks), while lr 1e-4 reaches 74% (Adapter+, Steitz and Roth 2024).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Grid:
  """All pairs of a learning rate and a weight decay.

  Attributes:
    lr: peak learning rates, before `optim.lr_scale_by_batch`.
    wd: weight decays.
    lr_scale_by_batch: the images that `lr` is meant for: it is multiplied by (images
      per update) / this. 0 leaves it as it is.
    head_lr: the head's own lr, the same at all points; 0 is `lr`.
  """

  lr: tuple[float, ...]
  wd: tuple[float, ...]
  lr_scale_by_batch: int = 0
  head_lr: float = 0.0


_INSVP = Grid(
  lr=(5e-4, 7e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3),
  wd=(5e-4, 1e-3, 2e-3, 5e-3, 0.07, 0.5, 1.0),
)
_VPT = Grid(
  lr=(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0),
  wd=(0.0, 1e-4, 1e-3, 1e-2),
  lr_scale_by_batch=256,
)
_FULL = Grid(lr=(1e-4, 5e-4), wd=(0.0, 1e-4, 1e-3, 1e-2), lr_scale_by_batch=256)
_SIDETUNE = Grid(
  lr=(1e-4, 5e-4, 1e-3, 5e-3), wd=(0.0, 1e-4, 1e-3, 1e-2), lr_scale_by_batch=256
)
_AUDIT = Grid(lr=(1e-3, 1e-2), wd=(1e-4, 1e-3))
_PIXELS = Grid(lr=(0.1, 1.0, 10.0, 40.0), wd=(0.0,))
_DAM_VP = dataclasses.replace(_PIXELS, head_lr=0.1)

_ADAPTER_PLUS = Grid(lr=(1e-4, 3e-4, 1e-3, 3e-3), wd=(1e-4,))
_LION = Grid(lr=(1e-4, 1e-3, 1e-2), wd=(1e-4, 1e-3))
# By optimizer: the grid and the methods that are tuned on it.
_METHODS = {
  "sgd": (
    (
      _VPT,
      *("vpt_shallow", "vpt_deep", "e2vpt", "vfpt", "vapt", "gated", "linear", "mlp"),
      "sidetune",
    ),
    (_PIXELS, "vp", "ilm_vp", "autovp"),
    (_DAM_VP, "dam_vp"),
  ),
  "adamw": (
    (_INSVP, "insvp"),
    (_FULL, "full", "partial"),
    (_ADAPTER_PLUS, "adapter_plus"),
    (_SIDETUNE, "sidetune"),
    (_LION, "lion"),
    (
      _AUDIT,
      *("vpt_shallow", "vpt_deep", "e2vpt", "vfpt", "vapt", "gated", "transhp"),
      *("linear", "mlp", "bias", "bitfit", "ln_tune", "difffit"),
      *("adapter", "adaptformer", "convpass", "repadapter"),
      *("lora", "ssf", "fact_tt", "fact_tk", "vp", "dam_vp"),
      *("ilm_vp", "autovp"),
    ),
  ),
}
# By (method, optimizer).
GRIDS = {
  (method, optimizer): grid
  for optimizer, grids in _METHODS.items()
  for grid, *methods in grids
  for method in methods
}
