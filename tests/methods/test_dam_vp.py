"""DAM-VP: its clusters are scikit-learn's, wherever and whenever images are routed."""

import dataclasses
import functools
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import pairwise_distances_argmin
from tiny_training import (
  CLASSES,
  SIZE,
  assert_same,
  at_step,
  make_data,
  prepare,
  stop_by,
  stored,
  streamed,
  tiny_config,
)

from insvp_jax.distributed.stopping import Stopped
from insvp_jax.methods import BackboneSpec, create_method
from insvp_jax.methods import dam_vp as dam_vp_lib
from insvp_jax.methods.base import Apply
from insvp_jax.methods.ops import border
from insvp_jax.run import load_run
from insvp_jax.search import population
from insvp_jax.train import preparation, trainer

SPEC = BackboneSpec(8, 1, 16, 1, patch_size=4, image_size=16)
# Leaves three clusters of the 24 training images.
FIELDS = {"distance_threshold": 4.6, "max_clusters": 5}
ONE_BORDER = 12 * 4 * (SIZE - 4)


def inputs_of(split):
  return make_data().splits[split].images / np.float32(127.5) - 1


def config_of(method="dam_vp", **changes):
  config = tiny_config(method, **changes)
  config.dam_vp.update(FIELDS)
  return config


@pytest.fixture(scope="module")
def prepared():
  return prepare(config_of())


@pytest.fixture(scope="module")
def start(prepared):
  """The parameters before the first step."""
  config = config_of()
  return prepared.prepare_params(config, prepared.first_params(config))


@pytest.fixture(scope="module")
def features(prepared, start):
  """What the plain backbone says of the images of train and test."""

  def of(split):
    rows = []
    for batch in preparation._batches(config_of(), prepared.program, split):
      found = prepared.program.apply.backbone(start, batch["images"])[0]
      rows.append(np.asarray(found)[batch["mask"] > 0])
    return np.concatenate(rows)

  return {name: of(prepared.data.splits[name]) for name in ("train", "test")}


def test_prototypes_are_the_means_of_scikit_learns_clusters(start, features):
  labels = AgglomerativeClustering(
    n_clusters=None, linkage="average", distance_threshold=FIELDS["distance_threshold"]
  ).fit_predict(features["train"])
  num, own = labels.max() + 1, start["prompter"]
  assert 1 < num < 5 and own["num_clusters"] == num
  for i in range(num):
    mean = features["train"][labels == i].mean(axis=0)
    np.testing.assert_allclose(own["prototypes"][i], mean, rtol=1e-4, atol=1e-5)
  # All borders start alike; what is left over is zero.
  for name in border.SIDES:
    assert (own[name][:num] == own[name][0]).all() and own[name][0].all()
    assert not own[name][num:].any()


def test_images_go_to_the_nearest_prototype_in_a_step_and_from_the_cache(
  prepared, start, features, monkeypatch
):
  config, program = config_of(), prepared.program
  num = int(start["prompter"]["num_clusters"])
  nearest = start["prompter"]["prototypes"][:num]
  used = set()
  for name in ("train", "test"):
    expected = pairwise_distances_argmin(features[name], nearest)
    cached = prepared.route(config, name, start, train=name == "train")
    np.testing.assert_array_equal(np.asarray(cached)[: len(expected)], expected)
    used |= set(expected)
  in_step = jax.jit(lambda p, x: program.model.apply({"params": p}, x, method="route"))
  np.testing.assert_array_equal(in_step(start, inputs_of("test")), expected)
  assert used == set(range(num))
  # Trials share what their routes depend on.
  stacked = population.stack_program(program)
  state = population.stack_state([config, config], stacked, start)
  monkeypatch.setattr(prepared.routes, "_entries", {})
  again = prepared.route(config, "test", state.params, train=False)
  np.testing.assert_array_equal(again, cached)
  assert prepared.route(config, "test", start, train=False) is again


