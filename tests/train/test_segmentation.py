"""Segmentation end to end: the head, every method, resume and devices."""

import dataclasses
import io
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import segment_fixtures
from segment_fixtures import (
  CLASSES,
  SIZE,
  SPLITS,
  draw,
  write_shapes,
)
from tiny_runs import draw_backbone, make_params
from tiny_training import assert_same, at_step, metrics, prepare, stop_by, stored

import insvp_jax
from insvp_jax import trees
from insvp_jax.data import load_data
from insvp_jax.data.label_maps import IGNORED, MaskStyle
from insvp_jax.distributed.stopping import Stopped
from insvp_jax.models import setr, weights
from insvp_jax.models.classifier import create_model
from insvp_jax.run import load_run
from insvp_jax.tools import evaluate as evaluate_tool
from insvp_jax.tools import figure, plan
from insvp_jax.tools import masks as masks_lib
from insvp_jax.tools import predict as predict_tool
from insvp_jax.train import program as program_lib
from insvp_jax.train import state as state_lib
from insvp_jax.train import trainer
from insvp_jax.train.objectives import Segmentation
from insvp_jax.train.objectives import segmentation as segmentation_lib
from insvp_jax.train.windows import held_bytes

TINY = {"width": 16, "depth": 3, "mlp_dim": 16, "num_heads": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """The folder of the images, and a backbone: drawing one in each run takes longest."""
  root = write_shapes(tmp_path_factory.mktemp("shapes"))
  config = segment_fixtures.segment_config(root)
  model = create_model(**program_lib.model_kwargs(config, len(CLASSES)))
  backbone = draw_backbone(state_lib.param_shapes(model)["backbone"])
  weights.save_backbone(backbone, root / "backbone.npz")
  return root


def segment_config(root, method="linear", **changes):
  """Returns the config of a run on the backbone beside the images."""
  changes = {"backbone__weights": f"{root}/backbone.npz", **changes}
  return segment_fixtures.segment_config(root, method, **changes)


@pytest.fixture(scope="module")
def data(root):
  return load_data("segment_folder", segment_config(root).data, SIZE)


# --- The model.


def counts(method, **method_kwargs):
  model = create_model(
    "L/16",
    method,
    num_classes=150,
    image_size=512,
    head="setr",
    method_kwargs=method_kwargs,
    # Traced once for all blocks; the parameters are as many.
    backbone_kwargs={"scan": True},
  )
  images = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  mask, carried = model.masks(shapes)
  trainable, _ = trees.split(shapes, mask)
  return trees.count(trainable), trees.flatten(carried), trainable


def test_the_parameters_of_table_3_are_counted():
  """VPT's table 3 has 13.18, 13.43, 13.46 and 15.79 M; see docs/segmentation.md."""
  main = 2 * 1024 + 9 * (1024 + 3 * 256) * 256 + 2 * 4 * 256 + 257 * 150
  aux = 2 * 1024 + 9 * (1024 + 256) * 256 + 2 * 2 * 256 + 257 * 150
  head, carried, trainable = counts("linear")
  assert (main, aux, head) == (4_171_414, 2_990_742, main + 3 * aux)
  assert head == 13_143_640
  # The running means and variances change, and are not trained.
  updated = {name for name, on in carried.items() if on} - set(trainable)
  assert len(updated) == 2 * (4 + 3 * 2)
  assert all(name.endswith(("mean", "var")) for name in updated)
  prompts, biases = 24 * 10 * 1024, 24 * (7 * 1024 + 4096) + 2 * 1024
  assert counts("vpt_deep", prompt_length=10)[0] == head + prompts == 13_389_400
  assert counts("bias")[0] == head + biases == 13_416_024
  both = counts("vpt_deep+bias", vpt_deep={"prompt_length": 95})[0]
  assert both == head + biases + 24 * 95 * 1024 == 15_750_744


def test_the_auxiliary_heads_see_the_blocks_of_setr():
  assert setr.aux_blocks(24) == (10, 15, 20)
  assert setr.aux_blocks(12) == (5, 7, 10)
  assert setr.aux_blocks(2) == (1,)


def test_maps_are_the_tokens_of_the_blocks_without_prompts_and_prefix():
  model = create_model(
    *("mu/4", "vpt_deep"),
    num_classes=3,
    image_size=SIZE,
    backbone_kwargs=TINY,
    method_kwargs={"prompt_length": 3},
    head="setr",
    head_kwargs={"channels": 4, "blocks": (1, 2)},
  )
  drawn = np.random.default_rng(1).normal(size=(2, SIZE, SIZE, 3))
  images = jnp.asarray(drawn, jnp.float32)
  params = jax.tree.map(np.abs, make_params(model))
  found = {}
  for scan in (False, True):
    backbone = model.backbone.clone(scan=scan)
    params = dict(params)
    if scan:
      blocks = dict(params["backbone"]["Transformer"])
      each = [blocks.pop(f"encoderblock_{i}") for i in range(3)]
      blocks["encoderblock"] = jax.tree.map(lambda *x: np.stack(x), *each)
      params["backbone"] = {**params["backbone"], "Transformer": blocks}
    own = model.clone(backbone=backbone)
    maps, logits = jax.jit(
      lambda params, own=own: (
        own.apply({"params": params}, images, method="maps"),
        own.apply({"params": params}, images),
      )
    )(params)
    assert [x.shape for x in maps] == [(2, 4, 4, 16)] * 3
    found[scan] = maps
    assert logits.shape == (2, SIZE, SIZE, 3) and logits.dtype == jnp.float32
  for unrolled, scanned in zip(found[False], found[True], strict=True):
    np.testing.assert_allclose(unrolled, scanned, atol=2e-5)
  # Without a method the last map is that of the tokens that the backbone gives.
  plain = model.backbone.clone(skip_unread=False)

  def both(params):
    tokens = plain.apply({"params": params}, images, method="tokens")
    maps = plain.apply(
      {"params": params},
      images,
      method=lambda module, x: module.maps(module.embed(x), blocks=(2,)),
    )
    return tokens, maps[-1]

  tokens, last = jax.jit(both)(make_params(model)["backbone"])
  np.testing.assert_allclose(
    last.reshape(2, 16, 16), tokens[:, 1:], rtol=1e-5, atol=1e-6
  )


def test_the_head_is_that_of_the_published_order():
  """The classifier after the last upsampling, with running statistics as they are."""
  head = setr.UpHead(num_classes=3, channels=4, num_convs=2, up=2)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 4, 4, 8)).astype(np.float32)
  shapes = jax.eval_shape(
    lambda x: head.init(jax.random.key(1), x, 16, train=False)["params"], x
  )
  # Not negative, since there are variances among them.
  params = jax.tree.map(lambda leaf: rng.random(leaf.shape, dtype=np.float32), shapes)
  y = x - x.mean(-1, keepdims=True)
  norm = params["LayerNorm_0"]
  y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]
  for i in range(2):
    padded = np.pad(y, [(0, 0), (1, 1), (1, 1), (0, 0)])
    kernel, size = params[f"Conv_{i}"]["kernel"], y.shape[1]
    y = sum(
      padded[:, a : a + size, b : b + size] @ kernel[a, b]
      for a in range(3)
      for b in range(3)
    )
    bn = params[f"BatchNorm_{i}"]
    y = (y - bn["mean"]) / np.sqrt(bn["var"] + 1e-5) * bn["scale"] + bn["bias"]
    y = np.asarray(setr.resize(jnp.asarray(np.maximum(y, 0)), 2 * size))
  logits = y @ params["classifier"]["kernel"] + params["classifier"]["bias"]
  found = jax.jit(lambda x: head.apply({"params": params}, x, 16, train=False))(x)
  np.testing.assert_allclose(found, logits, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
  "method, why",
  [
    ("mlp", "has a head of its own"),
    ("transhp", "has a loss of its own|has a head"),
    ("sidetune", "changes the pooled feature"),
    ("lion", "changes|computes|takes"),
    ("vpt_deep+mlp", "'mlp' cannot segment"),
  ],
)
def test_methods_of_one_feature_are_refused_in_one_line(method, why):
  with pytest.raises(ValueError, match=why) as error:
    create_model("mu/4", method, num_classes=3, image_size=SIZE, head="setr")
  assert "\n" not in str(error.value)


