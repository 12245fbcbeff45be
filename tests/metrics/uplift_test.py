"""Uplift metrics against loops over prefixes and against what they promise.

The loops follow the definitions of scikit-uplift 0.5.1 and causalml 0.18.0, and
have been compared with both packages: they and the metrics agree to 1e-12.
"""

import numpy as np
from absl.testing import absltest, parameterized

from recjax.metrics import cost_curve, uplift


def make_trial(seed, size=120, share=0.4, decimals=None):
  rng = np.random.default_rng(seed)
  treatment = (rng.random(size) < share).astype(np.int64)
  scores = rng.normal(size=size)
  chance = 0.2 + 0.3 * treatment * (scores > 0)
  response = (rng.random(size) < chance).astype(np.float64)
  if decimals is not None:
    scores = scores.round(decimals)
  return scores, treatment, response


def prefix_curves(scores, treatment, response):
  """Gain and Qini height after each person; NaN while an arm is empty."""
  gain, qini = [], []
  chosen = []
  for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
    chosen.append(i)
    t = [response[i] for i in chosen if treatment[i] == 1]
    c = [response[i] for i in chosen if treatment[i] == 0]
    mean_t = sum(t) / len(t) if t else np.nan
    mean_c = sum(c) / len(c) if c else np.nan
    gain.append((mean_t - mean_c) * len(chosen))
    qini.append(sum(t) - mean_c * len(t))
  return np.array(gain), np.array(qini)


def mean_height(lift, normalize):
  """Leading NaN on a straight line from 0, as pandas interpolates."""
  known = np.flatnonzero(~np.isnan(lift))
  numbers = np.arange(len(lift))
  lift = np.interp(numbers, np.append(0, known), np.append(0, lift[known]))
  return lift / (abs(lift[-1]) if normalize else 1)


def causalml_auuc(scores, treatment, response, normalize):
  gain, _ = prefix_curves(scores, treatment, response)
  numbers = np.arange(len(gain) + 1)
  lift = np.append(0, gain) / np.maximum(numbers, 1)
  curve = mean_height(lift, False) * numbers
  return (curve / (abs(curve[-1]) if normalize else 1)).mean()


def causalml_qini(scores, treatment, response, normalize):
  _, qini = prefix_curves(scores, treatment, response)
  curve = mean_height(np.append(0, qini), normalize)
  return (curve - np.linspace(0, curve[-1], len(curve))).mean()


def sklift_area(curve, scores, treatment, response):
  """Trapezoids over the points at which a score ends, above the chord."""
  order = sorted(range(len(scores)), key=lambda i: -scores[i])
  points = [(0, 0.0)]
  for k in range(1, len(order) + 1):
    if k < len(order) and scores[order[k]] == scores[order[k - 1]]:
      continue
    t = [response[i] for i in order[:k] if treatment[i] == 1]
    c = [response[i] for i in order[:k] if treatment[i] == 0]
    mean_t, mean_c = (sum(x) / len(x) if x else 0 for x in (t, c))
    height = (mean_t - mean_c) * k
    if curve == "qini":
      height = sum(t) - mean_c * len(t)
    points.append((k, height))
  area = sum(
    (b[0] - a[0]) * (a[1] + b[1]) / 2
    for a, b in zip(points, points[1:], strict=False)
  )
  return area - points[-1][0] * points[-1][1] / 2


def sklift_score(curve, scores, treatment, response):
  best = response * treatment - response * (1 - treatment)
  if curve == "uplift":
    won = ((response == 1) & (treatment == 0)).sum()
    lost = ((response == 0) & (treatment == 1)).sum()
    best = 2 * (response == treatment) + (response if won > lost else treatment)
  return sklift_area(curve, scores, treatment, response) / sklift_area(
    curve, best, treatment, response
  )


