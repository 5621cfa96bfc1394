"""Backbones in and out: from a name or a file to the model's parameters, and back."""

from collections.abc import Callable, Mapping, Sequence
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
from insvp_jax.models.mimetic import sincos_positions
from insvp_jax.models.vit import VARIANTS, ViT, decode_variant
from insvp_jax.models.weights import npz, positions
from insvp_jax.models.weights.downloads import atomic_file, file_digest, resolve
from insvp_jax.models.weights.releases import (
  RELEASES,
  Release,
  architecture_of,
  release_of,
)
from insvp_jax.models.weights.report import LoadReport, some

__all__ = [
  "RELEASES",
  "LoadReport",
  "Release",
  "architecture_of",
  "file_digest",
  "load_backbone",
  "resolve",
  "save_backbone",
]


def load_backbone(
  path_or_name: str | os.PathLike[str],
  model: nn.Module,
  *,
  report: Callable[[LoadReport], Any] | None = None,
  allow_missing: Sequence[str] = (),
  allow_unused: Sequence[str] = (),
  cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
  """Returns a model's backbone parameters from an `.npz` file.

  Reads the original release's files, big_vision's in both layouts, and what
  `save_backbone` writes. The head and `pre_logits` are left out. An entry of the
  class token in the position embedding is added to `cls`. A position embedding
  of another resolution is resampled; nothing else is.

  Args:
    path_or_name: a path, a key of `RELEASES`, or a URL; see `resolve`.
    model: a `PromptedClassifier` or a `ViT`.
    report: called with the `LoadReport`; None logs it.
    allow_missing: regular expressions over whole names; leaves that the file may
      lack, which then are drawn anew with key 0.
    allow_unused: regular expressions over whole names; leaves unknown to the model
      that the file may hold, which then are skipped.
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
  file = npz.read_vit(path)
  release = release_of(path_or_name) or release_of(path)
  leaves, skipped = dict(file.leaves), dict(file.skipped)
  try:
    changed = _fit_positions(leaves, skipped, vit, release)
    missing = _fit_leaves(leaves, skipped, vit, allow_missing, allow_unused)
  except ValueError as error:
    held = _describe(npz.fields(file.leaves), vit)
    raise ValueError(f"{path} does not fit the model: {error} {held}") from error
  summary = LoadReport(
    path=str(path),
    layout=file.layout,
    num_params=trees.count(leaves),
    loaded=tuple(sorted(leaves)),
    changed=changed,
    skipped=skipped,
    missing=tuple(missing),
    notes=_notes(vit, release),
  )
  (report or logging.info)(summary)
  if missing:
    leaves |= _drawn(vit, missing)
  return trees.unflatten(npz.stack(leaves) if vit.scan else leaves)


def save_backbone(
  params_backbone: Mapping[str, Any],
  path: str | os.PathLike[str],
  *,
  dtype: str = "float32",
) -> None:
  """Writes a backbone to an `.npz` file in big_vision's names, one group per block.

  The same parameters always give the same bytes. The file appears whole or not at
  all. float32 comes back exactly; float16 halves the file and rounds.

  Args:
    params_backbone: nested dict, `params["backbone"]`, of either layout.
    path: where to write.
    dtype: "float32" or "float16".

  Raises:
    ValueError: no backbone, unknown dtype, or values that the dtype cannot hold.
  """
  if dtype not in ("float32", "float16"):
    raise ValueError(f"dtype is {dtype!r}, expected 'float32' or 'float16'.")
  flat = trees.flatten(params_backbone)
  if npz.MARK not in flat:
    raise ValueError(
      f"these parameters hold no {npz_layout.MARK!r} but {some(flat) or 'nothing'}; "
      "pass params['backbone']."
    )
  flat = {name: np.asarray(leaf, np.float32) for name, leaf in flat.items()}
  arrays = {}
  for name, leaf in sorted(npz.unroll(flat).items()):
    with np.errstate(over="ignore"):
      arrays[name] = leaf.astype(dtype)
    if not np.isfinite(arrays[name]).all():
      raise ValueError(
        f"{name!r} holds NaN, infinite values, or values too large for {dtype}; "
        "nothing was written."
      )
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic_file(path) as temporary, open(temporary, "wb") as file:
    np.savez(file, **arrays)


def _expected_shapes(vit: ViT) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a ViT's leaves, with one group per block."""
  # Scanned, one block is traced instead of all.
  scanned = vit.clone(scan=True, remat=False)
  images = jax.ShapeDtypeStruct((1, vit.image_size, vit.image_size, 3), jnp.float32)
  shapes = jax.eval_shape(scanned.init, jax.random.key(0), images)["params"]
  flat = {
    # Zeros of no size in memory, so that shapes unroll like leaves.
    name: np.broadcast_to(np.float32(0), leaf.shape)
    for name, leaf in trees.flatten(shapes).items()
  }
  return {name: leaf.shape for name, leaf in npz.unroll(flat).items()}


def _fit_positions(
  leaves: dict[str, np.ndarray],
  skipped: dict[str, str],
  vit: ViT,
  release: Release | None,
) -> dict[str, str]:
  """Folds and resamples the position embedding in place; returns what changed."""
  changed = {}
  table = leaves.get("pos_embedding")
  if table is None and release is not None and release.positions == "sincos":
    grid = release.image_size // decode_variant(release.variant)["patch_size"]
    table = sincos_positions(grid, leaves[npz.MARK].shape[-1])
    changed["pos_embedding"] = "fixed sines and cosines, not in the file"
  if table is None:
    return changed
  if table.ndim != 3 or table.shape[0] != 1:
    raise ValueError(f"pos_embedding is {table.shape}, expected (1, n, width).")
  of_class, table = positions.split_positions(table)
  if of_class is not None and vit.pool != "tok":
    skipped["pos_embedding[0]"] = _other_pool("a class token", vit)
  elif of_class is not None and "cls" in leaves:
    leaves["cls"] = leaves["cls"] + of_class
    changed["cls"] = "entry 0 of the position embedding was added"
  old, new = math.isqrt(table.shape[1]), vit.image_size // vit.patch_size
  leaves["pos_embedding"] = positions.resample_positions(table, new)
  if old != new:
    how = f"resampled from {old} x {old} to {new} x {new} patches"
    before = changed.get("pos_embedding")
    changed["pos_embedding"] = f"{before}, {how}" if before else how
  return changed


def _fit_leaves(
  leaves: dict[str, np.ndarray],
  skipped: dict[str, str],
  vit: ViT,
  allow_missing: Sequence[str],
  allow_unused: Sequence[str],
) -> list[str]:
  """Drops in place what the model has no use for; returns what the file lacks."""
  expected = _expected_shapes(vit)
  got, want = leaves[npz.MARK].shape, expected[npz.MARK]
  if got[:2] != want[:2]:
    raise ValueError(
      f"{npz_layout.MARK} is {got}, expected {want}: patches of another size, and "
      "patch embeddings are not resampled."
    )
  for name in sorted(set(leaves) - set(expected)):
    reason = _unused(name, vit)
    if reason is None and _matches(name, allow_unused):
      reason = "unknown to the model, allowed"
    if reason is not None:
      skipped[name] = reason
      del leaves[name]
  missing = sorted(set(expected) - set(leaves))
  refused = [name for name in missing if not _matches(name, allow_missing)]
  unused = sorted(set(leaves) - set(expected))
  shapes = [
    f"{name} is {leaves[name].shape} in the file, {shape} in the model"
    # The embeddings first: their shapes say most.
    for name, shape in sorted(expected.items(), key=lambda item: "/enc" in item[0])
    if name in leaves and leaves[name].shape != shape
  ]
  problems = {
    "of another shape": shapes,
    "that only the model has": refused,
    "that only the file has": unused,
  }
  found = [
    f"{len(names)} leaves {what}: {some(names)}"
    for what, names in problems.items()
    if names
  ]
  if found:
    raise ValueError("; ".join(found) + ".")
  return missing


def _unused(name: str, vit: ViT) -> str | None:
  """Returns why a model that pools otherwise needs no such leaf, or None."""
  if name == "cls" and vit.pool != "tok":
    return _other_pool("a class token", vit)
  if name.startswith("MAPHead_0/") and vit.pool != "map":
    return _other_pool("attention pooling", vit)
  return None


def _other_pool(what: str, vit: ViT) -> str:
  return f"for {what}, but the model has pool={vit.pool!r}"


def _describe(held: Mapping[str, Any], vit: ViT) -> str:
  """Returns what the file holds, and the model that would fit it."""
  size = tuple(held.get(f) for f in ("width", "depth", "mlp_dim", "num_heads"))
  variant = next((name for name, known in VARIANTS.items() if known == size), None)
  called = f", which is {variant}/{held.get('patch_size')}" if variant else ""
  listed = ", ".join(f"{field}={value!r}" for field, value in held.items())
  other = {f: value for f, value in held.items() if getattr(vit, f) != value}
  mend = f" Build the model with backbone_kwargs={other}." if other else ""
  return f"The file holds {listed}{called}.{mend}"


def _notes(vit: ViT, release: Release | None) -> tuple[str, ...]:
  if release is None or not release.url or release.gelu == vit.gelu:
    return ()
  return (
    f"Note: this release was trained with gelu={release.gelu!r}, the model has "
    f"{vit.gelu!r}.",
  )


def _drawn(vit: ViT, names: Sequence[str]) -> dict[str, np.ndarray]:
  """Returns fresh values of the named leaves."""
  images = jnp.zeros((1, vit.image_size, vit.image_size, 3))

  def draw(key: jax.Array) -> dict[str, jax.Array]:
    flat = trees.flatten(vit.clone(scan=False).init(key, images)["params"])
    return {name: flat[name] for name in names}

  # Compiled, only what is asked for is computed.
  return jax.device_get(jax.jit(draw)(jax.random.key(0)))


def _matches(name: str, patterns: Sequence[str]) -> bool:
  return any(re.fullmatch(pattern, name) for pattern in patterns)
