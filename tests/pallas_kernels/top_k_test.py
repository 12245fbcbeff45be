"""`top_k` of every implementation against a sort by NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.top_k import arg_specs
from pallas_kernels.top_k.api import top_k

MESH = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
ALL = ("reference", "xla", "cpu")


def ordered(x):
  """int64 in the order of the floats' total order."""
  bits = np.asarray(x, np.float32).view(np.int32).astype(np.int64)
  return np.where(bits < 0, -(2**31) - 1 - bits, bits)


def expected(x, k):
  """Indices of the k largest, equal ones by index."""
  place = np.broadcast_to(np.arange(x.shape[-1]), x.shape)
  return np.lexsort((place, -ordered(x)), axis=-1)[..., :k]


def normal(shape, seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)


@functools.partial(jax.jit, static_argnames=("k", "is_sorted", "name"))
def run(x, k, is_sorted=True, name=None):
  return top_k(x, k, is_sorted=is_sorted, implementation=name)


def check(x, k, name):
  values, indices = run(x, k, name=name)
  want = expected(np.asarray(x.astype(jnp.float32)), k)
  np.testing.assert_array_equal(indices, want)
  np.testing.assert_array_equal(
    np.float32(values), np.take_along_axis(np.float32(x), want, axis=-1)
  )
  assert values.dtype == x.dtype and indices.dtype == jnp.int32


class TopKTest(parameterized.TestCase):
  @parameterized.product(
    name=ALL,
    # Short rows, whole rows, few groups, remainders, many equal candidates.
    size=((1, 1), (5, 1), (64, 16), (129, 129), (1000, 33), (4099, 700)),
    dtype=(jnp.float32, jnp.bfloat16),
  )
  def test_equals_a_sort(self, name, size, dtype):
    n, k = size
    check(normal((3, n), seed=n, dtype=dtype), k, name)

  @parameterized.product(name=ALL, n=(7, 300, 5000))
  def test_equal_values_come_by_index(self, name, n):
    rng = np.random.default_rng(n)
    for high in (1, 2, 5):
      x = jnp.asarray(rng.integers(0, high, (4, n)), jnp.float32)
      check(x, min(n, 40), name)

  @parameterized.product(
    name=ALL, n=(12, 200, 2000), dtype=(jnp.float32, jnp.bfloat16)
  )
  def test_nan_infinities_and_zeros_stand_in_the_total_order(
    self, name, n, dtype
  ):
    rng = np.random.default_rng(n)
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0])
    x = jnp.asarray(special[rng.integers(0, 7, (5, n))], jnp.float32)
    check(x.astype(dtype), min(n, 150), name)

  @parameterized.product(name=ALL, n=(1, 5, 60, 200, 4096))
  def test_all_and_none(self, name, n):
    check(normal((2, n)), n, name)
    values, indices = run(normal((2, n)), 0, name=name)
    self.assertEqual((values.shape, indices.shape), ((2, 0), (2, 0)))

  @parameterized.product(name=ALL, shape=((0, 9), (3, 0, 9), (9,), (2, 3, 9)))
  def test_any_leading_axes(self, name, shape):
    check(normal(shape), 4, name)

  @parameterized.product(name=ALL, n=(70, 500, 5000))
  def test_unsorted_is_the_same_set(self, name, n):
    x = normal((4, n))
    values, indices = run(x, 50, is_sorted=False, name=name)
    np.testing.assert_array_equal(
      np.sort(indices, axis=-1), np.sort(expected(np.asarray(x), 50), axis=-1)
    )
    np.testing.assert_array_equal(
      values, np.take_along_axis(np.asarray(x), np.asarray(indices), axis=-1)
    )

  @settings(max_examples=30, deadline=None)
  @given(st.integers(1, 400), st.data())
  def test_any_size(self, n, data):
    k = data.draw(st.integers(0, n))
    x = normal((2, n), seed=n)
    for name in ALL:
      values, indices = top_k(x, k, implementation=name)
      want = expected(np.asarray(x), k)
      np.testing.assert_array_equal(indices, want)
      np.testing.assert_array_equal(
        values, np.take_along_axis(np.asarray(x), want, axis=-1)
      )

  @parameterized.product(name=ALL, dtype=(jnp.float32, jnp.bfloat16))
  def test_gradient_goes_back_to_the_chosen(self, name, dtype):
    x, weights = normal((3, 200), dtype=dtype), normal((3, 40), seed=1)

    def loss(x):
      values, _ = top_k(x, 40, implementation=name)
      return jnp.sum(values.astype(jnp.float32) * weights)

    grads = jax.grad(loss)(x)
    want = np.zeros((3, 200))
    np.put_along_axis(
      want, expected(np.asarray(x.astype(jnp.float32)), 40), weights, axis=-1
    )
    self.assertEqual(grads.dtype, dtype)
    np.testing.assert_allclose(grads.astype(jnp.float32), want, rtol=1e-2)

  @parameterized.parameters(*ALL)
  def test_under_vmap_grad_checkpoint_and_shard_map(self, name):
    x = normal((4, 6, 70))
    fn = functools.partial(top_k, k=9, implementation=name)
    for mapped in (
      jax.vmap(fn),
      jax.vmap(fn, in_axes=1, out_axes=1),
      jax.checkpoint(fn),
      jax.shard_map(
        fn,
        mesh=MESH,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=True,
      ),
    ):
      np.testing.assert_array_equal(mapped(x)[1], fn(x)[1])
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(fn(x)[0])))
    np.testing.assert_allclose(jax.vmap(gradient)(x), gradient(x), rtol=1e-6)

  @parameterized.named_parameters(
    *((name, shape, k) for name, (shape, k) in arg_specs.ARG_SPECS.items())
  )
  def test_the_kernel_equals_xla_at_the_shapes_in_use(self, shape, k):
    x = normal((min(shape[0], 64), shape[1]))
    for got, want in zip(
      run(x, k, name="cpu"), run(x, k, name="xla"), strict=True
    ):
      np.testing.assert_array_equal(got, want)

  def test_mistakes(self):
    x = normal((3, 8))
    for wrong in (-1, 9):
      with self.assertRaisesRegex(ValueError, f"got k = {wrong} .*3, 8"):
        top_k(x, wrong)
    with self.assertRaisesRegex(ValueError, "last axis"):
      top_k(jnp.float32(1.0), 0)
    with self.assertRaisesRegex(TypeError, "floats, got int32"):
      top_k(jnp.arange(4), 2)
    with self.assertRaisesRegex(ValueError, "'gpu'; there are reference, xla"):
      top_k(x, 2, implementation="gpu")
    with self.assertRaisesRegex(NotImplementedError, "bfloat16, got float16"):
      top_k(x.astype(jnp.float16), 2, implementation="cpu")
    # What no kernel takes goes to XLA unless one is named.
    values, _ = top_k(x.astype(jnp.float16), 2)
    self.assertEqual(values.dtype, jnp.float16)


if __name__ == "__main__":
  absltest.main()
