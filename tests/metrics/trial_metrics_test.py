"""Metrics of a trial against loops, and against planted truth."""

import numpy as np
from absl.testing import absltest

from recjax.batch import TrialRows
from recjax.data import synthetic_trial
from recjax.metrics import cost_curve
from recjax.metrics import trial as trial_metrics
from recjax.metrics.uplift import eom


def planted(world="misspecified", num_rows=4000, seed=0):
  config = synthetic_trial.Config(world, num_rows=num_rows, seed=seed)
  return synthetic_trial.draw(config, "train")


def policy_at_budget(response, cost, budget: float, spend):
  """Choices at the least multiplier at which `spend(choices)` fits."""

  def choose(multiplier):
    return np.argmax(response - multiplier * cost, axis=1)

  def fits(choice):
    # One part in a billion: sums of the same costs differ in their last bits.
    return not spend(choice) > budget * (1 + 1e-9)

  choice = choose(0.0)
  if fits(choice):
    return choice
  low, high = 0.0, np.std(response) / max(np.std(cost), 1e-30) + 1e-30
  choice = choose(high)
  for _ in range(60):
    if fits(choice):
      break
    low, high = high, 2.0 * high
    choice = choose(high)
  for _ in range(40):
    middle = 0.5 * (low + high)
    tried = choose(middle)
    if fits(tried):
      high, choice = middle, tried
    else:
      low = middle
  return choice


class TrialTest(absltest.TestCase):
  def test_true_tables_have_no_regret_and_others_have(self):
    x, trial, truth = planted()
    best = trial_metrics.summarize(
      truth["response"], truth["cost"], trial, truth=truth
    )
    self.assertLess(abs(best["regret"]), 1e-9)
    flat = np.random.default_rng(0).normal(size=truth["response"].shape)
    worse = trial_metrics.summarize(flat, truth["cost"], trial, truth=truth)
    self.assertGreater(worse["regret"], 0.3)
    self.assertGreater(best["eom"], worse["eom"])

  def test_regret_is_what_a_search_over_prices_finds(self):
    x, _, truth = planted(num_rows=300)
    r, c = truth["response"], truth["cost"]
    predicted = r + 3 * np.random.default_rng(1).normal(size=r.shape)
    means = c.mean(0)
    budget = means.min() + 0.45 * (means.max() - means.min())

    def value(table):
      # All prices at which somebody changes.
      prices = [0.0]
      for row, cost in zip(table, c, strict=True):
        for j in range(4):
          for k in range(j):
            if cost[j] != cost[k]:
              prices.append((row[j] - row[k]) / (cost[j] - cost[k]))
      prices = np.sort([p for p in prices if p >= 0])
      low, high = 0, len(prices) - 1
      rows = np.arange(len(c))
      pick = lambda p: (table - (p + 1e-12) * c).argmax(1)  # noqa: E731
      while low < high:
        middle = (low + high) // 2
        if c[rows, pick(prices[middle])].mean() <= budget:
          high = middle
        else:
          low = middle + 1
      return r[rows, pick(prices[low])].mean()

    none = r[:, 0].mean()
    expected = (value(r) - value(predicted)) / (value(r) - none)
    actual = trial_metrics.regret(predicted, c, r, c)
    actual = actual[trial_metrics.SHARES.index(0.45)]
    np.testing.assert_allclose(actual, expected, atol=1e-6)

  def test_expected_outcomes_are_those_of_the_policy_at_the_budget(self):
    _, trial, truth = planted()
    noise = np.random.default_rng(2).normal(size=truth["response"].shape)
    response = truth["response"] + noise
    values = trial_metrics.summarize(response, truth["cost"], trial)
    budgets = trial_metrics.trial_budgets(trial, 4)
    for share, budget in zip(trial_metrics.SHARES, budgets, strict=True):
      choice = policy_at_budget(
        response,
        truth["cost"],
        budget,
        lambda c: eom(c, trial.treatment, trial.cost, trial.propensity),
      )
      expected = eom(choice, trial.treatment, trial.response, trial.propensity)
      # Spending as observed is no monotone function of a price.
      self.assertAlmostEqual(
        values[f"eom@{round(100 * share)}"], expected, delta=0.03
      )

  def test_one_treatment_has_an_area_under_the_cost_curve(self):
    _, trial, truth = planted()
    two = trial.treatment < 2
    rows = TrialRows(
      *(
        v[two]
        for v in (
          trial.treatment,
          trial.response,
          trial.cost,
          trial.propensity,
          trial.cluster,
        )
      )
    )
    tables = (truth["response"][two, :2], truth["cost"][two, :2])
    self.assertGreater(trial_metrics.summarize(*tables, rows)["aucc"], 0.6)
    reverse = trial_metrics.summarize(-tables[0], tables[1], rows)
    self.assertLess(reverse["aucc"], 0.4)

  def test_draws_are_those_of_people_written_as_often_as_drawn(self):
    _, trial, truth = planted(num_rows=400)
    trial = trial.replace(cluster=trial.cluster // 2)
    rng = np.random.default_rng(0)
    response = truth["response"] + rng.normal(size=truth["response"].shape)
    found = trial_metrics.resample(
      response, truth["cost"], trial, num_samples=3, seed=5
    )
    self.assertEqual(tuple(found), trial_metrics.RESAMPLED)
    budgets = trial_metrics.trial_budgets(trial, 4)
    units, draws = np.unique(trial.cluster), np.random.default_rng(5)
    for i in range(3):
      drawn = draws.choice(len(units), len(units))
      rows = np.concatenate(
        [np.flatnonzero(trial.cluster == units[unit]) for unit in drawn]
      )
      curve = cost_curve.cost_curve(
        response[rows],
        truth["cost"][rows],
        trial.treatment[rows],
        trial.response[rows],
        trial.cost[rows],
        trial.propensity[rows],
      )
      earned = cost_curve.value_at_budget(curve, budgets)
      expected = [earned.mean(), *earned, cost_curve.cost_curve_area(curve)]
      np.testing.assert_allclose([v[i] for v in found.values()], expected)

  def test_names_are_those_that_are_measured(self):
    _, trial, truth = planted(num_rows=500)
    values = trial_metrics.summarize(*truth.values(), trial, truth=truth)
    known = trial_metrics.metric_names(has_truth=True)
    self.assertCountEqual(values, [n for n in known if n != "aucc"])


if __name__ == "__main__":
  absltest.main()
