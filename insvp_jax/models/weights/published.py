"""What a file of weights says of its backbone: sizes, and how its pixels were made.

Three sources: a `.json` beside it (of `insvp export`, of timm or of Hugging Face), the
names and shapes in it, and what its family is known for. They are read once a process.
"""

from collections.abc import Mapping
import functools
import os
from pathlib import Path
import re
from typing import Any

from insvp_jax import array_files, files
from insvp_jax.models.vit import VARIANTS
from insvp_jax.models.weights import downloads, formats, releases

# Of a release's table, of the .json beside our own files, of others' config.json.
_KNOWN = (*releases.ARCHITECTURE, "class_token", "registers", "mlp", "pre_norm")
FIELDS = (*_KNOWN, "layer_scale", "fc_norm", "norm_eps", "projection")
FIELDS += ("depths", "window")
_GELUS = {
  **dict.fromkeys(("gelu_pytorch_tanh", "gelu_tanh", "gelu_new"), "tanh"),
  "gelu": "exact",
  **dict.fromkeys(("quick_gelu",), "quick"),
}


def is_file_name(name: str) -> bool:
  """Returns whether a backbone's name is that of a file, a repository or a URL.

  What else has a slash is a variant, such as "B/16".
  """
  if not name or name in releases.RELEASES:
    return False
  is_path = name.startswith(("/", "./", "../", "~"))
  is_path |= name.endswith(array_files.SUFFIXES)
  return is_remote(name) or is_path or Path(name).expanduser().exists()


def is_remote(name: str) -> bool:
  """Returns whether a backbone's name is that of a repository or a URL."""
  return re.match(r"(gs|https?)://|timm/|hf-hub:", name) is not None


def are_sizes_known(overrides: Mapping[str, Any]) -> bool:
  """Returns whether a ViT's sizes are known, so that no file is asked for them."""
  known = [f for f in releases.ARCHITECTURE if f != "image_size"]
  return all(overrides.get(field) is not None for field in known)


def architecture_of(name: str, overrides: Mapping[str, Any] | None = None):
  """Returns the `ViT` fields of a release, of a file or of a repository.

  Args:
    name: as for `resolve`.
    overrides: fields that are known already. A file is not read where they are all.

  Raises:
    ValueError, FileNotFoundError: there is none, or it is not usable.
  """
  if not is_file_name(name):
    return releases.architecture_of(name)
  overrides = overrides or {}
  if are_sizes_known(overrides):
    return {}
  path = downloads.resolve(name)
  fields = _fields_of(path)
  if release := releases.release_of(path):
    fields |= {"pool": release.pool, "gelu": release.gelu, **release.fields}
  if "architecture" in fields:
    return fields
  if "num_heads" not in fields and overrides.get("num_heads") is None:
    raise ValueError(
      f"{path} does not tell how many heads its blocks of width {fields['width']} "
      "have; set num_heads (config.backbone.num_heads)."
    )
  return fields


