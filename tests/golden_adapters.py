"""Golden files of adapters and reparametrisations; see `golden_cases`."""

from golden_family import Family, by_block

_KERNEL_AND_BIAS = ("kernel", "bias")


def _in_blocks(config, prefix, modules, leaves=_KERNEL_AND_BIAS):
  """Returns {our name: its names in the file} of leaves that every block has.

  Args:
    config: of the file.
    prefix: of the file's names, after the block's: "adapter/" or "ssf_".
    modules: theirs; ours have "_" for "/".
    leaves: of each module.
  """
  return {
    f"{module.replace('/', '_')}/{leaf}": by_block(
      config, f"block_{{i}}/{prefix}{module}/{leaf}"
    )
    for module in modules
    for leaf in leaves
  }


def _activation(config):
  text = config["adapter_activation"]
  if "1.702" in text:
    return "quick_gelu"
  return "relu" if "relu" in text else "gelu"


def _adapter(config):
  fields = {"hidden": config["hidden"], "activation": _activation(config)}
  return Family("adapter", fields, _in_blocks(config, "adapter/", ("down", "up")))


def _adaptformer(config):
  fields = {"hidden": config["hidden"], "scale": config["adaptformer_scale"]}
  names = _in_blocks(config, "adaptformer/", ("down", "up"))
  return Family("adaptformer", fields, names)


def _adapter_plus(config):
  names = _in_blocks(config, "adapter_plus/", ("down", "up"))
  names["scale"] = by_block(config, "block_{i}/adapter_plus/scale")
  return Family("adapter_plus", {"hidden": config["hidden"]}, names)


def _branches(config, method):
  """Returns the branches that the file has parameters of."""
  names = "\n".join(config["parameters"])
  return tuple(b for b in ("attn", "mlp") if f"/{method}_{b}/" in names)


def _convpass(config):
  branches = _branches(config, "convpass")
  fields = {"hidden": config["hidden"], "scale": config["convpass_scale"]}
  modules = [f"{b}/{layer}" for b in branches for layer in ("down", "conv", "up")]
  names = _in_blocks(config, "convpass_", modules)
  return Family("convpass", {**fields, "branches": branches}, names)


def _repadapter(config):
  branches = _branches(config, "repadapter")
  fields = {name: config[name] for name in ("hidden", "groups")}
  fields |= {"scale": config["repadapter_scale"], "branches": branches}
  modules = [f"{b}/{layer}" for b in branches for layer in ("down", "up")]
  norms = {"attn": "norm1", "mlp": "norm2"}
  names = {}
  for ours, theirs in _in_blocks(config, "repadapter_", modules).items():
    branch, _, rest = ours.partition("_")
    names[f"{norms[branch]}_{rest}"] = theirs
  return Family("repadapter", fields, names)


def _ssf(config):
  leaves = ("scale", "shift")
  modules = ("norm1", "query", "key", "value", "out", "norm2", "fc1", "fc2")
  names = _in_blocks(config, "ssf_", modules, leaves)
  names |= {
    f"{module}/{leaf}": f"ssf/{module}/{leaf}"
    for module in ("embedding", "encoder_norm")
    for leaf in leaves
  }
  return Family("ssf", {}, names)


def _fact(method, config):
  fields = {"rank": config["rank"], "scale": config["fact_scale"]}
  names = {"u": "fact/u/kernel", "v": "fact/v/kernel"}
  if method == "fact_tk":
    names |= {"core": "fact/core", "p": "fact/p"}
  else:
    modules = ("query", "key", "value", "out", "fc1", "fc2")
    names |= _in_blocks(config, "fact_", modules, ("kernel",))
  return Family(method, fields, names)


def _fact_tt(config):
  return _fact("fact_tt", config)


def _fact_tk(config):
  return _fact("fact_tk", config)


def _lora(config):
  fused = "fused" in config["method"]
  targets = ("qkv",) if fused else tuple(config["targets"])
  fields = {"rank": config["rank"], "scale": config.get("lora_scale", 1.0)}
  fields |= {"fused": True} if fused else {"targets": targets}
  modules = [f"{target}/{part}" for target in targets for part in ("down", "up")]
  return Family("lora", fields, _in_blocks(config, "lora_", modules, ("kernel",)))


# By the start of a file's method.
FAMILIES = {
  "adapter": _adapter,
  "adaptformer": _adaptformer,
  "adapter_plus": _adapter_plus,
  "convpass": _convpass,
  "repadapter": _repadapter,
  "ssf": _ssf,
  "fact_tt": _fact_tt,
  "fact_tk": _fact_tk,
  "lora": _lora,
}
