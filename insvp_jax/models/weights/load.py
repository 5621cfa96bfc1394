"""Backbones in and out: from a name or a file to the model's parameters, and back."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import os
from pathlib import Path
import re
from typing import Any

from absl import logging
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from insvp_jax import trees
from insvp_jax.models import positions, stages
from insvp_jax.models.mimetic import sincos_positions
from insvp_jax.models.vit import VARIANTS, ViT, decode_variant
from insvp_jax.models.weights import formats, npz
from insvp_jax.models.weights.downloads import atomic_file, resolve
from insvp_jax.models.weights.releases import Release, release_of
from insvp_jax.models.weights.report import LoadReport, abbreviate

# A grid of 256 x 256 patches, and the class token's entry.
_MAX_POSITIONS = 2**16 + 1


def load_backbone(
  path_or_name: str | os.PathLike[str],
  model: nn.Module,
  *,
  report: Callable[[LoadReport], Any] | None = None,
  allow_missing: Sequence[str] = (),
  allow_unused: Sequence[str] = (),
  cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
  """Returns a model's backbone parameters from a file of weights.

  Reads the original release's `.npz` files, big_vision's in both layouts, what
  `save_backbone` writes, and `.safetensors` and PyTorch files in the names of timm and
  others (`names_vit.LAYOUTS`). The head, unless the model keeps it
  (`ViT.head_classes`), and `pre_logits` are left out. If the position
  embedding has an entry for the class token, it is added to `cls`. One of another
  resolution is resampled; nothing else is. LayerScale is folded into the projections
  before it where the model has none, which is exact.

  Args:
    path_or_name: a path, a key of `RELEASES`, a repository of Hugging Face, or a URL;
      see `resolve`.
    model: a `PromptedClassifier` or a `ViT`.
    report: called with the `LoadReport`; None logs it.
    allow_missing: regular expressions over whole names: leaves that the file may
      lack; they are initialized with key 0.
    allow_unused: regular expressions over whole names: leaves that the file may hold
      though the model does not know them; they are skipped.
    cache_dir: see `resolve`.

  Returns:
    Nested dict in the model's layout (`scan` or not), float32 NumPy arrays.

  Raises:
    FileNotFoundError: see `resolve`.
    ValueError: not such a file, or it does not fit the model; the message names
      the first leaves that do not, and the model that would.
  """
  vit = getattr(model, "backbone", model)
  path = resolve(path_or_name, cache_dir)
  release = release_of(path_or_name) or release_of(path)

  if not isinstance(vit, ViT):
    return _load_other(path, vit, report or logging.info)
  expected = _expected_shapes(vit)

  def fit(
    file: npz.BackboneFile, shapes_only: bool
  ) -> tuple[dict, dict, dict, list[str]]:
    leaves, skipped = dict(file.leaves), dict(file.skipped)
    try:
      changed = _fit_layers(leaves, vit, expected, file.resize == "bicubic")
      changed |= _fit_positions(leaves, skipped, vit, release, shapes_only, file.resize)
      missing = _fit_leaves(leaves, skipped, vit, expected, allow_missing, allow_unused)
    except ValueError as error:
      fields = _describe_fields(formats.fields(file), vit)
      raise ValueError(f"{path} does not fit the model: {error} {fields}") from error
    return leaves, skipped, changed, missing

  # The shapes first: what the model has no place for is not read.
  with_head = vit.head_classes > 0
  fit(formats.read(path, shapes_only=True, with_head=with_head), True)
  file = formats.read(path, with_head=with_head)
  leaves, skipped, changed, missing = fit(file, False)
  if with_head:
    _check_head(leaves, skipped, path)
  load_report = LoadReport(
    path=str(path),
    layout=file.layout,
    num_params=trees.count(leaves),
    loaded=tuple(sorted(leaves)),
    changed=changed,
    skipped=skipped,
    missing=tuple(missing),
    notes=_notes(vit, release, formats.fields(file)),
  )
  (report or logging.info)(load_report)
  if missing:
    leaves |= _init_leaves(vit, missing)
  return trees.unflatten(npz.stack(leaves) if vit.scan else leaves)


def _load_other(
  path: Path, backbone: nn.Module, report: Callable[[LoadReport], Any]
) -> dict[str, Any]:
  """As `load_backbone`, for a backbone with stages: every leaf has its own shape.

  Its `stack` puts leaves with one group per block into the layout of `scan`.
  """
  shapes = _param_shapes(backbone.clone(scan=False) if backbone.scan else backbone)
  expected = {name: leaf.shape for name, leaf in trees.flatten(shapes).items()}
  file = formats.read(path, with_head=backbone.head_classes > 0)
  problems = {
    "of another shape": [
      f"{name} is {file.leaves[name].shape} in the file, {shape} in the model"
      for name, shape in expected.items()
      if name in file.leaves and file.leaves[name].shape != shape
    ],
    "that only the model has": sorted(set(expected) - set(file.leaves)),
    "that only the file has": sorted(set(file.leaves) - set(expected)),
  }
  _raise_problems(path, problems, formats.fields(file), backbone)
  report(
    LoadReport(
      path=str(path),
      layout=file.layout,
      num_params=trees.count(file.leaves),
      loaded=tuple(sorted(file.leaves)),
      changed={},
      skipped=dict(file.skipped),
      missing=(),
    )
  )
  leaves = file.leaves
  return trees.unflatten(backbone.stack(leaves) if backbone.scan else leaves)


def _raise_problems(
  path: Path,
  problems: Mapping[str, Sequence[str]],
  fields: Mapping[str, Any],
  backbone: nn.Module,
) -> None:
  """Raises a `ValueError` that says what does not fit, and what would."""
  if messages := _messages(problems):
    known = {k: v for k, v in fields.items() if getattr(backbone, k, v) != v}
    hint = f" Build the model with backbone_kwargs={known}." if known else ""
    raise ValueError(f"{path} does not fit the model: {messages}{hint}")


def _messages(problems: Mapping[str, Sequence[str]]) -> str:
  """Returns a sentence; "" where nothing is wrong."""
  texts = [
    f"{len(names)} leaves {problem}: {abbreviate(names)}"
    for problem, names in problems.items()
    if names
  ]
  return "; ".join(texts) + "." if texts else ""


def save_backbone(
  params_backbone: Mapping[str, Any],
  path: str | os.PathLike[str],
  *,
  dtype: str = "float32",
  names: str = "timm",
) -> None:
  """Writes a backbone to a file: `.npz`, or `.safetensors` in others' names.

  An `.npz` has big_vision's names, one group per block; of what is no ViT, this
  package's. The same parameters always give
  the same bytes. The file appears whole or not at all. float32 comes back exactly;
  float16 halves the file and rounds.

  Args:
    params_backbone: nested dict, `params["backbone"]`, of either layout.
    path: where to write.
    dtype: "float32" or "float16".
    names: of a `.safetensors` file: "timm", or "hf", Hugging Face's (of a ViT).

  Raises:
    ValueError: no backbone, unknown dtype or names, values that the dtype cannot hold,
      or parameters that the names have no word for.
  """
  if names not in ("timm", "hf"):
    raise ValueError(f"names is {names!r}, expected 'timm' or 'hf'.")
  if dtype not in ("float32", "float16"):
    raise ValueError(f"dtype is {dtype!r}, expected 'float32' or 'float16'.")
  flat = trees.flatten(params_backbone)
  if npz.EMBEDDING not in flat:
    raise ValueError(
      f"these parameters hold no {npz.EMBEDDING!r} but "
      f"{abbreviate(flat) or 'nothing'}; pass params['backbone']."
    )
  flat = {name: np.asarray(leaf, np.float32) for name, leaf in flat.items()}
  path, flat = Path(path), stages.unstack(npz.unroll(flat))
  is_safe = path.suffix == ".safetensors"
  if is_safe:
    flat = formats.published(flat, names)
  arrays = {}
  for name, leaf in sorted(flat.items()):
    with np.errstate(over="ignore"):
      arrays[name] = leaf.astype(dtype)
    if not np.isfinite(arrays[name]).all():
      raise ValueError(
        f"{name!r} holds NaN, infinite values, or values too large for {dtype}; "
        "nothing was written."
      )
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic_file(path) as temporary:
    if is_safe:
      import safetensors.numpy

      contiguous = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
      # transformers reads no file without this mark.
      safetensors.numpy.save_file(contiguous, temporary, metadata={"format": "pt"})
    else:
      with open(temporary, "wb") as file:
        np.savez(file, **arrays)


@functools.lru_cache(maxsize=8)
def _param_shapes(backbone: nn.Module) -> dict[str, Any]:
  """Returns the tree of a backbone's parameters as `jax.ShapeDtypeStruct`.

  Whoever loads several runs, or trains again, has one backbone: it is traced once.
  """
  size = backbone.image_size

  def init():
    # A key that is made outside is two programs to compile.
    return backbone.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]

  return jax.eval_shape(init)


def _expected_shapes(vit: ViT) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a ViT's leaves, with one group per block."""
  # A scan traces one block instead of all.
  shapes = _param_shapes(vit.clone(scan=True, remat=False))
  flat = {
    # Broadcast zeros take no memory, so that shapes unroll like leaves.
    name: np.broadcast_to(np.float32(0), leaf.shape)
    for name, leaf in trees.flatten(shapes).items()
  }
  return {name: leaf.shape for name, leaf in npz.unroll(flat).items()}


