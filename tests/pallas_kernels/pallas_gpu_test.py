"""Pallas kernels for GPUs, interpreted, against float64 NumPy."""

import contextlib
import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import row_update_test
import sparse_gather_test
from absl.testing import absltest, parameterized
from jax.experimental.pallas import triton as plt
from sparse_gather_test import close, ids, normal, stored

from pallas_kernels import dispatch
from pallas_kernels.aot import cases
from pallas_kernels.gpu import rows as gpu_rows
from pallas_kernels.row_update.api import row_update
from pallas_kernels.sparse_gather.api import (
  sparse_gather,
  sparse_gather_row_grads,
)

NAME = "pallas_gpu"
MAX_INT32 = 2**31 - 1


class InterpretedCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(dispatch.use(NAME, interpret=True))


class SparseGatherTest(InterpretedCase):
  @parameterized.parameters(
    (1, jnp.float32, 5),
    (7, jnp.bfloat16, 4),
    (64, jnp.uint16, 3),
    (130, jnp.float32, 1),
    # Two blocks of features, and more outputs than a program takes.
    (300, jnp.float32, 5),
  )
  def test_values_and_gradients_with_a_gate(self, dim, dtype, k):
    # Ids on both sides of the range, and one row twice in an output.
    indices = ids((3, 2, k)).at[0, 1].set(4)
    table, weights = stored(normal((23, dim)), dtype), normal((3, 2, k), 1)
    gate = normal((3, 2, dim), 2)
    sparse_gather_test.check(table, indices, weights, gate, name=NAME)

  def test_several_blocks_of_features_in_a_gradient(self):
    table, indices = normal((5, 1100)), ids((2, 2), high=7)
    grad, ones = normal((2, 1100), 1), jnp.ones((2, 2))
    _, pull = jax.jit(
      lambda *arrays: jax.vjp(functools.partial(sparse_gather, *arrays), ones)
    )(table, indices)
    want = sparse_gather_test.expected(table, indices, ones, None, grad)
    close(jax.jit(pull)(grad)[0], want[1][1])

  @parameterized.parameters(((0, 3), 4), ((3, 0), 4), ((3, 2), 0))
  def test_nothing_to_read(self, shape, dim):
    gate = normal((shape[0], dim))
    table, weights = normal((23, dim)), normal(shape, 1)
    sparse_gather_test.check(table, ids(shape), weights, gate, name=NAME)

  def test_nan_and_infinities_reach_who_reads_them(self):
    table = normal((4, 7)).at[0, 6].set(np.inf).at[1, 0].set(np.nan)
    indices = jnp.array([[0, 2], [1, 2], [2, 3], [9, 2]])
    weights = jnp.array([[2.0, 1], [1, 1], [1, 1], [np.inf, 1]])
    got = np.asarray(jax.jit(sparse_gather)(table, indices, weights))
    self.assertTrue(np.isposinf(got[0, 6]) and np.isnan(got[1, 0]))
    self.assertTrue(np.isfinite(got[0, :6]).all())
    self.assertTrue(np.isfinite(got[1, 1:]).all())
    self.assertTrue(np.isfinite(got[2]).all())
    # Beyond the table lie zeros, and infinity times zero is not a number.
    self.assertTrue(np.isnan(got[3]).all())


class RowGradsTest(InterpretedCase):
  check = sparse_gather_test.RowGradsTest.check

  @parameterized.parameters((1, 1), (7, 22), (130, 1000), (600, None))
  def test_equals_a_sum_by_row(self, dim, num_rows):
    indices, weights = ids((4, 2, 3)), normal((4, 2, 3), 1)
    self.check(indices, weights, normal((4, 2, dim), 9), num_rows, NAME)

  def test_one_row_may_take_all_reads(self):
    indices = jnp.full((150, 3), 3).at[::2, 0].set(5)
    self.check(indices, normal((150, 3), 1), normal((150, 5), 9), 9, NAME)

  def test_no_reads(self):
    self.check(ids((0, 3)), normal((0, 3)), normal((0, 7)), 4, NAME)

  def test_what_is_dropped_leaves_no_trace(self):
    # Nor does a gradient that is not finite.
    indices, weights = jnp.array([[-1, 7], [2, 3]]), jnp.ones((2, 2))
    output_grad = jnp.array([[np.nan, np.inf], [1.0, 2.0]])
    got_ids, grads = jax.jit(
      functools.partial(sparse_gather_row_grads, num_rows=7)
    )(indices, weights, output_grad)
    np.testing.assert_array_equal(got_ids, [2, 3, 7, 7])
    np.testing.assert_array_equal(grads, [[1, 2], [1, 2], [0, 0], [0, 0]])