@pytest.mark.parametrize(
  "changes, cached",
  [
    ({}, True),
    ({"method": "dam_vp+lora"}, True),
    # They change the images, or the backbone.
    ({"data__preset": "cifar"}, False),
    ({"loss__mixup_alpha": 0.8}, False),
    ({"method": "dam_vp+bias"}, False),
    ({"cache_features": False}, False),
  ],
)
def test_routes_are_known_beforehand_where_nothing_changes_them(changes, cached):
  config = config_of(**changes)
  config.lora.rank = 1
  own = prepare(config)
  routed = []
  own.program.__dict__["route_step"] = lambda params, batch: (
    routed.append(batch) or jax.device_put(np.zeros(8, np.int32))
  )
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), own.program.shapes)
  found = own.route(config, "train", params, train=True)
  assert (found is not None) == cached == bool(routed)
  # Alone and beside others.
  model = own.program.model
  images = jax.ShapeDtypeStruct((2, SIZE, SIZE, 3), jnp.float32)
  jax.eval_shape(lambda p, x: model.apply({"params": p}, x), params, images)
  prompts = jax.eval_shape(
    lambda p, x: model.apply({"params": p}, x, method="prompts"), params, images
  )
  assert prompts["image"].shape == images.shape
  assert model.prompter.spare_params(params["prompter"]) == 5 * ONE_BORDER


def test_stopped_and_resumed_equals_uninterrupted_however_routes_come(
  monkeypatch, tmp_path, prepared, capsys
):
  config = config_of()
  trainer.train(config, tmp_path / "whole", prepared=prepared)
  with monkeypatch.context() as patch:
    at_step(patch, 4, stop_by(signal.SIGTERM))
    with pytest.raises(Stopped):
      trainer.train(config, tmp_path / "stopped", prepared=prepared)
  # A new process knows no routes; the clusters come with the checkpoint.
  monkeypatch.setattr(prepared.routes, "_entries", {})
  monkeypatch.setattr(dam_vp_lib, "cluster", None)
  result = trainer.train(config, tmp_path / "stopped", prepared=prepared)
  monkeypatch.undo()
  assert_same(stored(tmp_path / "stopped"), stored(tmp_path / "whole"))

  # Spare borders are not counted, and said to be there.
  whole = stored(tmp_path / "whole")[3]["adapter"]
  num = int(whole["prompter/num_clusters"])
  assert result["prompter_params"] == num * ONE_BORDER
  assert f"{(5 - num) * ONE_BORDER:,} of the prompter's" in capsys.readouterr().err
  assert not whole["prompter/up"][num:].any()
  borders = whole["prompter/up"][:num]
  assert len({leaf.tobytes() for leaf in borders}) == num

  # A stream routes in each step.
  stream = dataclasses.replace(prepared, data=streamed(make_data()))
  trainer.train(config, tmp_path / "stream", prepared=stream)
  other = stored(tmp_path / "stream")[3]["adapter"]
  for name, leaf in whole.items():
    np.testing.assert_allclose(other[name], leaf, rtol=1e-3, atol=1e-4, err_msg=name)

  run = load_run(tmp_path / "whole")
  test = make_data().splits["test"]
  accuracy = np.mean(run.predict(test.images).argmax(axis=1) == test.labels)
  assert accuracy == pytest.approx(result["test_accuracy"])
  prompts, prompted = run.prompts(test.images)["image"], run.prompted(test.images)
  np.testing.assert_allclose(prompted, inputs_of("test") + prompts, atol=1e-5)
  assert 1 < len(np.unique(prompts[:, 0, 0, 0])) <= num


def test_neurons_are_the_channels_that_noise_moves_most():
  method = create_method("dam_vp", SPEC, 3, classifier="neurons")
  scales = np.array([1, 5, 0.1, 7, 2, 0.5, 6, 0], np.float32)
  noise = []

  def backbone(params, images, adaptation=None):
    del params, adaptation
    noise.append(images.shape)
    return scales * images.reshape(len(images), -1)[:, :8] + 10.0, None

  images = np.random.default_rng(0).normal(size=(6, 16, 16, 3)).astype(np.float32)
  batch = {"images": images, "labels": np.zeros(6), "mask": np.ones(6)}
  feature = np.arange(16, dtype=np.float32).reshape(2, 8)
  init = jax.jit(functools.partial(method.init, method="adapt_logits"))
  params = init(jax.random.key(0), feature)["params"]
  prepared = method.prepare(
    {"prompter": dict(params)}, lambda n: iter([batch]), Apply(backbone, None, None)
  )["prompter"]
  assert noise == [(6, 16, 16, 3)] + 8 * [(64, 16, 16, 3)]
  np.testing.assert_array_equal(prepared["neurons"], [1, 3, 6])
  # Of the feature itself: nothing trains but the borders.
  head = method.head(nn.Dense(3))

  @jax.jit
  def logits_of(params, feature):
    found = head.apply({}, feature)
    return method.apply({"params": params}, found, method="adapt_logits")

  logits = logits_of(prepared, feature)
  np.testing.assert_array_equal(logits, feature[:, [1, 3, 6]])
  assert method.trainable_patterns() == ("prompter/(up|down|left|right)",)


