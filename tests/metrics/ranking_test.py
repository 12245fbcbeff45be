"""Ranking metrics against a loop over queries, and scikit-learn's NDCG."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from sklearn import metrics as sklearn_metrics

from recjax.metrics import ranking


def draw(seed, queries=40, candidates=30):
  rng = np.random.default_rng(seed)
  # Few different scores, so that many are equal.
  scores = rng.integers(0, 12, (queries, candidates + 1)).astype(np.float32)
  return scores[:, 0], scores[:, 1:], rng.random((queries, candidates)) < 0.8


def brute_force(target, others, where):
  """Place of the true item in the sorted list, last among equals."""
  ranks = []
  for query in range(len(target)):
    entries = [(-target[query], 1)]
    entries += [(-s, 0) for s in others[query][where[query]]]
    ranks.append(sorted(entries).index((-target[query], 1)))
  return np.array(ranks)


class RankingTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 2)
  def test_ranks_equal_a_sorted_list(self, seed):
    target, others, where = draw(seed)
    expected = brute_force(target, others, where)
    rank = ranking.rank_of_target(target, others, where=where)
    np.testing.assert_array_equal(rank, expected)
    on_device = jax.jit(ranking.rank_of_target)(
      jnp.asarray(target), jnp.asarray(others), where=jnp.asarray(where)
    )
    np.testing.assert_array_equal(on_device, expected)

  @parameterized.parameters(1, 5, 10)
  def test_ndcg_is_that_of_scikit_learn(self, k):
    rng = np.random.default_rng(k)
    scores = rng.permuted(np.tile(np.arange(31.0), (40, 1)), axis=1)
    relevance = np.zeros_like(scores)
    relevance[:, 0] = 1
    rank = ranking.rank_of_target(scores[:, 0], scores[:, 1:])
    expected = sklearn_metrics.ndcg_score(relevance, scores, k=k)
    np.testing.assert_allclose(ranking.ndcg(rank, k), expected, rtol=1e-12)
    expected = np.mean(np.argsort(np.argsort(-scores))[:, 0] < k)
    np.testing.assert_allclose(ranking.hit_rate(rank, k), expected)

  def test_a_constant_score_and_nan_earn_nothing(self):
    for value in (0.0, np.nan):
      rank = ranking.rank_of_target(np.full(3, value), np.full((3, 20), value))
      self.assertEqual(float(ranking.hit_rate(rank, 10)), 0)
      self.assertEqual(float(ranking.ndcg(rank, 10)), 0)

  def test_slices_by_bucket(self):
    rank, bucket = np.array([0, 7, 20, 3]), np.array([0, 1, 4, 4])
    names = ("0", "1-4", "5-9", "10-49", "50+")
    slices = ranking.bucket_slices(bucket, names, warm_from=4)
    metrics = ranking.summarize_ranks(rank, slices=slices)
    self.assertEqual(metrics["hr@5"], 0.5)
    self.assertEqual(metrics["cold/hr@10"], 1.0)
    self.assertEqual(metrics["warm/hr@10"], 0.5)
    self.assertEqual(metrics["50+/queries"], 2)
    self.assertTrue(np.isnan(metrics["5-9/ndcg@5"]))
    expected = (1 / np.log2(2) + 1 / np.log2(5)) / 4
    self.assertAlmostEqual(metrics["ndcg@5"], expected)

  def test_candidates_are_distinct_unknown_and_uniform(self):
    rng = np.random.default_rng(0)
    known = rng.random((4000, 12)) < 0.3
    known[:, 0] = True
    known[:, 6:] = False
    drawn = ranking.sample_candidates(12, known, 5, seed=1)
    self.assertTrue(all(len(set(row)) == 5 for row in drawn.tolist()))
    self.assertFalse(np.take_along_axis(known, drawn, 1).any())
    counts = np.bincount(drawn.ravel(), minlength=12)[6:]
    self.assertLess(counts.std() / counts.mean(), 0.05)
    again = ranking.sample_candidates(12, known, 5, seed=1)
    np.testing.assert_array_equal(drawn, again)
    with self.assertRaisesRegex(ValueError, "cannot draw 12 candidates"):
      ranking.sample_candidates(12, known, 12, seed=1)


if __name__ == "__main__":
  absltest.main()
