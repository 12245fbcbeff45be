import functools

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.metrics
from absl.testing import absltest, parameterized

from recjax.metrics import calibration


def _data(size=1000, seed=0):
  rng = np.random.default_rng(seed)
  logits = (rng.normal(size=size) - 1).astype(np.float32)
  labels = (rng.random(size) < 1 / (1 + np.exp(-logits))).astype(np.float32)
  probs = (1 / (1 + np.exp(-0.8 * logits - 0.2))).astype(np.float32)
  return logits, probs, labels


def _ece(probs, labels, num_bins):
  """Loop over bins, in the words of the definition."""
  edges = np.linspace(0, 1, num_bins + 1)
  value = 0.0
  for b in range(num_bins):
    inside = (probs >= edges[b]) & (probs < edges[b + 1])
    if b == num_bins - 1:
      inside |= probs == 1
    if inside.any():
      gap = abs(probs[inside].mean() - labels[inside].mean())
      value += inside.mean() * gap
  return value


def _host(function, predictions, labels, mask):
  return function(predictions, labels, mask=mask)


def _jitted(function, predictions, labels, mask):
  mask = mask if mask is None else jnp.asarray(mask)
  return jax.jit(function)(
    jnp.asarray(predictions), jnp.asarray(labels), mask=mask
  )


_PATHS = (("host", _host), ("jitted", _jitted))
_MASS_ECE = functools.partial(calibration.ece, binning="equal_mass")
_ON_PROBS = (
  calibration.log_loss,
  calibration.normalized_entropy,
  calibration.pcoc,
  calibration.ece,
  _MASS_ECE,
)


