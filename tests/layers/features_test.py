"""Inputs of a network against NumPy, example by example."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax.layers import features
from recjax.sparse import table as table_lib
from tests import oracles, toy

TABLE = table_lib.embedding_table(toy.SCHEMA, 4)


def make(num_padding=0):
  """A batch, the rows that it reads, and the same rows for the oracle."""
  batch = toy.make_batch(size=6, num_padding=num_padding)
  rng = np.random.default_rng(0)
  values = rng.normal(size=TABLE.shape).astype(np.float32)
  flat = table_lib.gather(
    jnp.asarray(values), table_lib.feature_ids(TABLE, batch), TABLE
  )
  rows = table_lib.split_rows(flat, TABLE, batch)
  return batch, rows, oracles.feature_rows(TABLE, values, batch)


def random_params(layer, batch, rows):
  shapes = jax.eval_shape(layer.init, jax.random.key(0), batch, rows)
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes
  )


class FeaturesTest(parameterized.TestCase):
  @parameterized.parameters(0, 3)
  def test_concatenation_equals_numpy(self, numeric_dim):
    batch, rows, oracle_rows = make()
    layer = features.ConcatFeatures(toy.SCHEMA, numeric_dim)
    variables = random_params(layer, batch, rows)
    params = variables.get("params")
    expected = oracles.concat_features(
      toy.SCHEMA, batch, oracle_rows, oracles.to_float64(params)
    )
    self.assertEqual(expected.shape[-1], 5 * 4 + 3 + 2 + 2 * numeric_dim)
    actual = layer.apply(variables, batch, rows)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

  @parameterized.parameters(1, 2, 4, 5)
  def test_tokens_are_padded_slices(self, num_tokens):
    batch, rows, oracle_rows = make()
    layer = features.FeatureTokens(toy.SCHEMA, num_tokens, 6)
    variables = random_params(layer, batch, rows)
    inputs = oracles.concat_features(toy.SCHEMA, batch, oracle_rows)
    params = oracles.to_float64(variables["params"])
    width = params["project"]["kernel"].shape[1]
    self.assertBetween(width * num_tokens - inputs.shape[-1], 0, num_tokens - 1)
    expected = oracles.feature_tokens(params, inputs, num_tokens)
    actual = layer.apply(variables, batch, rows)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

  def test_mean_ignores_masked_positions_and_is_zero_where_none_is_valid(self):
    values = jnp.asarray([[[1.0], [3.0], [100.0]], [[7.0], [8.0], [9.0]]])
    mask = jnp.asarray([[True, True, False], [False, False, False]])
    mean = features.masked_mean(values, mask)
    np.testing.assert_array_equal(mean, [[2.0], [0.0]])

  def test_features_without_numbers_have_no_parameters(self):
    batch, rows, _ = make()
    batch = batch.replace(dense=jnp.zeros((6, 0)))
    layer = features.ConcatFeatures(toy.SCHEMA, 3)
    variables = layer.init(jax.random.key(0), batch, rows)
    self.assertEmpty(jax.tree.leaves(variables))
    self.assertEqual(layer.apply(variables, batch, rows).shape, (6, 23))


if __name__ == "__main__":
  absltest.main()
