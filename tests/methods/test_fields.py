"""What follows from a field's declaration, and from the hooks a method overrides."""

from collections.abc import Sequence
import dataclasses
import inspect

import jax.numpy as jnp
import pytest
from tiny_training import prepare, tiny_config

from insvp_jax import config as config_lib
from insvp_jax.methods import METHODS, BackboneSpec, Method, checks, fields
from insvp_jax.methods.fields import field
from insvp_jax.methods.insvp import PRESETS
from insvp_jax.methods.linear import Linear
from insvp_jax.train import features

SPEC = BackboneSpec(
  width=32, depth=3, mlp_dim=128, num_heads=2, patch_size=4, image_size=16
)
# Inherited by every Flax module, or there to be called rather than overridden.
NO_HOOKS = {"hparam", "clone"}
HOOKS = {
  name
  for name, value in vars(Method).items()
  if inspect.isfunction(value) and not name.startswith("_")
} - NO_HOOKS
BESIDE_THE_FEATURE = {
  *("trainable_patterns", "updated_patterns", "prompts", "head", "merge"),
  *("adjust_updates", "claims", "place_hparams", "prepares", "routes", "spare_params"),
  "measures",
  "sites",
}


class Example(Method):
  """A method with a field of each kind."""

  preset: str = field("a", "which of two", check=checks.one_of("a", "b"))
  size: int = field(3, "a size", check=checks.positive_int)
  blocks: int | None = field(
    lambda spec: spec.depth, "blocks; None: all", check=checks.block_count
  )
  extra: int | None = field(None, "a second size", check=checks.positive_int)
  pair: Sequence[float | int] | None = field(
    None,
    "two weights",
    check=checks.finite_numbers(2),
    hparam=True,
    presets={"a": (1.0, 2.0), "b": (3, 4)},
  )
  rate: float | int = field(0, "a rate", check=checks.rate, hparam=True)

  def adapt_feature(self, feature, images, *, train=False):
    return self.hparam("rate") * feature


@pytest.mark.parametrize("method", METHODS.values())
def test_every_field_is_declared(method):
  inherited = {"spec", "num_classes", "parent", "name"}
  names = {f.name for f in dataclasses.fields(method)} - inherited
  declared = fields.declared(method)
  assert set(declared) == names
  for declaration in declared.values():
    assert declaration.doc and "\n" not in declaration.doc_line()
    assert declaration.check
    assert set(declaration.presets) in (set(), set(PRESETS))
  # Every default passes its own check.
  method(SPEC)
  assert set(method.HPARAMS) <= names


def test_fields_take_their_defaults_and_the_type_that_is_computed_with():
  method = Example(SPEC)
  assert (method.size, method.blocks, method.extra) == (3, 3, None)
  assert method.pair == (1.0, 2.0) and isinstance(method.rate, float)
  assert Example(SPEC, preset="b").pair == (3.0, 4.0)
  assert Example(SPEC, pair=[5, 6], blocks=1).pair == (5.0, 6.0)
  assert Example.resolve(SPEC, {"size": None}) == Example.resolve(SPEC, {})
  assert Example.HPARAMS == ("pair", "rate") and Method.HPARAMS == ()


def test_equal_fields_make_equal_methods():
  method = Example(SPEC)
  assert method == Example(SPEC, size=3, blocks=3, pair=(1, 2))
  assert method != Example(SPEC, size=4)
  assert method.clone() == method == method.copy()
  assert method.clone(preset="b") == Example(SPEC, preset="b")


def test_an_hparam_is_the_field_or_data():
  method = Example(SPEC, rate=0.5)
  feature = jnp.ones((2, 4))
  assert jnp.all(method.apply({}, feature, None, method="adapt_feature") == 0.5)
  variables = {"hparams": {"rate": jnp.float32(3.0)}}
  assert jnp.all(method.apply(variables, feature, None, method="adapt_feature") == 3.0)


def test_the_config_follows_from_the_declarations(monkeypatch):
  assert fields.value_types(Example) == {
    "preset": str,
    "size": int,
    "blocks": int,
    "extra": int,
    "pair": tuple,
    "rate": float,
  }
  docs = {name: f.doc_line() for name, f in fields.declared(Example).items()}
  assert docs["size"] == "a size; None: 3"
  assert docs["blocks"] == "blocks; None: all"
  assert docs["extra"] == "a second size"
  assert docs["pair"] == "two weights; None: (1.0, 2.0) (a), (3, 4) (b)"
  # A method in the table has its section, and its hparams can be searched for.
  monkeypatch.setitem(METHODS, "example", Example)
  config = config_lib.defaults()
  assert config.example.to_dict() == {**dict.fromkeys(docs), "preset": "a"}
  assert {"pair", "rate"} <= set(config.tune.grid)
  config.example.pair = (1.0, 2.0)
  config.method = "example"
  assert config_lib.method_kwargs(config) == {"preset": "a", "pair": (1.0, 2.0)}
  assert "# two weights; None: (1.0, 2.0) (a)" in config_lib.format_keys(config)


def test_overridden_hooks_are_those_that_change_the_feature():
  assert HOOKS >= {"prompt_image", "adapt", "adapt_feature"}
  changed = {name: method.overridden_hooks() for name, method in METHODS.items()}
  # They train the head or what the backbone has, and change nothing else.
  heads = {"linear", "mlp"}
  parts = {"full", "bias", "bitfit", "ln_tune", "partial"}
  assert {name for name, hooks in changed.items() if not hooks} == heads | parts
  assert changed["insvp"] == {"prompt_image", "adapt", "prepare"}
  assert changed["lora"] == {"adapt", "hooks"}
  assert Method.overridden_hooks() == set()


@pytest.fixture(scope="module")
def linear():
  config = tiny_config("linear")
  return config, prepare(config).program


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_features_are_not_constant_where_any_one_hook_is_overridden(linear, hook):
  config, program = linear
  overriding = type("Overriding", (Linear,), {hook: lambda self, *args, **kwargs: None})
  adapts = hook not in BESIDE_THE_FEATURE
  assert overriding.overridden_hooks() == ({hook} if adapts else set())
  assert features.are_constant(config, program)
  # Also through a class between.
  for method in (overriding, type("Inheriting", (overriding,), {})):
    prompter = method(program.model.backbone.spec)
    model = program.model.clone(prompter=prompter)
    changed = dataclasses.replace(program, model=model)
    assert features.are_constant(config, changed) != adapts


def test_a_hook_that_is_added_counts_by_itself(monkeypatch):
  monkeypatch.setattr(Method, "adapt_later", lambda self: None, raising=False)
  added = type("Added", (Linear,), {"adapt_later": lambda self: None})
  assert added.overridden_hooks() == {"adapt_later"}
  assert Linear.overridden_hooks() == set()
