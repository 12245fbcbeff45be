import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.row_update.optimizers import Rule, make_row_optimizer
from recjax.sparse import table as table_lib
from recjax.sparse.table import Table
from recjax.sparse.update import RowGradients, apply_row_gradients
from tests.sparse_oracle import RowOracle

NAMES = ("sgd", "rowwise_adagrad", "adagrad", "lazy_adam")
NUM_ROWS, DIM, RATE = 20, 3, 0.1
# Duplicates, row 0, and ids that no row has.
IDS = np.array([7, 0, 7, -1, 19, NUM_ROWS, 64, 7, 3, 1 << 30, -20], np.int32)
TOUCHED = np.array([0, 3, 7, 19])


@functools.cache
def _setting(name, dtype="float32", weight_decay=0.0, clip_norm=None):
  table = Table(NUM_ROWS, DIM, in_model=True, init_scale=1.0, dtype=dtype)
  rule = Rule(name, weight_decay=weight_decay, clip_norm=clip_norm)
  oracle = RowOracle(name, weight_decay=weight_decay, clip_norm=clip_norm)
  update = jax.jit(
    functools.partial(apply_row_gradients, table=table, rule=rule)
  )
  return table, rule, oracle, update


def _start(table, rule):
  values = table_lib.init_table(jax.random.key(0), table)
  # A state that is not zero, so that a rewritten row would show.
  state = jax.tree.map(
    lambda x: x + 0.25, make_row_optimizer(rule.optimizer).init(*table.shape)
  )
  return values, state


def _read(seed):
  rng = np.random.default_rng(seed)
  grads = jnp.asarray(rng.normal(size=(len(IDS), DIM)), "float32")
  return RowGradients(jnp.asarray(IDS), grads)


def _float64(table, values):
  return np.asarray(table_lib.from_storage(values, table), np.float64)


def _flat(read):
  return np.asarray(read.ids), np.asarray(read.grads, np.float64)


class ApplyRowGradientsTest(parameterized.TestCase):
  @parameterized.product(
    name=NAMES, decay_and_clip=((0.0, None), (0.5, None), (0.3, 0.7))
  )
  def test_equals_float64_oracle_over_steps(self, name, decay_and_clip):
    table, rule, oracle, update = _setting(name, "float32", *decay_and_clip)
    values, state = _start(table, rule)
    expected = _float64(table, values)
    expected_state = {k: np.asarray(v, float) for k, v in state.items()}
    untouched = np.setdiff1d(np.arange(table.shape[0]), TOUCHED)
    for step in range(1, 5):
      before, state_before = np.asarray(values), jax.tree.map(np.array, state)
      read = _read(step)
      values, state = update(
        values,
        state,
        read,
        learning_rate=RATE,
        step=jnp.int32(step),
        keep=jnp.bool_(True),
      )
      oracle.step(expected[:NUM_ROWS], expected_state, *_flat(read), RATE, step)
      np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
      for key, new in state.items():
        np.testing.assert_allclose(
          new, expected_state[key], rtol=1e-4, atol=1e-6
        )
        np.testing.assert_array_equal(
          np.asarray(new)[untouched], state_before[key][untouched]
        )
      values_now = np.asarray(values)
      np.testing.assert_array_equal(values_now[untouched], before[untouched])
      self.assertTrue((values_now[TOUCHED] != before[TOUCHED]).all())

  @parameterized.parameters(*NAMES)
  def test_bfloat16_is_rounded_once_and_leaves_other_bits(self, name):
    table, rule, oracle, update = _setting(name, "bfloat16", 0.1, 0.7)
    values, state = _start(table, rule)
    self.assertEqual(values.dtype, jnp.uint16)
    untouched = np.setdiff1d(np.arange(table.shape[0]), TOUCHED)
    for step in range(1, 4):
      before, read = np.asarray(values), _read(step)
      expected = _float64(table, values)
      expected_state = {k: np.array(v, float) for k, v in state.items()}
      values, state = update(
        values, state, read, learning_rate=RATE, step=jnp.int32(step)
      )
      oracle.step(expected[:NUM_ROWS], expected_state, *_flat(read), RATE, step)
      # bfloat16 has 8 bits of precision: half a unit is 2 ** -8 of the value.
      np.testing.assert_allclose(
        _float64(table, values), expected, rtol=1.01 * 2**-8, atol=1e-5
      )
      for key, new in state.items():
        np.testing.assert_allclose(
          new, expected_state[key], rtol=1e-4, atol=1e-6
        )
      np.testing.assert_array_equal(
        np.asarray(values)[untouched], before[untouched]
      )

  @parameterized.parameters(*NAMES)
  def test_a_skipped_batch_changes_nothing(self, name):
    table, rule, _, update = _setting(name, "float32", 0.3, 0.7)
    values, state = _start(table, rule)
    for bad in (1.0, np.nan, np.inf):
      read = _read(0)._replace(grads=_read(0).grads * bad)
      new = update(
        values,
        state,
        read,
        learning_rate=RATE,
        step=jnp.int32(1),
        keep=jnp.bool_(False),
      )
      jax.tree.map(np.testing.assert_array_equal, new, (values, state))

  def test_no_limit_is_reached_by_small_gradients(self):
    table, rule, _, clipped = _setting("sgd", "float32", 0.0, 100.0)
    values, state = _start(table, rule)
    plain = _setting("sgd")[3]
    for update in (clipped, plain):
      new, _ = update(
        values, state, _read(0), learning_rate=RATE, step=jnp.int32(1)
      )
      ids, grads = _flat(_read(0))
      expected = np.asarray(values)[7] - RATE * grads[ids == 7].sum(axis=0)
      np.testing.assert_allclose(np.asarray(new)[7], expected, rtol=1e-5)

  @parameterized.parameters(*NAMES)
  def test_the_gradient_of_a_weighted_sum_goes_to_its_rows(self, name):
    table, rule, _, update = _setting(name)
    values, state = _start(table, rule)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(-3, NUM_ROWS + 3, (2, 5, 4)), jnp.int32)
    weights, grads = (
      jnp.asarray(rng.normal(size=shape), jnp.float32)
      for shape in ((2, 5, 4), (2, 5, DIM))
    )
    options = dict(learning_rate=RATE, step=jnp.int32(1))
    sums = update(values, state, RowGradients(ids, grads, weights), **options)
    rows = (weights[..., None] * grads[..., None, :]).reshape(-1, DIM)
    plain = update(
      values, state, RowGradients(ids.reshape(-1), rows), **options
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      sums,
      plain,
    )


if __name__ == "__main__":
  absltest.main()
