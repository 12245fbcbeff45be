import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax.layers.dropout import Dropout, draw_uint16


def apply(x, rate, seed=0, deterministic=False):
  return Dropout(rate, deterministic).apply(
    {}, x, rngs={"dropout": jax.random.key(seed)}
  )


class DropoutTest(parameterized.TestCase):
  # An even last axis, an odd one, none that is long.
  @parameterized.product(
    shape=((64, 512), (96, 341), (40_000, 1)), rate=(0.1, 0.5, 0.9)
  )
  def test_drops_that_share_and_keeps_the_mean(self, shape, rate):
    x = jnp.full(shape, 3.0)
    out = np.asarray(apply(x, rate))
    dropped = out == 0.0
    spread = (rate * (1 - rate) / out.size) ** 0.5
    self.assertLess(abs(dropped.mean() - rate), 5 * spread)
    np.testing.assert_allclose(out[~dropped], 3.0 / (1 - rate), rtol=1e-3)
    # No row, column or half of a word is special.
    for axis in (0, 1):
      share = dropped.mean(axis=axis)
      limit = 6 * (rate * (1 - rate) / dropped.shape[axis]) ** 0.5
      self.assertLess(np.abs(share - rate).max(), limit)

  def test_neighbours_are_independent(self):
    dropped = np.asarray(apply(jnp.ones((400, 500)), 0.5)) == 0.0
    for other in (dropped[:, 1::2], np.roll(dropped[:, ::2], 1, axis=0)):
      match = (dropped[:, ::2] == other).mean()
      self.assertLess(abs(match - 0.5), 5 * 0.5 / other.size**0.5)

  def test_seeds_differ_and_repeat(self):
    x = jnp.ones((8, 64))
    np.testing.assert_array_equal(apply(x, 0.5, 1), apply(x, 0.5, 1))
    self.assertTrue((apply(x, 0.5, 1) != apply(x, 0.5, 2)).any())

  def test_nothing_to_drop(self):
    x = jnp.ones((4, 6))
    self.assertIs(apply(x, 0.5, deterministic=True), x)
    self.assertIs(apply(x, 0.0), x)

  def test_keeps_the_type_and_drops_nan(self):
    x = jnp.full((64, 64), jnp.nan, jnp.bfloat16)
    out = apply(x, 0.5)
    self.assertEqual(out.dtype, jnp.bfloat16)
    self.assertFalse(jnp.isnan(out).all())

  @parameterized.parameters((7, 4), (7, 5))
  def test_all_16_bits_are_in_use(self, *shape):
    draws = np.asarray(draw_uint16(jax.random.key(0), (4000, *shape)))
    self.assertEqual(draws.dtype, np.uint16)
    share = np.unpackbits(draws.view(np.uint8).reshape(-1, 2), axis=1).mean(0)
    self.assertLess(np.abs(share - 0.5).max(), 0.01)


if __name__ == "__main__":
  absltest.main()
