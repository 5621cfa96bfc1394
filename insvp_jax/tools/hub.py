"""A run's adapter as a folder for others, with a model card; and on Hugging Face's hub.

  run = insvp_jax.load_run("runs/svhn")
  insvp_jax.push_to_hub(run, "user/svhn-insvp", private=True)
  run = insvp_jax.load_run("hf-hub:user/svhn-insvp@<commit>")

What the folder holds: `insvp_jax.checkpoints.adapters`.
"""

from collections.abc import Mapping
from pathlib import Path
import re
import tempfile
from typing import Any, NamedTuple

from insvp_jax import trees
from insvp_jax.checkpoints import adapters, items
from insvp_jax.errors import one_line, printable
from insvp_jax.train import objectives


class _Kind(NamedTuple):
  """What a card says of a kind of task.

  Attributes:
    task: as the hub calls it.
    metric: as the hub calls it.
    use: the line of Python that uses a run.
  """

  task: str
  metric: str
  use: str


# By the metric of a run.
_KINDS = {
  "accuracy": _Kind(
    "image-classification",
    "accuracy",
    'run.predict("photo.jpg")  # the probability of each of run.class_names',
  ),
  "miou": _Kind(
    "image-segmentation",
    "mean_iou",
    'run.segment("photo.jpg")  # for each pixel an index of run.class_names',
  ),
}
_MOST_CLASSES = 100  # that a card lists; the description has all
# What stands in a card where a repository has no name yet.
_ANY = "<this folder>"
_CARD = """\
# {title}

{method} on {backbone}, for {num_classes} classes of the task {task}: the {trainable}
parameters that were trained{share}. What stayed frozen of the backbone is not in here.

## Use

```python
import insvp_jax

run = insvp_jax.load_run({name!r}{argument})
{use}
```

{backbone_note}Add `@` and a commit's hash to the repository's name to get exactly these
weights, whatever is pushed later.

## Results

{results}

{protocol}

## Backbone

{backbone_lines}

## Classes

```text
{classes}
```
"""


def export_adapter(run: Any, folder: Path, *, name: str = "") -> dict[str, Any]:
  """Writes adapter.safetensors, config.json and README.md; returns the description.

  Args:
    run: from `load_run`.
    folder: is made; one that holds an exported adapter is written anew.
    name: of the repository that it will be in, for the model card, "user/name".

  Raises:
    ValueError: something else lies in the folder.
    OSError: the files cannot be written.
  """
  from insvp_jax.logs.writers import write_text

  trained = set(run.meta["trainable"])
  arrays = {
    leaf: array
    for leaf, array in trees.flatten(run.params).items()
    if leaf in trained or re.fullmatch(items.ALWAYS_STORED, leaf)
  }
  description = adapters.write_adapter(folder, arrays, run.meta, run.result)
  write_text(folder / adapters.CARD, model_card(run, description, name))
  return description


def push_to_hub(
  run: Any,
  repo_id: str,
  *,
  private: bool | None = None,
  token: str | None = None,
  revision: str | None = None,
  commit_message: str = "Upload the adapter of a run of insvp_jax",
) -> str:
  """Uploads a run's adapter, its description and its model card; returns its name.

  Args:
    run: from `load_run`.
    repo_id: the repository, "user/name"; it is made if need be.
    private: whether it is made private; None is your account's default. One that is
      there stays as it is.
    token: of your account; None is that of `hf auth login`.
    revision: the branch; None is main.
    commit_message: of the upload.

  Returns:
    "hf-hub:user/name@<commit>", which `load_run` takes.

  Raises:
    ValueError: no name of a repository.
    OSError: it could not be uploaded.
  """
  import huggingface_hub
  from huggingface_hub import errors

  api = huggingface_hub.HfApi(token=token)
  try:
    with tempfile.TemporaryDirectory() as folder:
      export_adapter(run, Path(folder), name=repo_id)
      api.create_repo(repo_id, private=private, exist_ok=True)
      commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
      )
  except errors.HFValidationError as error:
    raise ValueError(f"{repo_id!r} is no name of a repository: {error}") from error
  except OSError as error:
    raise OSError(
      f"{repo_id} could not be uploaded: {one_line(error)}. Log in with `hf auth "
      "login`, or pass token=..., of an account that may write there."
    ) from error
  return f"hf-hub:{repo_id}@{commit.oid}"