def _fields_of(path: Path) -> dict[str, Any]:
  return dict(_fields_of_file(os.fspath(path), path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=16)
def _fields_of_file(path: str, mtime: int) -> dict[str, Any]:
  del mtime
  file = formats.read(path, shapes_only=True)
  fields = formats.fields(file)
  fields.pop("head_classes", None)
  description = description_of(path)
  if "architecture" in fields:
    return {"image_size": _staged_size(fields, description), **fields}
  config = description.get("vision_config", description)
  if "hidden_size" in config:
    fields |= {
      ours: config[theirs]
      for theirs, ours in (
        ("num_attention_heads", "num_heads"),
        ("layer_norm_eps", "norm_eps"),
      )
      if isinstance(config.get(theirs), int | float)
    }
    if (gelu := _GELUS.get(str(config.get("hidden_act")))) and "mlp" not in fields:
      fields["gelu"] = gelu
  if "quickgelu" in str(description.get("architecture")):
    fields["gelu"] = "quick"
  if "width" in description:
    fields |= {f: description[f] for f in FIELDS if f in description}
  if "num_heads" not in fields:
    known = [heads for w, _, _, heads in VARIANTS.values() if w == fields["width"]]
    # All published ones but the few in the table have heads of width 64.
    heads = known[0] if known else fields["width"] // 64
    if heads and fields["width"] % heads == 0 and fields["width"] % 64 == 0:
      fields["num_heads"] = heads
  if "image_size" not in fields:
    fields["image_size"] = _image_size(file, fields, description)
  return fields


def _staged_size(fields: Mapping[str, Any], description: Any) -> int:
  """Returns the pixels per side of a backbone that has no positions to tell them."""
  if isinstance(description.get("image_size"), int):
    return description["image_size"]
  if "window" in fields:
    # The last stage of the published ones is one window.
    return fields["patch_size"] * 2 ** (len(fields["depths"]) - 1) * fields["window"]
  config = description.get("pretrained_cfg", description)
  return int(config.get("input_size", (224,))[-1])


def _image_size(file: Any, fields: Mapping[str, Any], description: Any) -> int:
  positions = file.leaves.get("pos_embedding")
  count = positions.shape[1] if positions is not None else 197
  size = int(count**0.5) * fields["patch_size"]
  # DINOv2 was trained at 224 px, and at 518 for its last steps alone.
  is_dinov2 = fields.get("layer_scale") and fields["patch_size"] == 14
  return 224 if is_dinov2 and size == 518 else size


def description_of(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns what the `.json` beside a file of weights says; {} where there is none."""
  path = Path(path)
  besides = (path.with_suffix(".json"), path.with_name("config.json"))
  return next(filter(None, (_read_json(b) for b in besides if b != path)), {})


def _read_json(path: Path) -> dict[str, Any]:
  """Returns the object in a JSON file; {} where there is none."""
  try:
    value = files.parse_json(files.read_bytes(path))
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


def backbone_fields(backbone: Any) -> dict[str, Any]:
  """Returns the fields that a backbone's file does not need to be asked for again."""
  return {f: getattr(backbone, f) for f in FIELDS if hasattr(backbone, f)}


# Of files that say nothing of their pixels.
_IMAGENET = (
  (0.485, 0.456, 0.406),
  (0.229, 0.224, 0.225),
  "shorter_side_bicubic",
  0.875,
)
_CLIP = (
  (0.48145466, 0.4578275, 0.40821073),
  (0.26862954, 0.26130258, 0.27577711),
  "shorter_side_bicubic",
  1.0,
)
_SIGLIP = ((0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)


def pixels_of(name: str) -> dict[str, Any] | None:
  """Returns how the pixels were made that a backbone was trained on.

  Args:
    name: as for `resolve`, a variant, or "random".

  Returns:
    {"mean", "std", "resize", "crop"} as of a `preprocess.Preset`, or {"preset"}, its
    name; of a release, whose geometry nobody says, mean and std alone; None where there
    are no weights.
  """
  if release := releases.release_of(name):
    geometry = {"resize": release.resize, "crop": release.crop}
    return {
      "mean": release.mean,
      "std": release.std,
      **(geometry if release.resize else {}),
    }
  if not is_file_name(name):
    return None
  path = downloads.resolve(name)
  description = description_of(path)
  if isinstance(description.get("preset"), str):
    return {"preset": description["preset"]}
  try:
    pixels = _timm_pixels(description.get("pretrained_cfg", description))
    pixels = pixels or _hf_pixels(
      _read_json(path.with_name("preprocessor_config.json"))
    )
  except (AttributeError, TypeError, ValueError, OverflowError) as error:
    raise ValueError(
      f"what stands beside {path} of how its pixels are made is not usable "
      f"({type(error).__name__}: {error}); name a preset (config.data.preset)."
    ) from error
  pixels = pixels or _family_pixels(name, _fields_of(path))
  return dict(zip(("mean", "std", "resize", "crop"), pixels, strict=True))


def _timm_pixels(cfg: Any) -> tuple | None:
  """Returns what timm's `pretrained_cfg` says."""
  if not isinstance(cfg, dict) or not {"mean", "std", "crop_pct"} <= cfg.keys():
    return None
  bicubic = cfg.get("interpolation") != "bilinear"
  if cfg.get("crop_mode") == "squash":
    return *_rgb(cfg["mean"], cfg["std"]), "bicubic" if bicubic else "antialias", 1.0
  resize = "shorter_side_bicubic" if bicubic else "shorter_side"
  return *_rgb(cfg["mean"], cfg["std"]), resize, float(cfg["crop_pct"])


def _hf_pixels(config: Mapping[str, Any]) -> tuple | None:
  """Returns what a preprocessor_config.json of Hugging Face says."""
  if not {"image_mean", "image_std"} <= config.keys():
    return None
  bicubic = config.get("resample") == 3
  size = config.get("size")
  shortest = size.get("shortest_edge") if isinstance(size, dict) else None
  crop = config.get("crop_size")
  crop = crop.get("height") if isinstance(crop, dict) else crop
  rgb = _rgb(config["image_mean"], config["image_std"])
  if shortest is None:
    return *rgb, "bicubic" if bicubic else "antialias", 1.0
  share = crop / shortest if crop and config.get("do_center_crop") else 1.0
  return *rgb, "shorter_side_bicubic" if bicubic else "shorter_side", min(share, 1.0)


def _rgb(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
  return tuple(map(float, mean)), tuple(map(float, std))


def _family_pixels(name: str, fields: Mapping[str, Any]) -> tuple:
  """Returns how the family of a file without a description makes its pixels."""
  if name.endswith(".npz"):
    return (0.5,) * 3, (0.5,) * 3, "tf1", 1.0
  if fields.get("pre_norm"):
    return _CLIP
  if fields.get("pool") == "map" or re.search(r"siglip", name):
    return _SIGLIP
  if re.search(r"augreg|\borig_in21k", name):
    return (0.5,) * 3, (0.5,) * 3, "shorter_side_bicubic", 0.9
  return _IMAGENET
