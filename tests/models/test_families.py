"""Weights of the ViT families, in files with their published names."""

import functools
import json
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
import scipy.special

from insvp_jax import array_files, trees
from insvp_jax.models import weights
from insvp_jax.models.classifier import create_model
from insvp_jax.models.weights import names_vit

WIDTH, HEADS, HIDDEN, PATCH, GRID, DEPTH = 8, 2, 12, 2, 3, 2
SIZE = PATCH * GRID
# Names in `make_arrays` -> a family's names; lists are joined on the outputs. "#" is a
# block, "*" weight and bias.
TIMM = {
  **{"cls_token": "cls", "pos_embed": "pos", "patch_embed.proj.*": "patch"},
  "norm.*": "norm",
  **{"blocks.#.norm1.*": "n1", "blocks.#.attn.qkv.*": ["q", "k", "v"]},
  **{"blocks.#.attn.proj.*": "o", "blocks.#.norm2.*": "n2"},
  **{"blocks.#.mlp.fc1.*": "f1", "blocks.#.mlp.fc2.*": "f2"},
}
SCALED = TIMM | {"blocks.#.ls1.gamma": "s1", "blocks.#.ls2.gamma": "s2"}
MAP_TIMM = {
  **{"attn_pool.latent": "probe", "attn_pool.q.*": "mq"},
  **{"attn_pool.kv.*": ["mk", "mv"], "attn_pool.proj.*": "mo"},
  "attn_pool.norm.*": "mn",
  **{"attn_pool.mlp.fc1.*": "m1", "attn_pool.mlp.fc2.*": "m2"},
}
HF = {
  **{"embeddings.cls_token": "cls", "embeddings.position_embeddings": "pos"},
  **{"embeddings.patch_embeddings.projection.*": "patch", "layernorm.*": "norm"},
  "encoder.layer.#.attention.attention.query.*": "q",
  "encoder.layer.#.attention.attention.key.*": "k",
  "encoder.layer.#.attention.attention.value.*": "v",
  "encoder.layer.#.attention.output.dense.*": "o",
}
HF_VIT = HF | {
  "encoder.layer.#.layernorm_before.*": "n1",
  "encoder.layer.#.layernorm_after.*": "n2",
  "encoder.layer.#.intermediate.dense.*": "f1",
  "encoder.layer.#.output.dense.*": "f2",
}
HF_DINOV2 = HF | {
  **{"encoder.layer.#.norm1.*": "n1", "encoder.layer.#.norm2.*": "n2"},
  "encoder.layer.#.layer_scale1.lambda1": "s1",
  "encoder.layer.#.layer_scale2.lambda1": "s2",
  **{"encoder.layer.#.mlp.fc1.*": "f1", "encoder.layer.#.mlp.fc2.*": "f2"},
}
GATED_HF = {k: v for k, v in HF_DINOV2.items() if ".mlp." not in k} | {
  **{
    "encoder.layer.#.mlp.weights_in.*": "f1",
    "encoder.layer.#.mlp.weights_out.*": "f2",
  },
  "embeddings.register_tokens": "reg",
}
CLIP = {
  **{"class_embedding": "cls 1", "positional_embedding": "pos 2"},
  **{"conv1.weight": "patch.weight", "ln_pre.*": "pre", "ln_post.*": "norm"},
  "proj": "proj",
  **{"transformer.resblocks.#.ln_1.*": "n1", "transformer.resblocks.#.ln_2.*": "n2"},
  "transformer.resblocks.#.attn.in_proj_*": ["q", "k", "v"],
  "transformer.resblocks.#.attn.out_proj.*": "o",
  "transformer.resblocks.#.mlp.c_fc.*": "f1",
  "transformer.resblocks.#.mlp.c_proj.*": "f2",
}
HF_TOWER = {
  **{"encoder.layers.#.layer_norm1.*": "n1", "encoder.layers.#.layer_norm2.*": "n2"},
  "encoder.layers.#.self_attn.q_proj.*": "q",
  "encoder.layers.#.self_attn.k_proj.*": "k",
  "encoder.layers.#.self_attn.v_proj.*": "v",
  "encoder.layers.#.self_attn.out_proj.*": "o",
  **{"encoder.layers.#.mlp.fc1.*": "f1", "encoder.layers.#.mlp.fc2.*": "f2"},
  "post_layernorm.*": "norm",
}
HF_CLIP = HF_TOWER | {
  "embeddings.class_embedding": "cls 1",
  "embeddings.position_embedding.weight": "pos 2",
  **{"embeddings.patch_embedding.weight": "patch.weight", "pre_layrnorm.*": "pre"},
}
HF_SIGLIP = HF_TOWER | {
  "embeddings.position_embedding.weight": "pos 2",
  **{"embeddings.patch_embedding.*": "patch", "head.probe": "probe"},
  **{"head.attention.in_proj_*": ["mq", "mk", "mv"], "head.layernorm.*": "mn"},
  **{"head.attention.out_proj.*": "mo", "head.mlp.fc1.*": "m1", "head.mlp.fc2.*": "m2"},
}
OTHERS = {"text_model.embeddings.token_embedding.weight": (4, WIDTH)}
# family: (names, prefix, what else is in the file, fields of the ViT beside the sizes).
TOKEN = {"pool": "tok", "gelu": "exact"}
FAMILIES = {
  "deit": (TIMM, "", {"head.weight": (5, WIDTH), "head.bias": (5,)}, TOKEN),
  "deit distilled": (
    TIMM | {"dist_token": "dist"},
    "",
    {"head_dist.weight": (5, WIDTH)},
    TOKEN | {"registers": 1},
  ),
  "deit3": (SCALED | {"pos_embed": "grid"}, "model.", {}, TOKEN),
  "mae": (TIMM, "model.", {"model.decoder_pos_embed": (1, 10, 4)}, TOKEN),
  "moco-v3": (
    TIMM,
    "state_dict.module.base_encoder.",
    {"state_dict.module.base_encoder.head.0.weight": (4, WIDTH)},
    TOKEN,
  ),
  "dino": (TIMM, "teacher.backbone.", {"teacher.head.mlp.0.weight": (4, 4)}, TOKEN),
  "dinov2": (SCALED, "", {"mask_token": (1, WIDTH)}, TOKEN),
  "dinov2 registers": (
    {
      k.replace("blocks.", "blocks.0."): v
      for k, v in SCALED.items()
      if ".mlp." not in k
    }
    | {"blocks.1.#.mlp.w12.*": "f1", "blocks.1.#.mlp.w3.*": "f2"}
    | {"register_tokens": "reg"},
    "",
    {},
    TOKEN | {"registers": 3, "mlp": "swiglu"},
  ),
  "hf vit": (HF_VIT, "vit.", {"classifier.weight": (5, WIDTH)}, TOKEN),
  "hf dinov2": (HF_DINOV2, "", {"embeddings.mask_token": (1, WIDTH)}, TOKEN),
  "hf dinov2 gated": (
    GATED_HF,
    "dinov2.",
    {},
    TOKEN | {"registers": 3, "mlp": "swiglu"},
  ),
  "clip": (
    CLIP,
    "visual.",
    {"text_projection": (WIDTH, 4), "transformer.resblocks.0.ln_1.bias": (WIDTH,)},
    {"pool": "tok", "gelu": "quick", "pre_norm": True, "norm_eps": 1e-5},
  ),
  "hf clip": (
    HF_CLIP,
    "vision_model.",
    {**OTHERS, "visual_projection.weight": (4, WIDTH), "logit_scale": ()},
    {"pool": "tok", "gelu": "quick", "pre_norm": True, "norm_eps": 1e-5},
  ),
  "timm clip": (
    TIMM
    | {"patch_embed.proj.*": "", "patch_embed.proj.weight": "patch.weight"}
    | {"norm_pre.*": "pre"},
    "",
    {"head.weight": (4, WIDTH)},
    {"pool": "tok", "gelu": "exact", "pre_norm": True, "norm_eps": 1e-5},
  ),
  "hf siglip": (HF_SIGLIP, "vision_model.", OTHERS, {"pool": "map", "gelu": "tanh"}),
  "timm siglip": (
    {k: v for k, v in TIMM.items() if k != "cls_token"}
    | {"pos_embed": "grid"}
    | MAP_TIMM,
    "",
    {},
    {"pool": "map", "gelu": "tanh"},
  ),
}