class RankingTest(parameterized.TestCase):
  @parameterized.product(seed=(0, 1, 2, 3, 4), decimals=(None, 1))
  def test_scikit_uplift(self, seed, decimals):
    trial = make_trial(seed, decimals=decimals)
    np.testing.assert_allclose(
      uplift.qini_auc_score(*trial), sklift_score("qini", *trial), atol=1e-12
    )
    np.testing.assert_allclose(
      uplift.uplift_auc_score(*trial),
      sklift_score("uplift", *trial),
      atol=1e-12,
    )

  def test_scikit_uplift_without_negative_effects(self):
    scores, treatment, response = make_trial(3)
    size, treated = len(scores), treatment == 1
    control = response[~treated].mean()
    top = response[treated].sum() - treated.sum() * control
    # The perfect curve rises to `top` at once (x = top) and stays.
    best = top * top / 2 + (size - top) * top - size * top / 2
    expected = sklift_area("qini", scores, treatment, response) / best
    found = uplift.qini_auc_score(
      scores, treatment, response, negative_effect=False
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)

  @parameterized.product(seed=(0, 1, 2, 3, 4), normalize=(True, False))
  def test_causalml(self, seed, normalize):
    scores, treatment, response = make_trial(seed, share=0.2)
    response = response * np.random.default_rng(seed).lognormal(size=120)
    trial = scores, treatment, response
    np.testing.assert_allclose(
      uplift.auuc_score(*trial, normalize=normalize),
      causalml_auuc(*trial, normalize),
      rtol=1e-10,
    )
    np.testing.assert_allclose(
      uplift.qini_score(*trial, normalize=normalize),
      causalml_qini(*trial, normalize),
      atol=1e-10,
    )

  METRICS = (
    uplift.qini_auc_score,
    uplift.uplift_auc_score,
    uplift.qini_score,
    uplift.auuc_score,
    lambda s, t, y, **kwargs: uplift.aucc(s, t, y, 1.0 * t, **kwargs),
  )

  @parameterized.parameters(*METRICS)
  def test_order_of_tied_rows_does_not_count(self, metric):
    trial = make_trial(1, decimals=0)
    order = np.random.default_rng(0).permutation(120)
    np.testing.assert_allclose(
      metric(*trial), metric(*(x[order] for x in trial)), atol=1e-12
    )

  @parameterized.parameters(*METRICS)
  def test_any_increasing_transform_gives_the_same(self, metric):
    scores, treatment, response = make_trial(2)
    self.assertAlmostEqual(
      metric(scores, treatment, response),
      metric(np.exp(scores), treatment, response),
    )

  @parameterized.parameters(*METRICS)
  def test_propensities_equal_within_arms_change_nothing(self, metric):
    scores, treatment, response = make_trial(2)
    propensity = np.where(treatment == 1, 0.4, 0.6)
    np.testing.assert_allclose(
      metric(scores, treatment, response, propensity=propensity),
      metric(scores, treatment, response),
      atol=1e-12,
    )

  def test_propensities_undo_a_draw_that_depends_on_the_person(self):
    rng = np.random.default_rng(0)
    size = 200_000
    scores = rng.random(size)
    drawn = 0.1 + 0.8 * scores
    treatment = (rng.random(size) < drawn).astype(np.int64)
    # Everyone responds alike to the treatment: no ranking is better than 0.5.
    response = treatment + scores
    propensity = np.where(treatment == 1, drawn, 1 - drawn)
    cost = 1.0 * treatment
    value = uplift.aucc(
      scores, treatment, response, cost, propensity=propensity
    )
    self.assertAlmostEqual(value, 0.5, delta=0.01)
    plain = uplift.aucc(scores, treatment, response, cost)
    self.assertGreater(abs(plain - 0.5), 0.02)

  def test_aucc_of_known_effects(self):
    # Two kinds of people in equal numbers, 3 and 1 per unit of cost: treating
    # the better half first reaches (1/2, 3/4).
    better = np.repeat([1.0, 0.0], 1000)
    treatment = np.tile([0, 1], 1000)
    response = treatment * np.where(better == 1, 3.0, 1.0)
    cost = 1.0 * treatment
    area = 0.5 * 0.5 * 0.75 + 0.5 * (0.75 + 1) / 2
    np.testing.assert_allclose(
      uplift.aucc(better, treatment, response, cost), area
    )
    np.testing.assert_allclose(
      uplift.aucc(np.zeros(2000), treatment, response, cost), 0.5
    )

  def test_undefined_values_are_nan(self):
    scores, treatment = np.arange(4.0), np.array([0, 1, 0, 1])
    nothing = np.zeros(4)
    self.assertTrue(np.isnan(uplift.qini_auc_score(scores, treatment, nothing)))
    self.assertTrue(np.isnan(uplift.auuc_score(scores, treatment, nothing)))
    alone = np.ones(4, np.int64)
    self.assertTrue(np.isnan(uplift.auuc_score(scores, alone, scores)))
    self.assertTrue(np.isnan(uplift.qini_score(scores, alone, scores)))

  def test_wrong_values_are_told(self):
    scores, treatment, response = make_trial(0)
    with self.assertRaisesRegex(ValueError, "treatment must be 0 or 1, got 2"):
      uplift.auuc_score(scores, treatment + 1, response)
    with self.assertRaisesRegex(ValueError, "response must be 0 or 1, got"):
      uplift.qini_auc_score(scores, treatment, response + 0.5)
    with self.assertRaisesRegex(ValueError, "must not be NaN"):
      uplift.qini_score(scores * np.nan, treatment, response)
    with self.assertRaisesRegex(ValueError, r"in \(0, 1\].*got 0.0"):
      uplift.auuc_score(scores, treatment, response, propensity=scores * 0)


class EomTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_constant_policy_has_the_mean_of_its_arm(self, normalize):
    rng = np.random.default_rng(0)
    treatment = rng.integers(0, 3, 500)
    outcome = rng.lognormal(size=500)
    propensity = (np.bincount(treatment) / 500)[treatment]
    for arm in range(3):
      value = uplift.eom(
        np.full(500, arm), treatment, outcome, propensity, normalize=normalize
      )
      np.testing.assert_allclose(value, outcome[treatment == arm].mean())

  def test_is_unbiased_over_draws_of_the_treatment(self):
    rng = np.random.default_rng(1)
    table = rng.lognormal(size=(200, 3))  # Everyone's outcome under each.
    choice = rng.integers(0, 3, 200)
    share = np.array([0.6, 0.3, 0.1])
    values = []
    for _ in range(1000):
      treatment = rng.choice(3, p=share, size=200)
      seen = table[np.arange(200), treatment]
      values.append(
        [
          uplift.eom(choice, treatment, seen, share[treatment], normalize=n)
          for n in (False, True)
        ]
      )
    truth = table[np.arange(200), choice].mean()
    mean, std = np.mean(values, axis=0), np.std(values, axis=0)
    self.assertLess(abs(mean[0] - truth), 3 * std[0] / np.sqrt(1000))
    self.assertLess(std[1], std[0])
    self.assertLess(abs(mean[1] - truth), 0.05 * truth)

  def test_nobody_matched_is_nan_and_wrong_propensities_are_told(self):
    ones = np.ones(3, np.int64)
    self.assertTrue(
      np.isnan(uplift.eom(0 * ones, ones, 1.0 * ones, 1.0 * ones))
    )
    with self.assertRaisesRegex(ValueError, "propensity must be"):
      uplift.eom(ones, ones, 1.0 * ones, np.array([0.5, 0.0, 1.0]))
    with self.assertRaisesRegex(ValueError, "nobody"):
      uplift.eom(ones[:0], ones[:0], ones[:0], np.zeros(0))


