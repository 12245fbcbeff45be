import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_oracle import RowOracle

from recjax.sparse import table as table_lib
from recjax.sparse.row_optimizers import make_row_optimizer
from recjax.sparse.table import Table
from recjax.sparse.update import (
  UpdateRule,
  apply_row_gradients,
  sum_duplicates,
)

NAMES = ("sgd", "rowwise_adagrad", "adagrad", "lazy_adam")
NUM_ROWS, DIM, RATE = 20, 3, 0.1
# Duplicates inside and across the two reads, row 0, and ids that no row has.
READS = (
  np.array([7, 0, 7, -1, 19, NUM_ROWS, 64], np.int32),
  np.array([7, 3, 1 << 30, -20], np.int32),
)
TOUCHED = np.array([0, 3, 7, 19])


@functools.cache
def _setting(name, dtype="float32", weight_decay=0.0, clip_norm=None):
  table = Table(NUM_ROWS, DIM, in_model=True, init_scale=1.0, dtype=dtype)
  rule = UpdateRule(make_row_optimizer(name), weight_decay, clip_norm)
  oracle = RowOracle(name, weight_decay=weight_decay, clip_norm=clip_norm)
  update = jax.jit(
    functools.partial(apply_row_gradients, table=table, rule=rule)
  )
  return table, rule, oracle, update


def _start(table, rule):
  values = table_lib.init_table(jax.random.key(0), table)
  # A state that is not zero, so that a rewritten row would show.
  state = jax.tree.map(lambda x: x + 0.25, rule.optimizer.init(*table.shape))
  return values, state


def _reads(seed):
  rng = np.random.default_rng(seed)
  return [
    (jnp.asarray(ids), jnp.asarray(rng.normal(size=(len(ids), DIM)), "float32"))
    for ids in READS
  ]


def _float64(table, values):
  return np.asarray(table_lib.from_storage(values, table), np.float64)


def _flat(reads):
  ids = np.concatenate([np.asarray(ids) for ids, _ in reads])
  return ids, np.concatenate([np.asarray(g, np.float64) for _, g in reads])


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
      reads = _reads(step)
      values, state = update(
        values,
        state,
        reads,
        learning_rate=RATE,
        step=jnp.int32(step),
        keep=jnp.bool_(True),
      )
      oracle.step(
        expected[:NUM_ROWS], expected_state, *_flat(reads), RATE, step
      )
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
      before, reads = np.asarray(values), _reads(step)
      expected = _float64(table, values)
      expected_state = {k: np.array(v, float) for k, v in state.items()}
      values, state = update(
        values, state, reads, learning_rate=RATE, step=jnp.int32(step)
      )
      oracle.step(
        expected[:NUM_ROWS], expected_state, *_flat(reads), RATE, step
      )
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
      reads = [(ids, grads * bad) for ids, grads in _reads(0)]
      new = update(
        values,
        state,
        reads,
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
        values, state, _reads(0), learning_rate=RATE, step=jnp.int32(1)
      )
      ids, grads = _flat(_reads(0))
      expected = np.asarray(values)[7] - RATE * grads[ids == 7].sum(axis=0)
      np.testing.assert_allclose(np.asarray(new)[7], expected, rtol=1e-5)


class SumDuplicatesTest(parameterized.TestCase):
  @settings(max_examples=60, deadline=None, derandomize=True)
  @given(
    num_reads=st.sampled_from((1, 2, 9)),
    # Few rows a read are counted, many are sorted.
    num_rows=st.sampled_from((1, 3, 64, 80)),
    dim=st.sampled_from((1, 2)),
    seed=st.integers(0, 2**31),
  )
  def test_equals_numpy(self, num_reads, num_rows, dim, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(-2, num_rows + 3, num_reads).astype(np.int32)
    grads = rng.normal(size=(num_reads, dim)).astype(np.float32)
    self._check(ids, grads, num_rows)

  @parameterized.product(
    num_rows=(8, 1000),
    ids=(
      [4] * 6,
      [5, 2, 5, 2, 5, 0],
      [-1, 1000, 1001, 1 << 30, -(1 << 31), 1000],
      [7, 6, 5, 0, 1, 2],
    ),
  )
  def test_all_duplicates_all_out_of_range_all_distinct(self, num_rows, ids):
    grads = np.arange(12, dtype=np.float32).reshape(6, 2)
    self._check(np.array(ids, np.int32), grads, num_rows)

  def _check(self, ids, grads, num_rows):
    unique, summed = _sum_duplicates(ids, grads, num_rows=num_rows)
    unique, summed = np.asarray(unique), np.asarray(summed)
    capacity = min(len(ids), num_rows + 1)
    self.assertEqual(unique.shape, (capacity,))
    self.assertEqual(summed.shape, (capacity, grads.shape[1]))
    expected = np.unique(ids[(ids >= 0) & (ids < num_rows)])
    count = len(expected)
    np.testing.assert_array_equal(unique[:count], expected)
    np.testing.assert_array_equal(unique[count:], num_rows)
    for row, total in zip(expected, summed, strict=False):
      np.testing.assert_allclose(
        total, grads[ids == row].sum(axis=0, dtype=float), rtol=1e-5, atol=1e-6
      )


_sum_duplicates = jax.jit(sum_duplicates, static_argnames="num_rows")


if __name__ == "__main__":
  absltest.main()