def make_arrays(family):
  """Returns {name: array} as PyTorch has them, [out, in], of all that a family has."""
  table, _, _, fields = FAMILIES[family]
  rng, arrays = np.random.default_rng(len(family)), {}
  gated = 1 + (fields.get("mlp") == "swiglu")

  def draw(name, *shape, mean=0.0):
    arrays[name] = (mean + 0.3 * rng.standard_normal(shape)).astype(np.float32)

  def dense(name, rows, columns):
    draw(f"{name}.weight", rows, columns)
    draw(f"{name}.bias", rows)

  def norm(name):
    draw(f"{name}.weight", WIDTH, mean=1.0)
    draw(f"{name}.bias", WIDTH)

  distilled = "dist_token" in table
  draw("cls", 1, 1, WIDTH)
  draw("dist", 1, 1, WIDTH)
  draw("pos", 1, GRID**2 + 1 + distilled, WIDTH)
  arrays["grid"] = arrays["pos"][:, 1 + distilled :]
  draw("reg", 1, 3, WIDTH)
  draw("probe", 1, 1, WIDTH)
  draw("proj", WIDTH, 4)
  draw("patch.weight", WIDTH, 3, PATCH, PATCH)
  draw("patch.bias", WIDTH)
  for name in ("norm", "pre", "mn"):
    norm(name)
  for name in ("mq", "mk", "mv", "mo"):
    dense(name, WIDTH, WIDTH)
  dense("m1", HIDDEN, WIDTH)
  dense("m2", WIDTH, HIDDEN)
  for i in range(DEPTH):
    for name in ("q", "k", "v", "o"):
      dense(f"{i}.{name}", WIDTH, WIDTH)
    dense(f"{i}.f1", gated * HIDDEN, WIDTH)
    dense(f"{i}.f2", WIDTH, HIDDEN)
    norm(f"{i}.n1")
    norm(f"{i}.n2")
    draw(f"{i}.s1", WIDTH, mean=1.0)
    draw(f"{i}.s2", WIDTH, mean=1.0)
  return arrays