def test_too_many_clusters_are_joined_and_no_image_reaches_a_spare_one():
  features = np.random.default_rng(0).normal(size=(20, 4))
  assert len(set(dam_vp_lib.cluster(features, 0.0, 30))) == 20
  few = dam_vp_lib.cluster(features, 0.0, 3)
  expected = AgglomerativeClustering(3, linkage="average").fit_predict(features)
  np.testing.assert_array_equal(few, expected)
  # By default at the mean distance.
  apart = np.linalg.norm(features[:, None] - features, axis=-1).sum() / (20 * 19)
  by_mean = dam_vp_lib.cluster(features, None, 20)
  assert 1 < by_mean.max() + 1 < 20
  np.testing.assert_array_equal(by_mean, dam_vp_lib.cluster(features, apart, 20))
  method = create_method("dam_vp", SPEC, max_clusters=3)
  feature = np.full((2, 8), 0.1, np.float32)
  init = jax.jit(functools.partial(method.init, method="route"))
  params = init(jax.random.key(0), feature)["params"]
  # The spare prototypes are nearer.
  prototypes = np.zeros((3, 8), np.float32)
  prototypes[0] = 3.0
  params = {**params, "prototypes": prototypes, "num_clusters": np.int32(1)}
  apply = jax.jit(functools.partial(method.apply, method="route"))
  route = apply({"params": params}, feature)
  np.testing.assert_array_equal(route, [0, 0])
  assert method.spare_params(params) == 2 * ONE_BORDER


def test_at_most_a_thousand_images_are_clustered(
  monkeypatch, prepared, start, features
):
  seen, original = [], dam_vp_lib.cluster
  monkeypatch.setattr(
    dam_vp_lib, "cluster", lambda rows, *cut: seen.append(rows) or original(rows, *cut)
  )
  assert dam_vp_lib.MOST_IMAGES == 1000
  monkeypatch.setattr(dam_vp_lib, "MOST_IMAGES", 5)
  prepared.prepare_params(config_of(), start)
  # From everywhere in the split.
  np.testing.assert_array_equal(seen[0], features["train"][[0, 4, 9, 14, 19]])


def test_defaults_are_those_published_at_224_pixels():
  spec = BackboneSpec(768, 12, 3072, 12, patch_size=16, image_size=224)
  method = create_method("dam_vp", spec, len(CLASSES))
  assert method.prompt_size == 30
  assert create_method("dam_vp", SPEC).prompt_size == 4


@pytest.mark.parametrize(
  ("method", "fields", "message"),
  [
    ("dam_vp", {"prompt_size": 8}, "expected an integer from 1 to 7"),
    ("dam_vp", {"max_clusters": 0}, "max_clusters is 0, expected an integer"),
    ("dam_vp", {"distance_threshold": -1}, "expected a number of at least 0"),
    ("dam_vp", {"classifier": "neurons"}, "feature has 8, but there are 9 classes"),
    ("dam_vp+ilm_vp", {}, "images of a size of its own"),
    ("dam_vp+mlp", {"dam_vp": {"classifier": "neurons"}}, "feature has 8"),
  ],
)
def test_what_does_not_fit_is_refused(method, fields, message):
  with pytest.raises(ValueError, match=message):
    create_method(method, SPEC, 9, **fields)


def test_one_image_makes_no_clusters():
  method = create_method("dam_vp", SPEC, 2)
  batch = {"images": np.zeros((2, 16, 16, 3)), "mask": np.array([1, 0])}
  apply = Apply(lambda p, x, a=None: (np.zeros((2, 8)), None), None, None)
  with pytest.raises(ValueError, match="there is 1 training image, but dam_vp"):
    method.prepare({"prompter": {}}, lambda n: iter([batch]), apply)
