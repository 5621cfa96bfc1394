"""The ViT against timm's: random weights, the same images. Skipped without timm."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from insvp_jax import array_files
from insvp_jax.models import weights
from insvp_jax.models.classifier import create_model

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
# Arguments of timm's VisionTransformer, and fields of ours that its file does not tell.
MODELS = {
  "token": ({}, {}),
  "average": ({"global_pool": "avg"}, {}),
  "average, normalised before": (
    {"global_pool": "avg", "fc_norm": False},
    {"pool": "gap", "class_token": True},
  ),
  "deit3": ({"init_values": 1e-1, "no_embed_class": True}, {}),
  "dinov2 registers": (
    {"init_values": 1e-1, "reg_tokens": 4, "no_embed_class": True},
    {},
  ),
  "clip": ({"pre_norm": True, "act_layer": "quick_gelu"}, {"gelu": "quick"}),
  "dinov2 giant": ({"init_values": 1e-1, "mlp_ratio": 4.0, "swiglu": True}, {}),
  "siglip": ({"class_token": False, "global_pool": "map"}, {"gelu": "exact"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_parity(tmp_path, name):
  torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
  arguments, kwargs = MODELS[name]
  torch.manual_seed(0)
  if arguments.get("swiglu"):
    gated = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    arguments = {n: x for n, x in arguments.items() if n != "swiglu"} | gated
  eps = 1e-5 if name == "clip" else 1e-6
  norm = functools.partial(timm.layers.LayerNorm, eps=eps)
  theirs = timm.models.vision_transformer.VisionTransformer(
    num_classes=5, norm_layer=norm, **SIZES, **arguments
  ).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.05 * torch.randn_like(parameter))
  state = {key: value.numpy() for key, value in theirs.state_dict().items()}
  path = tmp_path / "vit.safetensors"
  save_file(state, path)
  images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
  with torch.no_grad():
    expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
  kwargs = {"num_heads": 4, "head_classes": 5, **kwargs}
  model = create_model(str(path), "linear", num_classes=2, backbone_kwargs=kwargs)
  params = {"backbone": weights.load_backbone(path, model)}
  apply = functools.partial(model.apply, method="source_logits")
  params["head"] = {"kernel": np.zeros((48, 2)), "bias": np.zeros(2)}
  logits = np.asarray(jax.jit(apply)({"params": params}, images))
  assert np.max(np.abs(logits - expected)) < 1e-4 * np.max(np.abs(expected))
  # What is written is what timm reads.
  again = tmp_path / "again.safetensors"
  weights.save_backbone(params["backbone"], again)
  written = array_files.open_arrays(again, "safetensors").shapes
  folded = {key for key in state if ".ls1." in key or ".ls2." in key}
  assert set(written) == set(state) - folded
  torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "x.pth")
  from_pth = weights.load_backbone(tmp_path / "x.pth", model)
  same = jax.tree.map(np.array_equal, from_pth, params["backbone"])
  assert all(jax.tree.leaves(same))


def test_torch_files_are_never_unpickled(tmp_path):
  torch = pytest.importorskip("torch")

  class Bomb:
    def __reduce__(self):
      return (pytest.fail, ("a pickle was loaded",))

  path = tmp_path / "x.pth"
  torch.save({"state_dict": {"cls_token": torch.ones(3)}, "model": Bomb()}, path)
  with pytest.raises(ValueError, match="more than arrays, and is refused") as raised:
    create_model(str(path), "linear", num_classes=2)
  assert "\n" not in str(raised.value)
  torch.save({"a": torch.ones(1000)}, path)
  path.write_bytes(path.read_bytes()[:3000])
  with pytest.raises(ValueError, match="truncated or damaged"):
    create_model(str(path), "linear", num_classes=2)
