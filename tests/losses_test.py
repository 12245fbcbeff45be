"""Losses against scikit-learn and NumPy; what is masked is inert."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from sklearn import metrics as sklearn_metrics

from recjax import losses
from tests import toy


def make(seed=0, size=50):
  rng = np.random.default_rng(seed)
  logits = (4 * rng.normal(size=size)).astype(np.float32)
  labels = (rng.random(size) < 0.4).astype(np.float32)
  return logits, labels, rng.random(size) < 0.7


class LossesTest(parameterized.TestCase):
  def test_cross_entropy_equals_scikit_learn(self):
    logits, labels, mask = make()
    total, weight = losses.binary_cross_entropy(*map(jnp.asarray, make()))
    probs = 1 / (1 + np.exp(-logits[mask].astype(np.float64)))
    expected = sklearn_metrics.log_loss(labels[mask], probs)
    self.assertEqual(weight, mask.sum())
    np.testing.assert_allclose(total / weight, expected, rtol=1e-5)

  def test_cross_entropy_of_extreme_logits_is_finite(self):
    logits, labels = jnp.asarray([1e4, -1e4]), jnp.asarray([0.0, 1.0])
    total, _ = losses.binary_cross_entropy(logits, labels, jnp.ones(2, bool))
    np.testing.assert_allclose(total, 2e4)

  def test_squared_error_equals_scikit_learn(self):
    predictions, _, mask = make()
    targets = make(1)[0]
    total, weight = losses.squared_error(
      *map(jnp.asarray, (predictions, targets, mask))
    )
    expected = sklearn_metrics.mean_squared_error(
      targets[mask], predictions[mask]
    )
    np.testing.assert_allclose(total / weight, expected, rtol=1e-5)

  @parameterized.parameters(losses.binary_cross_entropy, losses.squared_error)
  def test_masked_nan_reaches_neither_value_nor_gradient(self, loss_fn):
    logits, labels, mask = map(jnp.asarray, make())
    broken = jnp.where(mask, labels, jnp.nan)
    run = jax.value_and_grad(lambda x, y: loss_fn(x, y, mask)[0])
    value, grad = run(logits, broken)
    expected_value, expected_grad = run(logits, labels)
    np.testing.assert_array_equal(value, expected_value)
    np.testing.assert_array_equal(grad, expected_grad)
    self.assertTrue((grad[~mask] == 0).all())

  def test_masked_sum_ignores_nan_and_counts(self):
    values = jnp.asarray([[1.0, jnp.nan], [jnp.inf, 2.0]])
    total, count = losses.masked_sum(values, jnp.eye(2, dtype=bool))
    self.assertEqual((float(total), float(count)), (3.0, 2.0))
    total, count = losses.masked_sum(values, jnp.zeros((2, 2), bool))
    self.assertEqual((float(total), float(count)), (0.0, 0.0))

  def test_each_task_counts_its_own_labels(self):
    batch = toy.make_batch(num_padding=4)
    rng = np.random.default_rng(0)
    predictions = {
      task: jnp.asarray(rng.normal(size=16), jnp.float32)
      for task in ("like", "play_time")
    }
    # Padding does not count even where its label is marked as observed.
    label_mask = batch.label_mask | {"play_time": jnp.ones(16, bool)}
    terms = losses.task_losses(
      predictions, batch.replace(label_mask=label_mask)
    )
    self.assertCountEqual(terms, predictions)
    like = np.asarray(batch.label_mask["like"])
    x = np.asarray(predictions["like"], np.float64)[like]
    y = np.asarray(batch.labels["like"])[like]
    np.testing.assert_allclose(
      terms["like"], [np.sum(np.log1p(np.exp(x)) - x * y), like.sum()], 1e-5
    )
    x = np.asarray(predictions["play_time"], np.float64)[:12]
    seconds = np.asarray(batch.labels["play_time"], np.float64)[:12]
    np.testing.assert_allclose(
      terms["play_time"], [np.sum((x - np.log(1 + seconds)) ** 2), 12], 1e-5
    )

  def test_symlog_and_symexp_are_inverse(self):
    x = jnp.asarray([-1e4, -3.0, -1e-3, 0.0, 1e-3, 0.5, 1e4])
    np.testing.assert_allclose(losses.symexp(losses.symlog(x)), x, rtol=1e-5)
    np.testing.assert_allclose(
      losses.symlog(x), np.sign(x) * np.log1p(np.abs(x)), rtol=1e-6
    )
    np.testing.assert_allclose(losses.symlog(-x), -losses.symlog(x))


if __name__ == "__main__":
  absltest.main()
