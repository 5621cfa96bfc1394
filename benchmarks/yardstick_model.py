"""InsVP over a frozen ViT in plain PyTorch, as one would write it there.

Written from the paper's equations and from measurements of what the released code
computes; no line of it is anybody else's. It needs torch and timm
(`benchmarks/requirements.txt`) and knows nothing of JAX.

Axes: b batch, c channels, h w pixels (PyTorch's order), n tokens, p prompts, d width.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import timm
import torch
from torch import nn
import torch.nn.functional as F

ACTIVATIONS = {"relu": F.relu, "leaky_relu": F.leaky_relu}  # slope 0.01
GELUS = {"tanh": "gelu_tanh", "exact": "gelu"}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is built; the names are those of the backbone's and of InsVP's fields.

  Attributes:
    num_classes: k.
    specific_every_block: whether each block makes the specific prompt anew, as the
      released code does; otherwise it is made once per forward pass. Without dropout
      the result is the same.
  """

  image_size: int
  patch_size: int
  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  pool: str
  gelu: str
  num_classes: int
  prompt_length: int
  patch_hidden: int
  global_hidden: int
  global_kernels: Sequence[int]
  global_dilations: Sequence[int]
  specific_kernels: Sequence[int]
  specific_activation: str
  specific_input: str
  train_specific: bool
  image_fusion: Sequence[float]
  feature_fusion: Sequence[float]
  dropout: float
  prompt_dropout: float
  specific_crop: int
  specific_size: int
  specific_channels: int
  specific_pool: int
  specific_every_block: bool = False


def create_backbone(s: Settings) -> nn.Module:
  """Returns timm's ViT without a head; its weights are random, and frozen."""
  vit = timm.create_model(
    "vit_base_patch16_224",
    pretrained=False,
    num_classes=0,
    img_size=s.image_size,
    patch_size=s.patch_size,
    embed_dim=s.width,
    depth=s.depth,
    num_heads=s.num_heads,
    mlp_ratio=s.mlp_dim / s.width,
    act_layer=GELUS[s.gelu],
    class_token=s.pool == "tok",
    global_pool={"tok": "token", "gap": "avg"}[s.pool],
    fc_norm=False,
    no_embed_class=True,
  )
  return vit.requires_grad_(False)


class PatchPrompter(nn.Module):
  """Two dense layers on each patch, flattened as (channel, row, column)."""

  def __init__(self, size: int, hidden: int):
    """Takes the side of a patch in pixels and the hidden width."""
    super().__init__()
    self.size = size
    self.layers = nn.Sequential(
      nn.Linear(3 * size**2, hidden), nn.ReLU(), nn.Linear(hidden, 3 * size**2)
    )

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """Returns the prompt of every patch in its place, [b, c, h, w]."""
    patches = F.pixel_unshuffle(images, self.size)  # [b, c q q, rows, columns]
    prompts = self.layers(patches.permute(0, 2, 3, 1))
    return F.pixel_shuffle(prompts.permute(0, 3, 1, 2), self.size)


def global_prompter(s: Settings) -> nn.Module:
  """Returns two wide convolutions over the whole image."""
  convs = []
  channels = (3, s.global_hidden, 3)
  for i, (kernel, dilation) in enumerate(
    zip(s.global_kernels, s.global_dilations, strict=True)
  ):
    convs.append(
      nn.Conv2d(channels[i], channels[i + 1], kernel, padding="same", dilation=dilation)
    )
  return nn.Sequential(convs[0], nn.ReLU(), convs[1])


class SpecificPrompter(nn.Module):
  """Three convolutions with pooling: p tokens made from the image."""

  def __init__(self, s: Settings):
    """Takes its sizes from the settings."""
    super().__init__()
    self.s, p = s, s.prompt_length
    channels = (3, p, 3 * p, s.specific_channels * p)
    self.convs = nn.ModuleList(
      nn.Conv2d(channels[i], channels[i + 1], s.specific_kernels[i], padding="same")
      for i in range(3)
    )

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """Returns the tokens, [b, p, d]."""
    s, activation = self.s, ACTIVATIONS[self.s.specific_activation]
    x = activation(self.convs[0](images))
    x = F.max_pool2d(_center(x, s.image_size - 2 * s.specific_crop), 4)
    x = F.dropout(x, s.dropout, self.training)
    x = activation(self.convs[1](x))
    x = F.max_pool2d(_center(x, s.specific_size * s.specific_pool), s.specific_pool)
    x = F.dropout(x, s.dropout, self.training)
    return self.convs[2](x).reshape(len(x), s.prompt_length, s.width)


def _center(x: torch.Tensor, side: int) -> torch.Tensor:
  top, left = (x.shape[2] - side) // 2, (x.shape[3] - side) // 2
  return x[:, :, top : top + side, left : left + side]


