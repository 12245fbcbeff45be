import numpy as np
import sklearn.metrics
from absl.testing import absltest

from recjax.metrics import auc as auc_lib
from recjax.metrics.summary import summarize, summarize_real


class SummaryTest(absltest.TestCase):
  def test_every_metric_has_its_printed_name(self):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=400).astype(np.float32)
    labels = (rng.random(400) < 0.3).astype(np.float32)
    mask = rng.random(400) < 0.9
    user, page = rng.integers(0, 40, 400), rng.integers(0, 90, 400)
    metrics = summarize(
      logits, labels, mask=mask, groups={"group": user, "query": page}
    )
    x, y = logits[mask].astype(np.float64), labels[mask].astype(np.float64)
    probs = 1 / (1 + np.exp(-x))
    rate = np.full_like(probs, y.mean())
    log_loss = sklearn.metrics.log_loss
    users = auc_lib.grouped_auc_parts(x, y, user[mask])
    pages = auc_lib.grouped_auc_parts(x, y, page[mask], weighting="uniform")
    expected = {
      "auc": sklearn.metrics.roc_auc_score(y, x),
      "logloss": log_loss(y, probs),
      "ne": log_loss(y, probs) / log_loss(y, rate),
      "pcoc": probs.sum() / y.sum(),
      "ece": metrics["ece"],
      "gauc": users.value,
      "gauc_one_class_groups": users.num_one_class_groups,
      "qauc": pages.value,
      "qauc_one_class_groups": pages.num_one_class_groups,
    }
    self.assertGreater(pages.num_one_class_groups, 0)
    self.assertEqual(list(metrics), list(expected))
    for name, value in expected.items():
      self.assertIs(type(metrics[name]), float)
      self.assertAlmostEqual(metrics[name], value, delta=1e-9, msg=name)

  def test_all_masked_is_nan(self):
    rows, nobody = np.zeros(3, np.float32), np.zeros(3, bool)
    metrics = summarize(
      rows, rows, mask=nobody, groups={"group": np.zeros(3, np.int32)}
    )
    self.assertEqual(metrics.pop("gauc_one_class_groups"), 0)
    self.assertTrue(all(np.isnan(value) for value in metrics.values()))

  def test_unknown_group_is_refused(self):
    rows = np.array([0.0, 1.0])
    with self.assertRaisesRegex(ValueError, "unknown group 'user'"):
      summarize(rows, rows, groups={"user": np.array([0, 0])})

  def test_real_labels(self):
    rng = np.random.default_rng(0)
    predictions, labels = rng.normal(size=50), 10 * rng.normal(size=50)
    mask = rng.random(50) < 0.7
    expected = {
      "mae": sklearn.metrics.mean_absolute_error(
        labels[mask], predictions[mask]
      ),
      "rmse": sklearn.metrics.root_mean_squared_error(
        labels[mask], predictions[mask]
      ),
    }
    predictions[~mask], labels[~mask] = np.inf, np.inf
    metrics = summarize_real(predictions, labels, mask=mask)
    self.assertEqual(list(metrics), list(expected))
    for name, value in expected.items():
      self.assertAlmostEqual(metrics[name], value, delta=1e-9)
    nobody = summarize_real(predictions, labels, mask=0 * mask > 0)
    self.assertTrue(np.isnan(nobody["mae"]) and np.isnan(nobody["rmse"]))


if __name__ == "__main__":
  absltest.main()