class RowUpdateTest(InterpretedCase):
  @parameterized.parameters(
    ("sgd", 7, jnp.float32),
    ("rowwise_adagrad", 7, jnp.bfloat16),
    ("rowwise_adagrad", 64, jnp.float32),
    ("adagrad", 130, jnp.uint16),
    ("lazy_adam", 1, jnp.float32),
  )
  def test_equals_the_oracle(self, optimizer, dim, dtype):
    table, state = row_update_test.start(optimizer, dim=dim, dtype=dtype)
    reads = row_update_test.IDS
    grads = normal((len(reads), dim))
    options = {"weight_decay": 0.3, "clip_norm": 1.5, "optimizer": optimizer}
    got = jax.jit(functools.partial(row_update, **options))(
      *(table, state, reads, grads),
      learning_rate=row_update_test.RATE,
      step=row_update_test.STEP,
    )
    self.assertEqual(got[0].dtype, dtype)
    row_update_test.check(
      got, row_update_test.expected(table, state, reads, grads, **options)
    )
    untouched = np.delete(np.arange(20), row_update_test.TOUCHED)
    chex.assert_trees_all_equal(
      *(
        jax.tree.map(lambda x: x[untouched], tree)
        for tree in (got, (table, state))
      )
    )

  def test_a_bag_equals_its_reads(self):
    table, state = row_update_test.start("rowwise_adagrad", dim=19)
    indices, weights = ids((3, 4, 6), high=22), normal((3, 4, 6), 1)
    # A hot row, whose reads take several steps of the loop.
    indices, grads = indices.at[:2].set(5), normal((3, 4, 19), 2)
    # With a decay a row would show that it was updated by mistake.
    options = {"optimizer": "rowwise_adagrad", "weight_decay": 0.3}
    got = jax.jit(functools.partial(row_update, num_rows=18, **options))(
      *(table, state, indices, grads),
      weights=weights,
      learning_rate=row_update_test.RATE,
      step=row_update_test.STEP,
    )
    parts = np.float64(weights)[..., None] * np.float64(grads)[..., None, :]
    reads = np.asarray(indices).reshape(-1)
    want = row_update_test.expected(
      *(table, state, np.where(reads < 18, reads, -1), parts.reshape(-1, 19)),
      **options,
    )
    row_update_test.check(got, want)

  def test_a_nan_reaches_its_row_only(self):
    table, state = row_update_test.start("adagrad")
    grads = jnp.ones((3, 5)).at[1].set(np.nan)
    got, _ = jax.jit(functools.partial(row_update, optimizer="adagrad"))(
      *(table, state, jnp.array([3, 9, 10]), grads), learning_rate=0.1
    )
    is_nan = np.isnan(np.asarray(got))
    self.assertTrue(is_nan[9].all())
    self.assertFalse(np.delete(is_nan, 9, axis=0).any())

  def test_refuses_rows_that_registers_cannot_hold(self):
    table, grads = jnp.zeros((2, 5000)), jnp.zeros((1, 5000))
    with self.assertRaisesRegex(NotImplementedError, "at most 4096 entries"):
      row_update(
        *(table, {}, jnp.array([1]), grads), optimizer="sgd", learning_rate=1.0
      )


@contextlib.contextmanager
def moved_bytes():
  """Bytes of each load and store of the kernels that are traced and run here.

  Single numbers that a kernel reads without `load` are not in it.
  """
  moved = []
  load, store = plt.load, plt.store

  def count(values, mask):
    size = jnp.sum(jnp.broadcast_to(mask, values.shape))
    jax.debug.callback(
      lambda size: moved.append(values.dtype.itemsize * int(size)), size
    )

  def counted_load(ref, *, mask, other):
    values = load(ref, mask=mask, other=other)
    count(values, mask)
    return values

  def counted_store(ref, values, *, mask):
    count(values, mask)
    store(ref, values, mask=mask)

  with (
    mock.patch.object(plt, "load", counted_load),
    mock.patch.object(plt, "store", counted_store),
  ):
    yield moved
    jax.effects_barrier()


class TrafficTest(InterpretedCase):
  """Bytes that a kernel loads and stores, against what it says it moves."""

  def check(self, fn, *arrays):
    with moved_bytes() as moved:
      # A function of its own, lest jax knows the trace without a count.
      jax.block_until_ready(jax.jit(lambda *x: fn(*x))(*arrays))
    estimate = cases.kernel_bytes(fn, *arrays)
    self.assertLess(abs(sum(moved) - estimate), 0.02 * estimate)

  @parameterized.parameters(128, 300)
  def test_gather_and_the_gradient_of_its_weights(self, dim):
    table, weights = normal((30, dim)), normal((12, 8), 1)
    indices = jnp.asarray(np.arange(96).reshape(12, 8) % 30, jnp.int32)

    def step(table, weights, gate):
      output, pull = jax.vjp(
        lambda w, g: sparse_gather(table, indices, w, gate=g), weights, gate
      )
      return output, pull(output)

    self.check(step, table, weights, normal((12, dim), 2))

  def test_gradients_of_rows(self):
    def grads(weights, output_grad):
      indices = jnp.arange(40).reshape(10, 4)
      return sparse_gather_row_grads(indices, weights, output_grad, num_rows=64)

    self.check(grads, normal((10, 4)), normal((10, 256), 1))

  def test_update(self):
    def step(table, grads):
      ids = jnp.arange(20)[::-1]
      return row_update(
        *(table, {}, ids, grads), optimizer="sgd", learning_rate=0.1
      )[0]

    self.check(step, normal((64, 256)), normal((20, 256), 1))


class GroupReadsTest(parameterized.TestCase):
  @parameterized.parameters(1, 5, 22, MAX_INT32)
  def test_every_read_is_in_the_group_of_its_row(self, num_rows):
    reads = np.asarray(ids((40,)))
    groups = jax.tree.map(
      np.asarray,
      jax.jit(gpu_rows.group_reads, static_argnums=1)(reads, num_rows),
    )
    valid = reads[(reads >= 0) & (reads < num_rows)]
    size, distinct = min(40, num_rows), np.unique(valid)
    left = [num_rows] * (size - len(distinct))
    np.testing.assert_array_equal(groups.rows, [*distinct, *left])
    for i, row in enumerate(groups.rows):
      members = groups.order[groups.starts[i] : groups.starts[i + 1]]
      want = np.flatnonzero(reads == row) if row < num_rows else []
      np.testing.assert_array_equal(members, want)


if __name__ == "__main__":
  absltest.main()
