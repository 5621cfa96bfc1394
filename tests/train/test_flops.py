"""FLOPs counted on jaxprs: as XLA counts them, and loops as often as they run."""

import jax
import jax.numpy as jnp
import pytest
from test_sharding import first_batch, wide_config
from tiny_training import prepare

from insvp_jax.train import flops
from insvp_jax.train import program as program_lib


def counted(function, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return flops.count(jax.jit(function).trace(*args).jaxpr)


def test_a_multiply_add_of_a_matrix_product_is_two():
  assert counted(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  batched = counted(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (2, 3, 5), (2, 7, 5))
  assert batched == 2 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_sums_over_its_window(groups):
  def conv(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (1, 1),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  found = counted(conv, (2, 6, 6, 4), (3, 3, 4 // groups, 8))
  assert found == 2 * (2 * 6 * 6 * 8) * (3 * 3 * 4 // groups)


def test_loops_count_as_often_as_they_run_and_of_branches_the_dearest():
  def body(x, _):
    return x @ x, None

  def branches(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

  product = 2 * 4**3
  assert counted(lambda x: jax.lax.scan(body, x, length=6)[0], (4, 4)) == 6 * product
  assert counted(branches, (4, 4)) == 2 * product


def test_a_train_step_costs_what_xla_says_scanned_or_not():
  found = []
  for scan in (False, True):
    config = wide_config(backbone__scan=scan, backbone__depth=3)
    program = prepare(config).program
    state = program_lib.abstract_state(config, program)
    traced = program.train_step.trace(state, first_batch(config, program))
    found.append(flops.count(traced.jaxpr))
    if not scan:
      # Before XLA rewrites anything; elementwise operations are a few per cent.
      xla = traced.lower().cost_analysis()["flops"]
      assert 0.85 * xla < found[0] <= xla
  # All rounds of a scan do the same. So it computes the gradient of the first block's
  # tokens, at most a third of one of three blocks; and the last block for all tokens,
  # where the head reads one: at most a whole block.
  assert found[0] < found[1] < found[0] * (1 + 1 / 9 + 1 / 3)
