"""The search and the lookup of product keys against all pairs in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.product_key_topk import xla
from pallas_kernels.product_key_topk.api import (
  product_key_lookup,
  product_key_topk,
)

MESH = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
ALL = ("reference", "xla", "cpu")
ROWS, HEADS, KEYS, DIM = 5, 2, 9, 4


def random_scores(num_keys, seed=0, shape=(3, 5)):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(2, *shape, num_keys)), jnp.float32)


def every_sum(row, col):
  row, col = np.asarray(row), np.asarray(col)
  return (row[..., :, None] + col[..., None, :]).reshape(*row.shape[:-1], -1)


@functools.partial(jax.jit, static_argnames=("k", "name"))
def search(row, col, k, name=None):
  return product_key_topk(row, col, k, implementation=name)


def random_lookup(seed=0, rows=ROWS, heads=HEADS, keys=KEYS, dim=DIM):
  """Queries, keys and gains."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  gain = 0.5 + jnp.abs(draw(2, dim))
  return draw(rows, 2, heads, dim), draw(2, heads, keys, dim), gain


def oracle(queries, keys, gain, k):
  """Weights of all slots, zeros where not chosen, in float64."""
  queries, keys = np.float64(queries), np.float64(keys)
  if gain is not None:
    mean = queries.mean(-1, keepdims=True)
    variance = queries.var(-1, keepdims=True)
    queries = (queries - mean) / np.sqrt(variance + 1e-6)
    queries = queries * np.float64(gain)[:, None]
  row, col = np.einsum("rahd,ahnd->arhn", queries, keys)
  sums = every_sum(row, col)
  bound = -np.sort(-sums, axis=-1)[..., k - 1 : k]
  exp = np.where(sums >= bound, np.exp(sums - sums.max(-1, keepdims=True)), 0)
  return exp / exp.sum(-1, keepdims=True)


def dense(weights, slots, num_keys):
  """Weights of all slots from those of the chosen."""
  out = np.zeros((*weights.shape[:-1], num_keys**2))
  np.put_along_axis(out, np.asarray(slots), np.asarray(weights), axis=-1)
  return out