def published(family, arrays):
  """Returns a family's file: {its name: array}."""
  table, prefix, others, _ = FAMILIES[family]
  rng = np.random.default_rng(0)
  file = {n: rng.standard_normal(s).astype(np.float32) for n, s in others.items()}
  for theirs, ours in table.items():
    if not ours:
      continue
    for i in range(DEPTH) if "#" in theirs else (0,):
      for leaf in ("weight", "bias") if "*" in theirs else ("",):
        name = prefix + theirs.replace("#", str(i)).replace("*", leaf)
        lead, end = f"{i}." if "#" in theirs else "", f".{leaf}" if leaf else ""
        if isinstance(ours, list):
          file[name] = np.concatenate([arrays[lead + part + end] for part in ours])
          continue
        key, _, axes = ours.partition(" ")
        array = arrays[lead + key + end]
        file[name] = array.reshape(array.shape[3 - int(axes) :]) if axes else array
  return file


def write(tmp_path, family, name="weights.safetensors"):
  arrays = make_arrays(family)
  save_file(published(family, arrays), tmp_path / name)
  return tmp_path / name, arrays


def load(path, **kwargs):
  kwargs = {"num_heads": HEADS, **kwargs}
  model = create_model(str(path), "linear", num_classes=2, backbone_kwargs=kwargs)
  reports = []
  params = weights.load_backbone(path, model, report=reports.append)
  return model.backbone, params, reports[0]


@functools.partial(jax.jit, static_argnums=0)
def apply(vit, params, images):
  return vit.apply({"params": params}, images)


def encode(vit, params, images):
  # What is alike is compiled once: `image_size` and the like are all the same.
  return np.asarray(apply(vit, params, images))