def test_backbones_of_stages_are_refused():
  with pytest.raises(ValueError, match="expected a ViT"):
    create_model("resnet50", "linear", num_classes=3, head="setr")


@pytest.mark.parametrize(
  "head_kwargs, message",
  [
    ({"channels": 0}, "channels is 0, expected a whole number from 1 to 4096"),
    ({"blocks": (2, 1)}, "are .2, 1., expected ascending numbers from 1 to 1"),
    ({"blocks": ("1",)}, "expected ascending numbers"),
    ({"block": (1,)}, "unknown field of head_kwargs 'block'"),
  ],
)
def test_what_a_head_cannot_be_is_named(head_kwargs, message):
  with pytest.raises(ValueError, match=message):
    create_model(
      *("mu/4", "linear"),
      num_classes=3,
      image_size=SIZE,
      head="setr",
      head_kwargs=head_kwargs,
    )


# --- The loss.


def objective(**settings):
  config = segment_config("x")
  config.segment.update(settings)
  return Segmentation.create(config, 3)


def test_the_loss_is_the_mean_over_the_pixels_that_count():
  rng = np.random.default_rng(0)
  logits = [rng.normal(size=(2, 4, 5, 3)).astype(np.float32) for _ in range(3)]
  labels = rng.integers(-1, 3, (2, 4, 5)).astype(np.int16)

  def expected(values):
    shares = np.exp(values) / np.exp(values).sum(-1, keepdims=True)
    nats = [
      -np.log(shares[i][labels[i]]) for i in np.ndindex(labels.shape) if labels[i] >= 0
    ]
    return np.mean(nats)

  on_device = tuple(map(jnp.asarray, logits))
  loss = jax.jit(objective(aux_weight=0.4).loss)
  found = loss(on_device, labels)
  main, *others = map(expected, logits)
  assert float(found) == pytest.approx(main + 0.4 * sum(others), rel=1e-5)
  right = (logits[0].argmax(-1) == labels)[labels != IGNORED].mean()
  share = jax.jit(objective().accuracy)(on_device, {"masks": labels})
  assert float(share) == pytest.approx(right)
  nothing = np.full(labels.shape, IGNORED, np.int16)
  assert float(loss(on_device, nothing)) == 0