class SearchTest(parameterized.TestCase):
  @parameterized.product(
    name=ALL, num_keys=(1, 5, 16, 70), top_k=(1, 4, 20), ties=(False, True)
  )
  def test_equals_brute_force_over_all_slots(self, name, num_keys, top_k, ties):
    k = min(top_k, num_keys**2)
    row, col = random_scores(num_keys, seed=top_k)
    if ties:
      row, col = jnp.round(row), jnp.round(col)
    scores, slots = search(row, col, k, name)
    sums = every_sum(row, col)
    np.testing.assert_array_equal(scores, -np.sort(-sums, axis=-1)[..., :k])
    slots = np.asarray(slots)
    np.testing.assert_array_equal(
      np.take_along_axis(sums, slots, axis=-1), scores
    )
    self.assertTrue((np.diff(np.sort(slots), axis=-1) > 0).all())

  @settings(max_examples=20, deadline=None)
  @given(st.integers(1, 30), st.data())
  def test_any_size(self, num_keys, data):
    k = data.draw(st.integers(1, num_keys**2))
    row, col = random_scores(num_keys, seed=k, shape=(2,))
    want = -np.sort(-every_sum(row, col), axis=-1)[..., :k]
    for name in ("xla", "cpu"):
      scores, _ = product_key_topk(row, col, k, implementation=name)
      np.testing.assert_array_equal(scores, want)

  @parameterized.parameters(1, 2, 7, 32)
  def test_pruned_grid_holds_every_winner_of_the_full_grid(self, top_k):
    i, j = xla.candidate_pairs(top_k)
    self.assertLen(i, sum(top_k // n for n in range(1, top_k + 1)))
    rng = np.random.default_rng(0)
    for _ in range(20):
      row, col = -np.sort(-rng.exponential(size=(2, top_k)))
      full = np.sort((row[:, None] + col).ravel())[-top_k:]
      np.testing.assert_array_equal(np.sort(row[i] + col[j])[-top_k:], full)

  def test_looks_at_119_pairs_for_32(self):
    self.assertLen(xla.candidate_pairs(32)[0], 119)

  @parameterized.parameters(*ALL)
  def test_gradient_goes_to_both_parts_of_a_sum(self, name):
    row, col = random_scores(12)
    weights = random_scores(20, seed=1)[0]

    def loss(row, col):
      scores, _ = product_key_topk(row, col, 20, implementation=name)
      return jnp.sum(scores * weights)

    grads = jax.jit(jax.grad(loss, (0, 1)))(row, col)
    _, slots = search(row, col, 20, name)
    for grad, keys in zip(grads, (slots // 12, slots % 12), strict=True):
      want = np.zeros(row.shape)
      for place in np.ndindex(*keys.shape):
        want[place[:-1]][keys[place]] += weights[place]
      np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(*ALL)
  def test_infinities_and_nan(self, name):
    row, col = random_scores(6, shape=(3,))
    row = row.at[0, 2].set(jnp.inf).at[1, :].set(-jnp.inf)
    scores, slots = search(row, col, 4, name)
    np.testing.assert_array_equal(slots[0] // 6, 2)
    np.testing.assert_array_equal(scores[0], jnp.inf)
    np.testing.assert_array_equal(scores[1], -jnp.inf)
    self.assertTrue(((slots >= 0) & (slots < 36)).all())
    scores, slots = search(row.at[2, 1].set(jnp.nan), col, 4, name)
    self.assertTrue(jnp.isnan(scores[2]).all())
    np.testing.assert_array_equal(slots[2] // 6, 1)
    self.assertFalse(jnp.isnan(scores[:2]).any())

  @parameterized.parameters(*ALL)
  def test_under_vmap_and_shard_map(self, name):
    row, col = random_scores(8, shape=(4, 3))
    fn = functools.partial(product_key_topk, top_k=5, implementation=name)
    mapped = jax.shard_map(
      fn,
      mesh=MESH,
      in_specs=P("data"),
      out_specs=P("data"),
      check_vma=True,
    )
    for other in (mapped, jax.vmap(fn)):
      for got, want in zip(other(row, col), fn(row, col), strict=True):
        np.testing.assert_array_equal(got, want)
    loss = lambda row, col: jnp.sum(jnp.sin(fn(row, col)[0]))  # noqa: E731
    np.testing.assert_allclose(
      jax.vmap(jax.grad(loss))(row, col), jax.grad(loss)(row, col), rtol=1e-5
    )

  def test_mistakes(self):
    row, col = random_scores(3)
    with self.assertRaisesRegex(ValueError, r"1 to keys squared \(9\), got 10"):
      product_key_topk(row, col, 10)
    with self.assertRaisesRegex(ValueError, "one shape .*got"):
      product_key_topk(row, col[..., :2], 2)
    with self.assertRaisesRegex(ValueError, "'x'; there are reference, xla"):
      product_key_topk(row, col, 2, implementation="x")


class LookupTest(parameterized.TestCase):
  @parameterized.product(
    name=ALL,
    has_gain=(True, False),
    sizes=(
      {},
      {"rows": 1, "heads": 1, "keys": 1, "dim": 1},
      {"rows": 7, "heads": 3, "keys": 65, "dim": 17},
    ),
  )
  def test_equals_brute_force(self, name, has_gain, sizes):
    queries, keys, gain = random_lookup(**sizes)
    gain = gain if has_gain and keys.shape[3] > 1 else None
    k = min(6, keys.shape[2])
    weights, slots = product_key_lookup(
      queries, keys, k, gain=gain, implementation=name
    )
    np.testing.assert_allclose(
      dense(weights, slots, keys.shape[2]),
      oracle(queries, keys, gain, k),
      rtol=1e-4,
      atol=1e-6,
    )
    self.assertTrue((np.diff(weights, axis=-1) <= 0).all())

  @parameterized.parameters(*ALL)
  def test_halves_are_taken_for_what_they_are_in_float32(self, name):
    halves = [x.astype(jnp.bfloat16) for x in random_lookup()]
    towards = jnp.arange(ROWS * HEADS * 6.0).reshape(ROWS, HEADS, 6)

    def look(queries, keys, gain):
      weights, slots = product_key_lookup(
        queries, keys, 6, gain=gain, implementation=name
      )
      return jnp.sum(weights * towards), (weights, slots)

    run = jax.jit(jax.value_and_grad(look, (0, 1, 2), has_aux=True))
    (_, found), grads = run(*halves)
    (_, want), want_grads = run(*(x.astype(jnp.float32) for x in halves))
    self.assertEqual(found[0].dtype, jnp.float32)
    for a, b in zip(found, want, strict=True):
      np.testing.assert_array_equal(a, b)
    for a, b in zip(grads, want_grads, strict=True):
      self.assertEqual(a.dtype, jnp.bfloat16)
      np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))

  @parameterized.product(name=("xla", "cpu"), has_gain=(True, False))
  def test_gradients_equal_finite_differences_of_float64(self, name, has_gain):
    queries, keys, gain = random_lookup()
    gain = gain if has_gain else None
    rng = np.random.default_rng(3)
    towards = rng.normal(size=(ROWS, HEADS, KEYS**2))

    def loss(queries, keys, gain):
      weights, slots = product_key_lookup(
        queries, keys, 6, gain=gain, implementation=name
      )
      chosen = jnp.take_along_axis(
        jnp.asarray(towards, jnp.float32), slots, axis=-1
      )
      return jnp.sum(weights * chosen)

    arguments = (queries, keys, gain)
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments)
    for i, (value, grad) in enumerate(zip(arguments, grads, strict=True)):
      if value is None:
        continue
      for place in rng.integers(0, value.size, 8):
        step = np.zeros(value.size)
        step[place] = 1e-5
        ends = []
        for sign in (1, -1):
          moved = [None if a is None else np.float64(a) for a in arguments]
          moved[i] = moved[i] + sign * step.reshape(value.shape)
          ends.append(np.sum(oracle(*moved, 6) * towards))
        np.testing.assert_allclose(
          np.ravel(grad)[place],
          (ends[0] - ends[1]) / 2e-5,
          rtol=2e-3,
          atol=2e-4,
        )

  @parameterized.parameters(*ALL)
  def test_no_rows_and_more_axes(self, name):
    queries, keys, gain = random_lookup(rows=6)
    look = functools.partial(
      product_key_lookup, top_k=3, gain=gain, implementation=name
    )
    weights, slots = look(queries, keys)
    folded = look(queries.reshape(2, 3, *queries.shape[1:]), keys)
    np.testing.assert_array_equal(folded[1].reshape(slots.shape), slots)
    empty = look(queries[:0], keys)
    self.assertEqual(empty[0].shape, (0, HEADS, 3))
    mapped = jax.vmap(look, in_axes=(0, None))(queries, keys)
    np.testing.assert_allclose(mapped[0], weights, rtol=1e-6)
    grads = jax.grad(lambda q: jnp.sum(look(q, keys)[0][..., 0]))(queries)
    by_row = jax.vmap(jax.grad(lambda q: jnp.sum(look(q, keys)[0][..., 0])))(
      queries
    )
    np.testing.assert_allclose(by_row, grads, rtol=1e-4, atol=1e-6)

  def test_the_kernel_makes_no_array_of_scores(self):
    queries, keys, gain = random_lookup(rows=4096, heads=1, keys=256)
    compiled = {}
    for name in ("xla", "cpu"):

      def loss(queries, keys, gain, name=name):
        return jnp.sum(
          product_key_lookup(queries, keys, 4, gain=gain, implementation=name)[
            0
          ][..., 0]
        )

      step = jax.jit(jax.grad(loss, (0, 1, 2)))
      compiled[name] = step.lower(queries, keys, gain).compile()
    size = 4096 * 256 * 4
    temp = {
      name: program.memory_analysis().temp_size_in_bytes
      for name, program in compiled.items()
    }
    self.assertGreater(temp["xla"], size)
    self.assertLess(temp["cpu"], size)

  def test_mistakes(self):
    queries, keys, gain = random_lookup()
    with self.assertRaisesRegex(ValueError, "queries must be .*got"):
      product_key_lookup(queries[:, :1], keys, 2)
    with self.assertRaisesRegex(ValueError, r"gain must be .*\(2, 4\), got"):
      product_key_lookup(queries, keys, 2, gain=gain[:1])
    with self.assertRaisesRegex(ValueError, "top_k must be from 1 .*got 0"):
      product_key_lookup(queries, keys, 0)


if __name__ == "__main__":
  absltest.main()
