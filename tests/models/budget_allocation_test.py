"""The goal of the budget model: its value, its gradient and its multipliers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import train_state
from recjax.errors import UserError
from recjax.layers import outcomes
from recjax.models import budget_allocation
from tests import toy_trial

TINY = {"embed_dim": 4, "mlp_dims": [6], "head_dims": [5]}


def load(name="budget_allocation", **overrides):
  return method_lib.load(name, TINY | overrides, toy_trial.SCHEMA)


@functools.cache
def setting(**overrides):
  """Method, parameters, tables and a batch."""
  method = load(**overrides)
  params, tables = jax.jit(method.init)(jax.random.key(2))
  return method, params, tables, toy_trial.make_batch(1, size=64, num_padding=9)


def forward(method, params, tables, batch):
  rows = method.read(tables, batch)
  predictions, aux, _ = method.apply(
    params, tables, rows, batch, train=True, rng=jax.random.key(4)
  )
  return predictions, aux


class BudgetAllocationTest(parameterized.TestCase):
  def test_the_goal_is_what_the_policy_earns(self):
    prices = (0.3, 1.1)
    method, params, tables, batch = setting(
      prices=prices, alpha=2.0, center=False
    )
    predictions, aux = forward(method, params, tables, batch)
    total, count = budget_allocation.goal_term(
      predictions, aux, batch, method.config
    )
    trial = method.schema.trial
    r, c = (np.float64(predictions[k]) for k in ("response", "cost"))
    expected = 0.0
    for price in prices:
      for i in range(64 - 9):
        score = r[i] / trial.response_std - price * c[i] / trial.cost_std
        t = int(batch.trial.treatment[i])
        if score.argmax() == t:
          y = float(batch.trial.response[i]) / trial.response_std
          z = float(batch.trial.cost[i]) / trial.cost_std
          expected += (y - price * z) / float(batch.trial.propensity[i])
    self.assertEqual(count, 55)
    np.testing.assert_allclose(total, -2.0 * expected / 2, rtol=1e-4)

  @parameterized.parameters("softmax", "row_nes", "nes", "finite_difference")
  def test_its_gradient_is_that_of_the_estimator(self, estimator):
    method, params, tables, batch = setting(
      estimator=estimator, prices=(0.5,), num_draws=64, center=False
    )
    predictions, aux = forward(method, params, tables, batch)

    def goal(predictions):
      return budget_allocation.goal_term(
        predictions, aux, batch, method.config
      )[0]

    slope = jax.grad(goal)(predictions)
    units = aux["units"]
    # Chain rule of S = r / scale - price c / cost_scale.
    np.testing.assert_allclose(
      slope["cost"] * units.cost_scale,
      -0.5 * slope["response"] * units.scale,
      rtol=1e-4,
      atol=1e-6,
    )
    self.assertTrue(bool(jnp.any(slope["response"] != 0)))
    np.testing.assert_array_equal(slope["response"][55:], 0)
    if estimator == "softmax":
      scores = outcomes.scores(predictions, 0.5, units)
      gain = outcomes.gains(batch, 0.5, units)
      s = np.float64(scores)[:55]
      spread = np.sqrt(((s - s.mean(1, keepdims=True)) ** 2).mean())
      tau = method.config.smoothing * spread * np.sqrt(6) / np.pi
      e = np.exp((s - s.max(1, keepdims=True)) / tau)
      p = e / e.sum(1, keepdims=True)
      t = np.asarray(batch.trial.treatment)[:55]
      own = p[np.arange(55), t][:, None]
      expected = np.float64(gain)[:55, None] * own * (np.eye(3)[t] - p) / tau
      np.testing.assert_allclose(
        slope["response"][:55] * units.scale, -expected, rtol=1e-3, atol=1e-4
      )

  def test_centred_gains_have_the_same_expected_gradient(self):
    # All treatments of one person, each with the weight that it would have.
    method, params, tables, batch = setting(prices=(0.5,))
    predictions, aux = forward(method, params, tables, batch)
    propensity = np.asarray(method.schema.trial.propensities)
    sums = []
    for center in (False, True):
      config = load(prices=[0.5], center=center).config
      total = 0.0
      for t in range(3):
        forced = batch.replace(
          trial=batch.trial.replace(
            treatment=jnp.full(64, t, jnp.int32),
            propensity=jnp.full(64, propensity[t]),
            response=jnp.full(64, 1.0 + t),
          )
        )

        def goal(predictions, forced=forced, config=config):
          return budget_allocation.goal_term(predictions, aux, forced, config)[
            0
          ]

        total += propensity[t] * jax.grad(goal)(predictions)["response"]
      sums.append(np.asarray(total))
    np.testing.assert_allclose(sums[1], sums[0], rtol=1e-3, atol=1e-5)
    self.assertGreater(np.abs(sums[0]).max(), 1e-2)

  def test_the_average_moves_to_the_price_of_the_budget(self):
    method, params, tables, batch = setting(budgets=(0.3, 0.6))
    predictions, aux = forward(method, params, tables, batch)

    def distance(logs):
      total, count = budget_allocation.multiplier_term(
        predictions, aux | {"log_multiplier": logs}, batch, method.config
      )
      return total / count

    step = jax.jit(lambda logs: logs - 500.0 * jax.grad(distance)(logs))
    logs = jnp.zeros(2)
    for _ in range(60):
      logs = step(logs)
    np.testing.assert_allclose(step(logs), logs, atol=1e-5)
    self.assertLess(float(distance(logs)), 1e-8)
    units, spent = aux["units"], []
    for multiplier in np.exp(np.asarray(logs)) * (1 + 1e-4):
      scores = np.asarray(
        outcomes.scores(predictions, float(multiplier), units)
      )
      cost = np.asarray(predictions["cost"])[:55]
      spent.append(cost[np.arange(55), scores[:55].argmax(1)].mean())
    mean = np.asarray(predictions["cost"])[:55].mean(0)
    for share, value in zip((0.3, 0.6), spent, strict=True):
      budget = mean.min() + share * (mean.max() - mean.min())
      self.assertLessEqual(value, budget * (1 + 1e-5))
      self.assertGreater(value, budget - 0.1)

  def test_without_the_goal_it_is_the_two_stage_method_bit_for_bit(self):
    states = []
    optimizer = optimizer_lib.Config(learning_rate=0.01)
    for name, overrides in (
      ("two_stage", {}),
      ("budget_allocation", {"alpha": 0.0}),
    ):
      method = load(name, **overrides)
      self.assertLen(method.stages, 1)
      config = train_state.StepConfig(
        method, method.stages[0], optimizer, num_steps=5
      )
      state = jax.jit(lambda rng, c=config: train_state.init_state(rng, c))(
        jax.random.key(3)
      )
      step = jax.jit(lambda s, b, c=config: train_state.train_step(s, b, c))
      for seed in range(5):
        state, _ = step(state, toy_trial.make_batch(seed))
      states.append(state)
    chex.assert_trees_all_equal(*states)

  def test_the_goal_changes_what_is_learned(self):
    method, params, tables, batch = setting(warmup_share=0.25)
    self.assertEqual([s.name for s in method.stages], ["warmup", "goal"])
    predictions, aux = forward(method, params, tables, batch)
    warm = method.stages[0].loss_fn(predictions, aux, batch, method.config)
    terms = method.module.loss_fn(predictions, aux, batch, method.config)
    self.assertCountEqual(warm, ["response", "cost", "multiplier"])
    self.assertCountEqual(terms, ["response", "cost", "multiplier", "goal"])

  @parameterized.parameters(
    ({"alpha": -1.0}, "alpha"),
    ({"estimator": "softmx"}, "did you mean 'softmax'"),
    ({"num_draws": 3}, "even"),
    ({"budgets": [1.5]}, "between 0 and 1"),
    ({"budgets": []}, "give one"),
    ({"prices": [-0.1]}, "at least 0"),
    ({"warmup_share": 1.0}, "warmup_share"),
    ({"learner": "x"}, "learner"),
  )
  def test_mistakes(self, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      load(**overrides)


if __name__ == "__main__":
  absltest.main()
