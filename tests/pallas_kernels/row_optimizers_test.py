import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.row_update import optimizers
from tests.sparse_oracle import RowOracle

NAMES = ("sgd", "rowwise_adagrad", "adagrad", "lazy_adam")


class RowOptimizersTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_equals_float64_formula_over_steps(self, name):
    optimizer = optimizers.make_row_optimizer(name, eps=1e-3)
    oracle = RowOracle(name, eps=1e-3)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 3))
    values, state = jnp.asarray(rows, jnp.float32), optimizer.init(4, 3)
    expected_state = oracle.init(4, 3)
    self.assertEqual(
      {k: v.shape for k, v in state.items()},
      {k: v.shape for k, v in expected_state.items()},
    )
    for step in range(1, 5):
      grads = rng.normal(size=(4, 3))
      delta, state = optimizer.update(
        jnp.asarray(grads, jnp.float32), state, 0.1, jnp.int32(step)
      )
      values = values - delta
      for row in range(4):
        rows[row] -= oracle.delta(expected_state, row, grads[row], 0.1, step)
      np.testing.assert_allclose(values, rows, rtol=1e-4, atol=1e-6)
      for key, expected in expected_state.items():
        np.testing.assert_allclose(state[key], expected, rtol=1e-5)

  def test_first_steps_spelled_out(self):
    grads = jnp.asarray([[3.0, 4.0]])
    expected = {
      "sgd": [[0.3, 0.4]],
      "rowwise_adagrad": [[0.3 / 12.5**0.5, 0.4 / 12.5**0.5]],
      "adagrad": [[0.1, 0.1]],
      "lazy_adam": [[0.1, 0.1]],
    }
    for name in NAMES:
      optimizer = optimizers.make_row_optimizer(name)
      state = optimizer.init(1, 2)
      delta, _ = optimizer.update(grads, state, 0.1, jnp.int32(1))
      np.testing.assert_allclose(delta, expected[name], rtol=1e-4)

  def test_lazy_adam_corrects_by_the_global_step(self):
    optimizer = optimizers.lazy_adam()
    state = optimizer.init(1, 1)
    delta, _ = optimizer.update(jnp.ones((1, 1)), state, 1.0, jnp.int32(100))
    mean = 0.1 / (1 - 0.9**100)
    square = 0.001 / (1 - 0.999**100)
    np.testing.assert_allclose(delta, [[mean / square**0.5]], rtol=1e-4)

  def test_unknown_name(self):
    with self.assertRaisesRegex(ValueError, "'adagrat'.*adagrad"):
      optimizers.make_row_optimizer("adagrat")


if __name__ == "__main__":
  absltest.main()
