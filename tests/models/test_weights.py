"""Backbone files: every layout in and out, known names, and every way to fail."""

import concurrent.futures
import contextlib
import gc
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import socket
import struct
import sys
import threading
import time
import tracemalloc
import warnings
import zipfile

from absl import logging
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from insvp_jax import trees
from insvp_jax.models import positions, weights
from insvp_jax.models.classifier import create_model
from insvp_jax.models.vit import ViT, decode_variant
from insvp_jax.models.weights import downloads, npz, releases
from insvp_jax.models.weights.releases import Release

SIZES = {
  "width": 8,
  "depth": 3,
  "mlp_dim": 12,
  "num_heads": 2,
  "patch_size": 4,
  "image_size": 16,
}
OLD = {
  "LayerNorm_1": "LayerNorm_2",
  "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
  "MlpBlock_0": "MlpBlock_3",
}


def make_vit(**overrides):
  return ViT(**{**SIZES, **overrides})


def make_leaves(vit, seed=0):
  """Random leaves under big_vision's names, one group per block."""
  images = jax.ShapeDtypeStruct((1, vit.image_size, vit.image_size, 3), jnp.float32)
  init = vit.clone(scan=False).init
  shapes = trees.flatten(jax.eval_shape(init, jax.random.key(0), images)["params"])
  rng = np.random.default_rng(seed)
  return {
    name: rng.standard_normal(leaf.shape).astype(np.float32)
    for name, leaf in shapes.items()
  }


def to_original(leaves):
  """The same ViT as the original release would have stored it, with a head."""
  out = {}
  for name, leaf in leaves.items():
    if name.startswith("Transformer/encoderblock_"):
      name = "/".join(OLD.get(part, part) for part in name.split("/"))
    out[name] = leaf
  of_class = np.full((1, 1, leaves["cls"].shape[-1]), 0.25, np.float32)
  out["cls"] = leaves["cls"] - of_class
  table = np.concatenate([of_class, out.pop("pos_embedding")], axis=1)
  out["Transformer/posembed_input/pos_embedding"] = table
  width = leaves["cls"].shape[-1]
  out |= {"pre_logits/kernel": np.ones((width, width)), "pre_logits/bias": np.ones(3)}
  return out | {"head/kernel": np.ones((width, 5)), "head/bias": np.ones(5)}


def write(path, leaves):
  np.savez(path, **leaves)
  return path


def load(path, model, **kwargs):
  """Returns (flat leaves, report)."""
  reports = []
  params = weights.load_backbone(path, model, report=reports.append, **kwargs)
  return trees.flatten(params), reports[0]


