import math

import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats
from sklearn import metrics

from recjax import statistics


class PairedTTest(parameterized.TestCase):
  @parameterized.parameters(2, 3, 5, 10, 400)
  def test_equals_scipy(self, num_pairs):
    rng = np.random.default_rng(num_pairs)
    for shift in (0.0, 0.01, 0.3, 3.0):
      a = rng.normal(size=num_pairs)
      b = a - shift + 0.2 * rng.normal(size=num_pairs)
      expected = stats.ttest_rel(a, b)
      interval = expected.confidence_interval(0.95)
      np.testing.assert_allclose(
        statistics.paired_t_test(a, b),
        (np.mean(a - b), interval.low, interval.high, expected.pvalue),
        rtol=1e-9,
      )

  def test_one_pair_has_no_spread(self):
    result = statistics.paired_t_test(np.array([0.7]), np.array([0.5]))
    self.assertAlmostEqual(result.difference, 0.2)
    self.assertTrue(math.isnan(result.p_value))
    self.assertTrue(math.isnan(result.low))

  def test_equal_differences(self):
    a = np.array([0.5, 0.25, 1.0])
    self.assertEqual(statistics.paired_t_test(a, a), (0.0, 0.0, 0.0, 1.0))
    self.assertEqual(statistics.paired_t_test(a + 0.5, a), (0.5, 0.5, 0.5, 0.0))

  @parameterized.parameters(np.nan, np.inf)
  def test_value_that_is_not_finite_gives_nan(self, value):
    a = np.array([value, 1.0])
    result = statistics.paired_t_test(a, np.array([value, 2.0]))
    self.assertTrue(np.isnan(result).all())

  def test_no_pair_is_an_error(self):
    with self.assertRaisesRegex(ValueError, "at least one pair"):
      statistics.paired_t_test(np.zeros(0), np.zeros(0))


class HolmTest(absltest.TestCase):
  def test_equals_a_hand_computation(self):
    p = np.array([0.01, 0.005, np.nan, 0.03, 0.04])
    expected = [3 * 0.01, 4 * 0.005, np.nan, 2 * 0.03, max(2 * 0.03, 0.04)]
    np.testing.assert_allclose(statistics.holm(p), expected)

  def test_stays_at_most_one_and_takes_none(self):
    np.testing.assert_array_equal(
      statistics.holm(np.array([0.9, 0.6])), [1.0, 1.0]
    )
    self.assertEqual(statistics.holm(np.zeros(0)).size, 0)


