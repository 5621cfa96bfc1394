"""Golden files of pixel prompts and label mappings; see `golden_cases`."""

from typing import Any

from golden_family import Family
import jax
import jax.numpy as jnp

from insvp_jax.methods.ops import frame, label_mapping


def _vp(config):
  names = {name.removeprefix("vp/"): name for name in config["parameters"]}
  fields = {
    "location": config["method"].removeprefix("vp_"),
    "prompt_size": config["prompt_size"],
  }
  return Family("vp", fields, names, extras=(_prompted_image,))


def _prompted_image(case) -> dict[str, Any]:
  @jax.jit
  def prompted(params, images):
    def prompt_image(model, images):
      return model.prompter.prompt_image(images)

    return case.model.apply({"params": params}, images, method=prompt_image)

  return {"prompted_image": prompted(case.params, case.images)}


# Frames with mapped labels.


def _ilm_vp(config):
  fields, names, model = _framed(config)
  fields["mapping"] = "fixed"
  return Family("ilm_vp", fields, names, model=model, **_FRAMED)


def _autovp(config):
  fields, names, model = _framed(config)
  fields |= {"additive": not config["sigmoid"], "resize": "resize" in config}
  fields["sources_per_target"] = config.get("sources_per_target", 1)
  kinds = {"fully_connected_layer_mapping": "full", "frequency_based_mapping": "fixed"}
  fields["mapping"] = kinds[config["mapping"]]
  extras = _FRAMED["extras"]
  if fields["mapping"] == "full":
    del names["label_mapping"]
    names |= {f"dense/{leaf}": f"mapping/{leaf}" for leaf in ("kernel", "bias")}
  if fields["resize"]:
    names["scale"] = "resize"
    extras = (*extras, _resized_image)
  options = {**_FRAMED, "extras": extras}
  return Family("autovp", fields, names, model=model, **options)


def _framed(config):
  """Returns (fields, names, model) of an image in a frame."""
  fields = {"inner_size": config["inner_size"]}
  names = {"delta": "delta", "label_mapping": "mapping"}
  is_plain = not config.get("normalize", True)
  model = {
    "num_classes": config["target_classes"],
    "backbone_kwargs": {"head_classes": config["vit"]["num_classes"]},
    "mean": (0.0, 0.0, 0.0) if is_plain else config["mean"],
    "std": (1.0, 1.0, 1.0) if is_plain else config["std"],
  }
  return fields, names, model


def _small_images(recipe, config):
  """Returns the images that are framed, normalised as a pipeline does."""
  pixels = _small_pixels(recipe, config)
  if not config.get("normalize", True):
    return pixels
  return (pixels - jnp.asarray(config["mean"])) / jnp.asarray(config["std"])


def _small_pixels(recipe, config):
  inner = config["inner_size"]
  shape = (config["batch"], inner, inner, 3)
  return jax.nn.sigmoid(jnp.asarray(recipe.images(shape, config["seed"])))


def _source_logits(case) -> dict[str, Any]:
  """Returns those, and the gradients of the source's head."""
  model = case.model
  logits = jax.jit(lambda p, x: model.apply({"params": p}, x, method="source_logits"))
  grads = {f"grad/{name}": case.backbone_grads[name] for name in _HEAD}
  return {"source_logits": logits(case.params, case.images), **grads}


def _resized_image(case) -> dict[str, Any]:
  pixels = _small_pixels(case.recipe, case.config)
  size, scale = case.config["vit"]["image_size"], jnp.float32(case.arrays["resize"])
  return {"resized_image": frame.pad_scaled(pixels, size, scale)}


_HEAD = ("head/kernel", "head/bias")
_FRAMED = {
  "images": _small_images,
  "trains_backbone": _HEAD,
  "extras": (_prompted_image, _source_logits),
}


# Label mappings: no model.


def _ilm_label_mapping(config):
  del config
  return Family("", extras=(_greedy_of_counts,))


def _greedy_of_counts(case) -> dict[str, Any]:
  return {
    f"{i}/mapping": label_mapping.greedy_mapping(
      case.arrays[f"{i}/counts"], sizes["sources_per_target"], ascending=True
    )
    for i, sizes in enumerate(case.config["cases"])
  }


def _autovp_label_mapping(config):
  del config
  return Family("", extras=(_frequencies, _iterations, _semantic))


def _mapping(case, name, sizes):
  """Returns (counts, mapping) of the predictions of a case or an epoch."""
  counts = label_mapping.count_predictions(
    case.arrays[f"{name}/predictions"],
    case.arrays[f"{name}/labels"],
    sizes["source_classes"],
    sizes["target_classes"],
  )
  return counts, label_mapping.greedy_mapping(counts, sizes["sources_per_target"])


def _frequencies(case) -> dict[str, Any]:
  results = {}
  for i, sizes in enumerate(case.config["cases"]):
    counts, mapping = _mapping(case, str(i), sizes)
    shape = (3, sizes["source_classes"])
    logits = case.recipe.draw(f"{i}/source_logits", shape, case.config["seed"])
    logits = label_mapping.map_logits(*map(jnp.asarray, (logits, mapping)))
    results |= {f"{i}/counts": counts, f"{i}/mapping": mapping}
    results[f"{i}/target_logits"] = logits
  return results


def _iterations(case) -> dict[str, Any]:
  sizes = case.config["iter"]
  return {
    f"iter/{epoch}/mapping": _mapping(case, f"iter/{epoch}", sizes)[1]
    for epoch in range(sizes["epochs"])
  }


def _semantic(case) -> dict[str, Any]:
  results = {}
  for i, sizes in enumerate(case.config["semantic"]):
    embeddings = (
      case.recipe.draw(
        f"semantic/{i}/{side}_embedding",
        (sizes[f"{side}_classes"], sizes["dim"]),
        case.config["seed"],
      )
      for side in ("source", "target")
    )
    results[f"semantic/{i}/mapping"] = label_mapping.semantic_mapping(
      *embeddings, sizes["sources_per_target"]
    )
  return results


FAMILIES = {
  "vp_": _vp,
  "ilm_vp": _ilm_vp,
  "autovp": _autovp,
  "ilm_label_mapping": _ilm_label_mapping,
  "autovp_label_mapping": _autovp_label_mapping,
}
