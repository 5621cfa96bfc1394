"""Golden files of E2VPT, VFPT and VAPT; see `golden_cases`."""

from golden_family import Family

from insvp_jax import trees
from insvp_jax.search import pruning

_MASKS = ("token_mask", "piece_mask")


def _scores(case):
  """Returns the masks' gradients, as the search computes them, in float64.

  Those at the masks of the file as well: where a token is not pruned, its own gradient
  nearly cancels.
  """
  batch = {"images": case.images, "labels": case.labels}
  at_masks = pruning.mask_gradients(case.model, case.params, [batch], _MASKS)
  flat = trees.flatten(case.params)
  ones = {f"prompter/{name}": flat[f"prompter/{name}"] * 0 + 1 for name in _MASKS}
  params = trees.unflatten({**flat, **ones})
  scores = pruning.mask_gradients(case.model, params, [batch], _MASKS)
  return {f"grad/{name}": value for name, value in at_masks.items()} | {
    f"score/{name}": value for name, value in scores.items()
  }


def _e2vpt(config):
  fields = {
    "prompt_length": config["prompt_length"],
    "kv_length": config["kv_prompt_length"],
    "share_kv": config["share_kv"],
  }
  names = {"common_prompt": "prompt"}
  kinds = ("kv",) if config["share_kv"] else ("key", "value")
  names |= {f"{kind}_prompt": f"{kind}_prompt" for kind in kinds}
  if "pieces" not in config:
    return Family("e2vpt", {**fields, **dict.fromkeys(_MASKS, ())}, names)
  names |= {name: name for name in _MASKS}
  return Family("e2vpt", fields, names, extras=(_scores,))


def _vfpt(config):
  # Where transformed prompts stand among the others, attention does not see.
  names = ("prompt_length", "fourier_fraction", "deep")
  fields = {name: config[name] for name in names}
  fields["dimension"] = config["fourier_dimension"]
  return Family("vfpt", fields, {"common_prompt": "prompt"})


def _vapt(config):
  names = ("prompt_length", "kernel", "hidden", "static_blocks")
  later = range(config["static_blocks"], config["vit"]["depth"])

  def of_later(name):
    return [f"block_{i}/vapt/{name}" for i in later]

  return Family(
    "vapt",
    {name: config[name] for name in names},
    {
      "common_prompt": "prompt",
      "norm_scale": of_later("norm/scale"),
      "norm_bias": of_later("norm/bias"),
      "conv_kernel": of_later("conv/kernel"),
      "positions/kernel": of_later("tokens/kernel"),
      "positions/bias": of_later("tokens/bias"),
      "projector_down": "vapt/projector/down/kernel",
      "projector_up": "vapt/projector/up/kernel",
    },
  )


FAMILIES = {"e2vpt": _e2vpt, "vfpt": _vfpt, "vapt": _vapt}
