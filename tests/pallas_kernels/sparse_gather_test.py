"""`sparse_gather` of every implementation against float64 NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.sparse_gather import arg_specs
from pallas_kernels.sparse_gather.api import (
  sparse_gather,
  sparse_gather_row_grads,
)

MESH = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
ALL = ("reference", "xla", "cpu")
MAX_INT32 = 2**31 - 1


def normal(shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def ids(shape, low=-2, high=25, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(low, high, shape), jnp.int32)


def stored(table, dtype):
  """The table as it is stored."""
  if dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(table.astype(jnp.bfloat16), jnp.uint16)
  return table.astype(dtype)


def float64(table):
  if table.dtype == jnp.uint16:
    table = jax.lax.bitcast_convert_type(table, jnp.bfloat16)
  return np.asarray(table.astype(jnp.float32), np.float64)


def expected(table, indices, weights, gate, output_grad):
  """Output and gradients of table, weights and gate, one read at a time."""
  table, weights = float64(table), np.float64(weights)
  indices, grads = np.asarray(indices), np.float64(output_grad)
  sums = np.zeros(grads.shape)
  rows = np.zeros((*indices.shape, table.shape[1]))
  for at in np.ndindex(indices.shape):
    if 0 <= indices[at] < len(table):
      rows[at] = table[indices[at]]
    sums[at[:-1]] += weights[at] * rows[at]
  output, gate_grad = sums, None
  if gate is not None:
    gate, tanh = np.float64(gate), np.tanh(sums)
    output, gate_grad = gate * tanh, grads * tanh
    grads = grads * gate * (1 - tanh**2)
  table_grad, weights_grad = np.zeros(table.shape), np.zeros(weights.shape)
  for at in np.ndindex(indices.shape):
    weights_grad[at] = grads[at[:-1]] @ rows[at]
    if 0 <= indices[at] < len(table):
      table_grad[indices[at]] += weights[at] * grads[at[:-1]]
  return output, (table_grad, weights_grad, gate_grad)


def close(got, want, tolerance=1e-5):
  want = np.asarray(want)
  scale = max(1.0, np.max(np.abs(want), initial=0.0))
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


@functools.partial(jax.jit, static_argnames="name")
def pull(table, indices, weights, gate, output_grad, name):
  """Output and gradients, of the table too where it has one."""

  def read(arrays):
    arrays = {"table": table, "gate": gate} | arrays
    return sparse_gather(indices=indices, implementation=name, **arrays)

  arrays = {"table": table, "weights": weights, "gate": gate}
  if table.dtype == jnp.uint16:
    del arrays["table"]
  output, backward = jax.vjp(read, arrays)
  return output, *backward(output_grad)


def check(table, indices, weights, gate=None, *, name):
  shape = (*indices.shape[:-1], table.shape[1])
  output_grad = normal(shape, seed=9)
  output, grads = pull(table, indices, weights, gate, output_grad, name)
  want, (table_grad, weights_grad, gate_grad) = expected(
    table, indices, weights, gate, output_grad
  )
  assert output.dtype == jnp.float32 and output.shape == shape
  close(output, want)
  close(grads["weights"], weights_grad)
  if gate is not None:
    close(grads["gate"], gate_grad)
  if "table" in grads:
    assert grads["table"].dtype == table.dtype
    tolerance = 1e-5 if table.dtype == jnp.float32 else 1e-2
    close(grads["table"].astype(jnp.float32), table_grad, tolerance)


class SparseGatherTest(parameterized.TestCase):
  @parameterized.parameters(
    *itertools.product(ALL, (1, 7, 64, 130)),
    # Each width of vectors, whole and shared, one block and several.
    *itertools.product(("cpu",), (2, 8, 13, 272)),
  )
  def test_values_and_gradients(self, name, dim):
    indices, weights = ids((3, 2, 5)), normal((3, 2, 5), 1)
    gate = normal((3, 2, dim), 2)
    check(normal((23, dim)), indices, weights, name=name)
    check(normal((23, dim)), indices, weights, gate, name=name)

  @parameterized.product(
    name=ALL, dim=(7, 130), dtype=(jnp.bfloat16, jnp.uint16)
  )
  def test_tables_of_16_bits(self, name, dim, dtype):
    table, gate = stored(normal((23, dim)), dtype), normal((6, dim), 2)
    check(table, ids((6, 5)), normal((6, 5), 1), gate, name=name)

  @parameterized.product(name=ALL, batch=((), (0,)), k=(0, 1, 40))
  def test_any_number_of_reads(self, name, batch, k):
    indices, weights = ids((*batch, k)), normal((*batch, k), 1)
    check(normal((23, 20)), indices, weights, normal((*batch, 20)), name=name)

  @parameterized.parameters(*ALL)
  def test_a_table_without_rows_or_columns(self, name):
    indices, weights = ids((6, 5)), normal((6, 5), 1)
    check(jnp.zeros((0, 4)), indices, weights, name=name)
    check(jnp.zeros((23, 0)), indices, weights, name=name)

  @parameterized.parameters(*ALL)
  def test_one_row_may_take_all_reads(self, name):
    # More than one thread sums at a time.
    indices = jnp.full((2500, 8), 3).at[::2, 0].set(5)
    table, weights = normal((9, 5)), normal((2500, 8), 1)
    output_grad = normal((2500, 5), 9)
    _, grads = pull(table, indices, weights, None, output_grad, name)
    want = np.zeros((9, 5))
    parts = np.float64(weights)[..., None] * np.float64(output_grad)[:, None]
    np.add.at(want, np.asarray(indices), parts)
    close(grads["table"], want)

  @settings(max_examples=10, deadline=None)
  @given(
    num_rows=st.integers(1, 40),
    dim=st.integers(1, 300),
    k=st.integers(1, 40),
    batch=st.integers(1, 4),
    seed=st.integers(0, 99),
  )
  def test_any_shape(self, num_rows, dim, k, batch, seed):
    table = normal((num_rows, dim), seed)
    indices = ids((batch, k), -1, num_rows + 1, seed)
    weights, grads = normal((batch, k), seed), normal((batch, dim), seed)
    want, (table_grad, weights_grad, _) = expected(
      table, indices, weights, None, grads
    )
    output, backward = jax.vjp(
      lambda t, w: sparse_gather(t, indices, w, implementation="cpu"),
      table,
      weights,
    )
    for got, right in zip(
      (output, *backward(grads)),
      (want, table_grad, weights_grad),
      strict=True,
    ):
      close(got, right)

  @parameterized.parameters(
    *itertools.product(ALL, (7,)), *itertools.product(("cpu",), (3, 20, 130))
  )
  def test_nan_and_infinities_reach_who_reads_them(self, name, dim):
    table = normal((4, dim)).at[0, dim - 1].set(np.inf).at[1, 0].set(np.nan)
    indices = jnp.array([[0, 2], [0, 3], [1, 2], [2, 3], [9, 2]])
    weights = jnp.array([[2.0, 1], [0, 1], [1, 1], [1, 1], [np.inf, 1]])
    output = np.asarray(
      sparse_gather(table, indices, weights, implementation=name)
    )
    rows = np.float64(table)
    with np.errstate(invalid="ignore"):
      parts = np.float64(weights)[:4, :, None] * rows[np.asarray(indices)[:4]]
    np.testing.assert_allclose(output[:4], parts.sum(axis=1), rtol=1e-5)
    # Beyond the table lie zeros, and infinity times zero is not a number.
    self.assertTrue(np.isnan(output[4]).all())
    # An infinite number counts once, where vectors share columns too.
    grad = jax.grad(
      lambda w: jnp.sum(sparse_gather(table, indices, w, implementation=name))
    )(weights)
    finite = rows.sum(axis=1)[np.asarray(indices)[:4]]
    np.testing.assert_allclose(grad[:4], finite, rtol=1e-4, atol=1e-5)
    gated = sparse_gather(
      table,
      indices,
      weights,
      gate=jnp.full((5, dim), 3.0),
      implementation=name,
    )
    np.testing.assert_allclose(gated, 3 * np.tanh(output), rtol=1e-5)

  def test_tanh_of_the_kernel(self):
    x = np.concatenate(
      [
        np.geomspace(1e-30, 30, 30_000),
        np.linspace(0, 12, 30_000),
        [0.0, 1e30, np.inf],
      ]
    ).astype(np.float32)
    x = np.concatenate([x, -x])
    got = sparse_gather(
      jnp.asarray(x)[None],
      jnp.zeros(1, int),
      jnp.ones(1),
      gate=jnp.ones(x.size),
      implementation="cpu",
    )
    np.testing.assert_allclose(got, np.tanh(np.float64(x)), rtol=2e-7)
    got = np.asarray(got)
    np.testing.assert_array_equal(np.signbit(got)[x != 0], (x < 0)[x != 0])

  def test_indices_of_64_bits_do_not_wrap_into_the_table(self):
    with jax.enable_x64(True):
      far = jnp.asarray([[2**32, 1, -(2**32)]], jnp.int64)
      output = sparse_gather(
        jnp.ones((4, 2), jnp.float32), far, jnp.ones((1, 3), jnp.float32)
      )
    np.testing.assert_array_equal(output, [[1.0, 1.0]])

  @parameterized.parameters(*ALL)
  def test_one_result_whatever_compiles_and_maps_it(self, name):
    table, indices = normal((23, 20)), ids((4, 6, 5))
    weights, gate = normal((4, 6, 5), 1), normal((4, 6, 20), 2)

    def fn(indices, weights, gate):
      return sparse_gather(
        table, indices, weights, gate=gate, implementation=name
      )

    want = fn(indices, weights, gate)
    tolerance = 0 if name == "cpu" else 1e-6
    for mapped in (
      jax.jit(fn),
      jax.vmap(fn),
      jax.vmap(jax.vmap(fn)),
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
      close(mapped(indices, weights, gate), want, tolerance)
    # Some arrays have no such axis.
    close(
      jax.vmap(fn, in_axes=(None, 0, None))(indices[0], weights, gate[0])[2],
      fn(indices[0], weights[2], gate[0]),
      tolerance,
    )

  @parameterized.parameters(*ALL)
  def test_mapped_tables(self, name):
    tables, indices = normal((3, 23, 4)), ids((6, 5))
    weights = normal((3, 6, 5), 1)
    fn = functools.partial(sparse_gather, implementation=name)
    got = jax.vmap(fn, in_axes=(0, None, 0))(tables, indices, weights)
    for i in range(3):
      close(got[i], fn(tables[i], indices, weights[i]), 1e-6)

  @parameterized.product(name=ALL, is_gated=(False, True))
  def test_gradients_under_vmap_and_checkpoint(self, name, is_gated):
    table, indices = normal((23, 4)), ids((3, 6, 5))
    weights = normal((3, 6, 5), 1)
    gate = normal((3, 6, 4), 2) if is_gated else None

    def loss(table, weights, indices, gate):
      output = sparse_gather(
        table, indices, weights, gate=gate, implementation=name
      )
      return jnp.sum(jnp.sin(output))

    gradient = jax.grad(loss, argnums=(0, 1))
    want_table, want_weights = gradient(table, weights, indices, gate)
    axes = (None, 0, 0, 0)
    by_member = jax.jit(jax.vmap(gradient, in_axes=axes))
    members = by_member(table, weights, indices, gate)
    close(members[0].sum(axis=0), want_table)
    close(members[1], want_weights)
    mapped = jax.vmap(jax.checkpoint(loss), in_axes=axes)
    whole = jax.grad(lambda *args: jnp.sum(mapped(*args)), argnums=(0, 1))
    got = jax.jit(whole)(table, weights, indices, gate)
    close(got[0], want_table)
    close(got[1], want_weights)

  def test_the_kernel_does_not_depend_on_the_parts(self):
    # The same rows alone and among many others.
    table, indices = normal((500, 64)), ids((4000, 9), high=500)
    weights = normal((4000, 9), 1)
    fn = functools.partial(sparse_gather, implementation="cpu")
    np.testing.assert_array_equal(
      fn(table, indices, weights)[1234:1240],
      fn(table, indices[1234:1240], weights[1234:1240]),
    )

  @parameterized.named_parameters(
    *((name, *shapes) for name, shapes in arg_specs.ARG_SPECS.items())
  )
  def test_the_kernel_equals_xla_at_the_shapes_in_use(self, table, indices):
    shape = (2, *indices[1:-1], indices[-1])[-2:]
    table = normal((min(table[0], 500), table[1]))
    indices, weights = ids(shape, high=500), normal(shape, 1)
    output_grad = normal((shape[0], table.shape[1]), 9)
    results = [
      pull(table, indices, weights, None, output_grad, name)
      for name in ("cpu", "xla")
    ]
    jax.tree.map(close, *results)


class RowGradsTest(parameterized.TestCase):
  def check(self, indices, weights, output_grad, num_rows, name):
    got_ids, got = jax.jit(
      functools.partial(
        sparse_gather_row_grads, num_rows=num_rows, implementation=name
      )
    )(indices, weights, output_grad)
    limit = MAX_INT32 if num_rows is None else num_rows
    want = {}
    for at in np.ndindex(indices.shape):
      row = int(indices[at])
      if 0 <= row < limit:
        part = np.float64(weights[at]) * np.float64(output_grad[at[:-1]])
        want[row] = want.get(row, 0.0) + part
    size = min(indices.size, limit)
    self.assertEqual(got.shape, (size, output_grad.shape[-1]))
    self.assertEqual((got_ids.dtype, got.dtype), (jnp.int32, jnp.float32))
    rows = sorted(want)
    num_left = size - len(rows)
    np.testing.assert_array_equal(got_ids, rows + [limit] * num_left)
    zeros = np.zeros(output_grad.shape[-1])
    close(
      got,
      np.reshape([want[r] for r in rows] + [zeros] * num_left, got.shape),
    )

  @parameterized.product(
    # Fewer rows than reads, as many, more, far more, and without an end.
    name=ALL,
    num_rows=(1, 22, 48, 1000, 10**9, None),
  )
  def test_equals_a_sum_by_row(self, name, num_rows):
    indices, weights = ids((4, 2, 6)), normal((4, 2, 6), 1)
    self.check(indices, weights, normal((4, 2, 20), 9), num_rows, name)

  @parameterized.product(name=ALL, shape=((0, 3), (3, 0), (5,)))
  def test_any_number_of_reads(self, name, shape):
    for num_rows in (0, 4, None):
      self.check(
        ids(shape),
        normal(shape, 1),
        normal((*shape[:-1], 7), 9),
        num_rows,
        name,
      )

  @parameterized.parameters(*ALL)
  def test_what_is_dropped_leaves_no_trace(self, name):
    # Nor does a gradient that is not finite.
    indices, weights = jnp.array([[-1, 7], [2, 3]]), jnp.ones((2, 2))
    output_grad = jnp.array([[np.nan, np.inf], [1.0, 2.0]])
    got_ids, grads = sparse_gather_row_grads(
      indices, weights, output_grad, num_rows=7, implementation=name
    )
    np.testing.assert_array_equal(got_ids, [2, 3, 7, 7])
    np.testing.assert_array_equal(grads, [[1, 2], [1, 2], [0, 0], [0, 0]])

  @parameterized.parameters(*ALL)
  def test_under_vmap(self, name):
    indices, weights = ids((3, 4, 6)), normal((4, 6), 1)
    output_grad = normal((3, 4, 5), 9)
    fn = functools.partial(
      sparse_gather_row_grads, num_rows=22, implementation=name
    )
    mapped = jax.vmap(fn, in_axes=(0, None, 0))(indices, weights, output_grad)
    for i in range(3):
      one = fn(indices[i], weights, output_grad[i])
      np.testing.assert_array_equal(mapped[0][i], one[0])
      close(mapped[1][i], one[1])


class CompiledTest(parameterized.TestCase):
  @parameterized.product(name=("xla", "cpu"), is_gated=(False, True))
  def test_a_donated_table_is_read_and_updated_in_place(self, name, is_gated):
    num_rows, dim, batch, k = 50_000, 16, 8, 4
    gate = jnp.ones((batch, dim)) if is_gated else None

    def step(table, indices, weights):
      def loss(weights, tap):
        output = sparse_gather(
          table, indices, weights, gate=gate, tap=tap, implementation=name
        )
        return jnp.sum(output**2)

      # The gradient of the weights is no part of the table's update.
      gradient, tapped = jax.grad(loss, argnums=(0, 1))(
        weights, jnp.zeros((batch, dim))
      )
      ids, grads = sparse_gather_row_grads(
        indices, weights, tapped, num_rows=num_rows, implementation=name
      )
      return table.at[ids].add(-grads, mode="drop"), gradient

    shapes = (
      jax.ShapeDtypeStruct((num_rows, dim), jnp.float32),
      jax.ShapeDtypeStruct((batch, k), jnp.int32),
      jax.ShapeDtypeStruct((batch, k), jnp.float32),
    )
    compiled = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    self.assertLess(memory.temp_size_in_bytes, num_rows * dim)
    self.assertGreaterEqual(memory.alias_size_in_bytes, num_rows * dim * 4)
    self.assertNotRegex(compiled.as_text(), rf"f32\[{num_rows},{dim}\].* copy")

  @parameterized.product(name=("xla", "cpu"), dtype=("float32", "bfloat16"))
  def test_no_table_of_gradients_where_none_is_asked_for(self, name, dtype):
    table = jnp.zeros((50_000, 16), dtype)

    def loss(table, weights, indices):
      table = jax.lax.stop_gradient(table)
      return jnp.sum(
        sparse_gather(table, indices, weights, implementation=name)
      )

    reads = (jnp.ones((8, 4)), ids((8, 4)))
    lowered = jax.jit(jax.grad(loss, argnums=1)).lower(table, *reads)
    self.assertNotIn("scatter", lowered.as_text())
    memory = lowered.compile().memory_analysis()
    self.assertLess(memory.temp_size_in_bytes, table.size)
    # Not even one operation at a time.
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=1))(table, *reads)
    self.assertNotIn("row_grads", str(jaxpr))

  def test_the_kernel_holds_no_row_per_read(self):
    batch, k, dim = 64, 32, 128

    def loss(weights, indices, table, gate):
      return jnp.sum(
        sparse_gather(table, indices, weights, gate=gate, implementation="cpu")
      )

    # A mapped axis neither brings them back nor repeats the table.
    for fn in (loss, jax.vmap(loss, in_axes=(0, 0, None, 0))):
      gradient = jax.jit(jax.grad(lambda *args, fn=fn: jnp.sum(fn(*args))))
      compiled = gradient.lower(
        jax.ShapeDtypeStruct((batch, k), jnp.float32),
        jax.ShapeDtypeStruct((batch, k), jnp.int32),
        jax.ShapeDtypeStruct((1000, dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, dim), jnp.float32),
      ).compile()
      self.assertLess(
        compiled.memory_analysis().temp_size_in_bytes, batch * k * dim
      )

  def test_mistakes(self):
    table, indices, weights = normal((9, 4)), ids((3, 2)), normal((3, 2))
    with self.assertRaisesRegex(TypeError, "float32, bfloat16 or uint16.*int8"):
      sparse_gather(table.astype(jnp.int8), indices, weights)
    with self.assertRaisesRegex(ValueError, r"\[rows, dim\], got shape \(4,\)"):
      sparse_gather(table[0], indices, weights)
    with self.assertRaisesRegex(TypeError, "integers, got float32"):
      sparse_gather(table, weights, weights)
    with self.assertRaisesRegex(ValueError, r"one shape.*\(3, 2\) and \(3,\)"):
      sparse_gather(table, indices, weights[:, 0])
    with self.assertRaisesRegex(ValueError, r"gate.*here \(3, 4\), got \(4,\)"):
      sparse_gather(table, indices, weights, gate=table[0])
    with self.assertRaisesRegex(ValueError, "'gpu'; there are reference, xla"):
      sparse_gather(table, indices, weights, implementation="gpu")
    with self.assertRaisesRegex(ValueError, r"output_grad.*here \(3, 4\)"):
      sparse_gather_row_grads(indices, weights, table)
    with self.assertRaisesRegex(ValueError, "output_grad.*got a number"):
      sparse_gather_row_grads(indices, weights, 1.0)
    with self.assertRaisesRegex(ValueError, "int32, got -1"):
      sparse_gather_row_grads(indices, weights, normal((3, 4)), num_rows=-1)


if __name__ == "__main__":
  absltest.main()