def _data(num_users, rows_a_user, seed, gain=0.5, decimals=1):
  """Scores with ties; users differ in their base rate."""
  rng = np.random.default_rng(seed)
  user = rng.permutation(np.repeat(np.arange(num_users) * 7, rows_a_user))
  taste = rng.normal(size=num_users)[user // 7]
  labels = (rng.normal(size=user.size) + taste > 0).astype(np.float32)
  noise = rng.normal(size=(2, user.size))
  a = np.round(gain * labels + noise[0], decimals).astype(np.float32)
  b = np.round(0.5 * labels + noise[1], decimals).astype(np.float32)
  return a, b, labels, user


class BootstrapTest(absltest.TestCase):
  def test_equals_brute_force_over_the_same_draws(self):
    a, b, labels, user = _data(12, 8, seed=0)
    value, samples = statistics.bootstrap_auc(
      np.stack([a, b]), labels, user, num_samples=50, seed=3
    )
    rng = np.random.default_rng(3)
    differences = []
    for i in range(50):
      drawn = rng.integers(12, size=12)
      rows = np.concatenate([np.flatnonzero(user == 7 * u) for u in drawn])
      weights = np.bincount(drawn, minlength=12)[user // 7]
      for side, scores in enumerate((a, b)):
        refit = metrics.roc_auc_score(labels[rows], scores[rows])
        weighted = metrics.roc_auc_score(labels, scores, sample_weight=weights)
        self.assertAlmostEqual(refit, weighted, places=12)
        self.assertAlmostEqual(samples[side, i], refit, places=12)
      differences.append(samples[0, i] - samples[1, i])
    full = [metrics.roc_auc_score(labels, s) for s in (a, b)]
    np.testing.assert_allclose(value, full, rtol=1e-12)
    result = statistics.clustered_bootstrap(
      a, b, labels, user, num_samples=50, seed=3
    )
    side = min(
      np.sum(np.array(differences) <= 0), np.sum(np.array(differences) >= 0)
    )
    np.testing.assert_allclose(
      result,
      (
        full[0] - full[1],
        *np.percentile(differences, [2.5, 97.5]),
        2 * (1 + side) / 51,
      ),
      rtol=1e-9,
    )

  def test_interval_covers_the_truth_about_as_often_as_it_says(self):
    hits = []
    for seed in range(80):
      a, b, labels, user = _data(60, 5, seed, gain=0.5, decimals=6)
      result = statistics.clustered_bootstrap(
        a, b, labels, user, num_samples=200
      )
      hits.append(result.low <= 0 <= result.high)  # Both have one true AUC.
    # 95 % less the small-sample loss; four standard errors are 10 %.
    self.assertBetween(np.mean(hits), 0.85, 1.0)

  def test_finds_a_gain_and_draws_users_not_rows(self):
    a, b, labels, user = _data(300, 6, seed=1, gain=1.0)
    by_user = statistics.clustered_bootstrap(
      a, b, labels, user, num_samples=300
    )
    self.assertGreater(by_user.low, 0)
    self.assertAlmostEqual(by_user.p_value, 2 / 301)
    # The same rows twice hold nothing new: users see it, rows do not.
    twice = [np.tile(x, 4) for x in (a, b, labels, user)]
    again = statistics.clustered_bootstrap(*twice, num_samples=300)
    np.testing.assert_allclose(again, by_user, rtol=1e-9)
    rows = statistics.clustered_bootstrap(
      *twice[:3], np.arange(twice[0].size), num_samples=300
    )
    self.assertLess(rows.high - rows.low, 0.7 * (again.high - again.low))

  def test_leading_axes_are_averaged_over_the_same_draws(self):
    a, b, labels, user = _data(30, 5, seed=2)
    pairs = [
      statistics.bootstrap_auc(x, labels, user, num_samples=40)[1]
      for x in (a, b)
    ]
    result = statistics.clustered_bootstrap(
      np.stack([a, b]), np.stack([b, b]), labels, user, num_samples=40
    )
    low = np.percentile((pairs[0] - pairs[1]) / 2, 2.5)
    self.assertAlmostEqual(result.low, low, places=12)

  def test_same_scores_never_differ(self):
    a, _, labels, user = _data(20, 5, seed=4)
    result = statistics.clustered_bootstrap(
      a, 2 * a, labels, user.astype(str), num_samples=50
    )
    self.assertEqual(result, (0.0, 0.0, 0.0, 1.0))

  def test_draws_with_one_class_are_left_out(self):
    labels = np.array([1.0, 0.0, 0.0])
    scores = np.array([0.9, 0.5, 0.1])
    _, samples = statistics.bootstrap_auc(
      scores, labels, np.arange(3), num_samples=100
    )
    self.assertBetween(np.isnan(samples).sum(), 1, 99)
    result = statistics.clustered_bootstrap(
      scores, -scores, labels, np.arange(3), num_samples=100
    )
    self.assertEqual(result[:3], (1.0, 1.0, 1.0))

  def test_auc_inside_users_equals_scikit_learn(self):
    a, _, labels, user = _data(40, 6, seed=5)
    found = statistics.auc_of_clusters(a, labels, user)
    for value, one in zip(found, np.unique(user), strict=True):
      own = user == one
      if np.unique(labels[own]).size == 2:
        expected = metrics.roc_auc_score(labels[own], a[own])
        self.assertAlmostEqual(value, expected, places=12)
      else:
        self.assertTrue(math.isnan(value))
    self.assertBetween(np.isnan(found).sum(), 1, 39)

  def test_ratios_meet_the_draws_of_the_auc(self):
    numerators, denominators = np.arange(6.0), np.array([1, 2, 0, 1, 1, 3.0])
    value, samples = statistics.bootstrap_ratio(
      numerators, denominators, num_samples=30, seed=4
    )
    rng, expected = np.random.default_rng(4), []
    for _ in range(30):
      drawn = rng.integers(6, size=6)
      expected.append(numerators[drawn].sum() / denominators[drawn].sum())
    self.assertAlmostEqual(value, 15 / 8)
    np.testing.assert_allclose(samples, expected, rtol=1e-12)
    zero = statistics.bootstrap_ratio(numerators, np.zeros(6), num_samples=3)
    self.assertTrue(np.isnan(zero[1]).all())

  def test_bad_input_is_named(self):
    scores, user = np.array([0.1, 0.2]), np.arange(2)
    for labels, bad_scores, message in (
      (np.ones(2), scores, "both classes"),
      (np.array([0.0, np.nan]), scores, "0 or 1"),
      (np.array([0, 1]), np.array([0.1, np.nan]), "NaN"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        statistics.bootstrap_auc(bad_scores, labels, user)


if __name__ == "__main__":
  absltest.main()
