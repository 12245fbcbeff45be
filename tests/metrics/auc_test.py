import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from recjax.metrics import auc as auc_lib


def _pairs_auc(scores, labels):
  """Every pair, one by one."""
  gaps = scores[labels == 1][:, None] - scores[labels == 0][None, :]
  return np.mean((gaps > 0) + 0.5 * (gaps == 0)) if gaps.size else np.nan


def _loop_over_groups(scores, labels, group_id, weighting):
  values, weights, left_out = [], [], 0
  for group in np.unique(group_id):
    inside = group_id == group
    value = _pairs_auc(scores[inside], labels[inside])
    if np.isnan(value):
      left_out += 1
    else:
      values.append(value)
      weights.append(inside.sum() if weighting == "examples" else 1)
  mean = np.average(values, weights=weights) if values else np.nan
  return mean, left_out


def _data(size, seed=0, num_groups=10, levels=None):
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=size)
  if levels is not None:
    scores = np.round(scores * levels) / levels
  labels = (rng.random(size) < 1 / (1 + np.exp(-scores))).astype(np.float32)
  group_id = rng.integers(0, num_groups, size)
  return scores.astype(np.float32), labels, group_id


# The same contract for NumPy, and for JAX under jit.
def _on_host(function, *args, **kwargs):
  return function(*args, **kwargs)


def _to_device(x):
  return x if x is None else jnp.asarray(x)


def _jitted(function, *args, weighting=None, **kwargs):
  if weighting is not None:
    function = functools.partial(function, weighting=weighting)
  kwargs = {name: _to_device(value) for name, value in kwargs.items()}
  return jax.jit(function)(*map(_to_device, args), **kwargs)


_PATHS = (("host", _on_host), ("jitted", _jitted))


