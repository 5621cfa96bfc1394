"""Notebooks are executed, all in one kernel, small; their stored outputs are whole."""

import base64
import io
from pathlib import Path
import re

import nbformat
import numpy as np
from PIL import Image
import pytest
from test_suite import write_noah
from tiny_runs import make_params, make_run
from tiny_training import write_images

from insvp_jax import config as config_lib
from insvp_jax.models.classifier import create_model
from insvp_jax.models.weights.load import save_backbone
from insvp_jax.run import load_run
from insvp_jax.tools import run_data
from insvp_jax.train.trainer import train

# None of this is about devices, and for one all compiles sooner.
pytestmark = pytest.mark.usefixtures("one_device")

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
KWARGS = {"backbone": "mu/4", "image_size": 16, "backbone_kwargs": {"depth": 1}}
# A search of a moment, in place of what takes minutes.
SMALL = {
  "backbone.name": "mu/4",
  "backbone.depth": 1,
  "image_size": 16,
  "batch_size": 4,
  "total_steps": 2,
  "optim.warmup_epochs": 0.0,
  "tensorboard": False,
  "data.cache_dir": "off",
  "tune.population": 1,
}


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


def read(name: str) -> nbformat.NotebookNode:
  return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def parameters(name: str, place: Path, backbone: Path) -> str:
  """Returns what takes the place of a notebook's cell of parameters."""
  # Read, not drawn: to draw a backbone would be the dearest program of each run.
  small = SMALL | {"backbone.weights": str(backbone)}
  values = {
    "adapt_images": {
      "root": str(place / "images"),
      "backbone": "boxed",
      "method": "linear",
      "lr": 0.01,
      "epochs": 3,  # two are warm-up
    },
    "compare_methods": {
      "methods": ("linear", "vpt_deep"),
      "learning_rates": (0.01, 0.1),
      "seeds": (0,),
      "epochs": 1,
      "shots": 4,
      "settings": small | {"vpt_deep.prompt_length": 2},
    },
    "vtab_task": {
      "task": "svhn",
      "method": "linear",
      "root": str(place / "vtab-1k"),
      "data_dir": "",
      "settings": small | {"tune.lr": (0.01,), "tune.wd": (), "tune.seeds": (0, 1)},
    },
  }[name] | {"workdir": str(place / name)}
  return "\n".join(f"{key} = {value!r}" for key, value in values.items())


@pytest.fixture(scope="module")
def executed(trained, root, tmp_path_factory) -> dict[str, nbformat.NotebookNode]:
  """All notebooks, executed one after the other by one kernel."""
  from nbclient import NotebookClient

  place = tmp_path_factory.mktemp("notebooks")
  write_images(place / "images")
  write_noah(place / "vtab-1k", "svhn", number_of_classes=2)
  nodes = {name: read(name) for name in NAMES}
  for name, node in nodes.items():
    for cell in node.cells:
      if "parameters" in cell.metadata.get("tags", ()):
        cell.source = parameters(name, place, trained.parent / "backbone.npz")
    # Nothing of one is there for the next.
    node.cells.append(nbformat.v4.new_code_cell("%reset -f"))
  together = nbformat.v4.new_notebook()
  together.cells = [cell for node in nodes.values() for cell in node.cells]
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("INSVP_RUN", str(trained))
    patch.setenv("PYTHONPATH", str(root))
    patch.delenv("MPLBACKEND", raising=False)
    # The notebooks share programs: keep those that compile in no time, too.
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Where Jupyter starts the kernel too.
    where = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(
      together, timeout=300, kernel_name="python3", resources=where
    ).execute()
  return nodes


def pictures(node: nbformat.NotebookNode) -> list[np.ndarray]:
  data = [out.data for c in node.cells for out in c.get("outputs", []) if "data" in out]
  images = [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]
  return [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]


def text(node: nbformat.NotebookNode, stream: str = "stdout") -> str:
  outputs = [out for cell in node.cells for out in cell.get("outputs", [])]
  return "".join(out.text for out in outputs if out.get("name") == stream)


