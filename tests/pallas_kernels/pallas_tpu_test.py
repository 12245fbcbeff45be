"""The TPU kernels in the TPU interpreter, against float64 and the definition.

What the interpreter does not know (sizes of VMEM, tiles, what the compiler
takes) is tested in `tests/aot`.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.aot import cases
from pallas_kernels.product_key_topk import reference as search_reference
from pallas_kernels.row_update import optimizers
from pallas_kernels.row_update import reference as update_reference
from pallas_kernels.sparse_gather import pallas_tpu as gather_tpu
from pallas_kernels.sparse_gather import reference as gather_reference
from pallas_kernels.top_k import pallas_tpu as top_k_tpu
from pallas_kernels.top_k import reference as top_k_reference
from pallas_kernels.tpu import networks, segments
from tests.pallas_kernels import tpu_case

OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad", "lazy_adam")


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def reads(num_rows, *shape, seed=0):
  """Indices, some out of range, with one hot row."""
  rng = np.random.default_rng(seed)
  indices = rng.integers(-2, num_rows + 2, shape)
  indices[rng.random(shape) < 0.3] = 7
  return jnp.asarray(indices, jnp.int32)


def close(got, want, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance
    ),
    got,
    want,
  )


class SparseGatherTest(tpu_case.TpuCase):
  @parameterized.named_parameters(
    ("rows_from_hbm", 0, 1 << 22),
    ("rows_from_hbm_in_slices", 0, 1 << 13),
    ("from_vmem", 1 << 22, 1 << 22),
    ("from_vmem_in_slices", 30 * 4 * 128, 1 << 22),
  )
  def test_values_and_all_gradients(self, resident, buffer):
    table, indices, weights = (
      normal(30, 256),
      reads(30, 3, 4, 5),
      normal(3, 4, 5),
    )
    gate, output_grad = normal(3, 4, 256, seed=1), normal(3, 4, 256, seed=2)

    def gated(table, weights, gate):
      return pallas_kernels.sparse_gather(table, indices, weights, gate=gate)

    def definition(table, weights, gate):
      (output,) = gather_reference.sparse_gather_gated(
        table, indices, weights, gate, with_tanh=False
      )
      return output

    with (
      mock.patch.object(gather_tpu, "_RESIDENT_BYTES", resident),
      mock.patch.object(gather_tpu, "_BUFFER_BYTES", buffer),
      mock.patch.object(gather_tpu, "_BLOCK", 8),
    ):
      output, vjp = jax.vjp(gated, table, weights, gate)
      grads = vjp(output_grad)
    want, want_vjp = jax.vjp(definition, table, weights, gate)
    close(output, want)
    close(grads, want_vjp(output_grad))

  def test_sums_without_a_gate_under_vmap(self):
    tables, indices, weights = normal(2, 20, 128), reads(20, 3, 5), normal(3, 5)
    got = jax.vmap(pallas_kernels.sparse_gather, (0, None, None))(
      tables, indices, weights
    )
    want = [gather_reference.sparse_gather(t, indices, weights) for t in tables]
    close(got, jnp.stack(want))

  def test_rows_that_were_read_over_several_blocks(self):
    indices, weights = reads(60, 15, 5), normal(15, 5)
    grads = normal(15, 128, seed=1)
    self.assertGreater(len(np.unique(indices)), 2 * segments.GROUP)
    with (
      mock.patch.object(segments, "_BLOCK", 16),
      mock.patch.object(segments, "_IN_FLIGHT", 4),
      mock.patch.object(segments, "SLOTS", 2),
    ):
      got = pallas_kernels.sparse_gather_row_grads(
        indices, weights, grads, num_rows=60
      )
    want = gather_reference.row_grads(indices, weights, grads, num_rows=60)
    np.testing.assert_array_equal(got[0], want[0])
    close(got[1], want[1])

  @parameterized.parameters(
    ((30, 64), "float32", "multiple of 128"),
    ((30, 128), "bfloat16", "float32"),
    ((0, 128), "float32", "not empty"),
  )
  def test_says_what_it_does_not_take(self, shape, dtype, reason):
    with self.assertRaisesRegex(NotImplementedError, reason):
      pallas_kernels.sparse_gather(
        jnp.zeros(shape, dtype), jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3))
      )


class RowUpdateTest(tpu_case.TpuCase):
  @parameterized.parameters(*OPTIMIZERS)
  def test_equals_the_definition(self, name):
    table, ids, weights = normal(40, 128), reads(37, 6, 5), normal(6, 5)
    grads = normal(6, 128, seed=1)
    state = optimizers.make_row_optimizer(name).init(*table.shape)
    state = {key: jnp.abs(normal(*x.shape)) for key, x in state.items()}
    options = {"weight_decay": 0.01, "clip_norm": 1.0}
    with mock.patch.object(segments, "_BLOCK", 16):
      new, new_state = pallas_kernels.row_update(
        table,
        state,
        ids,
        grads,
        weights=weights,
        optimizer=name,
        learning_rate=0.1,
        step=3,
        num_rows=37,
        **options,
      )
    want = update_reference.row_update(
      table,
      state,
      ids,
      grads,
      weights,
      jnp.float32(0.1),
      jnp.int32(3),
      rule=optimizers.Rule(name, **options),
      num_rows=37,
    )
    close((new, new_state), want)
    untouched = np.setdiff1d(np.arange(40), ids[(ids >= 0) & (ids < 37)])
    self.assertNotEmpty(untouched)
    np.testing.assert_array_equal(new[untouched], table[untouched])

  def test_plain_reads_of_more_rows_than_are_open_at_a_time(self):
    num_rows = segments.SLOTS * segments.GROUP + 20
    ids = np.random.default_rng(0).permutation(num_rows)
    ids[:9] = reads(num_rows, 9)
    table, grads = normal(num_rows, 128), normal(num_rows, 128, seed=1)
    new, _ = pallas_kernels.row_update(
      table, {}, ids, grads, optimizer="sgd", learning_rate=0.5
    )
    want = np.float64(table)
    for i, grad in zip(ids, grads, strict=True):
      if 0 <= i < num_rows:
        want[i] -= 0.5 * np.float64(grad)
    close(new, want)


class TopKTest(tpu_case.TpuCase):
  @parameterized.parameters(("float32", 7), ("bfloat16", 4))
  def test_is_exact_with_ties_and_without_numbers(self, dtype, k):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-9, 9, (2, 3, 300)), dtype)
    x = x.at[0, 0, 5].set(jnp.nan).at[0, 1, :290].set(-jnp.inf)
    x = x.at[1, 0, 299].set(jnp.inf).at[1, 1].set(-jnp.nan)
    with mock.patch.object(top_k_tpu, "_COLUMNS", 128):
      values, indices = pallas_kernels.top_k(x, k)
    want_values, want_indices = top_k_reference.top_k(x, k=k)
    np.testing.assert_array_equal(indices, want_indices)
    np.testing.assert_array_equal(
      values.astype(jnp.float32), want_values.astype(jnp.float32)
    )

  def test_all_of_a_short_row_and_the_gradient(self):
    x, k = normal(5, 3), 3
    grads = jax.grad(lambda x: (pallas_kernels.top_k(x, k)[0] * x).sum())(x)
    want = jax.grad(lambda x: (jax.lax.top_k(x, k)[0] * x).sum())(x)
    close(grads, want)

  def test_says_how_many_it_keeps(self):
    with self.assertRaisesRegex(NotImplementedError, "at most 64"):
      pallas_kernels.top_k(jnp.zeros((2, 100)), 65)


class ProductKeyTest(tpu_case.TpuCase):
  @parameterized.parameters(True, False)
  def test_lookup_and_its_gradients(self, has_gain):
    queries, keys = normal(5, 2, 2, 16), normal(2, 2, 20, 16, seed=1)
    gain = normal(2, 16, seed=2) if has_gain else None
    output_grad = normal(5, 2, 6, seed=3)

    def weights(fn, *arrays):
      return fn(*arrays, top_k=6) if has_gain else fn(*arrays, None, top_k=6)

    def kernel(queries, keys, gain, top_k):
      return pallas_kernels.product_key_lookup(queries, keys, top_k, gain=gain)

    arrays = [queries, keys] + ([gain] if has_gain else [])
    got, vjp, slots = jax.vjp(
      lambda *a: weights(kernel, *a), *arrays, has_aux=True
    )
    want, want_vjp, want_slots = jax.vjp(
      lambda *a: weights(search_reference.product_key_lookup, *a),
      *arrays,
      has_aux=True,
    )
    np.testing.assert_array_equal(slots, want_slots)
    close(got, want)
    close(vjp(output_grad), want_vjp(output_grad), 1e-4)

  def test_sums_of_scores_and_their_gradients(self):
    scores = normal(3, 40), normal(3, 40, seed=1)
    scores = scores[0].at[0, 3].set(jnp.inf), scores[1].at[1, 4].set(-jnp.inf)
    (sums, slots), vjp = jax.vjp(
      lambda a, b: pallas_kernels.product_key_topk(a, b, 5), *scores
    )
    want, want_slots = search_reference.product_key_topk(*scores, top_k=5)
    np.testing.assert_array_equal(slots[1:], want_slots[1:])
    close(sums, want)
    row_grad, col_grad = vjp((jnp.ones((3, 5)), np.zeros((3, 5), jax.float0)))
    for r in range(3):
      rows, cols = np.divmod(np.asarray(slots[r]), 40)
      close(row_grad[r], np.bincount(rows, minlength=40))
      close(col_grad[r], np.bincount(cols, minlength=40))


class TrafficTest(tpu_case.TpuCase):
  """Bytes of the copies that a kernel makes, against what it says it makes."""

  def traffic(self, fn, *arguments):
    with tpu_case.hbm_traffic() as moved:
      jax.block_until_ready(fn(*arguments))
    estimate = cases.kernel_bytes(fn, *arguments)
    total = sum(moved.values())
    self.assertLess(abs(total - estimate), 0.02 * estimate, (moved, estimate))
    return moved

  @pytest.mark.slow
  def test_gather_reads_each_row_once_a_use(self):
    bags, k, dim = 16, 8, 1024
    indices = jnp.asarray(np.arange(bags * k).reshape(bags, k) % 50, jnp.int32)
    with mock.patch.object(gather_tpu, "_RESIDENT_BYTES", 0):
      moved = self.traffic(
        gather_tpu.sparse_gather, normal(50, dim), indices, normal(bags, k)
      )
    fused = 4 * (bags * k * (dim + 2) + bags * dim)
    self.assertLessEqual(sum(moved.values()), 1.2 * fused)

  @pytest.mark.slow
  def test_gather_from_vmem_reads_the_table_once(self):
    indices, weights = reads(50, 16, 8), normal(16, 8)
    table = normal(50, 256)
    moved = self.traffic(gather_tpu.sparse_gather, table, indices, weights)
    compulsory = 4 * (table.size + 2 * indices.size + 16 * 256)
    self.assertEqual(sum(moved.values()), compulsory)

  @pytest.mark.slow
  def test_lookup_writes_no_scores(self):
    queries, keys = normal(1024, 2, 1, 16), normal(2, 1, 20, 16)
    moved = self.traffic(
      lambda q, k: pallas_kernels.product_key_lookup(q, k, 4), queries, keys
    )
    self.assertEqual(moved["written"], 2 * 4 * 1024 * 4)
    self.assertEqual(moved["read"], 4 * (queries.size + keys.size))

  @pytest.mark.slow
  def test_update_touches_rows_only(self):
    table, ids, grads = normal(64, 128), jnp.arange(16), normal(16, 128)

    def step(table, ids, grads):
      return pallas_kernels.row_update(
        table, {}, ids, grads, optimizer="sgd", learning_rate=0.1
      )[0]

    moved = self.traffic(step, table, ids, grads)
    self.assertEqual(moved["written"], 4 * 16 * 128)
    self.assertEqual(moved["read"], 4 * (2 * 16 * 128 + 3 * 16))


class NetworksTest(parameterized.TestCase):
  @parameterized.parameters(2, 4, 8, 16)
  def test_sorts_all_lists_of_zeros_and_ones(self, size):
    # By the zero-one principle it then sorts every list.
    lists = (np.arange(2**size)[:, None] >> np.arange(size)) & 1
    for i, j in networks.sorting_pairs(size):
      pair = lists[:, [i, j]]
      lists[:, i], lists[:, j] = pair.max(1), pair.min(1)
    self.assertTrue(np.all(lists[:, :-1] >= lists[:, 1:]))

  def test_number_of_comparators(self):
    # Batcher's count for 2 ** p: (p ** 2 - p + 4) 2 ** (p - 2) - 1.
    self.assertLen(networks.sorting_pairs(32), 191)

  def test_merges_what_rises_and_falls(self):
    rising = np.sort(np.random.default_rng(0).normal(size=(50, 16)))
    lists = np.concatenate([rising[:, ::2], rising[:, ::-2]], axis=1)
    want = np.sort(lists)[:, ::-1]
    for i, j in networks.merging_pairs(16):
      pair = lists[:, [i, j]]
      lists[:, i], lists[:, j] = pair.max(1), pair.min(1)
    np.testing.assert_array_equal(lists, want)

  @pytest.mark.slow
  def test_lists_longer_than_the_registers_are_merged(self):
    # Several blocks of 32 entries, with ties.
    k, x = 20, np.random.default_rng(0).integers(0, 40, (3, 130))
    with dispatch.use("pallas_tpu", interpret=True):
      _, indices = pallas_kernels.top_k(jnp.asarray(x, jnp.float32), k)
    want = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices, want)

  def test_groups_share_no_place(self):
    pairs = networks.mirrored_pairs(16, 32) + networks.distant_pairs(16, 8, 32)
    groups = networks.groups_of(pairs, 32)
    self.assertLen(groups, 8)
    places = [place for group in groups for place in group.places]
    self.assertCountEqual(places, range(32))
    found = [(g.places[i], g.places[j]) for g in groups for i, j in g.pairs]
    self.assertCountEqual(found, pairs)

  def test_images_of_floats_keep_their_order(self):
    x = np.float32([-np.nan, -np.inf, -1, -1e-40, -0.0, 0, 1e-40, 2, np.inf])
    keys = np.asarray(networks.to_key(jnp.asarray(x)))
    self.assertTrue(np.all(keys[:-1] < keys[1:]))
    back = np.asarray(networks.to_float(jnp.asarray(keys)))
    np.testing.assert_array_equal(back.view(np.int32), x.view(np.int32))


if __name__ == "__main__":
  absltest.main()
