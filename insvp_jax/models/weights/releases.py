"""Known backbones: their sizes and where to download them."""

from collections.abc import Mapping
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from insvp_jax import trees
from insvp_jax.models.vit import decode_variant

ASSETS = Path(__file__).parents[2] / "assets"
ARCHITECTURE = (
  "width",
  "depth",
  "mlp_dim",
  "num_heads",
  "patch_size",
  "image_size",
  "pool",
  "gelu",
)


@dataclasses.dataclass(frozen=True)
class Release:
  """A published backbone.

  Attributes:
    variant: the sizes, as in "B/16"; "" for one that comes with the package, whose
      sizes are in the `.json` beside it.
    url: "gs://..." or "https://..."; "" for one that comes with the package.
    pool: "tok", "gap" or "map".
    gelu: "tanh" or "exact".
    image_size: pixels per side of the images it was last trained on.
    sha256: hex digest of the file; None where nobody published one.
    mean: that was subtracted from pixels in [0, 1] when it was trained.
    std: that the difference was divided by.
    positions: "learned" (in the file) or "sincos" (fixed, not in the file).
    fields: further ones of `ViT`.
    resize, crop: how its images were resized; see `preprocess.Preset`. "" where the
      protocol says it.
  """

  variant: str = ""
  url: str = ""
  pool: str = "tok"
  gelu: str = "tanh"
  image_size: int = 224
  sha256: str | None = None
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  positions: str = "learned"
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  resize: str = ""
  crop: float = 1.0

  @property
  def max_bytes(self) -> int:
    """Returns more bytes than its file has; 0 where its sizes are not known.

    Nobody published the sizes of the files: it is twice what the matrices take in
    float32, with a head of ImageNet-21k's classes and the layer before it.
    """
    if not self.variant:
      return 0
    sizes = decode_variant(self.variant)
    width, depth, mlp_dim = (sizes[name] for name in ("width", "depth", "mlp_dim"))
    blocks = depth * width * (4 * width + 2 * mlp_dim)
    return 2 * 4 * (blocks + width * (21_843 + width))


def _original(variant: str) -> Release:
  """Dosovitskiy et al. 2021, trained on ImageNet-21k; VPT's and InsVP's backbone."""
  name = variant.replace("/", "_")
  return Release(variant, f"gs://vit_models/imagenet21k/ViT-{name}.npz")


def _augreg(variant: str, augmentation: str, wd: str) -> Release:
  """Steiner et al. 2022, trained on ImageNet-21k: big_vision's "howto-i21k-..."."""
  name = variant.replace("/", "_")
  recipe = f"i21k-300ep-lr_0.001-aug_{augmentation}-wd_{wd}-do_0.0-sd_0.0"
  return Release(variant, f"gs://vit_models/augreg/{name}-{recipe}.npz")


def _baseline(epochs: int) -> Release:
  """Beyer et al. 2022, trained on ImageNet-1k: big_vision's "i1k-s16-..."."""
  return Release(
    "S/16",
    f"gs://big_vision/vit_s16_i1k_{epochs}ep.npz",
    pool="gap",
    positions="sincos",
  )


def _deit3(size: str, image_size: int, data: str) -> Release:
  """Touvron et al. 2022, converted by big_vision to pixels in [-1, 1]."""
  size_name = {"S": "small", "B": "base", "L": "large"}[size]
  return Release(
    f"{size}/16",
    f"gs://big_vision/zoo/deit3/bv_deit_3_{size_name}_{image_size}_{data}.npz",
    gelu="exact",
    image_size=image_size,
  )


def _self_supervised(path: str, **fields: Any) -> Release:
  """He et al. 2022 and Chen et al. 2021: the files of VPT's table of pre-trainings."""
  return Release(
    "B/16",
    f"https://dl.fbaipublicfiles.com/{path}",
    pool="gap" if fields else "tok",
    gelu="exact",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    fields=fields,
    resize="shorter_side_bicubic",
    crop=0.875,
  )