def _fit_layers(
  leaves: dict[str, np.ndarray],
  vit: ViT,
  expected: Mapping[str, tuple[int, ...]],
  is_others: bool,
) -> dict[str, str]:
  """Gives layers of others the model's form, in place: heads, biases, LayerScale.

  Args:
    leaves: of the file.
    vit: the model.
    expected: shapes of its leaves.
    is_others: whether the file's names are not big_vision's.

  Returns:
    name -> how the file's values were changed.
  """
  changed = {}
  for name in list(leaves):
    shape = expected.get(name, ())
    is_attention = "/MultiHeadDotProductAttention_" in name
    if is_attention and leaves[name].ndim < len(shape):
      # Only where the heads are all that is not split.
      if leaves[name].size == math.prod(shape) and vit.width in leaves[name].shape:
        leaves[name] = leaves[name].reshape(shape)
  folded = [name for name in leaves if "/LayerScale_" in name]
  if folded and not vit.layer_scale:
    for name in folded:
      scale, (block, k) = leaves.pop(name), name.split("/LayerScale_")
      layer = "MultiHeadDotProductAttention_0/out", "MlpBlock_0/Dense_1"
      for leaf in ("kernel", "bias"):
        site = f"{block}/{layer[int(k[0])]}/{leaf}"
        if site in leaves and leaves[site].shape[-1:] == scale.shape:
          leaves[site] = leaves[site] * scale
    changed["LayerScale"] = (
      f"{len(folded)} factors folded into the projections before them, which is exact"
    )
  if is_others:
    # Layers of others may have no bias, in all blocks alike.
    present = {re.sub(r"_\d+/", "_/", name) for name in leaves}
    lost = [
      name
      for name in expected
      if name.endswith("/bias") and name.removesuffix("bias") + "kernel" in leaves
      if re.sub(r"_\d+/", "_/", name) not in present
    ]
    if lost:
      leaves |= {name: np.zeros(expected[name], np.float32) for name in lost}
      changed[abbreviate(lost)] = "zeros, as the file's layers have no bias"
  if vit.fc_norm and "fc_norm/scale" not in leaves:
    if leaves.pop("Transformer/encoder_norm/scale", None) is not None:
      leaves.pop("Transformer/encoder_norm/bias", None)
      leaves["fc_norm/scale"] = np.ones((vit.width,), np.float32)
      leaves["fc_norm/bias"] = np.zeros((vit.width,), np.float32)
      changed["fc_norm"] = (
        "not in the file: scale 1 and bias 0, and the norm before the pool is left "
        "away, as VPT does with MAE"
      )
  return changed


