"""Backbones by the name of a repository, and the pixels that weights ask for."""

import json
from pathlib import Path
import types

import huggingface_hub
from huggingface_hub import errors
import numpy as np
import pytest
from safetensors.numpy import save_file
import test_families
import tiny_training
from tiny_training import tiny_config

from insvp_jax.data import preprocess
from insvp_jax.models import weights
from insvp_jax.models.classifier import create_model
from insvp_jax.models.weights import downloads
from insvp_jax.run import load_run
from insvp_jax.train import program, report, trainer

REPOSITORY = "facebook/tiny-dinov2"


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A folder that is the hub; returns (folder, the files that were asked for)."""
  folder, asked = tmp_path / "hub", []
  folder.mkdir()
  monkeypatch.setenv("INSVP_CACHE", str(tmp_path / "cache"))

  def download(repository, file, revision=None, local_files_only=False, dry_run=False):
    if " " in repository:
      raise errors.HFValidationError("no blanks")
    if local_files_only:
      raise errors.LocalEntryNotFoundError("not in the cache")
    if not (folder / file).is_file():
      raise errors.EntryNotFoundError("404")
    if dry_run:
      return types.SimpleNamespace(file_size=(folder / file).stat().st_size)
    asked.append((repository, file, revision))
    return str(folder / file)

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  monkeypatch.setattr(downloads, "_look_up", lambda url: None)
  return folder, asked


def put(folder, family="hf dinov2", **jsons):
  arrays = test_families.make_arrays(family)
  save_file(test_families.published(family, arrays), folder / "model.safetensors")
  for name, content in jsons.items():
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_repository_by_its_name(hub):
  folder, asked = hub
  put(folder, config={"hidden_size": 8, "num_attention_heads": 2})
  name = f"hf-hub:{REPOSITORY}@abc"
  model = create_model(name, "linear", num_classes=2)
  assert model.backbone.num_heads == 2 and model.backbone.registers == 0
  assert asked[0] == (REPOSITORY, "model.safetensors", "abc")
  reports = []
  weights.load_backbone(name, model, report=reports.append)
  assert "Hugging Face's names of DINOv2" in str(reports[0])


def test_a_repository_in_parts(hub):
  folder, asked = hub
  family = "hf dinov2"
  arrays = test_families.make_arrays(family)
  test_families.write_parts(folder, test_families.published(family, arrays))
  assert weights.resolve(f"hf-hub:{REPOSITORY}").name == "model.safetensors.index.json"
  assert {file for _, file, _ in asked} > {"a.safetensors", "b.safetensors"}


def test_a_repository_that_is_too_large_is_not_downloaded(hub, monkeypatch):
  folder, asked = hub
  put(folder)
  # All of its parts together are.
  size = (folder / "model.safetensors").stat().st_size
  monkeypatch.setenv(downloads.LIMIT_VARIABLE, str((size - 1) / 2**30))
  with pytest.raises(ValueError, match=f"hf-hub:{REPOSITORY} has more than the"):
    weights.resolve(f"hf-hub:{REPOSITORY}")
  assert not asked


def test_what_was_put_into_the_cache_by_hand_comes_first(hub, tmp_path):
  folder, asked = hub
  with pytest.raises(FileNotFoundError) as caught:
    weights.resolve("timm/vit_tiny.augreg_in21k")
  message = str(caught.value)
  assert "\n" not in message and "it has none of model.safetensors" in message
  place = Path(message.split("put them into ")[1].split(";")[0])
  assert place.is_relative_to(tmp_path / "cache")
  place.mkdir(parents=True)
  put(place)
  asked.clear()
  assert weights.resolve("timm/vit_tiny.augreg_in21k") == place / "model.safetensors"
  assert not asked


def test_offline_one_line_says_what_to_do(hub, monkeypatch):
  def look_up(url):
    raise OSError(-2, "Name or service not known")

  monkeypatch.setattr(downloads, "_look_up", look_up)
  with pytest.raises(FileNotFoundError, match="Name or service not known") as caught:
    create_model(f"hf-hub:{REPOSITORY}", "linear", num_classes=2)
  url = f"https://huggingface.co/{REPOSITORY}/resolve/main/model.safetensors"
  assert f"Download {url}, and config.json beside it" in str(caught.value)
  with pytest.raises(ValueError, match="no name of a repository: no blanks"):
    weights.resolve("hf-hub:a b")


# The pixels.


@pytest.mark.parametrize(
  ("jsons", "expected"),
  [
    ({}, "imagenet"),
    (
      {
        "preprocessor_config": {
          "image_mean": preprocess.IMAGENET_MEAN,
          "image_std": preprocess.IMAGENET_STD,
          "size": {"shortest_edge": 256},
          "crop_size": {"height": 224, "width": 224},
          "do_center_crop": True,
          "resample": 3,
        }
      },
      "imagenet",
    ),
    (
      {
        "preprocessor_config": {
          "image_mean": (0.5,) * 3,
          "image_std": (0.5,) * 3,
          "size": 224,
          "resample": 2,
        }
      },
      "modern",
    ),
    (
      {
        "config": {
          "pretrained_cfg": {
            "mean": preprocess.CLIP_MEAN,
            "std": preprocess.CLIP_STD,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
          }
        }
      },
      "mean=0.48145466,0.4578275,0.40821073 std=0.26862954,0.26130258,0.27577711 "
      "resize=shorter_side_bicubic crop=0.9",
    ),
    (
      {
        "config": {
          "mean": (0.5,) * 3,
          "std": (0.5,) * 3,
          "crop_pct": 0.9,
          "interpolation": "bicubic",
          "crop_mode": "squash",
        }
      },
      "siglip",
    ),
    ({"model": {"preset": "vpt"}}, "vpt"),
    # How it was augmented is not how it is evaluated.
    ({"model": {"preset": "insvp_release"}}, None),
  ],
)
def test_the_preset_follows_the_weights(tmp_path, jsons, expected):
  put(tmp_path, **jsons)
  config = tiny_config(data__preset="")
  config.backbone.weights = ""
  config.backbone.name = str(tmp_path / "model.safetensors")
  program.fill_preset(config)
  name = config.data.preset
  preset = preprocess.get_preset(name)
  assert preset.name == name and not preset.augments
  if expected is not None:
    assert name == expected
  else:
    assert preset.mean == preprocess.IMAGENET_MEAN and preset.crop == 224 / 256
  assert not report._other_pixels(config)
  # The user's own choice stands, and is said in a line with the numbers.
  chosen = config.data.preset = "mean=0,0,0 std=1,1,1 resize=tf1 crop=1"
  program.fill_preset(config)
  (line,) = report._other_pixels(config)
  assert config.data.preset == chosen and "\n" not in line
  assert f"mean {list(preset.mean)}" in line and "crop=1 has mean [0.0" in line


@pytest.mark.parametrize(
  ("family", "expected"),
  [("clip", "clip"), ("hf siglip", "siglip"), ("mae", "imagenet")],
)
def test_a_family_s_own_pixels(tmp_path, family, expected):
  put(tmp_path, family)
  pixels = weights.pixels_of(str(tmp_path / "model.safetensors"))
  assert preprocess.preset_name(**pixels) == expected


def test_pixels_of_what_is_no_file(tmp_path):
  assert weights.pixels_of("random") is None and weights.pixels_of("B/16") is None
  assert weights.pixels_of("vit_b16_i21k") == {"mean": (0.5,) * 3, "std": (0.5,) * 3}
  config = tiny_config(data__preset="")
  program.fill_preset(config)
  assert config.data.preset == "vtab"
  put(tmp_path, preprocessor_config={"image_mean": "x", "image_std": 1})
  with pytest.raises(ValueError, match="is not usable.*name a preset"):
    weights.pixels_of(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
  "wrong", ["mean=1,1 std=1,1 resize=tf1 crop=1", "mean=a std=1 resize=tf1 crop=1"]
)
def test_a_preset_of_numbers_that_is_none(wrong):
  with pytest.raises(ValueError, match="expected three numbers each"):
    preprocess.get_preset(wrong)


def test_the_centre_is_kept_in_training_too():
  preset = preprocess.get_preset("imagenet")
  image = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
  assert preset.stored_size(28) == 28 and preset.resized_size(28) == 32
  stored = preprocess.resize(preset, image, 28)
  whole = preprocess.resize_whole(preset, image, 28)
  assert whole.shape[0] == 32 and stored.shape == (28, 28, 3)
  left = round((whole.shape[1] - 28) / 2)
  np.testing.assert_array_equal(stored, whole[2:30, left : left + 28])
  # An image of the model's size is no exception.
  square = image[:28, :28][None]
  expected = preprocess.resize(preset, square[0], 28)
  np.testing.assert_array_equal(preprocess.resize_all(preset, square, 28)[0], expected)
  assert (expected != square[0]).any()


def test_a_run_on_a_file_is_loaded_though_the_file_moved(tmp_path):
  folder = tmp_path / "weights"
  folder.mkdir()
  put(folder)
  path = folder / "model.safetensors"
  fields = {"width": None, "depth": None, "mlp_dim": None, "num_heads": 2}
  config = tiny_config("linear", total_epochs=1.0, data__preset="")
  config.backbone.update(fields | {"weights": "", "name": str(path)})
  workdir = tmp_path / "run"
  trainer.train(config, workdir, prepared=tiny_training.prepare(config))
  moved = path.rename(tmp_path / "moved.safetensors")
  run = load_run(workdir, backbone=moved)
  vit = run.model.backbone
  assert (vit.width, vit.image_size, vit.gelu) == (8, 16, "exact")
  assert run.preset.name == "imagenet" and not vit.layer_scale
  assert run.predict(np.zeros((1, 9, 7, 3), np.uint8)).shape == (1, 3)