class InsVP(nn.Module):
  """Prompted images and prompt tokens over the frozen ViT, and a linear head."""

  def __init__(self, s: Settings):
    """Builds everything with random weights."""
    super().__init__()
    self.s = s
    self.backbone = create_backbone(s)
    self.patch_prompter = PatchPrompter(s.patch_size, s.patch_hidden)
    self.global_prompter = global_prompter(s)
    self.specific_prompter = SpecificPrompter(s)
    self.specific_prompter.requires_grad_(s.train_specific)
    shape = (s.depth, s.prompt_length, s.width)
    self.common_prompt = nn.Parameter(torch.empty(shape).uniform_(-0.06, 0.06))
    self.head = nn.Linear(s.width, s.num_classes)

  def train(self, mode: bool = True) -> "InsVP":
    """Switches dropout; the frozen ViT stays in evaluation mode."""
    super().train(mode)
    self.backbone.eval()
    return self

  def forward(self, pixels: torch.Tensor) -> torch.Tensor:
    """Returns logits [b, k] of uint8 pixels [b, c, h, w], normalised to [-1, 1]."""
    s = self.s
    images = pixels.float() / 127.5 - 1
    patch = self._dropped(self.patch_prompter(images), s.dropout)
    overall = self._dropped(self.global_prompter(images), s.dropout)
    prompted = images + s.image_fusion[0] * patch + s.image_fusion[1] * overall
    source = images if s.specific_input == "original" else prompted
    return self.head(self._encode(prompted, source))

  def _dropped(self, x: torch.Tensor, rate: float) -> torch.Tensor:
    return F.dropout(x, rate, self.training)

  def _encode(self, images: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    s, vit = self.s, self.backbone
    x = vit._pos_embed(vit.patch_embed(images))
    first, p = vit.num_prefix_tokens, s.prompt_length
    specific = None
    for i, block in enumerate(vit.blocks):
      if specific is None or s.specific_every_block:
        specific = self.specific_prompter(source)
      common = self.common_prompt[i].expand(len(x), -1, -1)
      common = self._dropped(common, s.prompt_dropout)
      prompts = s.feature_fusion[0] * common + s.feature_fusion[1] * specific
      rest = x[:, first:] if i == 0 else x[:, first + p :]
      x = block(torch.cat([x[:, :first], prompts.to(x.dtype), rest], dim=1))
    x = vit.norm(x)
    return x[:, 0] if s.pool == "tok" else x[:, first + p :].mean(1)


def load(model: InsVP, arrays: Mapping[str, torch.Tensor]) -> None:
  """Sets the weights from parameters in JAX's layout, by their '/'-joined names."""
  s, state = model.s, {}

  def dense(name: str, kernel: torch.Tensor, bias: torch.Tensor) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = kernel.T, bias.reshape(-1)

  def conv(name: str, source: str) -> None:
    state[f"{name}.weight"] = arrays[f"{source}/kernel"].permute(3, 2, 0, 1)
    state[f"{name}.bias"] = arrays[f"{source}/bias"]

  def norm(name: str, source: str) -> None:
    state[f"{name}.weight"] = arrays[f"{source}/scale"]
    state[f"{name}.bias"] = arrays[f"{source}/bias"]

  conv("backbone.patch_embed.proj", "backbone/embedding")
  state["backbone.pos_embed"] = arrays["backbone/pos_embedding"]
  if s.pool == "tok":
    state["backbone.cls_token"] = arrays["backbone/cls"]
  norm("backbone.norm", "backbone/Transformer/encoder_norm")
  for i in range(s.depth):
    block, source = f"backbone.blocks.{i}", f"backbone/Transformer/encoderblock_{i}"
    norm(f"{block}.norm1", f"{source}/LayerNorm_0")
    norm(f"{block}.norm2", f"{source}/LayerNorm_1")
    attention = f"{source}/MultiHeadDotProductAttention_0"
    parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
    kernels = [arrays[f"{part}/kernel"].reshape(s.width, -1) for part in parts]
    biases = [arrays[f"{part}/bias"].reshape(-1) for part in parts]
    dense(f"{block}.attn.qkv", torch.cat(kernels, 1), torch.cat(biases))
    out = arrays[f"{attention}/out/kernel"].reshape(-1, s.width)
    dense(f"{block}.attn.proj", out, arrays[f"{attention}/out/bias"])
    for j in (0, 1):
      layer = f"{source}/MlpBlock_0/Dense_{j}"
      dense(
        f"{block}.mlp.fc{j + 1}", arrays[f"{layer}/kernel"], arrays[f"{layer}/bias"]
      )
  dense("head", arrays["head/kernel"], arrays["head/bias"])
  state["common_prompt"] = arrays["prompter/common_prompt"]
  for i in (0, 1):
    conv(f"global_prompter.{2 * i}", f"prompter/global_prompter/Conv_{i}")
  for i in (0, 1, 2):
    conv(f"specific_prompter.convs.{i}", f"prompter/specific_prompter/Conv_{i}")
  # A patch is (row, column, channel) there and (channel, row, column) here.
  q = s.patch_size
  order = torch.arange(3 * q**2).reshape(q, q, 3).permute(2, 0, 1).reshape(-1)
  first, second = (f"prompter/patch_prompter/Dense_{i}" for i in (0, 1))
  dense(
    "patch_prompter.layers.0",
    arrays[f"{first}/kernel"][order],
    arrays[f"{first}/bias"],
  )
  dense(
    "patch_prompter.layers.2",
    arrays[f"{second}/kernel"][:, order],
    arrays[f"{second}/bias"][order],
  )
  model.load_state_dict(state, strict=True)
