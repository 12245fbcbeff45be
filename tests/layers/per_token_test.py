"""Per-token networks and token mixing against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax.layers import per_token
from tests import oracles


def random_like(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes
  )


class TokenMixingTest(parameterized.TestCase):
  @parameterized.parameters((1, 3), (2, 8), (4, 12), (8, 8))
  def test_equals_the_definition_and_is_its_own_inverse(self, tokens, dim):
    x = jax.random.normal(jax.random.key(0), (tokens, 3, dim))
    mixed = per_token.token_mixing(x)
    np.testing.assert_array_equal(mixed, oracles.token_mixing(np.asarray(x)))
    np.testing.assert_array_equal(per_token.token_mixing(mixed), x)
    if tokens > 1:
      self.assertTrue(bool(jnp.any(mixed != x)))


class PerTokenTest(parameterized.TestCase):
  def test_dense_equals_loops(self):
    x = jax.random.normal(jax.random.key(0), (3, 5, 4))
    layer = per_token.PerTokenDense(6)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    params = random_like(shapes)["params"]
    self.assertEqual(params["kernel"].shape, (3, 4, 6))
    expected = oracles.per_token_dense(*oracles.to_float64((params, x)))
    actual = layer.apply({"params": params}, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

  @parameterized.parameters(1.0, 2.5)
  def test_ffn_equals_loops(self, ratio):
    x = jax.random.normal(jax.random.key(0), (3, 5, 4))
    layer = per_token.PerTokenFFN(ratio)
    shapes = jax.eval_shape(
      lambda x: layer.init(jax.random.key(0), x, train=False), x
    )
    params = random_like(shapes)["params"]
    self.assertEqual(params["up"]["kernel"].shape, (3, 4, int(4 * ratio)))
    expected = oracles.per_token_ffn(*oracles.to_float64((params, x)))
    actual = layer.apply({"params": params}, x, train=True)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

  def test_initial_outputs_have_unit_variance_in_every_token(self):
    x = jax.random.normal(jax.random.key(0), (3, 400, 64))
    layer = per_token.PerTokenDense(64)
    y, _ = layer.init_with_output(jax.random.key(1), x)
    np.testing.assert_allclose(y.std(axis=(1, 2)), 1.0, atol=0.1)

  def test_dropout_is_for_training_only(self):
    x = jax.random.normal(jax.random.key(0), (2, 4, 4))
    layer = per_token.PerTokenFFN(2.0, dropout_rate=0.5)
    variables = layer.init(jax.random.key(0), x, train=False)

    def run(seed, train):
      rngs = {"dropout": jax.random.key(seed)}
      return layer.apply(variables, x, train=train, rngs=rngs)

    np.testing.assert_array_equal(run(0, False), run(1, False))
    self.assertTrue(bool(jnp.any(run(0, True) != run(1, True))))
    self.assertTrue(bool(jnp.any(run(0, True) != run(0, False))))


if __name__ == "__main__":
  absltest.main()