def _fit_positions(
  leaves: dict[str, np.ndarray],
  skipped: dict[str, str],
  vit: ViT,
  release: Release | None,
  shapes_only: bool,
  resize: str,
) -> dict[str, str]:
  """Fits the position embedding to the model, in place.

  Args:
    leaves: of the file; the position embedding is resampled and, where it has an entry
      for the class token, that is added to `cls`.
    skipped: name in the file -> why it was left out; added to here.
    vit: the model.
    release: of the file; some have a fixed position embedding that is not in the file.
    shapes_only: compute no values.
    resize: "linear" or "bicubic".

  Returns:
    name -> how the file's values were changed.
  """
  changed = {}
  pos_embedding = leaves.get("pos_embedding")  # [1, n, d]
  if pos_embedding is None and release is not None and release.positions == "sincos":
    grid = release.image_size // decode_variant(release.variant)["patch_size"]
    pos_embedding = sincos_positions(grid, leaves[npz.EMBEDDING].shape[-1])
    changed["pos_embedding"] = "fixed sines and cosines, not in the file"
  if pos_embedding is None:
    return changed
  shape = pos_embedding.shape
  if len(shape) != 3 or shape[0] != 1 or shape[1] > _MAX_POSITIONS:
    raise ValueError(
      f"pos_embedding is {shape}, expected (1, n, width) with n of at most "
      f"{_MAX_POSITIONS}."
    )
  own_position, pos_embedding = positions.split_positions(
    pos_embedding, max(vit.num_prefix, 1)
  )
  if own_position is not None and not vit.has_cls:
    skipped["pos_embedding[0]"] = _other_pool("a class token", vit)
  # Zeros are what is written where `cls` has it already.
  elif own_position is not None and "cls" in leaves and own_position.any():
    leaves["cls"] = leaves["cls"] + own_position[:, :1]
    changed["cls"] = "entry 0 of the position embedding was added"
    if own_position.shape[1] > 1 and "registers" in leaves:
      leaves["registers"] = leaves["registers"] + own_position[:, 1:]
  old, new = math.isqrt(pos_embedding.shape[1]), vit.image_size // vit.patch_size
  if shapes_only:
    resampled = np.broadcast_to(np.float32(0), (1, new * new, shape[2]))
  else:
    resampled = positions.resample_positions(pos_embedding, new, resize)
  leaves["pos_embedding"] = resampled
  if old != new:
    text = f"resampled from {old} x {old} to {new} x {new} patches"
    before = changed.get("pos_embedding")
    changed["pos_embedding"] = f"{before}, {text}" if before else text
  return changed


