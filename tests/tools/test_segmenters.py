"""The tools on a run that segments: what works as for classes, and what says no."""

import json

from jax import export
import numpy as np
from PIL import Image
import pytest
from segment_fixtures import CLASSES, SIZE, SPLITS, draw, segment_config, write_shapes
from tiny_runs import make_run

import insvp_jax
from insvp_jax import config as config_lib
from insvp_jax.data import load_data
from insvp_jax.logs.writers import write_json
from insvp_jax.run import load_run
from insvp_jax.tools import demo, figure, visualize
from insvp_jax.tools import export as export_tool
from insvp_jax.tools.masks import colors_of

RESULT = {
  **{"metric": "miou", "val_miou": 0.25, "test_miou": 0.375},
  **{"trainable_params": 5000, "num_test_examples": SPLITS["test"]},
}
STYLE = {"values": [0, 3, 7], "colors": ["#102030", "#fa0000", "#0000fa"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def workdir(root, tmp_path_factory):
  """A run of InsVP that segments the shapes, with weights that were drawn."""
  config = segment_config(root, "insvp")
  config.data.preset = "vtab"
  data = load_data("segment_folder", config.data, SIZE)
  meta = {
    **{"class_names": list(CLASSES), "task": "shapes", "masks": STYLE},
    "config": config_lib.stored(config),
    "data_sha256": data.digest({"train", "val", "test"}),
  }
  head = {"head": "setr", "head_kwargs": {"channels": 4}}
  where, _, _ = make_run(tmp_path_factory.mktemp("run"), meta=meta, **head)
  write_json(where / "result.json", RESULT)
  rows = [
    {"step": 1, "epoch": 0.5, "loss": 2.0},
    {"step": 2, "epoch": 1.0, "loss": 1.5},
    {"step": 2, "val_miou": 0.25, "val_loss": 1.25},
  ]
  (where / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
  return where


@pytest.fixture(scope="module")
def run(workdir):
  return load_run(workdir)


def test_visualize_draws_prompts_and_masks(run, root, workdir, tmp_path, capsys):
  output = tmp_path / "prompts.png"
  assert visualize.main([f"--run={workdir}", f"--output={output}", "--rows=2"]) == 0
  with Image.open(output) as image:
    assert image.width > 1000
  image, mask = draw(0, 2)
  mask = np.where(mask == 255, -1, mask.astype(np.int16))
  drawn = visualize.mask_figure(run, [image], [mask])
  panels = {axis.get_title(): axis.get_images()[0].get_array() for axis in drawn.axes}
  prompts = ["patch prompt", "global prompt", "fused prompt", "prompted image"]
  assert list(panels) == ["image", *prompts, "predicted", "mask"]
  colors = colors_of(run.mask_style)
  assert colors.tolist() == [[16, 32, 48], [250, 0, 0], [0, 0, 250]]
  expected = np.where((mask >= 0)[..., None], 0.45 * image + 0.55 * colors[mask], image)
  np.testing.assert_allclose(panels["mask"], expected, atol=1)
  (legend,) = drawn.legends
  assert {text.get_text() for text in legend.get_texts()} == set(CLASSES)
  # Of images without masks.
  shown = visualize.mask_figure(run, [root / "images" / "test" / "0.png"])
  assert shown.axes[-1].get_title() == "predicted"


def test_curves_and_parameters_are_of_miou(workdir, tmp_path):
  found = {}
  for kind in ("curves", "parameters"):
    flags = [f"--kind={kind}", f"--run={workdir}", f"--output={tmp_path / 'x.png'}"]
    assert figure.main([*flags, f"--data={tmp_path / 'x.csv'}"]) == 0
    found[kind] = (tmp_path / "x.csv").read_text().splitlines()
  assert any(line.endswith(",val_miou,1.0,0.25") for line in found["curves"])
  assert any(line.endswith(",val_loss,1.0,1.25") for line in found["curves"])
  assert found["parameters"][0] == "label,trainable_params,test_miou,std"
  assert found["parameters"][1].endswith(",5000,0.375,")


def test_runs_of_several_metrics_are_not_in_one_figure(workdir, tmp_path, capsys):
  (tmp_path / "result.json").write_text(
    json.dumps({"test_accuracy": 0.5, "trainable_params": 10})
  )
  flags = ["--kind=parameters", f"--run={workdir}", f"--run={tmp_path}"]
  assert figure.main([*flags, f"--output={tmp_path / 'x.png'}"]) == 2
  assert "are judged by accuracy and mIoU; draw a figure of" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gradcam", "rollout", "tsne", "prompts"])
def test_figures_of_classes_say_so_in_one_line(workdir, tmp_path, kind, capsys):
  flags = [f"--kind={kind}", f"--run={workdir}", f"--output={tmp_path / 'x.png'}"]
  assert figure.main(flags) == 2
  said = capsys.readouterr().err
  assert "segments, and this kind of figure is of runs that classify images" in said
  assert said.count("\n") == 1


def test_the_program_of_a_window_computes_what_the_run_does(run, workdir, tmp_path):
  output = tmp_path / "model.stablehlo"
  flags = ["--format=stablehlo", f"--output={output}"]
  assert export_tool.main([f"--run={workdir}", *flags]) == 0
  about = json.loads((tmp_path / "model.stablehlo.json").read_text())
  assert about["test_miou"] == 0.375 and about["class_names"] == list(CLASSES)
  assert about["output"] == f"float32[b, {SIZE}, {SIZE}, 3], logits of each pixel"
  assert about["windows"] == {
    **{"resize": "shorter", "size": SIZE, "stride": 10, "fill": [128] * 3},
    "values": [0, 3, 7],
  }
  program = export.deserialize(bytearray(output.read_bytes()))
  pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
  found = np.asarray(program.call(pixels))
  np.testing.assert_allclose(found, run.window_logits(pixels), rtol=1e-4, atol=1e-4)
  # One window is one pass.
  np.testing.assert_array_equal(run.segment(pixels[0])[0], found[0].argmax(-1))


def test_onnx_runtime_computes_what_the_run_does(run, workdir, tmp_path):
  pytest.importorskip("jax2onnx")
  runtime = pytest.importorskip("onnxruntime")
  output = tmp_path / "model.onnx"
  flags = ["--format=onnx", f"--output={output}"]
  assert export_tool.main([f"--run={workdir}", *flags]) == 0
  about = json.loads((tmp_path / "model.onnx.json").read_text())
  assert about["input"] == f"uint8[1, {SIZE}, {SIZE}, 3], RGB"
  pixels = np.random.default_rng(1).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
  (found,) = runtime.InferenceSession(output).run(None, {"images": pixels})
  np.testing.assert_allclose(found, run.window_logits(pixels), rtol=1e-4, atol=1e-4)


def test_an_adapter_says_how_well_it_segments(run, workdir, tmp_path):
  output = tmp_path / "adapter"
  flags = ["--format=adapter", f"--output={output}"]
  assert export_tool.main([f"--run={workdir}", *flags]) == 0
  card = (output / "README.md").read_text()
  assert "pipeline_tag: image-segmentation" in card and "type: mean_iou" in card
  assert "| split | mIoU | images |" in card and "| test | 37.50% | 4 |" in card
  assert 'run.segment("photo.jpg")' in card and "predict" not in card
  loaded = load_run(output, backbone=workdir / "backbone.npz")
  assert loaded.mask_style == run.mask_style and loaded.result["test_miou"] == 0.375


def test_the_page_shows_shares_of_pixels_and_the_classes(run, root):
  path = root / "images" / "test" / "1.png"
  pixels, _ = demo.read_upload(run, path, "1.png")
  np.testing.assert_array_equal(pixels, draw(1, 2)[0])
  answered = demo.answer(run, pixels)
  labels = run.segment(pixels)[0]
  shares = {CLASSES[k]: np.mean(labels == k) for k in np.unique(labels)}
  assert dict(answered.classes) == pytest.approx(shares)
  assert answered.classes[0][1] == max(shares.values())
  ((title, png),) = answered.pictures
  assert title == "the classes of the pixels" and png.startswith(b"\x89PNG")
  assert demo.titles(["x"], [run]) == ["x, insvp, test mIoU 37.50%"]


def test_a_segmenter_has_no_feature_of_an_image(run, root):
  with pytest.raises(ValueError, match="its head sees maps, not a feature"):
    run.features(root / "images" / "test" / "0.png")


def test_adapt_takes_images_with_masks_in_one_folder_alone(root, tmp_path):
  with pytest.raises(ValueError, match="has images with masks; expected val and test"):
    insvp_jax.adapt(root, root, workdir=tmp_path)
