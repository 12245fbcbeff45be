import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import toy
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax.sparse import in_model
from recjax.sparse import table as table_lib
from recjax.sparse.table import Table
from recjax.sparse.update import RowGradients
from tests import sparse_oracle

NUM_ROWS, DIM = 30, 3
# Duplicates inside one sum, across sums, and ids that no row has.
IDS = np.array([[[4, 4], [0, 29]], [[4, 7], [64, -1]]], np.int32)
WEIGHTS = np.array([[[0.2, 0.5], [1.0, -2.0]], [[0.3, 0.0], [1.5, 2.5]]])
TABLE = Table(NUM_ROWS, DIM, in_model=True, init_scale=1.0)


class Reader(nn.Module):
  """Reads `values` once for each entry of `scales`."""

  scales: tuple[float, ...] = (1.0,)

  @nn.compact
  def __call__(self, weights):
    return sum(
      in_model.read(self, "values", jnp.asarray(IDS), scale * weights)
      for scale in self.scales
    )


class TwoReaders(nn.Module):
  @nn.compact
  def __call__(self, weights):
    first = Reader(name="first")(weights)
    return first + Reader((2.0,), name="second")(weights)


def _values(seed=0, table=TABLE):
  return table_lib.init_table(jax.random.key(seed), table)


def _dense_read(values, ids, weights):
  """The reference: indexing that autodiff sees through."""
  valid = (ids >= 0) & (ids < values.shape[0])
  rows = values[jnp.where(valid, ids, 0)] * valid[..., None]
  return (weights[..., None] * rows).sum(axis=-2)


def _loss(output):
  """Something whose gradient differs from entry to entry."""
  grid = jnp.arange(output.size, dtype=jnp.float32).reshape(output.shape)
  return jnp.sum(jnp.sin(output) * (1.0 + grid))


class WeightedGatherTest(parameterized.TestCase):
  @parameterized.parameters("float32", "bfloat16")
  def test_equals_brute_force(self, dtype):
    table = dataclasses.replace(TABLE, dtype=dtype)
    values = _values(table=table)
    plain = np.asarray(table_lib.from_storage(values, table), np.float64)
    expected = np.zeros((2, 2, DIM))
    for place in np.ndindex(IDS.shape):
      if 0 <= IDS[place] < table.shape[0]:
        expected[place[:2]] += WEIGHTS[place] * plain[IDS[place]]
    output = in_model.weighted_gather(
      values, jnp.asarray(IDS), jnp.asarray(WEIGHTS, jnp.float32)
    )
    self.assertEqual(output.dtype, jnp.float32)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(output[1, 1], np.zeros(DIM))


class GradientTest(absltest.TestCase):
  def test_taps_give_the_dense_gradients(self):
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    values = {"first/values": _values(1), "second/values": _values(2)}

    def dense_loss(values, weights):
      first = _dense_read(values["first/values"], IDS, weights)
      return _loss(
        first + _dense_read(values["second/values"], IDS, 2 * weights)
      )

    def tapped_loss(taps, weights):
      output, mutated = TwoReaders().apply(
        {
          in_model.TABLES: in_model.collection(values),
          in_model.TAPS: in_model.collection(taps),
        },
        weights,
        mutable=[in_model.READS],
      )
      return _loss(output), in_model.flatten_reads(mutated[in_model.READS])

    shape = jnp.zeros((2, 2, DIM))
    taps = {name: shape for name in values}
    (value, reads), (tap_grads, weight_grads) = jax.value_and_grad(
      tapped_loss, argnums=(0, 1), has_aux=True
    )(taps, weights)
    expected = jax.value_and_grad(dense_loss, argnums=(0, 1))(values, weights)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(
      weight_grads, expected[1][1], rtol=1e-4, atol=1e-5
    )
    self.assertEqual(set(reads), set(values))
    for name, read in reads.items():
      dense = sparse_oracle.dense_gradient(
        RowGradients(read["ids"], tap_grads[name], read["weights"]),
        TABLE.shape,
      )
      np.testing.assert_allclose(
        dense, expected[1][0][name], rtol=1e-4, atol=1e-5
      )
      self.assertTrue(dense[4].any())

  def test_the_table_is_a_constant(self):
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    grads = jax.grad(
      lambda v: in_model.weighted_gather(v, jnp.asarray(IDS), weights).sum()
    )(_values())
    np.testing.assert_array_equal(grads, np.zeros(TABLE.shape))