class AucTest(parameterized.TestCase):
  @parameterized.named_parameters(*_PATHS)
  def test_equals_scikit_learn(self, run):
    for levels in (None, 2):
      scores, labels, _ = _data(5000, levels=levels)
      self.assertAlmostEqual(
        float(run(auc_lib.auc, scores, labels)),
        roc_auc_score(labels, scores),
        delta=1e-6,
      )

  @parameterized.named_parameters(*_PATHS)
  def test_equals_all_pairs_with_ties(self, run):
    for seed in range(20):
      scores, labels, _ = _data(12, seed, levels=1)
      np.testing.assert_allclose(
        run(auc_lib.auc, scores, labels),
        _pairs_auc(scores, labels),
        atol=1e-6,
      )

  @parameterized.named_parameters(*_PATHS)
  def test_order_of_rows_does_not_matter(self, run):
    scores, labels, _ = _data(300, levels=3)
    order = np.random.default_rng(1).permutation(300)
    self.assertEqual(
      run(auc_lib.auc, scores, labels),
      run(auc_lib.auc, scores[order], labels[order]),
    )

  @parameterized.named_parameters(*_PATHS)
  def test_constant_scores_give_one_half(self, run):
    scores = np.array([0.0, -0.0, 0.0, -0.0], np.float32)
    labels = np.array([0, 1, 0, 0], np.float32)
    self.assertEqual(run(auc_lib.auc, scores, labels), 0.5)

  @parameterized.named_parameters(*_PATHS)
  def test_infinite_scores_are_ordered(self, run):
    scores = np.array([-np.inf, -1e30, 1e-30, np.inf], np.float32)
    labels = np.array([0, 0, 1, 1], np.float32)
    self.assertEqual(run(auc_lib.auc, scores, labels), 1.0)

  @parameterized.named_parameters(*_PATHS)
  def test_masked_examples_do_not_count(self, run):
    scores, labels, _ = _data(400, levels=5)
    mask = np.random.default_rng(2).random(400) < 0.5
    expected = roc_auc_score(labels[mask], scores[mask])
    scores[~mask] = np.nan
    labels[~mask] = np.nan
    np.testing.assert_allclose(
      run(auc_lib.auc, scores, labels, mask=mask), expected, atol=1e-6
    )

  @parameterized.named_parameters(*_PATHS)
  def test_undefined_is_nan(self, run):
    scores = np.array([0.1, 0.2, 0.3], np.float32)
    ones = np.ones(3, np.float32)
    both = np.array([0, 1, 1], np.float32)
    nobody = np.zeros(3, bool)
    with_nan = np.array([0.1, np.nan, 0.3], np.float32)
    self.assertTrue(np.isnan(run(auc_lib.auc, scores, ones)))
    self.assertTrue(np.isnan(run(auc_lib.auc, scores, 0 * ones)))
    self.assertTrue(np.isnan(run(auc_lib.auc, scores, both, mask=nobody)))
    self.assertTrue(np.isnan(run(auc_lib.auc, scores[:0], both[:0])))
    self.assertTrue(np.isnan(run(auc_lib.auc, with_nan, both)))

  def test_float64_scores_keep_their_precision(self):
    scores = 1.0 + 1e-12 * np.arange(4)
    self.assertEqual(auc_lib.auc(scores, np.array([0, 0, 1, 1])), 1.0)

  def test_device_is_exact_enough_at_100_000_rows(self):
    scores, labels, group_id = _data(100_000, num_groups=5000, levels=1000)
    for function, args in (
      (auc_lib.auc, (scores, labels)),
      (auc_lib.grouped_auc, (scores, labels, group_id)),
    ):
      np.testing.assert_allclose(
        _jitted(function, *args), function(*args), rtol=0, atol=5e-7
      )

  def test_wrong_labels_and_sizes_are_refused(self):
    with self.assertRaisesRegex(ValueError, "labels must be 0 or 1, got 2"):
      auc_lib.auc(np.array([0.1, 0.2]), np.array([0, 2]))
    rows = jax.ShapeDtypeStruct((auc_lib.MAX_DEVICE_EXAMPLES + 1,), jnp.float32)
    with self.assertRaisesRegex(ValueError, "pass NumPy arrays"):
      jax.eval_shape(auc_lib.auc, rows, rows)

  @settings(max_examples=60, deadline=None)
  @given(
    st.lists(
      st.tuples(st.integers(-50, 50), st.booleans()),
      min_size=2,
      max_size=40,
    )
  )
  def test_monotone_transforms_change_nothing(self, rows):
    scores = np.array([score for score, _ in rows], np.float64)
    labels = np.array([label for _, label in rows], np.int32)
    expected = auc_lib.auc(scores, labels)
    np.testing.assert_allclose(expected, _pairs_auc(scores, labels), atol=1e-12)
    for transformed in (scores**3 - 7, np.exp(scores), np.arctan(scores)):
      np.testing.assert_equal(auc_lib.auc(transformed, labels), expected)
    np.testing.assert_allclose(
      auc_lib.auc(-scores, labels), 1 - expected, atol=1e-12
    )


