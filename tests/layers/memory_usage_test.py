"""Use of the slots against plain NumPy counting."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from scipy import stats

from recjax.layers import memory_usage

NUM_KEYS, NUM_SLOTS = 8, 64


def make_reads(seed=0, tokens=2, batch=5, heads=2, top_k=3):
  rng = np.random.default_rng(seed)
  shape = (tokens, batch, heads, top_k)
  reads = {
    "slots": rng.integers(0, NUM_SLOTS, shape).astype(np.int32),
    "weights": rng.dirichlet(np.ones(top_k), shape[:-1]).astype(np.float32),
  }
  value = rng.normal(size=(2, batch, 4)).astype(np.float32)
  return reads, value, np.arange(batch) < 3


def count(reads, value, mask):
  return jax.device_get(
    memory_usage.count(
      jax.tree.map(jnp.asarray, reads),
      jnp.asarray(value),
      jnp.asarray(mask),
      num_slots=NUM_SLOTS,
    )
  )


def summarize(hits):
  counts = dict(
    hits=np.asarray(hits), max_weight_sum=3.0, searches=6.0, gate_sum=1.0,
    gates=4.0,
  )  # fmt: skip
  return memory_usage.summarize(counts)


class MemoryUsageTest(absltest.TestCase):
  def test_count_equals_numpy_over_valid_examples(self):
    for tokens in (1, 2):
      reads, value, mask = make_reads(tokens=tokens)
      counts = count(reads, value, mask)
      slots, weights = reads["slots"][:, :3], reads["weights"][:, :3]
      np.testing.assert_array_equal(
        counts["hits"], np.bincount(slots.ravel(), minlength=NUM_SLOTS)
      )
      self.assertEqual(counts["searches"], tokens * 3 * 2)
      self.assertEqual(counts["gates"], 2 * 3 * 4)
      np.testing.assert_allclose(
        counts["max_weight_sum"], weights.max(-1).sum(), rtol=1e-6
      )
      np.testing.assert_allclose(
        counts["gate_sum"], np.abs(np.tanh(value[:, :3])).sum(), rtol=1e-6
      )

  def test_counts_add_over_batches(self):
    reads, value, _ = make_reads()
    every = np.ones(5, bool)
    parts = [
      count(
        {k: v[:, part] for k, v in reads.items()}, value[:, part], every[part]
      )
      for part in (slice(0, 2), slice(2, 5))
    ]
    total = jax.tree.map(np.add, *parts)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
      total,
      count(reads, value, every),
    )

  def test_summary_equals_scipy(self):
    hits = np.random.default_rng(0).poisson(2, NUM_SLOTS)
    share = hits / hits.sum()
    summary = summarize(hits)
    uniform = np.full(NUM_SLOTS, 1 / NUM_SLOTS)
    expected = {
      "slots_hit": np.count_nonzero(hits) / NUM_SLOTS,
      "perplexity": np.exp(stats.entropy(share)) / NUM_SLOTS,
      "kl_uniform": stats.entropy(share, uniform),
      "top1pct_share": share.max(),
      "max_weight": 0.5,
      "gate": 0.25,
      "dead_rows": 0.0,
      "dead_cols": 0.0,
      "collapsed": 0.0,
    }
    self.assertCountEqual(summary, expected)
    for name, value in expected.items():
      self.assertAlmostEqual(summary[name], value, places=12, msg=name)

  def test_even_use_is_no_collapse(self):
    summary = summarize(np.full(NUM_SLOTS, 7))
    self.assertAlmostEqual(summary["perplexity"], 1.0)
    self.assertAlmostEqual(summary["kl_uniform"], 0.0)
    self.assertEqual(summary["collapsed"], 0)
    self.assertEqual(summary["slots_hit"], 1)

  def test_planted_collapse_is_flagged(self):
    hits = np.zeros(NUM_SLOTS, int)
    hits[5 * NUM_KEYS + 2 : 5 * NUM_KEYS + 5] = 100
    summary = summarize(hits)
    self.assertEqual(summary["collapsed"], 1)
    self.assertAlmostEqual(summary["perplexity"], 3 / NUM_SLOTS)
    self.assertAlmostEqual(summary["dead_rows"], 7 / 8)
    self.assertAlmostEqual(summary["dead_cols"], 5 / 8)
    self.assertAlmostEqual(summary["top1pct_share"], 1 / 3)
    hits[0] = 100
    self.assertEqual(summarize(hits)["collapsed"], 0)

  def test_busiest_percent_of_a_large_memory(self):
    hits = np.ones(400, int)
    hits[[3, 17, 200, 399]] = 101
    self.assertAlmostEqual(summarize(hits)["top1pct_share"], 404 / 800)

  def test_histogram_is_sorted(self):
    counts = {"hits": jnp.asarray([1, 5, 0, 2])}
    self.assertEqual(memory_usage.slot_histogram(counts), [5, 2, 1, 0])


if __name__ == "__main__":
  absltest.main()