def _fit_leaves(
  leaves: dict[str, np.ndarray],
  skipped: dict[str, str],
  vit: ViT,
  expected: Mapping[str, tuple[int, ...]],
  allow_missing: Sequence[str],
  allow_unused: Sequence[str],
) -> list[str]:
  """Removes from `leaves` what the model does not need, and checks the rest.

  Returns:
    The names of leaves that the file lacks and may lack.

  Raises:
    ValueError: the file lacks other leaves, or holds unknown ones or other shapes.
  """
  actual, wanted = leaves[npz.EMBEDDING].shape, expected[npz.EMBEDDING]
  if actual[:2] != wanted[:2]:
    raise ValueError(
      f"{npz.EMBEDDING} is {actual}, expected {wanted}: patches of another size, and "
      "patch embeddings are not resampled."
    )
  for name in sorted(set(leaves) - set(expected)):
    reason = _unused_reason(name, vit)
    if reason is None and _matches(name, allow_unused):
      reason = "unknown to the model, allowed"
    if reason is not None:
      skipped[name] = reason
      del leaves[name]
  missing = sorted(set(expected) - set(leaves))
  # The embeddings first: their shapes say most.
  embeddings_first = sorted(expected.items(), key=lambda item: "/enc" in item[0])
  problems = {
    "of another shape": [
      f"{name} is {leaves[name].shape} in the file, {shape} in the model"
      for name, shape in embeddings_first
      if name in leaves and leaves[name].shape != shape
    ],
    "that only the model has": [n for n in missing if not _matches(n, allow_missing)],
    "that only the file has": sorted(set(leaves) - set(expected)),
  }
  if messages := _messages(problems):
    raise ValueError(messages)
  return missing