class CostCurveTest(parameterized.TestCase):
  def make(self, seed=0, size=300, num=4):
    rng = np.random.default_rng(seed)
    response, cost = rng.random((size, num)), rng.random((size, num))
    cost[:, 0] = 0
    share = np.arange(1, num + 1) / np.arange(1, num + 1).sum()
    treatment = rng.choice(num, p=share, size=size)
    seen = rng.lognormal(size=(2, size))
    return response, cost, treatment, *seen, share[treatment]

  @parameterized.product(spend=("observed", "predicted"), normalize=(1, 0))
  def test_every_point_is_the_policy_of_its_price(self, spend, normalize):
    data = self.make()
    response, cost, treatment, y, z, propensity = data
    curve = cost_curve.cost_curve(*data, spend=spend, normalize=bool(normalize))
    self.assertTrue((np.diff(curve.multiplier) < 0).all())
    for i in [0, 1, 7, len(curve.value) // 2, len(curve.value) - 1]:
      # Just below the price at which the point's last step pays.
      price = min(curve.multiplier[i], 1e9) * (1 - 1e-12)
      choice = (response - price * cost).argmax(axis=1)
      named = (choice, treatment), dict(normalize=bool(normalize))
      value = uplift.eom(*named[0], y, propensity, **named[1])
      np.testing.assert_allclose(curve.value[i], value, rtol=1e-9)
      spent = uplift.eom(*named[0], z, propensity, **named[1])
      if spend == "predicted":
        spent = cost[np.arange(300), choice].mean()
      np.testing.assert_allclose(curve.spend[i], spent, rtol=1e-9)

  def test_ends_with_nobody_and_with_everybody_treated(self):
    response, cost, treatment, y, z, propensity = self.make()
    curve = cost_curve.cost_curve(response, cost, treatment, y, z, propensity)
    for point, choice in ((0, 0 * treatment), (-1, response.argmax(axis=1))):
      value = uplift.eom(choice, treatment, y, propensity)
      np.testing.assert_allclose(curve.value[point], value)

  def test_order_of_tied_people_does_not_count(self):
    response, cost, *seen = self.make(num=2)
    response, cost = response.round(1), np.ceil(cost)
    order = np.random.default_rng(1).permutation(300)
    curve = cost_curve.cost_curve(response, cost, *seen)
    other = cost_curve.cost_curve(*(x[order] for x in (response, cost, *seen)))
    self.assertLess(len(curve.value), 25)
    np.testing.assert_allclose(curve.value, other.value)

  def test_value_at_budgets(self):
    curve = cost_curve.CostCurve(
      spend=np.array([1.0, 3.0, 1.5, 2.0, 4.0, 4.0]),
      value=np.array([0.0, 2.0, 9.0, 7.0, 4.0, 5.0]),
      multiplier=np.arange(6.0)[::-1],
    )
    # Spend falls to 1.5 and first is above 3 on the way to 4.
    found = cost_curve.value_at_budget(
      curve, np.array([0.5, 2.0, 3.0, 3.5, 4.0, 7.0])
    )
    np.testing.assert_allclose(found, [0, 1, 2, 3, 5, 5])

  def test_random_predictions_have_half_the_area(self):
    rng = np.random.default_rng(0)
    treatment = rng.integers(0, 3, 30_000)
    gain = np.array([0.0, 1.0, 1.5])[treatment] + 0.1 * rng.normal(size=30_000)
    cost = np.array([0.0, 1.0, 1.5])[treatment]
    third = np.full(30_000, 1 / 3)
    guess = np.cumsum(rng.random((30_000, 3)), axis=1)
    curve = cost_curve.cost_curve(
      guess, np.tile([0.0, 1.0, 1.5], (30_000, 1)), treatment, gain, cost, third
    )
    self.assertAlmostEqual(cost_curve.cost_curve_area(curve), 0.5, delta=0.02)

  def test_more_budget_buys_more_where_predictions_are_true(self):
    rng = np.random.default_rng(3)
    table = np.cumsum(rng.random((20_000, 4)), axis=1)
    cost = np.cumsum(rng.random((20_000, 4)), axis=1)
    cost -= cost[:, :1]
    treatment = rng.integers(0, 4, 20_000)
    rows = np.arange(20_000), treatment
    quarter = np.full(20_000, 0.25)
    curve = cost_curve.cost_curve(
      table, cost, treatment, table[rows], cost[rows], quarter
    )
    budgets = np.array([0.2, 0.5, 0.9, 1.3])
    values = cost_curve.value_at_budget(curve, budgets)
    self.assertTrue((np.diff(values) > 0).all())
    predicted = cost_curve.cost_curve(
      table,
      cost,
      treatment,
      table[rows],
      cost[rows],
      quarter,
      spend="predicted",
    )
    np.testing.assert_allclose(
      values, cost_curve.value_at_budget(predicted, budgets), rtol=0.02
    )

  def test_wrong_spend_is_told(self):
    with self.assertRaisesRegex(ValueError, "unknown spend 'guess'"):
      cost_curve.cost_curve(*self.make(), spend="guess")


class BootstrapTest(parameterized.TestCase):
  def test_interval_of_a_mean(self):
    outcome = np.random.default_rng(0).normal(size=400)
    found = uplift.bootstrap(lambda rows: outcome[rows].mean(), 400)
    self.assertEqual(found.estimate, outcome.mean())
    half = 1.96 * outcome.std() / 20
    np.testing.assert_allclose(found.high - found.low, 2 * half, rtol=0.1)

  def test_clusters_stay_together_and_widen_the_interval(self):
    rng = np.random.default_rng(0)
    cluster = np.repeat(rng.permutation(100), rng.integers(1, 8, 100))
    order = rng.permutation(len(cluster))
    cluster = cluster[order]
    outcome = rng.normal(size=100)[cluster]  # The same for all of a cluster.
    sums = []

    def metric(rows):
      counts = np.bincount(cluster[rows], minlength=100)
      sums.append(counts % np.maximum(np.bincount(cluster, minlength=100), 1))
      return np.array([outcome[rows].mean(), len(rows)])

    found = uplift.bootstrap(metric, len(cluster), cluster=cluster)
    self.assertFalse(np.any(sums))
    rows = uplift.bootstrap(lambda rows: outcome[rows].mean(), len(cluster))
    self.assertGreater(
      (found.high - found.low)[0], 1.4 * (rows.high - rows.low)
    )

  def test_wrong_arguments_are_told(self):
    with self.assertRaisesRegex(ValueError, "confidence"):
      uplift.bootstrap(len, 5, confidence=1.5)


if __name__ == "__main__":
  absltest.main()
