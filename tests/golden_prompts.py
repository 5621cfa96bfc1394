"""Golden files of prompts; see `golden_cases`."""

from golden_family import Family


def _insvp(config):
  fields = {
    "preset": "release",
    "prompt_length": config["prompt_length"],
    "patch_hidden": config["patch_hidden"],
    "global_hidden": config["global_hidden"],
    "global_kernels": tuple(config["global_kernels"]),
    "specific_kernels": tuple(config["specific_kernels"]),
    "image_fusion": (1.0, config["global_weight"]),
    "simam": config["simam"],
  }
  return Family("insvp", fields)


def _vpt(config):
  deep = config.get("deep", True)
  fields = {"prompt_length": config["prompt_length"]}
  if "method" in config:
    return Family("vpt_deep", fields, {"common_prompt": "prompt"})
  return Family("vpt_deep" if deep else "vpt_shallow", fields)


FAMILIES = {"insvp_release": _insvp, "vpt": _vpt}