class GroupedAucTest(parameterized.TestCase):
  @parameterized.product(
    path=_PATHS, weighting=("examples", "uniform"), levels=(None, 1)
  )
  def test_equals_a_loop_over_groups(self, path, weighting, levels):
    scores, labels, group_id = _data(500, num_groups=150, levels=levels)
    mask = np.random.default_rng(3).random(500) < 0.8
    expected, left_out = _loop_over_groups(
      scores[mask], labels[mask], group_id[mask], weighting
    )
    scores[~mask] = np.nan
    parts = path[1](
      auc_lib.grouped_auc_parts,
      scores,
      labels,
      group_id,
      mask=mask,
      weighting=weighting,
    )
    np.testing.assert_allclose(parts.value, expected, atol=1e-6)
    self.assertGreater(left_out, 0)
    self.assertEqual(parts.num_one_class_groups, left_out)
    self.assertEqual(parts.num_groups, np.unique(group_id[mask]).size)

  @parameterized.named_parameters(*_PATHS)
  def test_counts_of_what_is_left_out(self, run):
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32)
    labels = np.array([0, 1, 1, 1, 0, 1], np.float32)
    group_id = np.array([4, 4, 2, 2, 9, 7])
    mask = np.array([1, 1, 1, 1, 1, 0], bool)
    parts = run(auc_lib.grouped_auc_parts, scores, labels, group_id, mask=mask)
    self.assertEqual(tuple(map(float, parts)), (1.0, 3.0, 2.0, 3.0))

  @parameterized.named_parameters(*_PATHS)
  def test_no_two_class_group_is_nan(self, run):
    scores = np.array([0.1, 0.2, 0.3], np.float32)
    labels = np.array([0, 1, 1], np.float32)
    group_id = np.array([0, 1, 1])
    parts = run(auc_lib.grouped_auc_parts, scores, labels, group_id)
    self.assertTrue(np.isnan(parts.value))
    self.assertEqual(parts.num_one_class_groups, 2)
    nobody = np.zeros(3, bool)
    parts = run(
      auc_lib.grouped_auc_parts, scores, labels, group_id, mask=nobody
    )
    self.assertTrue(np.isnan(parts.value))
    self.assertEqual(parts.num_groups, 0)

  @parameterized.parameters(
    (np.int8, 1, -128),
    (np.int32, 20_000_000, -(2**31)),
    (np.int64, 10**16, -(2**63)),
    (np.int64, 3, 2**62),
    (np.uint64, 5, 2**64 - 1000),
  )
  def test_any_integers_name_groups(self, dtype, step, start):
    scores, labels, group_id = _data(600, num_groups=200)
    expected, _ = _loop_over_groups(scores, labels, group_id, "examples")
    names = [start + step * int(group) for group in group_id]
    names = np.array(names, dtype)
    np.testing.assert_allclose(
      auc_lib.grouped_auc(scores, labels, names), expected, atol=1e-12
    )

  def test_host_ids_beside_device_scores_are_not_cut_to_32_bits(self):
    scores, labels, group_id = _data(60, num_groups=20)
    np.testing.assert_allclose(
      auc_lib.grouped_auc(
        jnp.asarray(scores), jnp.asarray(labels), group_id * 2**32
      ),
      auc_lib.grouped_auc(scores, labels, group_id),
      atol=1e-6,
    )

  @parameterized.named_parameters(*_PATHS)
  def test_one_group_is_the_plain_auc(self, run):
    scores, labels, group_id = _data(200, levels=4)
    self.assertEqual(
      run(auc_lib.grouped_auc, scores, labels, 0 * group_id + 3),
      run(auc_lib.auc, scores, labels),
    )

  def test_unknown_weighting_is_refused(self):
    # Past the annotations, which tests check and production does not.
    function = auc_lib.grouped_auc_parts
    function = getattr(function, "__wrapped__", function)
    with self.assertRaisesRegex(ValueError, "unknown weighting 'size'"):
      function(np.zeros(2), np.array([0, 1]), None, weighting="size")

  @pytest.mark.slow
  def test_ten_million_rows_and_a_million_groups(self):
    size = 10_000_000
    rng = np.random.default_rng(0)
    scores = rng.normal(size=size).astype(np.float32)
    labels = (rng.random(size) < 0.4 + 0.05 * scores).astype(np.float32)
    group_id = rng.integers(0, 1_000_000, size)
    start = time.perf_counter()
    value = auc_lib.auc(scores, labels)
    parts = auc_lib.grouped_auc_parts(scores, labels, group_id)
    seconds = time.perf_counter() - start
    # Pairs reach 2.4e13 here: too many for 32 bits, exact for these sums.
    self.assertAlmostEqual(value, roc_auc_score(labels, scores), delta=1e-9)
    self.assertAlmostEqual(parts.value, value, delta=2e-3)
    self.assertEqual(parts.num_groups, np.unique(group_id).size)
    self.assertLess(seconds, 60)


if __name__ == "__main__":
  absltest.main()