# Nobody published digests of these files; a person who has verified one can add it.
RELEASES: dict[str, Release] = {
  "boxed": Release(),
  "vit_b16_i21k": _original("B/16"),
  "vit_b32_i21k": _original("B/32"),
  "vit_l16_i21k": _original("L/16"),
  "vit_l32_i21k": _original("L/32"),
  "vit_h14_i21k": _original("H/14"),
  "augreg_ti16_i21k": _augreg("Ti/16", "none", "0.03"),
  "augreg_s32_i21k": _augreg("S/32", "none", "0.1"),
  "augreg_s16_i21k": _augreg("S/16", "light1", "0.03"),
  "augreg_b32_i21k": _augreg("B/32", "light1", "0.1"),
  "augreg_b16_i21k": _augreg("B/16", "medium1", "0.1"),
  "augreg_b8_i21k": _augreg("B/8", "medium2", "0.1"),
  "augreg_l16_i21k": _augreg("L/16", "strong1", "0.1"),
  "vit_s16_i1k_90ep": _baseline(90),
  "vit_s16_i1k_150ep": _baseline(150),
  "vit_s16_i1k_300ep": _baseline(300),
  "mocov3_b16_i1k": _self_supervised("moco-v3/vit-b-300ep/linear-vit-b-300ep.pth.tar"),
  # Pooled as VPT does it; fc_norm=False keeps the trained norm before the mean instead.
  "mae_b16_i1k": _self_supervised(
    "mae/pretrain/mae_pretrain_vit_base.pth", class_token=True, fc_norm=True
  ),
} | {
  f"deit3_{size.lower()}16_{image_size}_i{data}": _deit3(size, image_size, data)
  for size in "SBL"
  for image_size in (224, 384)
  for data in ("1k", "21k")
}


def architecture_of(name: str) -> dict[str, Any]:
  """Returns the `ViT` fields of a release, e.g. width, pool and image_size.

  Raises:
    ValueError: unknown name, or a packaged file whose description is unusable.
    FileNotFoundError: the packaged backbone is not there.
  """
  release = trees.lookup(RELEASES, name, "backbone", "insvp_jax.BACKBONES")
  if release.variant:
    return decode_variant(release.variant) | {
      "image_size": release.image_size,
      "pool": release.pool,
      "gelu": release.gelu,
      **release.fields,
    }
  description = read_description(name)
  missing = [field for field in ARCHITECTURE if field not in description]
  if missing:
    raise ValueError(
      f"{ASSETS / name}.json lacks {', '.join(missing)}; it has to hold "
      f"{', '.join(ARCHITECTURE)}."
    )
  return {field: description[field] for field in ARCHITECTURE}


def release_of(path_or_name: str | os.PathLike[str]) -> Release | None:
  """Returns the release of a name, or of a path that ends like its download."""
  name = os.fspath(path_or_name)
  if name in RELEASES:
    return RELEASES[name]
  for release in RELEASES.values():
    if release.url and Path(name).name == release.url.rsplit("/", 1)[-1]:
      return release
  return None


def read_description(name: str) -> dict[str, Any]:
  """Returns the description of a packaged backbone: ViT fields, sha256, ...

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it is no JSON object.
  """
  path = ASSETS / f"{name}.json"
  if not path.is_file():
    raise FileNotFoundError(missing_asset_message(name, path))
  try:
    description = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(
      f"{path} is not JSON: {error}. Install the package anew."
    ) from error
  if not isinstance(description, dict):
    raise ValueError(f"{path} holds no JSON object. Install the package anew.")
  return description


def missing_asset_message(name: str, path: Path) -> str:
  """Returns the message for a packaged file that is not there."""
  return (
    f"the packaged backbone {name!r} is incomplete: there is no {path}. Install the "
    "package anew, or train the backbone with configs/pretrain.py."
  )