def model_card(run: Any, description: Mapping[str, Any], name: str = "") -> str:
  """Returns a model card: what the run is and scored, and how to load it.

  No license is stated, since nobody has said which.

  Args:
    run: from `load_run`.
    description: what is beside the card, which has no paths of this machine.
    name: of the repository, "user/name"; "" where there is none.
  """
  result = description.get("result") or {}
  backbone = description["backbone"]
  method, task = (_plain(description.get(k) or "?") for k in ("method", "task"))
  own = f"{task}-{method}"
  title = name.rpartition("/")[2] or own
  total = trees.count(run.params)
  trainable = result.get("trainable_params") or _count_trainable(run)
  is_found, note = _backbone_note(backbone)
  classes = [_plain(class_name) for class_name in run.class_names]
  text = _CARD.format(
    title=_plain(title),
    method=f"`{method}`",
    task=f"`{task}`",
    backbone=f"`{_plain(backbone['id'])}`",
    num_classes=len(classes),
    trainable=f"{trainable:,}",
    share=f" ({100 * trainable / total:.2f}% of the model's {total:,})",
    name=f"hf-hub:{name}" if name else _ANY,
    use=_KINDS[run.metric].use,
    argument="" if is_found else ', backbone="<its file>"',
    backbone_note=note,
    results=_results(result, run.metric),
    protocol=_protocol(run, result),
    backbone_lines=_backbone_lines(backbone),
    classes="\n".join(
      [*classes[:_MOST_CLASSES], *["..."] * (len(classes) > _MOST_CLASSES)]
    ),
  )
  front = _front_matter(title, method, task, backbone, result, run.metric)
  return f"---\n{front}---\n\n{text}"


def _front_matter(
  name: str,
  method: str,
  task: str,
  backbone: Mapping[str, Any],
  result: Mapping[str, Any],
  metric: str,
) -> str:
  """Returns the YAML that the hub reads, without the lines around it."""
  import huggingface_hub

  kind, value = _KINDS[metric], result.get(f"test_{metric}")
  evaluated = huggingface_hub.EvalResult(
    task_type=kind.task,
    dataset_type=task,
    dataset_name=task,
    dataset_split="test",
    metric_type=kind.metric,
    metric_name=f"{objectives.title_of(metric)} on test",
    metric_value=value,
  )
  base = re.match(r"(?:hf-hub:)?([^/@]+/[^/@]+)", backbone["id"])
  is_repository = backbone["id"].startswith(("timm/", "hf-hub:"))
  data = huggingface_hub.ModelCardData(
    base_model=base[1] if base and is_repository else None,
    library_name="insvp_jax",
    pipeline_tag=kind.task,
    tags=[kind.task, "parameter-efficient-fine-tuning", "jax", method],
    metrics=None if value is None else [kind.metric],
    model_name=None if value is None else name,
    eval_results=None if value is None else [evaluated],
  )
  return data.to_yaml() + "\n"


def _results(result: Mapping[str, Any], metric: str) -> str:
  """Returns a table of the metric on val and test, or that there are none."""
  rows = []
  for split in ("val", "test"):
    value = result.get(f"{split}_{metric}")
    if value is not None:
      count = result.get(f"num_{split}_examples") or ""
      rows.append(f"| {split} | {100 * value:.2f}% | {count} |")
  if not rows:
    return "It has not been evaluated."
  titles = f"| split | {objectives.title_of(metric)} | images |"
  return "\n".join([titles, "|---|---|---|", *rows])


def _protocol(run: Any, result: Mapping[str, Any]) -> str:
  """Returns how the run was trained, as far as is known."""
  config = run.meta["config"]
  optim = config.get("optim") or {}
  parts = {
    "trained on": result.get("train_split"),
    "steps": result.get("steps"),
    "batch size": config.get("batch_size"),
    "optimizer": optim.get("name"),
    "lr": result.get("lr"),
    "wd": result.get("wd"),
    "seed": result.get("seed"),
  }
  known = [f"{key} {_plain(x)}" for key, x in parts.items() if x is not None]
  versions = run.meta.get("versions") or {}
  used = ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in versions.items())
  lines = [f"Pixels: {run.preset.summary().removeprefix('preset ')}."]
  if known:
    lines.append(f"Training: {', '.join(known)}.")
  if used:
    lines.append(f"Versions: {used}.")
  return "\n\n".join(lines)


def _backbone_note(backbone: Mapping[str, Any]) -> tuple[bool, str]:
  """Returns whether `load_run` finds the backbone by itself, and a note about it."""
  from insvp_jax.models import weights

  identity = backbone["id"]
  if identity == "random" or identity in weights.RELEASES:
    return True, ""
  where = "the file" if not weights.is_remote(identity) else "the repository"
  return False, (
    "`load_run` does not request a backbone because a run names it: pass "
    f"{where} `{_plain(identity)}`, with the sha256 below.\n\n"
  )


def _backbone_lines(backbone: Mapping[str, Any]) -> str:
  lines = [f"- name: `{_plain(backbone['id'])}`"]
  if backbone.get("sha256"):
    lines.append(f"- sha256: `{_plain(backbone['sha256'])}`, which `load_run` compares")
  if "seed" in backbone:
    lines.append(f"- drawn at random with seed {backbone['seed']}, and never trained")
  return "\n".join(lines)


def _count_trainable(run: Any) -> int:
  flat = trees.flatten(run.params)
  return sum(flat[name].size for name in run.meta["trainable"])


def _plain(text: Any) -> str:
  """Returns a text on one line that ends no code and no cell of Markdown."""
  return re.sub("[`|]", "'", printable(str(text)))