class CalibrationTest(parameterized.TestCase):
  @parameterized.named_parameters(*_PATHS)
  def test_log_loss_equals_scikit_learn(self, run):
    logits, probs, labels = _data()
    expected = sklearn.metrics.log_loss(labels, probs.astype(np.float64))
    np.testing.assert_allclose(
      run(calibration.log_loss, probs, labels, None), expected, rtol=1e-6
    )
    probs = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(
      run(calibration.log_loss_with_logits, logits, labels, None),
      sklearn.metrics.log_loss(labels, probs),
      rtol=1e-6,
    )

  @parameterized.named_parameters(*_PATHS)
  def test_log_loss_at_the_ends(self, run):
    labels = np.array([1, 0], np.float32)
    right, wrong = labels, 1 - labels
    eps = np.finfo(np.float32).eps
    loss = run(calibration.log_loss, wrong, labels, None)
    np.testing.assert_allclose(loss, -np.log(eps), rtol=1e-3)
    self.assertLess(run(calibration.log_loss, right, labels, None), 1e-6)
    far = np.array([500, -500], np.float32)
    loss = run(calibration.log_loss_with_logits, far, labels, None)
    self.assertLess(float(loss), 1e-200)
    loss = run(calibration.log_loss_with_logits, -far, labels, None)
    self.assertEqual(loss, 500)
    infinite = far * np.float32(np.inf)
    loss = run(calibration.log_loss_with_logits, infinite, labels, None)
    self.assertEqual(loss, 0)

  @parameterized.named_parameters(*_PATHS)
  def test_normalized_entropy_of_the_base_rate_is_one(self, run):
    _, probs, labels = _data()
    rate = np.full_like(probs, labels.mean(dtype=np.float64))
    np.testing.assert_allclose(
      run(calibration.normalized_entropy, rate, labels, None), 1, rtol=1e-6
    )
    p = labels.mean(dtype=np.float64)
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    np.testing.assert_allclose(
      run(calibration.normalized_entropy, probs, labels, None),
      sklearn.metrics.log_loss(labels, probs.astype(np.float64)) / entropy,
      rtol=1e-6,
    )

  @parameterized.named_parameters(*_PATHS)
  def test_pcoc(self, run):
    _, probs, labels = _data()
    np.testing.assert_allclose(
      run(calibration.pcoc, probs, labels, None),
      probs.sum(dtype=np.float64) / labels.sum(dtype=np.float64),
      rtol=1e-6,
    )

  @parameterized.product(path=_PATHS, num_bins=(1, 8, 15))
  def test_ece_equals_a_loop_over_bins(self, path, num_bins):
    _, probs, labels = _data()
    probs[:3] = 0, 1, 0.5
    function = functools.partial(calibration.ece, num_bins=num_bins)
    np.testing.assert_allclose(
      path[1](function, probs, labels, None),
      _ece(probs.astype(np.float64), labels, num_bins),
      atol=1e-6,
    )

  @parameterized.named_parameters(*_PATHS)
  def test_equal_mass_bins_hold_equal_shares(self, run):
    _, probs, labels = _data(1003)
    mask = np.random.default_rng(5).random(1003) < 0.9
    curve = run(
      functools.partial(
        calibration.reliability_curve, num_bins=7, binning="equal_mass"
      ),
      probs,
      labels,
      mask,
    )
    order = np.argsort(probs[mask])
    parts = [
      order[len(order) * b // 7 : len(order) * (b + 1) // 7] for b in range(7)
    ]
    np.testing.assert_array_equal(curve.count, [len(part) for part in parts])
    np.testing.assert_allclose(
      curve.prob_sum, [probs[mask][part].sum() for part in parts], rtol=1e-5
    )
    np.testing.assert_allclose(
      curve.label_sum, [labels[mask][part].sum() for part in parts]
    )

  @parameterized.named_parameters(*_PATHS)
  def test_equal_mass_keeps_equal_probabilities_together(self, run):
    probs = np.array([0.1, 0.3, 0.3, 0.3, 0.3, 0.9], np.float32)
    labels = np.array([0, 1, 0, 1, 0, 1], np.float32)
    function = functools.partial(
      calibration.reliability_curve, num_bins=3, binning="equal_mass"
    )
    for order in (np.arange(6), np.arange(6)[::-1], np.roll(np.arange(6), 2)):
      curve = run(function, probs[order], labels[order], None)
      np.testing.assert_array_equal(curve.count, [5, 0, 1])
      np.testing.assert_array_equal(curve.label_sum, [2, 0, 1])

  @parameterized.product(path=_PATHS, function=_ON_PROBS)
  def test_masked_examples_do_not_count(self, path, function):
    _, probs, labels = _data()
    mask = np.random.default_rng(4).random(probs.size) < 0.6
    expected = path[1](function, probs[mask], labels[mask], None)
    probs[~mask], labels[~mask] = np.nan, np.inf
    np.testing.assert_allclose(
      path[1](function, probs, labels, mask), expected, rtol=1e-6
    )

  @parameterized.product(path=_PATHS, function=_ON_PROBS)
  def test_undefined_is_nan(self, path, function):
    _, probs, labels = _data(8)
    nobody = np.zeros(8, bool)
    self.assertTrue(np.isnan(path[1](function, probs, labels, nobody)))
    self.assertTrue(np.isnan(path[1](function, probs[:0], labels[:0], None)))
    probs[2] = np.nan
    self.assertTrue(np.isnan(path[1](function, probs, 1 - 0 * labels, None)))

  @parameterized.named_parameters(*_PATHS)
  def test_one_class(self, run):
    _, probs, labels = _data(8)
    for function in (calibration.normalized_entropy, calibration.pcoc):
      self.assertTrue(np.isnan(run(function, probs, 0 * labels, None)))
    entropy = calibration.base_rate_entropy(0 * labels + 1)
    self.assertEqual(entropy, 0)

  @parameterized.parameters(*_ON_PROBS)
  def test_device_sums_of_a_million_rows(self, function):
    _, probs, labels = _data(1_000_000)
    np.testing.assert_allclose(
      _jitted(function, probs, labels, None),
      _host(function, probs, labels, None),
      rtol=2e-6,
      atol=1e-6,
    )

  def test_bfloat16_has_its_own_limit(self):
    probs = jnp.array([0.0], jnp.bfloat16)
    loss = calibration.log_loss(probs, jnp.array([1.0]))
    np.testing.assert_allclose(loss, 7 * np.log(2), rtol=1e-6)

  def test_wrong_options_are_refused(self):
    function = calibration.reliability_curve
    function = getattr(function, "__wrapped__", function)
    with self.assertRaisesRegex(ValueError, "unknown binning 'log'"):
      function(np.zeros(2), np.zeros(2), binning="log")
    with self.assertRaisesRegex(ValueError, "num_bins must be at least 1"):
      calibration.ece(np.zeros(2), np.zeros(2), num_bins=0)


if __name__ == "__main__":
  absltest.main()