def reference(family, arrays, images):
  """Returns the feature by NumPy alone, in float64."""
  table, _, _, fields = FAMILIES[family]
  used = {n for v in table.values() for n in ([v] if isinstance(v, str) else v)}
  used = {name.split(" ")[0] for name in used}
  a = {name: x.astype(np.float64) for name, x in arrays.items()}
  eps = fields.get("norm_eps", 1e-6)
  gelus = {
    "exact": lambda x: x * scipy.special.ndtr(x),
    "quick": lambda x: x * scipy.special.expit(1.702 * x),
    "tanh": lambda x: (
      0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
  }

  def dense(name, x):
    return x @ a[f"{name}.weight"].T + a[f"{name}.bias"]

  def norm(name, x):
    x = x - x.mean(-1, keepdims=True)
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * a[f"{name}.weight"] + a[f"{name}.bias"]

  def attention(names, x_q, x):
    q, k, v = (
      dense(name, rows).reshape(len(x), -1, HEADS, WIDTH // HEADS).swapaxes(1, 2)
      for name, rows in zip(names, (x_q, x, x), strict=False)
    )
    probs = scipy.special.softmax(q @ k.swapaxes(2, 3) / (WIDTH / HEADS) ** 0.5, -1)
    return dense(names[3], (probs @ v).swapaxes(1, 2).reshape(len(x), -1, WIDTH))

  patches = images.reshape(-1, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
  x = patches.reshape(len(images), GRID**2, -1) @ a["patch.weight"].reshape(WIDTH, -1).T
  x = x + (a["patch.bias"] if "patch" in used else 0)
  x = x + a["pos"][:, -(GRID**2) :]
  prefix = []
  if "cls" in used:
    prefix.append(a["cls"] + (a["pos"][:, :1] if "pos" in used else 0))
  prefix += [a["dist"] + a["pos"][:, 1:2]] if "dist" in used else []
  prefix += [a["reg"]] if "reg" in used else []
  x = np.concatenate([*[np.repeat(t, len(x), 0) for t in prefix], x], 1)
  x = norm("pre", x) if "pre" in used else x
  for i in range(DEPTH):
    y = attention([f"{i}.{n}" for n in "qkvo"], *[norm(f"{i}.n1", x)] * 2)
    x = x + y * (a[f"{i}.s1"] if "s1" in used else 1)
    hidden = dense(f"{i}.f1", norm(f"{i}.n2", x))
    if fields.get("mlp") == "swiglu":
      gate, hidden = np.split(hidden, 2, -1)
      hidden = gate * scipy.special.expit(gate) * hidden
    else:
      hidden = gelus[fields["gelu"]](hidden)
    x = x + dense(f"{i}.f2", hidden) * (a[f"{i}.s2"] if "s2" in used else 1)
  x = norm("norm", x)
  if fields["pool"] == "tok":
    return x[:, 0]
  y = attention(["mq", "mk", "mv", "mo"], np.repeat(a["probe"], len(x), 0), x)
  return (y + dense("m2", gelus["tanh"](dense("m1", norm("mn", y)))))[:, 0]


IMAGES = np.random.default_rng(1).standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_from_its_published_names(tmp_path, family):
  path, arrays = write(tmp_path, family)
  vit, params, report = load(path)
  sizes = {"width": WIDTH, "depth": DEPTH, "mlp_dim": HIDDEN, "patch_size": PATCH}
  for field, value in {**sizes, "image_size": SIZE, **FAMILIES[family][3]}.items():
    assert getattr(vit, field) == value, field
  got = encode(vit, params, IMAGES)
  expected = reference(family, arrays, IMAGES)
  assert np.max(np.abs(got - expected)) < 2e-5 * np.max(np.abs(expected))
  # What the file has besides is named, and nothing is made up.
  assert set(report.skipped) >= set(FAMILIES[family][2]) - {"visual_projection.weight"}
  assert not report.missing
  if prefix := FAMILIES[family][1]:
    assert f"below {prefix!r}" in str(report)


@pytest.mark.parametrize("family", ["clip", "hf clip"])
def test_the_projection_is_kept_where_it_is_asked_for(tmp_path, family):
  path, arrays = write(tmp_path, family)
  vit, params, report = load(path, projection=4)
  expected = reference(family, arrays, IMAGES)
  file = published(family, arrays)
  kernel = (
    file["visual.proj"] if family == "clip" else file["visual_projection.weight"].T
  )
  got = encode(vit, params, IMAGES)
  assert got.shape == (2, 4)
  np.testing.assert_allclose(got, expected @ kernel, rtol=1e-4, atol=1e-5)


def test_layer_scale_stays_where_its_branch_is_trained(tmp_path):
  path, arrays = write(tmp_path, "dinov2")
  for method, kept in (("linear", False), ("vpt_deep", False), ("bias", True)):
    model = create_model(
      str(path), method, num_classes=2, backbone_kwargs={"num_heads": HEADS}
    )
    assert model.backbone.layer_scale == kept, method
  expected = reference("dinov2", arrays, IMAGES)
  for scan in (False, True):
    vit, params, report = load(path, layer_scale=True, scan=scan)
    assert "folded" not in str(report)
    np.testing.assert_allclose(encode(vit, params, IMAGES), expected, 1e-4, 1e-5)
  assert "LayerScale: 4 factors folded" in str(load(path)[2])


def test_all_fields_at_once_scanned_recomputed_and_in_bfloat16(tmp_path):
  path, _ = write(tmp_path, "dinov2 registers")
  fields = {"layer_scale": True, "projection": 4, "pool": "gap", "class_token": True}
  options = {"pre_norm": True, "num_heads": HEADS}
  model = create_model(
    str(path), "linear", num_classes=2, backbone_kwargs={**fields, **options}
  )
  new = {"allow_missing": ("projection/.*", "pre_norm/.*")}
  vit = model.backbone
  params = weights.load_backbone(path, model, **new)
  scanned = vit.clone(scan=True, remat=True)
  stacked = weights.load_backbone(path, scanned, **new)

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(vit, params):
    return jax.grad(
      lambda p: (vit.apply({"params": p}, jnp.asarray(IMAGES)) ** 2).sum()
    )(params)

  plain, other = gradient(vit, params), gradient(scanned, stacked)
  np.testing.assert_allclose(
    other["Transformer"]["encoderblock"]["LayerScale_1"]["scale"][1],
    plain["Transformer"]["encoderblock_1"]["LayerScale_1"]["scale"],
    rtol=1e-4,
    atol=1e-5,
  )
  np.testing.assert_allclose(other["registers"], plain["registers"], 1e-4, 1e-5)
  expected = encode(vit, params, IMAGES)
  half = encode(scanned.clone(dtype="bfloat16"), stacked, IMAGES)
  assert np.max(np.abs(half - expected)) < 0.05 * np.max(np.abs(expected))


def test_another_activation_than_the_family_s_is_said(tmp_path):
  path, _ = write(tmp_path, "clip")
  note = str(load(path, gelu="tanh", norm_eps=1e-6)[2])
  assert "note: weights of this family have gelu='quick', the model has 'tanh'" in note
  assert "norm_eps=1e-05, the model has 1e-06" in note
  assert "note:" not in str(load(path)[2])


def test_both_poolings_of_mae(tmp_path):
  path, arrays = write(tmp_path, "mae")
  plain = {"pool": "gap", "class_token": True}
  vit, params, _ = load(path, **plain)
  tokens = jax.jit(lambda p, x: vit.apply({"params": p}, x, method="tokens"))(
    params, IMAGES
  )
  assert tokens.shape == (2, 1 + GRID**2, WIDTH)
  # The corrected form: the trained norm, then the mean of the patches.
  np.testing.assert_allclose(
    encode(vit, params, IMAGES), tokens[:, 1:].mean(axis=1), 1e-5, 1e-6
  )
  vpt, params, report = load(path, **plain, fc_norm=True)
  assert "fc_norm: not in the file: scale 1 and bias 0" in str(report)
  got = encode(vpt, params, IMAGES)
  # VPT's form: the mean of tokens without that norm, then one that nothing trained.
  np.testing.assert_allclose(got.mean(axis=1), 0, atol=1e-5)
  np.testing.assert_allclose(got.std(axis=1), 1, atol=1e-3)


# Prefixes, parts, other containers.


def test_the_teacher_is_taken_and_the_prefix_said(tmp_path):
  teacher, student = make_arrays("dino"), make_arrays("deit")
  file = published("dino", teacher)
  others = published("deit", student)
  file |= {f"student.module.backbone.{name}": x for name, x in others.items()}
  save_file(file, tmp_path / "x.safetensors")
  vit, params, report = load(tmp_path / "x.safetensors")
  np.testing.assert_array_equal(
    params["embedding"]["bias"],
    published("dino", teacher)["teacher.backbone.patch_embed.proj.bias"],
  )
  assert "below 'teacher.backbone.'" in str(report)
  assert report.skipped["student.module.backbone.cls_token"] == (
    "not a part of the backbone"
  )


def write_parts(folder, file):
  names = sorted(file)
  parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
  for part, inside in parts.items():
    save_file({name: file[name] for name in inside}, folder / part)
  weight_map = {name: part for part, inside in parts.items() for name in inside}
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  return index


def test_a_file_in_parts(tmp_path):
  file = published("hf dinov2", make_arrays("hf dinov2"))
  index = write_parts(tmp_path, file)
  save_file(file, tmp_path / "whole.safetensors")
  whole = trees.flatten(load(tmp_path / "whole.safetensors")[1])
  # By the index, and by the folder as Hugging Face has it.
  for path in (index, tmp_path):
    got = trees.flatten(load(path)[1])
    assert all((got[name] == whole[name]).all() for name in whole)
  digest = weights.file_digest(index)
  part = tmp_path / "b.safetensors"
  save_file({}, tmp_path / "b.safetensors")
  assert weights.file_digest(index) != digest
  with pytest.raises(ValueError, match="says that .* is in .*b.safetensors; it is not"):
    load(index)
  part.unlink()
  with pytest.raises(FileNotFoundError, match="1 are missing: .*b.safetensors"):
    load(index)
  index.write_text(json.dumps({"weight_map": {"x": "../b.safetensors"}}))
  with pytest.raises(ValueError, match="no file beside it"):
    load(index)


def test_an_index_of_itself_is_refused(tmp_path):
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"x": index.name}}))
  with pytest.raises(ValueError, match="an index again"):
    load(index)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
  file = published("deit", make_arrays("deit"))
  halves = {name: x.astype(dtype) for name, x in file.items()}
  save_file(halves, tmp_path / "x.safetensors")
  leaves = trees.flatten(load(tmp_path / "x.safetensors")[1])
  assert all(leaf.dtype == np.float32 for leaf in leaves.values())
  np.testing.assert_array_equal(
    leaves["embedding/bias"], halves["patch_embed.proj.bias"].astype(np.float32)
  )


