"""Command lines of small runs: the flags, and the files that they name."""

from pathlib import Path

from tiny_runs import make_params
from tiny_training import SIZE, write_images

from insvp_jax.models import weights
from insvp_jax.models.classifier import create_model

# One block: a process traces and compiles all that it needs anew.
BACKBONE = {"width": 16, "depth": 1, "mlp_dim": 16, "num_heads": 2}


def flags_of(**values):
  """Returns `--config.a.b=value` for `a__b=value`."""
  return [f"--config.{n.replace('__', '.')}={value}" for n, value in values.items()]


def make_place(place: Path) -> Path:
  """Fills a folder with images/ and two backbones."""
  write_images(place / "images")
  model = create_model(
    "mu/4", "linear", num_classes=3, image_size=SIZE, backbone_kwargs=BACKBONE
  )
  for seed in (0, 1):
    params = make_params(model, seed)["backbone"]
    weights.save_backbone(params, place / f"backbone{seed}.npz")
  return place


def base_flags(root: Path, place: Path) -> list[str]:
  """Returns the flags of a small run of configs/folder.py, without a workdir."""
  sizes = {f"backbone__{name}": size for name, size in BACKBONE.items()}
  lists = {f"tune__{name}": "()" for name in ("methods", "lr", "seeds")}
  return [
    f"--config={root / 'configs' / 'folder.py'}",
    *flags_of(
      data__root=place / "images",
      data__cache_dir="off",
      backbone__name="mu/4",
      backbone__weights=place / "backbone0.npz",
      **sizes,
      **lists,
      image_size=SIZE,
      method="vpt_deep",
      vpt_deep__prompt_length=2,
      batch_size=4,
      total_steps=3,
      optim__warmup_epochs=0.0,
      tensorboard=False,
    ),
  ]
