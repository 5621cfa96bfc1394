"""Golden files of pixel prompts and label mappings; see `golden_cases`."""

from typing import Any

from golden_family import Family
import jax
import jax.numpy as jnp

from insvp_jax.methods.ops import label_mapping


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
  "ilm_label_mapping": _ilm_label_mapping,
  "autovp_label_mapping": _autovp_label_mapping,
}
