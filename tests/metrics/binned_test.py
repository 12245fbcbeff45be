import jax
import numpy as np
from absl.testing import absltest
from jax.sharding import PartitionSpec

from recjax.metrics import auc as auc_lib
from recjax.metrics import calibration
from recjax.metrics.binned import BinnedMetrics
from recjax.metrics.summary import summarize


def _data(size=4096, seed=0):
  rng = np.random.default_rng(seed)
  logits = (2 * rng.normal(size=size) - 2).astype(np.float32)
  labels = (rng.random(size) < 1 / (1 + np.exp(-logits))).astype(np.float32)
  return logits, labels, rng.random(size) < 0.8


_update = jax.jit(lambda state, x, y, mask: state.update(x, y, mask=mask))
_compute = jax.jit(lambda state: state.compute())
_merge = jax.jit(lambda left, right: left.merge(right))


def _state(logits, labels, mask):
  return _update(BinnedMetrics.empty(), logits, labels, mask)


class BinnedMetricsTest(absltest.TestCase):
  def test_equals_the_metrics_of_all_rows(self):
    logits, labels, mask = _data()
    expected = summarize(logits, labels, mask=mask)
    metrics = _compute(_state(logits, labels, mask))
    for name in ("logloss", "ne", "pcoc", "ece"):
      np.testing.assert_allclose(
        metrics[name], expected[name], rtol=2e-6, atol=1e-6, err_msg=name
      )
    error = abs(float(metrics["auc"]) - expected["auc"])
    self.assertLess(error, 1e-5)
    self.assertLessEqual(error, metrics["auc_error_bound"])
    self.assertLess(metrics["auc_error_bound"], 1e-3)

  def test_auc_is_exact_for_the_binned_scores(self):
    logits, labels, _ = _data()
    logits = np.round(logits * 4) / 4 + np.float32(0.01)
    state = BinnedMetrics.empty(num_score_bins=128)
    state = _update(state, logits, labels, np.ones(logits.size, bool))
    np.testing.assert_allclose(
      _compute(state)["auc"], auc_lib.auc(logits, labels), atol=1e-6
    )

  def test_reliability_curve(self):
    logits, labels, mask = _data()
    probs = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = calibration.reliability_curve(probs, labels, mask=mask)
    curve = _state(logits, labels, mask).reliability_curve()
    for name, value in expected._asdict().items():
      np.testing.assert_allclose(getattr(curve, name), value, rtol=1e-6)

  def test_merged_splits_equal_the_whole(self):
    logits, labels, mask = _data()
    whole = _state(logits, labels, mask)
    merged = BinnedMetrics.empty()
    for part in np.split(np.arange(logits.size), 4):
      merged = _merge(merged, _state(logits[part], labels[part], mask[part]))
    for name in ("positives", "negatives", "count", "label_sum"):
      np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))
    for name, value in _compute(whole).items():
      np.testing.assert_allclose(
        _compute(merged)[name], value, rtol=1e-6, atol=1e-7
      )

  def test_psum_over_devices_equals_the_whole(self):
    logits, labels, mask = _data()
    num_devices = jax.device_count()
    mesh = jax.make_mesh(
      (num_devices,), ("data",), (jax.sharding.AxisType.Auto,)
    )

    def local(logits, labels, mask):
      state = BinnedMetrics.empty().update(logits, labels, mask=mask)
      return jax.lax.psum(state, "data")

    rows = PartitionSpec("data")
    summed = jax.jit(
      jax.shard_map(
        local, mesh=mesh, in_specs=(rows,) * 3, out_specs=PartitionSpec()
      )
    )(logits, labels, mask)
    whole = _state(logits, labels, mask)
    np.testing.assert_array_equal(summed.count, whole.count)
    np.testing.assert_array_equal(summed.positives, whole.positives)
    for name, value in _compute(whole).items():
      np.testing.assert_allclose(
        _compute(summed)[name], value, rtol=1e-6, atol=1e-7
      )

  def test_many_updates_lose_nothing(self):
    # A plain float32 sum is off by more than 1e-4 after these updates.
    logits = np.full(1024, 0.1, np.float32)
    labels = np.zeros(1024, np.float32)
    mask = np.ones(1024, bool)
    state = jax.jit(
      lambda: jax.lax.fori_loop(
        0,
        20_000,
        lambda _, s: s.update(logits, labels, mask=mask),
        BinnedMetrics.empty(num_score_bins=16),
      )
    )()
    self.assertEqual(state.count.sum(), 20_000 * 1024)
    expected = calibration.log_loss_with_logits(
      logits.astype(np.float64), labels
    )
    np.testing.assert_allclose(_compute(state)["logloss"], expected, rtol=5e-7)

  def test_masked_rows_change_nothing(self):
    logits, labels, _ = _data(8)
    state = _state(logits, labels, np.ones(8, bool))
    nan = np.full(8, np.nan, np.float32)
    after = _update(state, nan, nan, np.zeros(8, bool))
    for before, now in zip(
      jax.tree.leaves(state), jax.tree.leaves(after), strict=True
    ):
      np.testing.assert_array_equal(before, now)

  def test_undefined_is_nan(self):
    for name, value in _compute(BinnedMetrics.empty()).items():
      self.assertTrue(np.isnan(value), name)
    ones = _state(np.zeros(4, np.float32), np.ones(4), np.ones(4, bool))
    self.assertTrue(np.isnan(_compute(ones)["auc"]))
    self.assertTrue(np.isnan(_compute(ones)["ne"]))
    nan = _state(np.full(2, np.nan, np.float32), np.eye(2)[0], np.ones(2, bool))
    for name in ("auc", "logloss", "pcoc", "ece"):
      self.assertTrue(np.isnan(_compute(nan)[name]), name)

  def test_extreme_logits_go_to_the_outer_bins(self):
    logits = np.array([-np.inf, -100, 100, np.inf], np.float32)
    labels = np.array([0, 0, 1, 1], np.float32)
    metrics = _compute(_state(logits, labels, np.ones(4, bool)))
    self.assertEqual(metrics["auc"], 1)
    self.assertEqual(metrics["logloss"], 0)
    self.assertEqual(metrics["pcoc"], 1)


if __name__ == "__main__":
  absltest.main()
