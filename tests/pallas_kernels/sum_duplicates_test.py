"""The sums of duplicates by XLA against NumPy."""

import jax
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.row_update import xla


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


_sum_duplicates = jax.jit(xla.sum_duplicates, static_argnames="num_rows")


if __name__ == "__main__":
  absltest.main()
