"""Golden files of adapters and reparametrisations; see `golden_cases`."""

from golden_family import Family, by_block


def _lora(config):
  fused = "fused" in config["method"]
  targets = ("qkv",) if fused else tuple(config["targets"])
  fields = {"rank": config["rank"], "scale": config.get("lora_scale", 1.0)}
  fields |= {"fused": True} if fused else {"targets": targets}
  names = {
    f"{target}_{part}/kernel": by_block(
      config, f"block_{{i}}/lora_{target}/{part}/kernel"
    )
    for target in targets
    for part in ("down", "up")
  }
  return Family("lora", fields, names)


FAMILIES = {"lora": _lora}