def markdown(node: nbformat.NotebookNode) -> str:
  outputs = [out for cell in node.cells for out in cell.get("outputs", [])]
  return "".join(out.get("data", {}).get("text/markdown", "") for out in outputs)


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
def test_a_run_is_loaded(executed):
  node = executed["load_run"]
  printed = text(node)
  assert text(node, "stderr") == ""
  assert "task       digits, method insvp" in printed
  assert "classes    0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in printed
  assert "on the test split" in printed
  assert printed.count("is taken for") == 6
  shown = pictures(node)
  assert len(shown) == 3
  assert all(picture.std() > 10 for picture in shown)
  assert "global [6, 16, 16, 3]" in printed
  assert printed.count("of the variation") == 1


@pytest.mark.filterwarnings("default")
def test_a_folder_is_adapted_to(executed):
  node = executed["adapt_images"]
  assert "images: 3 classes, train 24, val 10, test 13" in text(node, "stderr")
  assert re.search(r"test accuracy \d+\.\d% of 13 images", text(node))
  assert len(pictures(node)) == 2


@pytest.mark.filterwarnings("default")
def test_methods_are_compared(executed):
  node = executed["compare_methods"]
  assert {"linear", "vpt_deep"} <= set(re.findall(r"^\| (\w+)", markdown(node), re.M))
  assert text(node).count("on val: lr 0.01: ") == 2
  assert len(pictures(node)) == 1


@pytest.mark.filterwarnings("default")
def test_prompts_are_looked_into(executed):
  node = executed["inside_prompts"]
  printed = text(node)
  assert "specific [256, 2, " in printed
  assert printed.count("of it differs from image to image") == 3
  assert len(re.findall(r"(?:as trained|no [a-z ]+) +\d+\.\d%$", printed, re.M)) == 5
  assert len(pictures(node)) == 2


@pytest.mark.filterwarnings("default")
def test_a_task_of_vtab_is_trained(executed):
  node = executed["vtab_task"]
  assert "all splits are there" in text(node)
  assert re.search(r"\| linear +\| +\d+\.\d+ ± \d", markdown(node))


def run_here(name: str, **names) -> None:
  """Executes the code of a notebook in this process."""
  node = read(name)
  sources = [cell.source for cell in node.cells if cell.cell_type == "code"]
  code = "\n".join(sources).replace("%matplotlib inline", "")
  code = re.sub(r"^ *%pip.*$", "  pass", code, flags=re.M)
  exec(code, names)


def test_a_task_that_is_not_there_says_what_to_prepare(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  pytest.importorskip("IPython")
  run_here("vtab_task")
  printed = capsys.readouterr().out
  assert "Not yet: config.data.root: no vtab-1k" in printed
  assert "vtab-1k/svhn/train800val200.txt" in printed
  assert "insvp prepare --task=svhn --data_dir=FOLDER" in printed
  assert not list(tmp_path.iterdir())


def test_a_run_of_a_method_without_prompts_is_loaded(tmp_path, monkeypatch, capsys):
  data = {"preset": "vtab", "split_seed": 0}
  meta = {"config": {"task": "digits", "data": data}, "task": "digits"}
  meta["class_names"] = list("0123456789")
  workdir, _, _ = make_run(tmp_path, "linear", meta=meta, num_classes=10)
  monkeypatch.setenv("INSVP_RUN", str(workdir))
  run_here("load_run", display=pytest.fail)
  import matplotlib.pyplot as plt

  plt.close("all")
  printed = capsys.readouterr().out
  assert printed.count("is taken for") == 6
  assert "method linear" in printed and "of the variation" not in printed


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_of_one_run_of_the_whole(name):
  node = read(name)
  nbformat.validate(node)
  cells = [cell for cell in node.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  assert text(node) or pictures(node)
  printed = text(node) + text(node, "stderr") + markdown(node)
  # No folder of whoever ran it, and no error.
  assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users)/", printed)
  assert all(o.output_type != "error" for c in cells for o in c.outputs)
  assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 2**19


def test_notebooks_look_at_the_run_of_the_quickstart():
  for name in ("load_run", "inside_prompts"):
    assert 'INSVP_RUN", "runs/quickstart/insvp/seed0"' in read(name).cells[1].source
