import base64
import io
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image
import pytest
from tiny_runs import make_params, make_run

from insvp_jax import config as config_lib
from insvp_jax.models.classifier import create_model
from insvp_jax.models.weights.load import save_backbone
from insvp_jax.run import load_run
from insvp_jax.tools import run_data
from insvp_jax.train.trainer import train

KWARGS = {"backbone": "mu/4", "image_size": 16, "backbone_kwargs": {"depth": 1}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
  """The workdir of a run trained for a few steps on the digits."""
  workdir = tmp_path_factory.mktemp("trained")
  weights = workdir / "backbone.npz"
  params = make_params(create_model(num_classes=10, method="linear", **KWARGS))
  save_backbone(params["backbone"], weights)
  config = config_lib.defaults()
  config.task = "digits"
  config.total_steps = 3
  config.image_size = KWARGS["image_size"]
  config.backbone.name = KWARGS["backbone"]
  config.backbone.weights = str(weights)
  config.backbone.depth = 1
  config.insvp.global_kernels = (3, 3)
  config.insvp.global_dilations = (1, 1)
  config.insvp.prompt_length = 2
  config.tensorboard = False
  train(config, workdir / "seed0")
  return workdir / "seed0"


def execute(
  notebook: Path, run: Path, root: Path, monkeypatch
) -> nbformat.NotebookNode:
  from nbclient import NotebookClient

  monkeypatch.setenv("INSVP_RUN", str(run))
  monkeypatch.setenv("PYTHONPATH", str(root))
  monkeypatch.delenv("MPLBACKEND", raising=False)
  node = nbformat.read(notebook, as_version=4)
  # Where Jupyter starts the kernel too.
  where = {"metadata": {"path": str(notebook.parent)}}
  NotebookClient(node, timeout=300, kernel_name="python3", resources=where).execute()
  return node


def pictures(node: nbformat.NotebookNode) -> list[np.ndarray]:
  data = [out.data for c in node.cells for out in c.get("outputs", []) if "data" in out]
  images = [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]
  return [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]


def text(node: nbformat.NotebookNode) -> str:
  outputs = [out for cell in node.cells for out in cell.get("outputs", [])]
  assert not [out for out in outputs if out.get("name") == "stderr"]
  return "".join(out.get("text", "") for out in outputs)


@pytest.fixture
def notebook(root):
  return root / "notebooks" / "load_run.ipynb"


def test_a_loaded_run_is_as_accurate_as_the_trainer_said(trained):
  run = load_run(trained)
  images, labels = run_data.sample_images(run, 797)
  said = [run.class_names[i] for i in run.predict(images).argmax(axis=1)]
  right = sum(a == b for a, b in zip(said, labels, strict=True))
  assert run.result["num_test_examples"] == len(images) == 797
  # One image may lie on the edge: batches of another size round differently.
  assert abs(right - 797 * run.result["test_accuracy"]) < 1.5


# Jupyter's client and its kernels warn about themselves.
@pytest.mark.filterwarnings("default")
def test_notebook_runs_on_a_fresh_run(notebook, trained, root, monkeypatch):
  node = execute(notebook, trained, root, monkeypatch)
  printed = text(node)
  assert "task       digits, method insvp" in printed
  assert "classes    0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in printed
  assert "on the test split" in printed
  assert printed.count("is taken for") == 6
  shown = pictures(node)
  assert len(shown) == 3
  assert all(picture.std() > 10 for picture in shown)
  assert "global [6, 16, 16, 3]" in printed
  assert printed.count("of the variation") == 1


def test_notebook_runs_on_a_method_without_prompts(
  notebook, tmp_path, monkeypatch, capsys
):
  data = {"preset": "vtab", "split_seed": 0}
  meta = {"config": {"task": "digits", "data": data}, "task": "digits"}
  meta["class_names"] = list("0123456789")
  workdir, _, _ = make_run(tmp_path, "linear", meta=meta, num_classes=10)
  monkeypatch.setenv("INSVP_RUN", str(workdir))
  node = nbformat.read(notebook, as_version=4)
  sources = [cell.source for cell in node.cells if cell.cell_type == "code"]
  names = {"display": pytest.fail}
  exec("\n".join(sources).replace("%matplotlib inline", ""), names)
  names["plt"].close("all")
  printed = capsys.readouterr().out
  assert printed.count("is taken for") == 6
  assert "method linear" in printed and "of the variation" not in printed


def test_notebook_is_kept_without_outputs(notebook):
  node = nbformat.read(notebook, as_version=4)
  nbformat.validate(node)
  for cell in node.cells:
    assert cell.get("outputs", []) == []
    assert cell.get("execution_count") is None
  assert 'INSVP_RUN", "runs/quickstart/insvp/seed0"' in node.cells[1].source