# --- Runs.


@pytest.fixture(scope="module")
def learnt(root, data, tmp_path_factory):
  """A run that learns the shapes: (config, workdir, result)."""
  config = segment_config(root, "vpt_deep", optim__lr=0.03)
  config.total_steps, config.eval_every_epochs = 60, 10.0
  workdir = tmp_path_factory.mktemp("learnt")
  return config, workdir, trainer.train(config, workdir, prepared=prepare(config, data))


def test_the_shapes_are_learnt_and_every_pixel_is_counted(learnt, data):
  _, workdir, result = learnt
  assert result["metric"] == "miou" and result["test_miou"] > 0.6
  assert result["val_miou"] > 0.6
  for name in ("train", "test"):
    assert result[f"num_{name}_examples"] == SPLITS[name]
  classes = result["test_by_class"]["classes"]
  pixels = data.splits["test"].class_counts(3).tolist()
  assert [row["pixels"] for row in classes] == pixels
  assert [row["name"] for row in classes] == list(CLASSES)
  assert np.mean([row["iou"] for row in classes]) == pytest.approx(result["test_miou"])
  logged = [row for row in metrics(workdir) if "val_miou" in row]
  assert [row["step"] for row in logged][:2] == [20, 40]
  assert logged[-1]["test_miou"] == result["test_miou"]
  assert 0 < logged[1]["val_loss"] < logged[0]["val_loss"] < 2
  assert json.loads((workdir / "result.json").read_text())["test_miou"] > 0.6


@pytest.fixture(scope="module")
def whole(root, data, tmp_path_factory):
  """An uninterrupted run: (config, data and compiled steps, workdir, result)."""
  changes = {"checkpoint_every_epochs": 0.5, "segment__batch_size": 3}
  config = segment_config(root, "linear", **changes)
  workdir, shared = tmp_path_factory.mktemp("whole"), prepare(config, data, devices=4)
  return config, shared, workdir, trainer.train(config, workdir, prepared=shared)


