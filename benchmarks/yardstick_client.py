"""Drives the PyTorch yardstick in its own process."""

import contextlib
import json
from pathlib import Path
import subprocess
import tempfile
from typing import Any

import numpy as np

from insvp_jax import trees
from insvp_jax.methods.insvp import InsVP
from insvp_jax.methods.insvp_prompters import specific_grid
from insvp_jax.models.classifier import PromptedClassifier

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
  "prompt_length",
  "patch_hidden",
  "global_hidden",
  "global_kernels",
  "global_dilations",
  "specific_kernels",
  "specific_activation",
  "specific_input",
  "train_specific",
  "image_fusion",
  "feature_fusion",
  "dropout",
  "prompt_dropout",
)


def missing(python: str) -> str:
  """Returns why an interpreter cannot run the yardstick, or ""."""
  command = [python, "-c", "import torch, timm"]
  try:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError as error:
    return f"{python} cannot be started: {error.strerror}"
  if run.returncode == 0:
    return ""
  lines = run.stderr.strip().splitlines() or ["torch and timm cannot be imported"]
  return (
    f"{python}: {lines[-1]}. Install benchmarks/requirements.txt, or name an "
    "interpreter that has it with --torch_python."
  )


def settings(
  model: PromptedClassifier, specific_every_block: bool = False
) -> dict[str, Any]:
  """Returns what the yardstick builds to compute what a model of ours computes.

  Raises:
    ValueError: the model is something that the yardstick is not written for.
  """
  vit, prompter = model.backbone, model.prompter
  if not isinstance(prompter, InsVP) or vit.pool not in ("tok", "gap"):
    raise ValueError("the yardstick is InsVP over a ViT with pool 'tok' or 'gap'.")
  used = [prompter.use_patch, prompter.use_global]
  used += [prompter.use_common, prompter.use_specific]
  if not all(used) or prompter.simam or prompter.prompted_blocks != vit.depth:
    raise ValueError("the yardstick has all four prompts in all blocks, and no SimAM.")
  grid = specific_grid(vit.width, vit.image_size)
  sizes = ("image_size", "patch_size", "width", "depth", "mlp_dim", "num_heads")
  return {
    **{name: getattr(vit, name) for name in (*sizes, "pool", "gelu")},
    **{name: getattr(prompter, name) for name in FIELDS},
    "num_classes": model.head.num_classes,
    "specific_crop": grid.crop,
    "specific_size": grid.size,
    "specific_channels": grid.channels,
    "specific_pool": grid.pool,
    "specific_every_block": specific_every_block,
  }


class Client(contextlib.AbstractContextManager):
  """One yardstick; it ends with the with block."""

  def __init__(
    self,
    python: str,
    model: PromptedClassifier,
    *,
    batch_size: int,
    dtype: str = "float32",
    compiled: bool = False,
    specific_every_block: bool = False,
  ):
    """Starts the process and builds the model there.

    Args:
      python: the interpreter that has torch and timm.
      model: ours, whose counterpart it builds.
      batch_size: b.
      dtype: "float32" or "bfloat16".
      compiled: whether `torch.compile` is used.
      specific_every_block: see `yardstick_model.Settings`.

    Raises:
      RuntimeError: torch or timm is missing, or the process fails; see the message.
    """
    self._process = subprocess.Popen(
      [python, "-m", "benchmarks.yardstick"],
      cwd=ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    try:
      self.info = self.ask(
        create=settings(model, specific_every_block),
        batch_size=batch_size,
        dtype=dtype,
        compile=compiled,
      )
    except BaseException:
      self.close()
      raise

  def ask(self, **request: Any) -> dict[str, Any]:
    """Returns the answer to a request; see `benchmarks/yardstick.py`."""
    try:
      self._process.stdin.write(json.dumps(request) + "\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # the empty answer tells
    line = self._process.stdout.readline()
    if not line:
      python = self._process.args[0]
      raise RuntimeError(missing(python) or "the yardstick's process ended; see above.")
    answer = json.loads(line)
    if "error" in answer:
      raise RuntimeError(f"the yardstick failed: {answer['error']}")
    return answer

  def seconds(self, what: str, times: int, clock: str = "wall") -> float:
    """Returns the seconds of some calls of "train" or "eval", together.

    Args:
      what: is called.
      times: so often.
      clock: a key of `turns.CLOCKS`.
    """
    return self.ask(run=what, times=times, clock=clock)["seconds"]

  def logits(self, params: Any, pixels: np.ndarray) -> np.ndarray:
    """Returns its logits [b, k] from our parameters, of uint8 pixels [b, h, w, 3]."""
    with tempfile.TemporaryDirectory() as name:
      folder = Path(name)
      flat = {k: np.asarray(v) for k, v in trees.flatten(params).items()}
      np.savez(folder / "weights.npz", **flat)
      np.save(folder / "pixels.npy", pixels)
      self.ask(load=str(folder / "weights.npz"))
      output = folder / "logits.npy"
      self.ask(logits=str(folder / "pixels.npy"), output=str(output))
      return np.load(output)

  def close(self) -> None:
    """Ends the process."""
    # What is still buffered fails to be written where the process is gone.
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()

  def __exit__(self, *_: Any) -> None:
    """Ends the process."""
    self.close()
