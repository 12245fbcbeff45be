"""Gradients of a policy's value against float64 loops and each other."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax.layers import policy_gradients

NUM_ROWS, NUM_TREATMENTS, SIGMA = 256, 4, 0.3


def problem(seed=0, num_rows=NUM_ROWS):
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(num_rows, NUM_TREATMENTS)).astype(np.float32)
  treatment = rng.integers(NUM_TREATMENTS, size=num_rows).astype(np.int32)
  gain = rng.normal(0.5, 1.0, size=num_rows).astype(np.float32)
  return scores, treatment, gain


@jax.jit
def smoothed_gradient(scores, treatment, gain):
  """What Gaussian smoothing has as its gradient, from 20,000 policies."""
  return policy_gradients.evolution_strategies(
    scores, treatment, gain, SIGMA, jax.random.key(9), 20_000, per_row=True
  )


def estimate(name, scores, treatment, gain, num_draws=128):
  return np.asarray(
    policy_gradients.value_gradient(
      name,
      jnp.asarray(scores),
      jnp.asarray(treatment),
      jnp.asarray(gain),
      sigma=jnp.float32(SIGMA),
      rng=jax.random.key(1),
      num_draws=num_draws,
    ),
    np.float64,
  )


def cosine(a, b):
  a, b = np.ravel(a), np.ravel(b)
  return float(a @ b / np.sqrt((a @ a) * (b @ b)))


class PolicyGradientsTest(parameterized.TestCase):
  def test_rows_and_closed_form_agree(self):
    scores, treatment, gain = problem()
    rows = estimate("row_nes", scores, treatment, gain)
    closed = estimate("softmax", scores, treatment, gain)
    self.assertGreater(cosine(rows, closed), 0.9)
    exact = np.asarray(smoothed_gradient(scores, treatment, gain), np.float64)
    self.assertGreater(cosine(exact, closed), 0.99)
    ratio = np.linalg.norm(closed) / np.linalg.norm(exact)
    self.assertBetween(ratio, 0.95, 1.05)

  def test_noise_on_the_batch_is_far_noisier_than_noise_by_row(self):
    scores, treatment, gain = problem()
    exact = smoothed_gradient(scores, treatment, gain)
    batch = cosine(estimate("nes", scores, treatment, gain), exact)
    rows = cosine(estimate("row_nes", scores, treatment, gain), exact)
    self.assertLess(batch, 0.5)
    self.assertGreater(rows, 0.9)

  def test_noise_on_the_batch_is_unbiased(self):
    scores, treatment, gain = problem(num_rows=3)
    exact = smoothed_gradient(scores, treatment, gain)
    batch = estimate("nes", scores, treatment, gain, num_draws=40_000)
    np.testing.assert_allclose(batch, exact, atol=0.06)

  def test_closed_form_equals_a_numeric_derivative(self):
    scores, treatment, gain = problem(num_rows=5)
    temperature = 0.7

    def value(s):
      e = np.exp(s / temperature)
      p = e / e.sum(1, keepdims=True)
      return float((gain * p[np.arange(5), treatment]).sum())

    expected = np.zeros((5, NUM_TREATMENTS))
    wide = scores.astype(np.float64)
    for index in np.ndindex(expected.shape):
      step = np.zeros_like(wide)
      step[index] = 1e-5
      expected[index] = (value(wide + step) - value(wide - step)) / 2e-5
    actual = policy_gradients.softmax(
      jnp.asarray(scores),
      jnp.asarray(treatment),
      jnp.asarray(gain),
      temperature,
    )
    np.testing.assert_allclose(actual, expected, atol=1e-5)

  def test_finite_difference_equals_its_rule(self):
    scores, treatment, gain = problem(1, num_rows=40)
    expected = np.zeros(scores.shape)
    for i, (s, t, g) in enumerate(zip(scores, treatment, gain, strict=True)):
      best = int(np.argmax(s))
      gap = lambda j, s=s, t=t: max(abs(float(s[t]) - float(s[j])), SIGMA)  # noqa: E731
      if best == t:
        others = [j for j in range(NUM_TREATMENTS) if j != t]
        second = max(others, key=lambda j, s=s: s[j])
        expected[i, t] = g / gap(second)
        for j in others:
          expected[i, j] = -g / gap(j)
      else:
        expected[i, t] = g / gap(best)
        expected[i, best] = -g / gap(best)
    self.assertBetween(np.mean(np.argmax(scores, 1) == treatment), 0.1, 0.9)
    actual = estimate("finite_difference", scores, treatment, gain)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)

  @parameterized.parameters(*policy_gradients.ESTIMATORS)
  def test_rows_without_gain_have_no_gradient(self, name):
    scores, treatment, gain = problem(num_rows=6)
    gain[2] = 0.0
    if name == "nes":
      gain[:] = 0.0  # A row's noise is weighted by the whole batch.
    gradient = estimate(name, scores, treatment, gain)
    np.testing.assert_array_equal(gradient[2], 0.0)

  def test_spending_falls_as_the_price_rises(self):
    rng = np.random.default_rng(3)
    response = jnp.asarray(rng.normal(size=(500, 5)), jnp.float32)
    cost = jnp.asarray(rng.exponential(size=(500, 5)), jnp.float32)
    mask = jnp.asarray(rng.random(500) < 0.8)
    prices = np.linspace(0, 20, 300, dtype=np.float32)
    spent = jax.vmap(
      lambda p: policy_gradients.mean_cost(response, cost, p, mask)
    )(prices)
    self.assertLess(float(np.max(np.diff(np.asarray(spent)))), 1e-6)
    self.assertGreater(float(spent[0] - spent[-1]), 0.5)

  @parameterized.parameters(0.3, 0.5, 0.9)
  def test_the_multiplier_is_the_least_that_fits(self, budget):
    rng = np.random.default_rng(4)
    response = rng.exponential(size=(400, 4)).astype(np.float32)
    cost = np.sort(rng.exponential(size=(400, 4)), axis=1).astype(np.float32)
    cost[:, 0] = 0.0
    mask = rng.random(400) < 0.7

    def spend(price):
      choice = np.argmax(response - price * cost, axis=1)
      return cost[np.arange(400), choice][mask].mean()

    solved = float(
      policy_gradients.solve_multiplier(
        *map(jnp.asarray, (response, cost, np.float32(budget), mask))
      )
    )
    self.assertLessEqual(spend(solved * (1 + 1e-5)), budget)
    self.assertGreater(spend(solved * (1 - 1e-3)), budget)

  def test_a_budget_that_does_not_bind_has_no_price(self):
    response = jnp.asarray([[0.0, 1.0], [0.0, -1.0]])
    cost = jnp.asarray([[0.0, 2.0], [0.0, 2.0]])
    price = policy_gradients.solve_multiplier(
      response, cost, jnp.float32(1.0), jnp.ones(2, bool)
    )
    self.assertEqual(float(price), 0.0)

  def test_spread_leaves_out_what_rows_share(self):
    scores, _, _ = problem()
    mask = jnp.arange(NUM_ROWS) < 200
    wide = scores[:200].astype(np.float64)
    expected = np.sqrt(((wide - wide.mean(1, keepdims=True)) ** 2).mean())
    shifted = scores + np.arange(NUM_ROWS, dtype=np.float32)[:, None]
    for s in (scores, shifted):
      actual = policy_gradients.spread(jnp.asarray(s), mask)
      np.testing.assert_allclose(actual, expected, rtol=1e-4)


if __name__ == "__main__":
  absltest.main()