def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch):
  config, shared, workdir, _ = whole
  with monkeypatch.context() as patch:
    at_step(patch, 3, stop_by(signal.SIGTERM))
    with pytest.raises(Stopped):
      trainer.train(config, tmp_path, prepared=shared)
  trainer.train(config, tmp_path, prepared=shared)
  assert_same(stored(workdir), stored(tmp_path))
  adapter = stored(workdir)[3]["adapter"]
  # Running statistics are stored and have moved.
  means = [x for name, x in adapter.items() if name.endswith("BatchNorm_0/mean")]
  assert len(means) == 2 and all(np.abs(x).max() > 0 for x in means)


def test_one_and_four_devices_give_the_same_run(whole, data, tmp_path):
  config, shared, workdir, four = whole
  assert shared.program.mesh.size == 4
  one = trainer.train(config, tmp_path, prepared=prepare(config, data))
  assert one["test_miou"] == pytest.approx(four["test_miou"], abs=0.02)
  adapter, other = (stored(place)[3]["adapter"] for place in (tmp_path, workdir))
  for name, leaf in adapter.items():
    np.testing.assert_allclose(leaf, other[name], rtol=2e-3, atol=2e-4, err_msg=name)
  # Batches and statistics are those of the whole batch.
  lines, others = metrics(tmp_path), metrics(workdir)
  assert lines[0]["loss"] == pytest.approx(others[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["insvp", "full", "vpt_deep+bias"])
def test_every_method_takes_steps_that_descend(
  root, data, tmp_path, monkeypatch, method
):
  config = segment_config(root, method, optim__lr=0.01)
  config.total_steps = 8
  data = dataclasses.replace(data, splits={"train": data.splits["train"]})
  # To draw the parameters by JAX would take as long to compile as a step.
  monkeypatch.setattr(
    trainer.Prepared,
    "first_params",
    lambda prepared, _: draw_backbone(prepared.program.shapes),
  )
  trainer.train(config, tmp_path, prepared=prepare(config, data))
  losses = [row["loss"] for row in metrics(tmp_path) if "loss" in row]
  assert len(losses) == 8 and np.mean(losses[-2:]) < 0.9 * losses[0]


def test_masks_are_not_mixed(root):
  config = segment_config(root, loss__mixup_alpha=0.2)
  with pytest.raises(ValueError, match="mixup_alpha is 0.2, but masks are not mixed"):
    Segmentation.create(config, 3)
  stride = objective(stride=17)
  with pytest.raises(ValueError, match="stride is 17, expected at most 16"):
    stride.windows(16)


def test_batches_of_windows_are_filled_up(mesh):
  from insvp_jax.distributed import mesh as mesh_lib

  rows, seen = mesh_lib.batch_sharding(mesh), []

  def eval_step(batch):
    seen.append((len(batch["images"]), int(batch["mask"].sum())))
    return batch["images"].astype(jnp.float32)

  windows = dataclasses.replace(objective().windows(SIZE, 4), batch=8)
  apply = segmentation_lib.logits_function(eval_step, windows, rows)
  for count in (1, 4, 5):
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(apply(images)[:count], images)
  assert seen == [(4, 1), (4, 4), (8, 5)]


def test_adapt_takes_images_with_masks_and_selects_by_miou(root, tmp_path, capsys):
  config = segment_config(root, "linear")
  names = ("weights", "width", "depth", "mlp_dim", "num_heads")
  settings = {f"backbone.{name}": config.backbone[name] for name in names}
  run = insvp_jax.adapt(
    root,
    **{"workdir": tmp_path, "backbone": config.backbone.name, "method": "linear"},
    **{"image_size": SIZE, "batch_size": 4, "total_epochs": 0.0, "total_steps": 6},
    **{"tensorboard": False, "optim.warmup_epochs": 0.0, "data.cache_dir": "off"},
    **{"segment.channels": 8, "tune.lr": (0.03, 1e-6)},
    **settings,
  )
  assert run.segments and run.metric == "miou" and run.class_names == CLASSES
  assert run.result["train_split"] == "train_val" and 0 < run.result["test_miou"] < 1
  assert run.meta["masks"] == {"values": [0, 1, 2], "colors": []}
  row = json.loads((tmp_path / "summary.json").read_text())["linear"]
  assert row["metric"] == "miou" and row["lr"] == 0.03
  values = {trial["lr"]: trial["val_miou"] for trial in row["trials"]}
  assert row["val_miou"] == values[0.03] > values[1e-6]
  assert row["test_mious"] == [row["mean"]]
  assert "test mIoU, %" in (tmp_path / "table.md").read_text()
  columns = (tmp_path / "table.csv").read_text().splitlines()[0].split(",")
  assert {"test_mious", "val_miou"} < set(columns)
  assert "linear: test mIoU" in capsys.readouterr().out
  assert figure.main([f"--run={tmp_path}", f"--output={tmp_path / 'drawn.csv'}"]) == 0
  drawn = (tmp_path / "drawn.csv").read_text()
  assert "linear,val_miou,0.03," in drawn and "linear,test_miou," in drawn
  # What it needs is planned by the same steps.
  planned = plan.plan(config, jax.devices()[:1])
  assert planned["eval_batch_size"] == config.segment.batch_size
  assert planned["arrays"]["training_images"] == 0
  logits = 4 * 8 * SIZE**2 * len(CLASSES)
  assert planned["eval_step"]["temporaries"] > logits + held_bytes(SIZE, len(CLASSES))


# --- What a run is good for.


@pytest.fixture(scope="module")
def run(learnt):
  """The run that learnt, loaded."""
  return load_run(learnt[1])


def test_evaluate_gives_the_numbers_of_the_run(learnt, capsys):
  _, workdir, result = learnt
  assert evaluate_tool.main([f"--run={workdir}", "--format=json"]) == 0
  scored = json.loads(capsys.readouterr().out)["splits"]["test"]
  assert scored["miou"] == pytest.approx(result["test_miou"], abs=1e-3)
  assert sum(map(sum, scored["confusion"])) == scored["num_pixels"]
  flags = ["--splits", "val", "--by_class", "--scales", "0.75", "1.5", "--flips"]
  assert evaluate_tool.main([f"--run={workdir}", *flags]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("val: mIoU ") and "3 images" in lines[0]
  assert [line.split()[0] for line in lines[1:]] == ["class", *CLASSES]


def test_predict_writes_masks_and_overlays(learnt, run, root, tmp_path, capsys):
  _, workdir, _ = learnt
  images, output = root / "images" / "test", tmp_path / "found"
  flags = [f"--run={workdir}", f"--output={output}", "--overlays"]
  assert predict_tool.main([*flags, str(images), str(images / "1.png")]) == 0
  assert len(capsys.readouterr().out.splitlines()) == 5
  names = {path.name for path in output.iterdir()}
  masks = {f"{i}.png" for i in range(4)} | {"1_2.png"}
  assert names == masks | {name.replace(".png", "_overlay.png") for name in masks}
  with Image.open(output / "1.png") as mask, Image.open(images / "1.png") as image:
    assert mask.size == image.size and mask.mode == "P"
    found = run.segment(np.asarray(image))[0]
    np.testing.assert_array_equal(np.asarray(mask), found)
    labels = draw(1, 2)[1]
    assert (found == labels)[labels != 255].mean() > 0.8
  # What a person sees is the image under the colours.
  with Image.open(output / "1_overlay.png") as picture:
    assert picture.mode == "RGB" and picture.size == (23, 18)


def test_what_a_segmenter_cannot_do_is_one_line(learnt, run, root, capsys):
  _, workdir, _ = learnt
  image = str(root / "images" / "test" / "0.png")
  assert predict_tool.main([f"--run={workdir}", image]) == 2
  assert "name the folder of the masks by --output" in capsys.readouterr().err
  assert evaluate_tool.main([f"--run={workdir}", "--scales", "0"]) == 2
  assert "expected numbers in [0.01, 100]" in capsys.readouterr().err
  with pytest.raises(ValueError, match="classifies pixels, not images; use segment"):
    run.predict(image)
  with pytest.raises(ValueError, match="unknown field of config.segment 'scale'"):
    run.segment(image, scale=(1.0,))


def test_masks_of_many_classes_have_16_bits():
  labels = np.array([[0, 300], [5, 999]])
  style = MaskStyle(tuple(range(1000)))
  with Image.open(io.BytesIO(masks_lib.png(labels, style))) as image:
    np.testing.assert_array_equal(np.asarray(image), labels)
  colors = masks_lib.palette(256)
  assert len(np.unique(colors, axis=0)) == 256
  assert colors[:3].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