def assert_same(got, want, atol=0.0):
  assert sorted(got) == sorted(want)
  for name, leaf in want.items():
    assert got[name].dtype == np.float32, name
    np.testing.assert_allclose(got[name], leaf, rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def leaves():
  return make_leaves(make_vit())


# What is read


@pytest.mark.parametrize("case", ["vpt_deep", "vpt_shallow"])
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("skip_unread", [False, True])
def test_golden_encoding_through_the_loader(
  golden, recipe, tmp_path, case, scan, skip_unread
):
  data = golden(case)
  config = data["config"]
  drawn = recipe.vit(config["seed"], **config["vit"])
  path = write(tmp_path / "ViT.npz", drawn)
  fields = {k: v for k, v in config["vit"].items() if k != "num_classes"}
  vit = ViT(**fields, scan=scan, skip_unread=skip_unread)
  params = weights.load_backbone(path, vit)
  size = config["vit"]["image_size"]
  images = recipe.images((config["batch"], size, size, 3), config["seed"])

  @jax.jit
  def apply(params, images):
    feature, state = vit.apply(
      {"params": params},
      images,
      capture_intermediates=lambda module, _: module.name == "Transformer",
      mutable=["intermediates"],
    )
    return feature, state["intermediates"]["Transformer"]["__call__"][0]

  with jax.default_matmul_precision("highest"):
    feature, encoded = apply(params, images)
  logits = np.asarray(feature) @ drawn["head/kernel"] + drawn["head/bias"]
  # The head reads the class token, the first one.
  expected = data["plain_encoded"][:, :1] if skip_unread else data["plain_encoded"]
  np.testing.assert_allclose(encoded, expected, rtol=0, atol=2e-5)
  np.testing.assert_allclose(logits, data["plain_logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("layout", ["original", "unrolled", "stacked"])
def test_every_layout_into_every_layout(tmp_path, leaves, layout, scan):
  stored = {
    "original": to_original(leaves),
    "unrolled": leaves,
    "stacked": npz.stack(leaves),
  }[layout]
  got, report = load(write(tmp_path / "x.npz", stored), make_vit(scan=scan))
  assert_same(got, npz.stack(leaves) if scan else leaves, atol=1e-6)
  assert report.loaded == tuple(sorted(leaves))
  assert report.missing == ()
  assert report.num_params == trees.count(trees.unflatten(leaves))
  heads = {"head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias"}
  assert set(report.skipped) == (heads if layout == "original" else set())
  assert set(report.changed) == ({"cls"} if layout == "original" else set())


@pytest.mark.parametrize("prefix", npz.PREFIXES)
def test_prefixes_and_training_state(tmp_path, leaves, prefix):
  stored = {prefix + name: leaf for name, leaf in leaves.items()}
  if prefix:
    stored |= {"opt/count": np.array(3), "opt/mu/cls": np.ones(2), "chrono": np.ones(1)}
  got, report = load(write(tmp_path / "x.npz", stored), make_vit())
  assert_same(got, leaves)
  assert set(report.skipped) == (set(stored) - {prefix + name for name in leaves})


def test_position_embedding_inside_the_encoder(tmp_path, leaves):
  stored = dict(leaves)
  stored["Transformer/pos_embedding"] = stored.pop("pos_embedding")
  got, _ = load(write(tmp_path / "x.npz", stored), make_vit())
  assert_same(got, leaves)


def test_map_head_without_a_module_of_its_own(tmp_path):
  vit = make_vit(pool="map")
  leaves = make_leaves(vit)
  stored = {name.removeprefix("MAPHead_0/"): leaf for name, leaf in leaves.items()}
  assert "probe" in stored
  got, _ = load(write(tmp_path / "x.npz", stored), vit)
  assert_same(got, leaves)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_float_types_become_float32(tmp_path, leaves, dtype):
  stored = {name: leaf.astype(dtype) for name, leaf in leaves.items()}
  got, _ = load(write(tmp_path / "x.npz", stored), make_vit())
  assert_same(got, {name: leaf.astype(np.float32) for name, leaf in stored.items()})


def test_class_token_is_skipped_where_the_model_averages(tmp_path, leaves):
  vit = make_vit(pool="gap")
  got, report = load(write(tmp_path / "x.npz", to_original(leaves)), vit)
  assert_same(got, {n: leaf for n, leaf in leaves.items() if n != "cls"})
  assert "pool='gap'" in report.skipped["cls"]
  assert "pool='gap'" in report.skipped["pos_embedding[0]"]
  assert report.changed == {}


def test_map_head_is_skipped_where_the_model_averages(tmp_path):
  leaves = make_leaves(make_vit(pool="map"))
  got, report = load(write(tmp_path / "x.npz", leaves), make_vit(pool="gap"))
  skipped = {name for name in leaves if name.startswith("MAPHead_0/")}
  assert skipped and set(report.skipped) == skipped
  assert set(got) == set(leaves) - skipped


def test_a_classifier_takes_its_backbone(tmp_path, leaves):
  sizes = {k: v for k, v in SIZES.items() if k != "image_size"}
  model = create_model(
    "mu/4", "linear", num_classes=2, image_size=16, backbone_kwargs=sizes
  )
  got, _ = load(write(tmp_path / "x.npz", leaves), model)
  assert_same(got, leaves)


def test_another_resolution_is_resampled_and_reported(tmp_path, leaves):
  path = write(tmp_path / "x.npz", to_original(leaves))
  got, report = load(path, make_vit(image_size=24))
  want = positions.resample_positions(leaves["pos_embedding"], 6)
  assert got["pos_embedding"].shape == (1, 36, 8)
  np.testing.assert_array_equal(got["pos_embedding"], want)
  assert report.changed["pos_embedding"] == "resampled from 4 x 4 to 6 x 6 patches"


def test_fixed_positions_come_with_their_release(tmp_path, monkeypatch, leaves):
  release = Release("mu/4", "gs://bucket/fixed.npz", "gap", positions="sincos")
  release = Release(**{**release.__dict__, "image_size": 16})
  monkeypatch.setitem(releases.RELEASES, "fixed", release)
  without = {n: v for n, v in leaves.items() if n not in ("cls", "pos_embedding")}
  got, report = load(write(tmp_path / "fixed.npz", without), make_vit(pool="gap"))
  # Patch (y, x) = (1, 2): the lowest frequency pair turns by one radian per patch.
  row = got["pos_embedding"][0, 1 * 4 + 2]
  np.testing.assert_allclose(row[0::2], np.sin([2, 2 + np.pi / 2, 1, 1 + np.pi / 2]))
  assert "sines" in report.changed["pos_embedding"]
  other = write(tmp_path / "other.npz", without)
  with pytest.raises(ValueError, match="only the model has: pos_embedding"):
    load(other, make_vit(pool="gap"))


def test_report_is_one_readable_line(tmp_path, monkeypatch, leaves):
  monkeypatch.setattr(
    logging, "info", lambda message, *args: lines.append(str(message))
  )
  lines = []
  path = write(tmp_path / "ViT.npz", to_original(leaves))
  weights.load_backbone(path, make_vit(image_size=24))
  (text,) = lines
  assert "\n" not in text
  for part in (
    f"{len(leaves)} of {len(leaves)} leaves",
    f"{sum(v.size for v in leaves.values()) + 20 * 8:,} parameters",
    str(path),
    "the original release's names",
    "resampled from 4 x 4 to 6 x 6",
    "cls: entry 0",
    "; skipped: pre_logits/kernel, pre_logits/bias, head/kernel, head/bias (a head of",
  ):
    assert part in text, part
  assert "missing" not in text


def test_report_notes_another_gelu(tmp_path, monkeypatch, leaves):
  release = Release("mu/4", "gs://bucket/torch.npz", gelu="exact")
  monkeypatch.setitem(releases.RELEASES, "torch", release)
  path = write(tmp_path / "torch.npz", leaves)
  assert "gelu='exact'" in str(load(path, make_vit())[1])
  assert load(path, make_vit(gelu="exact"))[1].notes == ()


def test_missing_leaves_are_drawn_only_if_allowed(tmp_path):
  vit = make_vit(pool="map", scan=True)
  leaves = make_leaves(vit)
  held = {n: leaf for n, leaf in leaves.items() if not n.startswith("MAPHead_0")}
  path = write(tmp_path / "x.npz", held)
  with pytest.raises(ValueError, match=r"only the model has: MAPHead_0.*pool.*gap"):
    load(path, vit)
  got, report = load(path, vit, allow_missing=("MAPHead_0/.*",))
  assert set(report.missing) == set(leaves) - set(held)
  assert "MAPHead_0" in str(report)
  assert got["MAPHead_0/probe"].shape == (1, 1, 8)
  assert np.ptp(got["MAPHead_0/probe"]) > 0
  np.testing.assert_array_equal(got["embedding/kernel"], leaves["embedding/kernel"])


def test_unknown_leaves_are_skipped_only_if_allowed(tmp_path, leaves):
  path = write(tmp_path / "x.npz", leaves | {"gamma": np.ones(3)})
  with pytest.raises(ValueError, match="only the file has: gamma"):
    load(path, make_vit())
  got, report = load(path, make_vit(), allow_unused=("gamma",))
  assert_same(got, leaves)
  assert list(report.skipped) == ["gamma"]


# What does not fit


@pytest.mark.parametrize(
  ("overrides", "expected"),
  [
    ({"width": 16}, r"embedding/kernel is \(4, 4, 3, 8\) in the file.*\(4, 4, 3, 16\)"),
    ({"depth": 2}, r"only the file has: Transformer/encoderblock_2/.*'depth': 3"),
    ({"depth": 5}, r"only the model has: Transformer/encoderblock_3/.*and 28 more"),
    ({"mlp_dim": 16}, r"MlpBlock_0.*12.*backbone_kwargs=\{'mlp_dim': 12\}"),
    ({"num_heads": 4}, r"backbone_kwargs=\{'num_heads': 2\}"),
    ({"patch_size": 8}, r"not resampled.*backbone_kwargs=\{'patch_size': 4\}"),
  ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_other_sizes_name_leaves_and_the_mend(
  tmp_path, leaves, overrides, expected, scan
):
  path = write(tmp_path / "x.npz", leaves)
  with pytest.raises(ValueError, match=expected):
    load(path, make_vit(**overrides, scan=scan))


def test_a_known_variant_is_named(tmp_path):
  vit = make_vit(**decode_variant("mu/4"))
  path = write(tmp_path / "x.npz", make_leaves(vit))
  with pytest.raises(ValueError, match="which is mu/4"):
    load(path, make_vit())


def test_no_class_token_in_the_file(tmp_path, leaves):
  path = write(tmp_path / "x.npz", {n: v for n, v in leaves.items() if n != "cls"})
  with pytest.raises(ValueError, match=r"cls.*backbone_kwargs=\{'pool': 'gap'\}"):
    load(path, make_vit())


@pytest.mark.parametrize("entries", [2 * 3, 4 * 4 + 2])
def test_grid_that_is_not_square(tmp_path, leaves, entries):
  table = np.zeros((1, entries, 8), np.float32)
  path = write(tmp_path / "x.npz", leaves | {"pos_embedding": table})
  with pytest.raises(ValueError, match=f"{entries} entries, expected k . k"):
    load(path, make_vit())


def test_position_embedding_of_two_axes(tmp_path, leaves):
  path = write(tmp_path / "x.npz", leaves | {"pos_embedding": np.zeros((16, 8))})
  with pytest.raises(ValueError, match=r"\(16, 8\), expected \(1, n, width\)"):
    load(path, make_vit())


@pytest.mark.parametrize(
  ("name", "value", "expected"),
  [
    ("cls", np.full((1, 1, 8), np.nan), "'cls'.*NaN"),
    ("cls", np.zeros((1, 1, 8), np.int32), "'cls'.*is int32"),
    ("Transformer/encoderblock/x", np.zeros((3, 2)), "only the file has.*block_0/x"),
    ("Transformer/encoderblock_0/LayerNorm_2/bias", np.zeros(8), "holds .* twice"),
    ("Transformer/pos_embedding", np.zeros((1, 16, 8)), "'pos_embedding' twice"),
  ],
)
def test_bad_leaves(tmp_path, leaves, name, value, expected):
  path = write(tmp_path / "x.npz", leaves | {name: value})
  with pytest.raises(ValueError, match=expected):
    load(path, make_vit())


def test_stacks_of_different_depths_and_mixed_layouts(leaves):
  stacked = npz.stack(leaves)
  name = "Transformer/encoderblock/LayerNorm_0/bias"
  with pytest.raises(ValueError, match="different depths"):
    npz.unroll(stacked | {name: stacked[name][:2]})
  with pytest.raises(ValueError, match="keep one"):
    npz.unroll(stacked | leaves)
  del (broken := dict(leaves))["Transformer/encoderblock_1/LayerNorm_0/bias"]
  with pytest.raises(ValueError, match="block 1 of 3 has no 'LayerNorm_0/bias'"):
    npz.stack(broken)


# Files that are no such files


class Bomb:
  """Unpickling it would leave a trace."""

  def __reduce__(self):
    return (pytest.fail, ("a pickle was loaded",))


def _npz_bytes(leaves):
  buffer = io.BytesIO()
  np.savez(buffer, **leaves)
  return buffer.getvalue()


def _zip_of(name, content):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    archive.writestr(name, content)
  return buffer.getvalue()


def _npy_bytes():
  buffer = io.BytesIO()
  np.save(buffer, np.ones(3))
  return buffer.getvalue()


@pytest.mark.parametrize(
  ("make", "expected"),
  [
    (lambda data: b"", "not an .npz"),
    (lambda data: b"<!DOCTYPE html>", "DOCTYPE"),
    (lambda data: pickle.dumps({"cls": Bomb()}), "not an .npz"),
    (lambda data: _npy_bytes(), "not an .npz"),
    (lambda data: data[: len(data) // 2], "truncated"),
    (lambda data: data[:-10], "truncated"),
    (lambda data: _zip_of("archive/data.pkl", b"x"), "PyTorch"),
    (lambda data: _zip_of("embedding/kernel.npy", b"x" * 40), "cannot be read"),
    (lambda data: _npz_bytes({"a": np.ones(2)}), "holds no ViT.*It starts with: a"),
    (lambda data: _npz_bytes({}), "holds nothing"),
  ],
)
def test_not_a_backbone_file(tmp_path, make, expected):
  # One large leaf, so that the middle of the file is inside it.
  data = _npz_bytes({"embedding/kernel": np.zeros((4, 4, 3, 4096), np.float32)})
  path = tmp_path / "x.npz"
  path.write_bytes(make(data))
  with pytest.raises(ValueError, match=expected) as caught:
    load(path, make_vit())
  assert str(path) in str(caught.value)


def test_a_flipped_bit_is_noticed(tmp_path, leaves):
  path = tmp_path / "x.npz"
  write(path, leaves)
  data = bytearray(path.read_bytes())
  # The zip's checksum notices, also where the number would be a good one.
  data[data.index(leaves["cls"].tobytes())] ^= 1
  path.write_bytes(data)
  with pytest.raises(ValueError, match="damaged"):
    load(path, make_vit())


def test_pickled_members_are_refused(tmp_path, leaves):
  array = np.empty(1, object)
  array[0] = Bomb()
  path = tmp_path / "x.npz"
  np.savez(path, **(leaves | {"cls": array}), allow_pickle=True)
  with pytest.raises(ValueError, match="pickled"):
    load(path, make_vit())


def _claim(path, name, shape, leaves):
  """Writes a file in which one leaf claims a shape that it has not room for."""
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for leaf_name, leaf in leaves.items():
      stream = io.BytesIO()
      np.save(stream, leaf)
      data = stream.getvalue()
      if leaf_name == name:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n"
        data = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()
      archive.writestr(f"{leaf_name}.npy", data)


@pytest.mark.parametrize("name", ["cls", "embedding/kernel", "pos_embedding"])
@pytest.mark.parametrize("shape", [(2**40,), (1, 1, 2**40), (-1, 1, 8), (2**40, 1, 8)])
def test_a_header_of_terabytes_is_an_error_at_once(tmp_path, leaves, name, shape):
  _claim(tmp_path / "x.npz", name, shape, leaves)
  with pytest.raises(ValueError, match="x.npz cannot be read as an .npz file"):
    load(tmp_path / "x.npz", make_vit())


@pytest.mark.parametrize(
  ("name", "shape", "expected"),
  [
    ("cls", (1, 1, 2**24), r"cls is \(1, 1, 16777216\) in the file, \(1, 1, 8\) in"),
    ("pos_embedding", (1, 17, 2**20), r"pos_embedding is .* in the file"),
    ("pos_embedding", (1, 2**21, 8), r"pos_embedding is .*expected \(1, n, width\)"),
    ("embedding/kernel", (4, 4, 3, 2**19), "does not fit the model"),
    ("Transformer/encoderblock_0/LayerNorm_0/scale", (2**24,), "of another shape"),
    ("more", (2**24,), "that only the file has: more"),
  ],
)
def test_what_does_not_fit_is_not_unpacked(tmp_path, leaves, name, shape, expected):
  # More than 60 megabytes, which a file of some 100 kB holds.
  large = {name: np.broadcast_to(np.float32(0), shape)}
  np.savez_compressed(tmp_path / "x.npz", **leaves | large)
  tracemalloc.start()
  with pytest.raises(ValueError, match=expected):
    load(tmp_path / "x.npz", make_vit())
  assert tracemalloc.get_traced_memory()[1] < 2**25
  tracemalloc.stop()


def test_a_stack_of_too_many_blocks_is_an_error_at_once(tmp_path, leaves):
  stacked = {"Transformer/encoderblock/LayerNorm_0/scale": np.zeros((10**6, 0))}
  np.savez(tmp_path / "x.npz", **leaves | stacked)
  with pytest.raises(ValueError, match="x.npz: .* expected at most 1000 blocks"):
    load(tmp_path / "x.npz", make_vit())


def test_only_files_are_read(tmp_path):
  os.mkfifo(tmp_path / "x.npz")
  with pytest.raises(ValueError, match="x.npz is a pipe"):
    npz.read_vit(tmp_path / "x.npz")


# Writing


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_save_and_load(tmp_path, leaves, scan, dtype):
  vit = make_vit(scan=scan)
  params = trees.unflatten(npz.stack(leaves) if scan else leaves)
  path = tmp_path / "deeper" / "x.npz"
  weights.save_backbone(jax.tree.map(jnp.asarray, params), path, dtype=dtype)
  with np.load(path, allow_pickle=False) as file:
    assert sorted(file.files) == sorted(leaves)
    assert {str(file[name].dtype) for name in file.files} == {dtype}
  got, report = load(path, vit)
  rounded = {n: v.astype(dtype).astype(np.float32) for n, v in params_flat(params)}
  assert_same(got, rounded)
  assert report.layout == "big_vision's names"
  again = tmp_path / "again.npz"
  weights.save_backbone(trees.unflatten(got), again, dtype=dtype)
  assert weights.file_digest(again) == weights.file_digest(path)


def params_flat(params):
  return trees.flatten(params).items()


def test_bfloat16_parameters_are_written_as_float32(tmp_path, leaves):
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), trees.unflatten(leaves))
  weights.save_backbone(params, tmp_path / "x.npz")
  got, _ = load(tmp_path / "x.npz", make_vit())
  assert_same(got, {n: np.asarray(v, np.float32) for n, v in params_flat(params)})


def test_save_refuses_what_it_cannot_hold(tmp_path, leaves):
  params = trees.unflatten(leaves)
  path = tmp_path / "x.npz"
  with pytest.raises(ValueError, match="'bfloat16', expected 'float32'"):
    weights.save_backbone(params, path, dtype="bfloat16")
  with pytest.raises(ValueError, match=r"pass params\['backbone'\]"):
    weights.save_backbone({"backbone": params}, path)
  large = trees.unflatten(leaves | {"cls": np.full((1, 1, 8), 1e5, np.float32)})
  with pytest.raises(ValueError, match="'cls'.*too large for float16"):
    weights.save_backbone(large, path, dtype="float16")
  weights.save_backbone(large, path)
  assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch, leaves):
  path = tmp_path / "x.npz"
  path.write_bytes(b"old")

  def interrupted(file, **arrays):
    file.write(b"half")
    raise KeyboardInterrupt

  monkeypatch.setattr(np, "savez", interrupted)
  with pytest.raises(KeyboardInterrupt):
    weights.save_backbone(trees.unflatten(leaves), path)
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]


# Position embeddings

grids = st.integers(1, 9)


@given(old=grids, new=grids, seed=st.integers(0, 3))
def test_resampling_is_scipys_zoom(old, new, seed):
  table = np.random.default_rng(seed).standard_normal((1, old * old, 3))
  got = positions.resample_positions(table, new)
  grid = table.reshape(old, old, 3)
  want = scipy.ndimage.zoom(grid, (new / old, new / old, 1), order=1)
  np.testing.assert_allclose(got, want.reshape(1, new * new, 3), atol=1e-12)
  assert got.min() >= table.min() - 1e-12 and got.max() <= table.max() + 1e-12


@given(old=st.integers(2, 9), new=st.integers(2, 9), slope=st.floats(-2, 2))
def test_resampling_keeps_planes_and_corners(old, new, slope):
  def plane(k):
    y, x = np.mgrid[:k, :k] / (k - 1)
    return (1 + slope * y - x).reshape(1, k * k, 1)

  np.testing.assert_allclose(
    positions.resample_positions(plane(old), new), plane(new), atol=1e-12
  )


@given(grid=grids)
def test_same_grid_is_untouched(grid):
  table = np.random.default_rng(grid).standard_normal((1, grid * grid, 2))
  assert positions.resample_positions(table, grid) is table


@given(grid=grids)
def test_class_entry_is_split_off(grid):
  table = np.arange(grid * grid + 1.0).reshape(1, -1, 1)
  of_class, rest = positions.split_positions(table)
  assert of_class.item() == 0 and rest.shape == (1, grid * grid, 1)
  none, same = positions.split_positions(rest)
  assert none is None and same is rest


def test_resampling_wants_a_square():
  with pytest.raises(ValueError, match="6 position embeddings form no square"):
    positions.resample_positions(np.zeros((1, 6, 2)), 3)


# Names


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers as the server's attributes say."""

  def do_GET(self):
    server = self.server
    server.requests.append((self.path, self.headers))
    server.may_answer.wait(timeout=20)
    data, start = server.files.get(self.path), 0
    if data is None:
      self.send_error(404)
      return
    if isinstance(data, str):
      self.send_response(302)
      self.send_header("Location", data)
      self.end_headers()
      with contextlib.suppress(ConnectionError):
        for _ in range(1 << 10):
          self.wfile.write(bytes(1 << 16))
        server.was_read = True
      return
    wanted = self.headers.get("Range")
    if server.sends_ranges and wanted:
      start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
    if wanted and server.sends_ranges:
      self.send_response(206 if start < len(data) else 416)
      self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    else:
      self.send_response(200)
    if server.says_length:
      self.send_header("Content-Length", str(len(data[start:])))
    self.end_headers()
    # A client that has seen enough closes the connection.
    with contextlib.suppress(ConnectionError):
      self.wfile.write(data[start:][: server.breaks_after])

  def log_message(self, *args):
    pass


@pytest.fixture
def server(monkeypatch):
  """A server on this machine; `files` maps paths to bytes."""
  monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
  monkeypatch.setattr(downloads, "_SCHEME", "http")
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.requests = {}, []
    server.breaks_after, server.sends_ranges = None, True
    server.says_length, server.was_read = True, False
    server.may_answer = threading.Event()
    server.may_answer.set()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
  # The answer to a download that failed is closed by the garbage collector alone, which
  # would warn of it in whichever test it happens to run.
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)
    gc.collect()


@pytest.fixture
def published(tmp_path, server, monkeypatch, leaves):
  """The content of a release "tiny"."""
  content = write(tmp_path / "content.npz", leaves).read_bytes()
  server.files["/tiny.npz"] = content
  release = Release("mu/4", f"{server.url}/tiny.npz")
  monkeypatch.setitem(releases.RELEASES, "tiny", release)
  monkeypatch.setenv("INSVP_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(downloads, "_CHUNK", 1000)
  return content


def cached_files(tmp_path):
  files = (tmp_path / "cache").rglob("*")
  return [p for p in files if p.is_file() and p.suffix != ".lock"]


def test_download_is_cached_and_said(tmp_path, server, published, leaves, capsys):
  got, _ = load("tiny", make_vit())
  assert_same(got, leaves)
  (path,) = cached_files(tmp_path)
  assert path.parts[-2:] == (f"127.0.0.1:{server.server_port}", "tiny.npz")
  before, after = capsys.readouterr().err.splitlines()
  assert before == f"downloading {server.url}/tiny.npz (0.0 MiB) to {path}"
  digest = weights.file_digest(path)
  said = rf"downloaded 0\.0 MiB in \d s \(\d+\.\d MiB/s\), sha256 {digest}"
  assert re.fullmatch(said, after)
  server.files.clear()
  assert weights.resolve("tiny") == path
  assert capsys.readouterr().err == ""
  with pytest.raises(FileNotFoundError, match="404 Client Error: Not Found"):
    weights.resolve("tiny", cache_dir=tmp_path / "elsewhere")


def test_a_url_is_cached_too(tmp_path, server, published, monkeypatch):
  monkeypatch.setattr(downloads, "_GCS_URL", f"{server.url}/")
  server.files["/some_bucket/a%2Bb/x.npz"] = published
  path = weights.resolve("gs://some_bucket/a+b/x.npz")
  assert path == tmp_path / "cache" / "some_bucket" / "a+b" / "x.npz"
  assert weights.resolve(f"{server.url}/some_bucket/a%2Bb/x.npz") == path
  assert len(server.requests) == 1
  assert downloads._cache_name("https://example.org/../y.npz") == "example.org/y.npz"


def test_offline_says_what_to_put_where(tmp_path, monkeypatch):
  def offline(*args, **kwargs):
    raise socket.gaierror(-2, "Name or service not known")

  monkeypatch.setattr(socket, "getaddrinfo", offline)
  monkeypatch.setenv("NO_PROXY", "*")
  monkeypatch.setenv("INSVP_CACHE", str(tmp_path / "cache"))
  with pytest.raises(FileNotFoundError) as caught:
    weights.resolve("vit_b16_i21k")
  text = str(caught.value)
  url = "https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz"
  target = tmp_path / "cache" / "vit_models" / "imagenet21k" / "ViT-B_16.npz"
  assert url in text and str(target) in text and "Name or service not known" in text
  assert "INSVP_CACHE" in text and "Max retries" not in text
  assert not [p for p in cached_files(tmp_path) if p.suffix == ".npz"]
  # The advice works.
  target.write_bytes(b"put by hand")
  assert weights.resolve("vit_b16_i21k") == target


def test_cache_is_below_home_by_default(monkeypatch, tmp_path):
  monkeypatch.delenv("INSVP_CACHE", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  target = tmp_path / ".cache/insvp_jax/vit_models/imagenet21k/ViT-L_32.npz"
  target.parent.mkdir(parents=True)
  target.write_bytes(b"x")
  assert weights.resolve("vit_l32_i21k") == target


def test_an_interrupted_download_is_resumed(tmp_path, server, published, capsys):
  total, server.breaks_after = len(published), 1000
  for received in (1000, 2000):
    with pytest.raises(FileNotFoundError, match=f"after {received} of {total} bytes; "):
      weights.resolve("tiny")
    assert not [p for p in cached_files(tmp_path) if p.suffix == ".npz"]
  server.breaks_after = None
  path = weights.resolve("tiny")
  assert path.read_bytes() == published
  assert cached_files(tmp_path) == [path]
  wanted = [headers["Range"] for _, headers in server.requests]
  assert wanted == [None, "bytes=1000-", "bytes=2000-"]
  assert capsys.readouterr().err.count(f"{path}, resuming at 0.0 MiB\n") == 2


def test_ctrl_c_leaves_what_can_be_resumed(tmp_path, server, published, monkeypatch):
  def interrupt(meter, size):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(downloads._Meter, "update", interrupt)
    weights.resolve("tiny")
  assert not [p for p in cached_files(tmp_path) if p.suffix == ".npz"]
  assert weights.resolve("tiny").read_bytes() == published
  assert server.requests[-1][1]["Range"] == "bytes=1000-"


@pytest.mark.parametrize("case", ["no ranges", "complete"])
def test_what_cannot_be_resumed_starts_over(tmp_path, server, published, case):
  server.breaks_after = 1000
  with pytest.raises(FileNotFoundError, match="after 1000 of"):
    weights.resolve("tiny")
  server.breaks_after = None
  server.sends_ranges = case != "no ranges"
  if case == "complete":  # Killed before it was renamed: there is no more to be sent.
    (part,) = cached_files(tmp_path)
    part.write_bytes(published)
  path = weights.resolve("tiny")
  assert path.read_bytes() == published
  assert cached_files(tmp_path) == [path]


def test_two_downloads_at_once(tmp_path, server, published):
  server.may_answer.clear()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = [pool.submit(weights.resolve, "tiny") for _ in range(2)]
    while not server.requests:
      time.sleep(0.001)
    server.may_answer.set()
  first, second = (future.result() for future in found)
  assert first == second and first.read_bytes() == published
  assert len(server.requests) == 1
  assert cached_files(tmp_path) == [first]


def test_digest_of_a_download_is_checked(tmp_path, server, published, monkeypatch):
  digest = hashlib.sha256(published).hexdigest()
  url = f"{server.url}/tiny.npz"
  good, bad = Release("mu/4", url, sha256=digest), Release("mu/4", url, sha256="0" * 64)
  monkeypatch.setitem(releases.RELEASES, "tiny", bad)
  with pytest.raises(ValueError, match=f"sha256 {digest}, expected 0000"):
    weights.resolve("tiny")
  assert cached_files(tmp_path) == []
  monkeypatch.setitem(releases.RELEASES, "tiny", good)
  path = weights.resolve("tiny")
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match="Delete it"):
    weights.resolve("tiny")


_WRONG = {
  "a login page": (
    b"<!DOCTYPE html>",
    True,
    "no file of weights: it begins with b'<!D",
  ),
  "an error in JSON": (b'{"error": "login"}', True, "no file of weights: it begins"),
  "a part without a length": (slice(1000), False, "no file of weights"),
  "too large, as it says": (bytes(2 << 20), True, "more than the 1.0 MiB"),
  "too large, unsaid": (bytes(2 << 20), False, "more than the 1.0 MiB"),
  "another scheme": (
    "file:///etc/passwd",
    True,
    "'file:///etc/passwd' is not requested",
  ),
  "a private name": ("http://localhost/x.npz", True, "not public"),
  "a private address": ("http://169.254.169.254/x", True, "not public"),
  "one inside of IPv6": ("http://[::ffff:10.0.0.1]/x", True, "not public"),
  "no address": ("http://[", True, "no address"),
  "a circle": ("/x.npz", True, "more than 5 redirections"),
}


@pytest.mark.parametrize("case", _WRONG)
def test_a_wrong_download_leaves_nothing(
  tmp_path, server, published, monkeypatch, case
):
  data, server.says_length, expected = _WRONG[case]
  monkeypatch.setenv(downloads.LIMIT_VARIABLE, str(2**-10))
  url = f"{server.url}/x.npz"
  server.files["/x.npz"] = published[data] if isinstance(data, slice) else data
  with pytest.raises((ValueError, FileNotFoundError), match=re.escape(expected)):
    weights.resolve(url)
  assert cached_files(tmp_path) == []
  # Nor does it stand in the way of the right one, which lies elsewhere on this host.
  server.files["/x.npz"] = "/tiny.npz"
  assert weights.resolve(url).read_bytes() == published
  # What comes with a redirection is nothing to wait for.
  assert not server.was_read


def test_only_https_is_requested(tmp_path, server, published, monkeypatch):
  monkeypatch.undo()
  monkeypatch.setenv("INSVP_CACHE", str(tmp_path / "cache"))
  with pytest.raises(ValueError, match="only https:// is: on its way"):
    weights.resolve(f"{server.url}/tiny.npz")
  assert not server.requests


def test_a_silent_server_is_not_waited_for(tmp_path, server, published, monkeypatch):
  monkeypatch.setattr(downloads, "_TIMEOUT_SECONDS", 0.05)
  server.may_answer.clear()
  with pytest.raises(FileNotFoundError, match="Read timed out"):
    weights.resolve("tiny")
  server.may_answer.set()
  assert cached_files(tmp_path) == []


def test_a_part_that_is_a_link_is_not_written_to(tmp_path, server, published):
  (tmp_path / "mine").write_bytes(b"x")
  folder = tmp_path / "cache" / server.url.removeprefix("http://")
  folder.mkdir(parents=True)
  (folder / ".tiny.npz.part").symlink_to(tmp_path / "mine")
  with pytest.raises(ValueError, match="is a link to"):
    weights.resolve("tiny")
  assert (tmp_path / "mine").read_bytes() == b"x"


def test_a_release_is_as_large_as_it_is(monkeypatch):
  release = releases.RELEASES["vit_b16_i21k"]
  # Of ViT-B/16 with its head in float32.
  assert 1.5 < downloads._max_bytes(release) / 412e6 < 2.5
  assert downloads._max_bytes() == 5 * 2**30
  monkeypatch.setenv(downloads.LIMIT_VARIABLE, "9")
  assert downloads._max_bytes(release) == 9 * 2**30
  monkeypatch.setenv(downloads.LIMIT_VARIABLE, "much")
  with pytest.raises(ValueError, match="'much', expected a number of GiB, such as 5"):
    downloads._max_bytes()


def test_a_download_is_visible_in_a_file(
  tmp_path, server, published, monkeypatch, capsys
):
  zeros = np.zeros((3 << 20) - 400, np.uint8)
  content = write(tmp_path / "zeros.npz", {"x": zeros}).read_bytes()
  server.files["/tiny.npz"] = content + bytes((3 << 20) - len(content))
  monkeypatch.setattr(downloads, "_LINE_SECONDS", 0)
  monkeypatch.setattr(downloads, "_CHUNK", 1 << 20)
  weights.resolve("tiny")
  lines = capsys.readouterr().err.splitlines()
  assert "(3.0 MiB)" in lines[0] and lines[-1].startswith("downloaded 3.0 MiB in")
  shown = [line.rsplit(", ")[0] for line in lines[1:-1]]
  expected = [f"  {i}.0 MiB of 3.0 MiB" for i in (1, 2, 3)]
  assert shown == expected and lines[1].endswith(" MiB/s")


def test_other_processes_say_nothing(server, published, monkeypatch, capsys):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert weights.resolve("tiny").read_bytes() == published
  assert capsys.readouterr().err == ""


def test_a_download_is_a_bar_on_a_terminal(server, published, monkeypatch):
  stream = io.StringIO()
  stream.isatty = lambda: True
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setattr(sys, "stderr", stream)
  server.files["/tiny.npz"] = bytes(3 << 20)
  server.breaks_after = 1 << 20
  with pytest.raises(FileNotFoundError):
    weights.resolve("tiny")
  assert stream.getvalue().endswith("\x1b[2K")  # the bar has gone
  text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
  assert re.search(r"━+.* 33% 1\.0/3\.0 MiB", text)


def test_unwritable_cache_is_one_clear_error(tmp_path, published, monkeypatch):
  blocked = tmp_path / "file"
  blocked.write_bytes(b"")
  monkeypatch.setenv("INSVP_CACHE", str(blocked))
  with pytest.raises(FileNotFoundError, match="INSVP_CACHE"):
    weights.resolve("tiny")


def test_unknown_names_and_paths(tmp_path):
  with pytest.raises(ValueError, match="Nearest: vit_b16_i21k"):
    weights.resolve("vit_b16_i2k")
  with pytest.raises(ValueError, match="Nearest: augreg_b8_i21k, "):
    weights.architecture_of("augreg_b8_i21")
  with pytest.raises(ValueError, match="neither a file nor the name"):
    weights.resolve("")
  for missing in ("nowhere.npz", tmp_path / "x.npz", "./x", "~/x"):
    with pytest.raises(FileNotFoundError, match="there is no file /"):
      weights.resolve(missing)
  with pytest.raises(FileNotFoundError, match="is a directory"):
    weights.resolve(tmp_path)


def test_local_file_comes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "boxed").write_bytes(b"x")
  assert weights.resolve("boxed").read_bytes() == b"x"


# The table


def test_releases_are_consistent():
  urls = [r.url for r in releases.RELEASES.values() if r.url]
  assert len(set(urls)) == len(urls)
  # The name of a downloaded file tells its release.
  assert len({url.rsplit("/", 1)[-1] for url in urls}) == len(urls)
  for name, release in releases.RELEASES.items():
    # A name with a slash would read as an architecture.
    assert re.fullmatch(r"[a-z0-9_]+", name)
    if release.url.startswith("gs://"):
      assert release.mean == release.std == (0.5, 0.5, 0.5)
    if release.url:
      assert release.url.endswith((".npz", ".pth", ".pth.tar"))
      vit = ViT(**weights.architecture_of(name))
      assert vit.image_size == release.image_size and vit.pool == release.pool
      size, patch = release.variant.lower().split("/")
      assert f"{size}{patch}_" in name
      assert (
        releases.release_of(f"/some/where/{release.url.rsplit('/')[-1]}") == release
      )


def test_the_backbone_of_the_papers():
  assert weights.architecture_of("vit_b16_i21k") == {
    "width": 768,
    "depth": 12,
    "mlp_dim": 3072,
    "num_heads": 12,
    "patch_size": 16,
    "image_size": 224,
    "pool": "tok",
    "gelu": "tanh",
  }
  url = weights.RELEASES["vit_b16_i21k"].url
  assert url == "gs://vit_models/imagenet21k/ViT-B_16.npz"


@pytest.fixture
def assets(tmp_path, monkeypatch, leaves):
  """A complete packaged backbone; returns (folder, description)."""
  folder = tmp_path / "assets"
  weights.save_backbone(trees.unflatten(leaves), folder / "boxed.npz", dtype="float16")
  described = SIZES | {
    "pool": "tok",
    "gelu": "tanh",
    "sha256": weights.file_digest(folder / "boxed.npz"),
    "test_accuracy": 0.5,
  }
  (folder / "boxed.json").write_text(json.dumps(described))
  monkeypatch.setattr(releases, "ASSETS", folder)
  return folder, described


def test_packaged_backbone(assets, leaves):
  folder, _ = assets
  assert weights.architecture_of("boxed") == SIZES | {"pool": "tok", "gelu": "tanh"}
  assert weights.resolve("boxed") == folder / "boxed.npz"
  model = create_model("boxed", "linear", num_classes=2)
  got, _ = load("boxed", model)
  assert_same(got, {n: v.astype(np.float16) for n, v in leaves.items()})


def test_packaged_backbone_of_another_digest(assets):
  folder, described = assets
  described["sha256"] = "0" * 64
  (folder / "boxed.json").write_text(json.dumps(described))
  with pytest.raises(ValueError, match="expected 000.*Install"):
    weights.resolve("boxed")


@pytest.mark.parametrize(
  ("content", "expected"),
  [("{", "not JSON"), ("[]", "no JSON object"), ('{"width": 8}', "lacks depth")],
)
def test_unusable_description(assets, content, expected):
  folder, _ = assets
  (folder / "boxed.json").write_text(content)
  with pytest.raises(ValueError, match=expected):
    weights.architecture_of("boxed")


@pytest.mark.parametrize("name", ["boxed.npz", "boxed.json"])
def test_incomplete_package(assets, name):
  folder, _ = assets
  (folder / name).unlink()
  with pytest.raises(FileNotFoundError, match=f"there is no .*{name}"):
    weights.resolve("boxed")


def test_the_package_holds_its_backbone():
  if not (releases.ASSETS / "boxed.npz").is_file():
    pytest.skip("the packaged backbone has not been trained yet")
  vit = ViT(**weights.architecture_of("boxed"))
  _, report = load("boxed", vit)
  assert report.missing == () and report.skipped == {} and report.changed == {}
