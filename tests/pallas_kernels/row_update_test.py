"""`row_update` of every implementation against NumPy in float64."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sparse_oracle import RowOracle

from pallas_kernels.row_update import arg_specs, optimizers, xla
from pallas_kernels.row_update.api import row_update

MESH = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
NAMES = ("sgd", "rowwise_adagrad", "adagrad", "lazy_adam")
ALL = ("reference", "xla", "cpu")
RATE, STEP = 0.1, 3
# Duplicates, row 0, the last row, and ids that no row has.
IDS = np.array([7, 0, 7, -1, 19, 20, 64, 7, 3, 1 << 30, -(2**31)], np.int32)
TOUCHED = [0, 3, 7, 19]
STATIC = (
  *("optimizer", "weight_decay", "clip_norm", "num_rows", "implementation"),
)
run = jax.jit(row_update, static_argnames=STATIC)


def normal(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def start(name, num_rows=20, dim=5, dtype=jnp.float32):
  """A table, and a state that is not zero so that a lost one would show."""
  table = optimizers.to_storage(normal(num_rows, dim), dtype)
  state = optimizers.make_row_optimizer(name).init(num_rows, dim)
  return table, {key: x + 0.25 for key, x in state.items()}


def float64(table):
  return np.asarray(optimizers.from_storage(table), np.float64)


def expected(table, state, ids, grads, *, optimizer, step=STEP, **options):
  """The same step by the oracle."""
  values = float64(table)
  state = {key: np.asarray(x, np.float64) for key, x in state.items()}
  oracle = RowOracle(optimizer, **options)
  oracle.step(values, state, ids, np.asarray(grads, np.float64), RATE, step)
  return values, state


def check(got, want, atol=2e-6):
  table, state = got
  values, want_state = want
  rtol = 1e-5 if table.dtype == jnp.float32 else 2**-8
  np.testing.assert_allclose(float64(table), values, rtol=rtol, atol=atol)
  assert state.keys() == want_state.keys()
  for key, x in state.items():
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, want_state[key], rtol=1e-5, atol=2e-6)


def compiled(step, *args):
  return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


class RowUpdateTest(parameterized.TestCase):
  @parameterized.product(
    optimizer=NAMES,
    implementation=ALL,
    options=({}, {"weight_decay": 0.3, "clip_norm": 1.5}),
  )
  def test_equals_the_oracle(self, optimizer, implementation, options):
    table, state = start(optimizer)
    grads = normal(len(IDS), 5)
    arguments = {"optimizer": optimizer, **options}
    got = run(
      *(table, state, IDS, grads),
      learning_rate=RATE,
      step=STEP,
      implementation=implementation,
      **arguments,
    )
    check(got, expected(table, state, IDS, grads, **arguments))
    untouched = np.delete(np.arange(20), TOUCHED)
    chex.assert_trees_all_equal(
      *(
        jax.tree.map(lambda x: x[untouched], tree)
        for tree in (got, (table, state))
      )
    )

  # Whole tiles of registers, single vectors, remainders.
  @parameterized.product(
    [
      {"implementation": name, "dim": dim}
      for name, dim in (
        *(("cpu", 1), ("cpu", 16), ("cpu", 67), ("cpu", 149), ("xla", 67)),
      )
    ],
    optimizer=NAMES,
    dtype=(jnp.float32, jnp.bfloat16, jnp.uint16),
  )
  def test_every_width_and_type(self, implementation, dim, optimizer, dtype):
    table, state = start(optimizer, dim=dim, dtype=dtype)
    ids, grads = IDS.reshape(1, -1), normal(1, len(IDS), dim)
    got = run(
      *(table, state, ids, grads),
      optimizer=optimizer,
      learning_rate=RATE,
      step=STEP,
      weight_decay=0.1,
      clip_norm=4.0,
      implementation=implementation,
    )
    self.assertEqual(got[0].dtype, dtype)
    check(
      got,
      expected(
        *(table, state, IDS, grads[0]),
        optimizer=optimizer,
        weight_decay=0.1,
        clip_norm=4.0,
      ),
    )

  @parameterized.product(
    optimizer=("rowwise_adagrad", "lazy_adam"), implementation=ALL
  )
  def test_a_bag_equals_its_reads(self, optimizer, implementation):
    table, state = start(optimizer, dim=19)
    ids = np.random.default_rng(0).integers(-2, 22, (3, 4, 6))
    weights, grads = normal(3, 4, 6), normal(3, 4, 19)
    options = {
      "optimizer": optimizer,
      "learning_rate": RATE,
      "implementation": implementation,
    }
    bags = run(table, state, ids, grads, weights=weights, **options)
    each = weights[..., None] * grads[..., None, :]
    check(bags, expected(
      *(table, state, ids.reshape(-1), each.reshape(-1, 19)),
      optimizer=optimizer, step=1,
    ))  # fmt: skip
    chex.assert_trees_all_close(
      bags, run(table, state, ids, each, **options), rtol=1e-5, atol=2e-6
    )

  @parameterized.product(implementation=ALL, dtype=(jnp.bfloat16, jnp.uint16))
  def test_stores_to_the_nearest_even(self, implementation, dtype):
    # 1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between odd and even.
    table = optimizers.to_storage(jnp.ones((4, 1)), dtype)
    grads = -jnp.array([[2.0**-8], [3 * 2.0**-8], [2.0**-8 + 2.0**-20]])
    new, _ = run(
      *(table, {}, np.arange(3), grads),
      optimizer="sgd",
      learning_rate=1.0,
      implementation=implementation,
    )
    want = [1.0, 1 + 2 * 2.0**-7, 1 + 2.0**-7, 1.0]
    np.testing.assert_array_equal(float64(new)[:, 0], want)

  @parameterized.product(implementation=ALL, num_rows=(30, 5000))
  def test_one_hot_row(self, implementation, num_rows):
    table, state = start("rowwise_adagrad", num_rows, 70)
    ids, grads = np.full(500, 11), normal(500, 70)
    got = run(
      *(table, state, ids, grads),
      learning_rate=RATE,
      implementation=implementation,
    )
    want = expected(table, state, ids, grads, optimizer="rowwise_adagrad")
    check(got, want, atol=1e-5)

  @parameterized.parameters(*ALL)
  def test_rows_of_the_padding_are_not_trained(self, implementation):
    table, state = start("adagrad")
    got = run(
      *(table, state, IDS, normal(len(IDS), 5)),
      optimizer="adagrad",
      learning_rate=RATE,
      num_rows=7,
      implementation=implementation,
    )
    changed = jnp.any(got[0] != table, axis=-1)
    np.testing.assert_array_equal(jnp.nonzero(changed)[0], [0, 3])

  @parameterized.parameters("xla", "cpu")
  def test_wide_ids_do_not_wrap_around(self, implementation):
    table, state = start("sgd")
    with jax.enable_x64(True):
      ids = jnp.array([2**32 + 3, -(2**32) + 4, 5], jnp.int64)
      got, _ = run(
        *(table, state, ids, jnp.ones((3, 5), jnp.float32)),
        optimizer="sgd",
        learning_rate=RATE,
        implementation=implementation,
      )
    changed = jnp.any(got != table, axis=-1)
    np.testing.assert_array_equal(jnp.nonzero(changed)[0], [5])

  @parameterized.product(optimizer=NAMES, implementation=ALL)
  def test_a_nan_reaches_only_its_row(self, optimizer, implementation):
    table, state = start(optimizer, dim=17)
    grads = normal(len(IDS), 17).at[8, 2].set(jnp.nan)  # Of row 3.
    grads = grads.at[1, 16].set(jnp.inf)  # Of row 0.
    new, new_state = run(
      *(table, state, IDS, grads),
      optimizer=optimizer,
      learning_rate=RATE,
      clip_norm=1.0,
      implementation=implementation,
    )
    for x in (new, *new_state.values()):
      bad = ~np.isfinite(x).reshape(20, -1).all(axis=-1)
      self.assertContainsSubset(np.flatnonzero(bad), [0, 3])
    # The norm that it is clipped by is a NaN too.
    self.assertTrue(np.isnan(new[3]).all())

  @parameterized.parameters(*ALL)
  def test_nothing_to_do(self, implementation):
    for num_rows, ids in ((20, []), (0, []), (0, [3]), (20, [-1, 20])):
      args = start("lazy_adam", num_rows)
      got = run(
        *(*args, np.array(ids, np.int32), normal(len(ids), 5)),
        optimizer="lazy_adam",
        learning_rate=RATE,
        implementation=implementation,
      )
      chex.assert_trees_all_equal(got, args)
    args = start("sgd")
    got = run(
      *(*args, np.zeros((3, 0), np.int32), normal(3, 5)),
      weights=jnp.zeros((3, 0)),
      optimizer="sgd",
      learning_rate=RATE,
      implementation=implementation,
    )
    chex.assert_trees_all_equal(got, args)

  @settings(max_examples=15, deadline=None, database=None, derandomize=True)
  @given(
    num_rows=st.sampled_from((1, 9, 5000)),
    dim=st.sampled_from((1, 40)),
    num_reads=st.sampled_from((1, 64)),
    optimizer=st.sampled_from(NAMES),
    seed=st.integers(0, 99),
  )
  def test_any_shape(self, num_rows, dim, num_reads, optimizer, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(-2, num_rows + 2, num_reads)
    table, state = start(optimizer, num_rows, dim)
    grads = normal(num_reads, dim, seed=seed)
    want = expected(table, state, ids, grads, optimizer=optimizer)
    for implementation in ("xla", "cpu"):
      got = run(
        *(table, state, ids, grads),
        optimizer=optimizer,
        learning_rate=RATE,
        step=STEP,
        implementation=implementation,
      )
      check(got, want)

  def test_ranking_by_sort_equals_by_count(self):
    ids = np.random.default_rng(0).integers(-3, 90, 50)
    grads = normal(50, 3)
    sum_fn = jax.jit(xla.sum_duplicates, static_argnames="num_rows")
    few = sum_fn(ids, grads, num_rows=80)
    many = sum_fn(ids % 80, grads, num_rows=8 * 50 + 1)
    for (unique, summed), kept, num_rows in (
      (few, np.where((ids < 0) | (ids >= 80), 80, ids), 80),
      (many, ids % 80, 401),
    ):
      want = np.zeros((num_rows + 1, 3))
      np.add.at(want, kept, grads)
      rows = np.unique(kept)
      np.testing.assert_array_equal(unique[: len(rows)], rows)
      np.testing.assert_array_equal(unique[len(rows) :], num_rows)
      np.testing.assert_allclose(
        summed[: len(rows)], want[rows], rtol=1e-5, atol=1e-6
      )

  def test_the_same_at_every_call(self):
    # Enough work for several threads; one thread gives the same bits.
    table, state = start("rowwise_adagrad", 3000, 64)
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.3, (512, 32)), 3000) - 1
    args = (table, state, ids, normal(512, 64))
    options = {"weights": normal(512, 32), "implementation": "cpu"}
    first = run(*args, learning_rate=RATE, **options)
    for _ in range(5):
      again = run(*args, learning_rate=RATE, **options)
      chex.assert_trees_all_equal(first, again)


class CompiledTest(parameterized.TestCase):
  @parameterized.product(
    optimizer=("rowwise_adagrad", "lazy_adam"),
    dtype=(jnp.float32, jnp.uint16),
    implementation=("xla", "cpu", None),
  )
  def test_a_donated_table_is_updated_where_it_lies(
    self, optimizer, dtype, implementation
  ):
    """A whole step: it reads the rows, then updates them."""

    def step(table, state, ids, weights, rate, count):
      rows = optimizers.from_storage(table.at[ids].get(mode="fill"))
      grads = 2 * jnp.einsum("nk,nkd->nd", weights, rows)
      return row_update(
        *(table, state, ids, grads),
        optimizer=optimizer,
        learning_rate=rate,
        step=count,
        weights=weights,
        implementation=implementation,
      )

    args = start(optimizer, 20_000, 16, dtype)
    size = args[0].nbytes
    rest = (jnp.arange(32).reshape(8, 4), jnp.ones((8, 4)), 0.1, 2)
    program = compiled(step, *args, *rest)
    self.assertLess(program.memory_analysis().temp_size_in_bytes, size)
    self.assertIsNone(re.search(r"\[20000,16\]\S* copy\(", program.as_text()))
    wanted = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(args)]
    new = program(*args, *rest)
    self.assertEqual(
      [x.unsafe_buffer_pointer() for x in jax.tree.leaves(new)], wanted
    )

  def test_a_table_that_is_not_donated_stays(self):
    table, state = start("adagrad")
    before = np.array(table)
    run(
      *(table, state, IDS, normal(len(IDS), 5)),
      optimizer="adagrad",
      learning_rate=RATE,
      implementation="cpu",
    )
    np.testing.assert_array_equal(table, before)

  @parameterized.parameters("xla", "cpu", None)
  def test_rate_and_step_are_traced(self, implementation):
    table, state = start("lazy_adam")
    grads = normal(len(IDS), 5)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(table, state, rate, step):
      return row_update(
        *(table, state, IDS, grads),
        optimizer="lazy_adam",
        learning_rate=rate,
        step=step,
        implementation=implementation,
      )

    want = float64(table), jax.tree.map(np.float64, state)
    for step in (1, 2, 3):
      table, state = update(table, state, jnp.float32(RATE), jnp.int32(step))
      want = expected(
        want[0], want[1], IDS, grads, optimizer="lazy_adam", step=step
      )
      check((table, state), want, atol=1e-5)

  @parameterized.product(implementation=(None, *ALL), check_vma=(True, False))
  def test_runs_where_the_rows_live(self, implementation, check_vma):
    table, state = start("rowwise_adagrad")
    grads = normal(len(IDS), 5)

    @jax.jit
    @functools.partial(
      jax.shard_map,
      mesh=MESH,
      in_specs=(P("model"), P("model"), P(), P()),
      out_specs=P("model"),
      check_vma=check_vma,
    )
    def update(table, state, ids, grads):
      first = jax.lax.axis_index("model") * table.shape[0]
      mine = (ids >= first) & (ids < first + table.shape[0])
      return row_update(
        *(table, state, jnp.where(mine, ids - first, -1), grads),
        learning_rate=RATE,
        implementation=implementation,
      )

    want = expected(table, state, IDS, grads, optimizer="rowwise_adagrad")
    check(update(table, state, IDS, grads), want)

  @parameterized.parameters(None, *ALL)
  def test_vmap(self, implementation):
    table, state = start("lazy_adam")
    ids, grads = np.stack([IDS, IDS[::-1]]), normal(2, len(IDS), 5)
    update = functools.partial(
      row_update, optimizer="lazy_adam", implementation=implementation
    )

    def one(table, state, ids, grads, rate):
      return update(table, state, ids, grads, learning_rate=rate)

    def pick(tree, i):
      return jax.tree.map(lambda x: x[i], tree)

    rates = jnp.array([0.1, 0.2])
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (table, state))
    for in_axes, args in ((0, two), ((None, None, 0, 0, 0), (table, state))):
      got = jax.jit(jax.vmap(one, in_axes))(*args, ids, grads, rates)
      for i in range(2):
        chex.assert_trees_all_close(
          pick(got, i),
          jax.jit(one)(
            *(pick(two, i) if in_axes == 0 else args),
            *(ids[i], grads[i], rates[i]),
          ),
          rtol=1e-5,
          atol=1e-6,
        )

  def test_has_no_gradient(self):
    def loss(table):
      new, _ = row_update(
        *(table, {}, IDS, normal(len(IDS), 5)),
        optimizer="sgd",
        learning_rate=RATE,
      )
      return new.sum()

    with self.assertRaisesRegex(TypeError, "not differentiable"):
      jax.grad(loss)(start("sgd")[0])

  def test_shapes_in_use(self):
    for table, ids in arg_specs.ARG_SPECS.values():
      new, _ = jax.eval_shape(
        functools.partial(row_update, learning_rate=RATE),
        jax.ShapeDtypeStruct(table, jnp.float32),
        {"sum": jax.ShapeDtypeStruct(table[:1], jnp.float32)},
        jax.ShapeDtypeStruct(ids, jnp.int32),
        jax.ShapeDtypeStruct((*ids, table[1]), jnp.float32),
      )
      self.assertEqual(new.shape, table)


class MistakesTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"optimizer": "adagrid"}, ValueError, "did you mean 'adagrad'"),
    ({"optimizer": "x"}, ValueError, "there are sgd, rowwise_adagrad"),
    ({"optimizer": "sgd"}, ValueError, "the state of sgd"),
    ({"state": {"sum": jnp.zeros((20, 5))}}, ValueError, "is {'sum': 'float"),
    ({"table": jnp.zeros((20, 5), jnp.int32)}, TypeError, "int32"),
    ({"table": jnp.zeros((20,))}, ValueError, r"\(20,\)"),
    ({"ids": jnp.zeros((4,))}, TypeError, "ids must be integers"),
    ({"grads": jnp.zeros((4, 5), int)}, TypeError, "grads must hold floats"),
    ({"grads": jnp.zeros((4, 6))}, ValueError, "without weights"),
    ({"weights": jnp.ones((4,))}, ValueError, r"shape \(5,\)"),
    ({"weights": jnp.ones((4, 1))}, ValueError, "the shape of ids"),
    ({"num_rows": 21}, ValueError, "the 20 rows of the table"),
    ({"clip_norm": 0.0}, ValueError, "clip_norm must be above 0"),
    ({"b2": 1.0}, ValueError, r"b2 in \[0, 1\)"),
    ({"implementation": "gpu"}, ValueError, "unknown implementation 'gpu'"),
  )
  def test_is_told(self, change, error, message):
    table, state = start("rowwise_adagrad")
    args = {
      "table": table,
      "state": state,
      "ids": jnp.arange(4),
      "grads": jnp.ones((4, 5)),
      "learning_rate": RATE,
    }
    with self.assertRaisesRegex(error, message):
      row_update(**(args | change))


if __name__ == "__main__":
  absltest.main()
