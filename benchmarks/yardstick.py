"""The PyTorch yardstick's process: reads requests, measures, answers.

  python -m benchmarks.step --yardstick

starts it, with `--torch_python` where another interpreter has torch and timm
(`pip install -r benchmarks/requirements.txt`). One line of JSON comes in, one goes out,
so that PyTorch computes only while JAX waits:

  {"create": {...Settings}, "batch_size": 8, "dtype": "float32", "compile": false}
  {"load": "weights.npz"}                      our parameters, to compare the two
  {"logits": "pixels.npy", "output": "f.npy"}  of uint8 images [b, h, w, 3]
  {"run": "train", "times": 3, "clock": "wall"}
                             {"seconds": ...}; also "eval", and the processor's "cpu"
  {"memory": "train"}                          peak MiB of one step, where CUDA says so
"""

from collections.abc import Callable
import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.yardstick_model import InsVP, Settings, load


class Yardstick:
  """A model, an optimizer, a batch; and what can be asked of them."""

  def __init__(
    self, settings: Settings, batch_size: int, dtype: str, compiled: bool, lr: float
  ):
    """Builds it.

    Args:
      settings: of the model.
      batch_size: b.
      dtype: "float32" or "bfloat16", of what autocast computes so.
      compiled: whether `torch.compile` compiles the model.
      lr: of AdamW.
    """
    torch.manual_seed(0)
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    self.dtype = getattr(torch, dtype)
    self.model = InsVP(settings).to(self.device)
    self.call = torch.compile(self.model) if compiled else self.model
    trained = [p for p in self.model.parameters() if p.requires_grad]
    self.trainable = sum(p.numel() for p in trained)
    self.optimizer = torch.optim.AdamW(trained, lr=lr)
    size = settings.image_size
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch_size, 3, size, size), np.uint8)
    labels = rng.integers(0, settings.num_classes, batch_size)
    self.pixels = torch.from_numpy(pixels).to(self.device)
    self.labels = torch.from_numpy(labels).to(self.device)

  def logits(self, pixels: torch.Tensor) -> torch.Tensor:
    """Returns logits [b, k], computed in `dtype`."""
    mixed = self.dtype != torch.float32
    with torch.autocast(self.device, self.dtype, enabled=mixed):
      return self.call(pixels).float()

  def train(self) -> None:
    """Takes one step."""
    self.model.train()
    self.optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(self.logits(self.pixels), self.labels).backward()
    self.optimizer.step()

  def eval(self) -> None:
    """Counts the correct ones of one batch."""
    self.model.eval()
    with torch.inference_mode():
      logits = self.logits(self.pixels)
      (logits.argmax(1) == self.labels).sum()
      F.cross_entropy(logits, self.labels, reduction="sum")

  def seconds(self, function: Callable[[], None], times: int, clock: str) -> float:
    """Returns how long some calls take together, by either of two clocks."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    self._wait()
    start = now()
    for _ in range(times):
      function()
    self._wait()
    return now() - start

  def peak_mib(self, function: Callable[[], None]) -> float | None:
    """Returns what one call needs at its peak with all weights; None on a CPU."""
    if self.device == "cpu":
      return None
    function()
    torch.cuda.reset_peak_memory_stats()
    function()
    self._wait()
    return torch.cuda.max_memory_allocated() / 2**20

  def _wait(self) -> None:
    if self.device == "cuda":
      torch.cuda.synchronize()

  def load(self, path: str) -> None:
    """Takes our parameters from an .npz file."""
    with np.load(path, allow_pickle=False) as file:
      load(self.model, {name: torch.from_numpy(file[name]) for name in file.files})

  def write_logits(self, pixels: str, output: str) -> None:
    """Writes the logits of images in a file, without dropout."""
    images = np.ascontiguousarray(np.load(pixels).transpose(0, 3, 1, 2))
    self.model.eval()
    with torch.inference_mode():
      found = self.logits(torch.from_numpy(images).to(self.device))
    np.save(output, found.cpu().numpy())


def answer(request: dict[str, Any], state: dict[str, Yardstick]) -> dict[str, Any]:
  """Returns the answer to one request; `state` keeps the model."""
  if "create" in request:
    yardstick = Yardstick(
      Settings(**request["create"]),
      request["batch_size"],
      request["dtype"],
      request["compile"],
      request.get("lr", 1e-3),
    )
    state["model"] = yardstick
    return {
      "device": yardstick.device,
      "torch": torch.__version__,
      "threads": torch.get_num_threads(),
      "trainable": yardstick.trainable,
    }
  yardstick = state["model"]
  if "run" in request:
    function = getattr(yardstick, request["run"])
    return {"seconds": yardstick.seconds(function, request["times"], request["clock"])}
  if "memory" in request:
    return {"mib": yardstick.peak_mib(getattr(yardstick, request["memory"]))}
  if "load" in request:
    yardstick.load(request["load"])
  else:
    yardstick.write_logits(request["logits"], request["output"])
  return {}


def main() -> None:
  """Answers until the input ends."""
  # Whatever libraries print goes elsewhere: the answers have the output alone.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  state: dict[str, Yardstick] = {}
  for line in sys.stdin:
    try:
      found = answer(json.loads(line), state)
    except Exception as error:  # the other side reports it
      found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
  main()