def _check_head(
  leaves: Mapping[str, np.ndarray], skipped: Mapping[str, str], path: Path
) -> None:
  """Checks that a file's head tells classes apart, and that it reads the feature.

  Raises:
    ValueError: it does not.
  """
  if npz.HEAD in leaves and not leaves[npz.HEAD].any():
    raise ValueError(
      f"the head in {path} is all zeros, as that of the IN-21k release is: it tells no "
      "classes apart. Take a backbone with a trained head, or head_classes=0."
    )
  if any(name.split("/")[-2:-1] == ["pre_logits"] for name in skipped):
    raise ValueError(
      f"the head in {path} reads a layer 'pre_logits', which is not kept. Take a "
      "backbone whose head reads the feature, or head_classes=0."
    )


def _unused_reason(name: str, vit: ViT) -> str | None:
  """Returns why the model's pooling does not need a leaf; None if it is unknown."""
  if name == "cls" and not vit.has_cls:
    return _other_pool("a class token", vit)
  if name.startswith("MAPHead_0/") and vit.pool != "map":
    return _other_pool("attention pooling", vit)
  if name.startswith("projection/") and not vit.projection:
    return "a projection after the feature; projection=<its width> keeps it"
  return None


def _other_pool(what: str, vit: ViT) -> str:
  return f"for {what}, but the model has pool={vit.pool!r}"


def _describe_fields(fields: Mapping[str, Any], vit: ViT) -> str:
  """Returns the `ViT` fields of a file as text, and the model that would fit it."""
  sizes = tuple(fields.get(f) for f in ("width", "depth", "mlp_dim", "num_heads"))
  variant = next((name for name, known in VARIANTS.items() if known == sizes), None)
  variant_text = f", which is {variant}/{fields.get('patch_size')}" if variant else ""
  listed = ", ".join(f"{field}={value!r}" for field, value in fields.items())
  other = {field: v for field, v in fields.items() if getattr(vit, field) != v}
  hint = f" Build the model with backbone_kwargs={other}." if other else ""
  return f"The file holds {listed}{variant_text}.{hint}"


def _notes(
  vit: ViT, release: Release | None, fields: Mapping[str, Any]
) -> tuple[str, ...]:
  """Returns remarks on what the model computes otherwise than it was trained."""
  if release is None:
    return tuple(
      f"note: weights of this family have {field}={fields[field]!r}, the model has "
      f"{getattr(vit, field)!r}"
      for field in ("gelu", "norm_eps")
      if fields.get(field, getattr(vit, field)) != getattr(vit, field)
    )
  if not release.url or release.gelu == vit.gelu:
    return ()
  return (
    f"note: this release was trained with gelu={release.gelu!r}, the model has "
    f"{vit.gelu!r}",
  )


def _init_leaves(vit: ViT, names: Sequence[str]) -> dict[str, np.ndarray]:
  """Returns initial values of the named leaves."""
  images = jnp.zeros((1, vit.image_size, vit.image_size, 3))

  def init(key: jax.Array) -> dict[str, jax.Array]:
    flat = trees.flatten(vit.clone(scan=False).init(key, images)["params"])
    return {name: flat[name] for name in names}

  # Compiled, so that only what is asked for is computed.
  return jax.device_get(jax.jit(init)(jax.random.key(0)))


def _matches(name: str, patterns: Sequence[str]) -> bool:
  return any(re.fullmatch(pattern, name) for pattern in patterns)