class ContractTest(absltest.TestCase):
  def _apply(self, module, tables, taps=None):
    variables = {in_model.TABLES: tables}
    if taps is not None:
      variables[in_model.TAPS] = taps
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    return module.apply(variables, weights, mutable=[in_model.READS])

  def test_undeclared_read_raises(self):
    with self.assertRaisesRegex(ValueError, "'second/values'.*not declare"):
      self._apply(TwoReaders(), {"first": {"values": _values()}})

  def test_double_read_raises(self):
    with self.assertRaisesRegex(ValueError, "'values' is read twice"):
      self._apply(Reader((1.0, 2.0)), {"values": _values()})

  def test_tap_of_a_wrong_shape_raises(self):
    for shape in ((1, 2, DIM), (2, 2, 1), (DIM,)):
      with self.assertRaisesRegex(ValueError, "tap of 'values' has shape"):
        self._apply(
          Reader(), {"values": _values()}, {"values": jnp.zeros(shape)}
        )

  def test_missing_read_raises(self):
    read = {"ids": jnp.asarray(IDS), "weights": jnp.asarray(WEIGHTS)}
    tables = {"a/values": TABLE, "b/values": TABLE}
    in_model.check_reads({"a/values": read, "b/values": read}, tables)
    with self.assertRaisesRegex(ValueError, r"\['b/values'\] were not read"):
      in_model.check_reads({"a/values": read}, tables)
    plain = Table(8, 2, first_row={"item_id": 0})
    in_model.check_reads({}, {"embedding": plain})

  def test_taps_have_the_shape_of_the_output(self):
    read = {"ids": jnp.asarray(IDS), "weights": jnp.asarray(WEIGHTS)}
    taps = in_model.zero_taps({"a/values": read}, {"a/values": TABLE})
    self.assertEqual(taps["a/values"].shape, (2, 2, DIM))
    self.assertFalse(taps["a/values"].any())

  def test_a_method_must_read_what_it_declares(self):
    @dataclasses.dataclass(frozen=True)
    class Config:
      tasks: tuple[str, ...] = ("click",)
      reads: tuple[str, ...] = ("values",)

    class Model(nn.Module):
      config: Config
      schema: object

      @nn.compact
      def __call__(self, batch, rows, *, train):
        ids = jnp.zeros((batch.size, 1), jnp.int32)
        weights = jnp.ones((batch.size, 1))
        outputs = [
          in_model.read(self, name, ids, weights) for name in self.config.reads
        ]
        logits = nn.Dense(1)(batch.dense)[..., 0]
        return {"click": sum((o.sum(axis=-1) for o in outputs), logits)}, {}

    module = types.SimpleNamespace(
      Model=Model, tables=lambda config, schema: {"values": TABLE}
    )
    init = lambda config: jax.eval_shape(  # noqa: E731
      method_lib.Method("m", module, config, toy.SCHEMA).init, jax.random.key(0)
    )
    init(Config())
    with self.assertRaisesRegex(ValueError, r"\['values'\] were not read"):
      init(Config(reads=()))
    with self.assertRaisesRegex(ValueError, "'other'.*not declare"):
      init(Config(reads=("values", "other")))
    with self.assertRaisesRegex(ValueError, "read twice"):
      init(Config(reads=("values", "values")))


if __name__ == "__main__":
  absltest.main()