def test_names_of_pytorch_in_an_npz(tmp_path):
  arrays = make_arrays("deit")
  np.savez(tmp_path / "x.npz", **published("deit", arrays))
  vit, params, _ = load(tmp_path / "x.npz")
  np.testing.assert_array_equal(params["embedding"]["bias"], arrays["patch.bias"])


# Errors.


def test_what_is_wrong_with_a_file_is_one_line(tmp_path):
  path, _ = write(tmp_path, "deit")
  model = create_model("mu/2", "linear", num_classes=2, image_size=SIZE)
  with pytest.raises(ValueError, match=r"does not fit.*width=8, depth|'width': 8"):
    weights.load_backbone(path, model)
  content = path.read_bytes()
  for end in (len(content) // 2, len(content) - 1, 40):
    path.write_bytes(content[:end])
    with pytest.raises(ValueError, match="truncated or damaged; get it again"):
      load(path)
  path.write_bytes(b"<!DOCTYPE html>")
  with pytest.raises(ValueError, match="a web page or a bare pickle is refused"):
    load(path)
  with pytest.raises(FileNotFoundError, match="there is no file /"):
    load(tmp_path / "none.safetensors")
  file = published("deit", make_arrays("deit"))
  save_file(file | {"norm.bias": np.full(WIDTH, np.nan, np.float32)}, path)
  with pytest.raises(ValueError, match="'norm.bias' .* NaN"):
    load(path)
  save_file(file | {"cls_token": np.ones((1, 1, WIDTH), np.int32)}, path)
  with pytest.raises(ValueError, match="'cls_token' .* is int32, expected a float"):
    load(path)
  # A kind of layer that this ViT has not is not left out silently.
  save_file(file | {"blocks.0.attn.q_norm.weight": np.ones(4, np.float32)}, path)
  with pytest.raises(
    ValueError, match="only the file has: blocks.0.attn.q_norm.weight"
  ):
    load(path)
  del file["blocks.1.mlp.fc2.bias"]
  save_file(file, path)
  with pytest.raises(
    ValueError, match="only the model has: .*encoderblock_1/MlpBlock_0"
  ):
    load(path)


def test_pytorch_s_files_need_torch_and_say_so(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  path = tmp_path / "vit.bin"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", b"")
  with pytest.raises(ValueError, match=r"torch, .* is not installed: .*\[torch\]") as e:
    load(path)
  assert "\n" not in str(e.value)


def test_an_unknown_family_is_compared_with_the_known_ones(tmp_path):
  path = tmp_path / "x.safetensors"
  file = published("hf vit", make_arrays("hf vit"))
  save_file({name.replace("attention", "mixer"): x for name, x in file.items()}, path)
  # It lacks the attention, but not what tells the family.
  with pytest.raises(ValueError, match="only the file has: encoder.layer.0.mixer"):
    load(path)
  file = {name.replace("projection", "stem"): x for name, x in file.items()}
  save_file(file, path)
  expected = (
    "holds 39 arrays, such as .*nearest known family is Hugging Face's names of "
  )
  with pytest.raises(ValueError, match=f"{expected}ViT.*but not .*projection.weight"):
    load(path)
  save_file({"a.b": np.ones(2, np.float32)}, path)
  with pytest.raises(
    ValueError, match="No name is one of a known family: timm's names,"
  ):
    load(path)


def test_the_number_of_heads_that_no_file_tells(tmp_path):
  path, _ = write(tmp_path, "deit")
  with pytest.raises(ValueError, match="does not tell how many heads.*set num_heads"):
    create_model(str(path), "linear", num_classes=2)
  (tmp_path / "config.json").write_text('{"hidden_size": 8, "num_attention_heads": 4}')
  path.touch()
  formats_of = create_model(str(path), "linear", num_classes=2)
  assert formats_of.backbone.num_heads == 4


# Writing back.


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
  ("family", "kwargs"),
  [
    ("deit", {}),
    ("deit3", {"layer_scale": True}),
    ("dinov2", {}),
    ("dinov2 registers", {"layer_scale": True}),
    ("clip", {"projection": 4}),
    ("hf siglip", {}),
  ],
)
def test_what_is_written_is_read_again_bit_for_bit(tmp_path, family, kwargs, scan):
  path, _ = write(tmp_path, family)
  kwargs = {**kwargs, "num_heads": HEADS}
  model = create_model(str(path), "linear", num_classes=2, backbone_kwargs=kwargs)
  model = model.clone(backbone=model.backbone.clone(scan=scan))
  params = weights.load_backbone(path, model)
  # timm has no projection.
  names = [("npz", ""), ("safetensors", "hf")]
  names += [] if "projection" in kwargs else [("safetensors", "timm")]
  for suffix, name in names:
    again = tmp_path / f"again_{name}.{suffix}"
    weights.save_backbone(params, again, names=name or "timm")
    got = trees.flatten(weights.load_backbone(again, model))
    for leaf, value in trees.flatten(params).items():
      assert got[leaf].tobytes() == np.asarray(value).tobytes(), leaf
  if "projection" in kwargs:
    with pytest.raises(ValueError, match="timm's names have no word for projection/"):
      weights.save_backbone(params, again.with_name("x.safetensors"))
    assert not again.with_name("x.safetensors").exists()
  with pytest.raises(ValueError, match="expected 'timm' or 'hf'"):
    weights.save_backbone(params, again, names="torch")


def test_what_is_written_has_the_published_names(tmp_path):
  for family, names in (("deit", "timm"), ("hf vit", "hf"), ("hf dinov2 gated", "hf")):
    path, arrays = write(tmp_path, family)
    kwargs = {"layer_scale": True} if "dinov2" in family else {}
    _, params, _ = load(path, **kwargs)
    again = tmp_path / "again.safetensors"
    weights.save_backbone(params, again, names=names)
    shapes = array_files.open_arrays(again, "safetensors").shapes
    _, prefix, others, _ = FAMILIES[family]
    expected = {
      name.removeprefix(prefix): x.shape
      for name, x in published(family, arrays).items()
      if name not in others
    }
    assert shapes == expected


def test_every_layout_says_what_it_is(tmp_path):
  assert set(names_vit.generic_names()) == {x.name for x in names_vit.LAYOUTS.values()}
