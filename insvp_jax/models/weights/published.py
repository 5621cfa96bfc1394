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

from insvp_jax import files
from insvp_jax.models.vit import VARIANTS, ViT
from insvp_jax.models.weights import downloads, formats, readers, releases

# Of a release's table, of the .json beside our own files, of others' config.json.
_KNOWN = (*releases.ARCHITECTURE, "class_token", "registers", "mlp", "pre_norm")
FIELDS = (*_KNOWN, "layer_scale", "fc_norm", "norm_eps")
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
  is_remote = re.match(r"(gs|https?)://|timm/|hf-hub:", name)
  is_path = name.startswith(("/", "./", "../", "~")) or name.endswith(readers.SUFFIXES)
  return bool(is_remote) or is_path or Path(name).expanduser().exists()


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
  known = [f for f in releases.ARCHITECTURE if f != "image_size"]
  if all(overrides.get(field) is not None for field in known):
    return {}
  path = downloads.resolve(name)
  fields = dict(_fields_of_file(os.fspath(path), path.stat().st_mtime_ns))
  if "num_heads" not in fields and overrides.get("num_heads") is None:
    raise ValueError(
      f"{path} does not tell how many heads its blocks of width {fields['width']} have; "
      "set num_heads (config.backbone.num_heads)."
    )
  return fields


@functools.lru_cache(maxsize=16)
def _fields_of_file(path: str, mtime: int) -> dict[str, Any]:
  del mtime
  file = formats.read(path, shapes_only=True)
  fields = formats.fields(file)
  fields.pop("head_classes", None)
  description = description_of(path)
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


def _image_size(file: Any, fields: Mapping[str, Any], description: Any) -> int:
  positions = file.leaves.get("pos_embedding")
  count = positions.shape[1] if positions is not None else 197
  size = int(count**0.5) * fields["patch_size"]
  # DINOv2 was trained at 224 px; the last steps, at 518, are what its positions are for.
  is_dinov2 = fields.get("layer_scale") and fields["patch_size"] == 14
  return 224 if is_dinov2 and size == 518 else size


def description_of(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns what the `.json` beside a file of weights says; {} where there is none."""
  path = Path(path)
  for beside in (path.with_suffix(".json"), path.with_name("config.json")):
    if files.is_regular(beside) and beside != path:
      try:
        description = files.parse_json(files.read_bytes(beside))
      except (OSError, ValueError):
        continue
      if isinstance(description, dict):
        return description
  return {}


def vit_fields(vit: ViT) -> dict[str, Any]:
  """Returns the fields that a backbone's file does not need to be asked for again."""
  return {field: getattr(vit, field) for field in FIELDS}
