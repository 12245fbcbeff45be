"""Tests of what a row may know of the outcomes before it."""

import numpy as np
from absl.testing import absltest, parameterized

from recjax.data import causal


def _log(seed, rows=300, width=None, num_keys=12, num_times=60):
  rng = np.random.default_rng(seed)
  shape = rows if width is None else (rows, width)
  key = rng.integers(-1, num_keys, shape)
  if width is not None:  # A row names a group once.
    key = np.stack([rng.permutation(num_keys + 1)[:width] - 1 for _ in key])
  time = np.sort(rng.integers(0, num_times, rows))
  # Parts follow time but overlap, as days cut by another clock do.
  late = time + rng.integers(-4, 5, rows)
  part = np.digitize(late, [num_times // 2, 3 * num_times // 4])
  return key, time, part, rng.integers(0, 5, (rows, 3))


def _brute_force(key, time, part, values):
  sums = np.zeros(values.shape, np.int64)
  key = key.reshape(len(key), -1)
  for row in range(len(key)):
    for event in range(len(key)):
      open_parts = (0, 1) if part[row] == 2 else (0,)
      if time[event] >= time[row] or part[event] not in open_parts:
        continue
      shared = set(key[row]) & set(key[event]) - {-1}
      sums[row] += len(shared) * values[event]
  return sums


class CausalTest(parameterized.TestCase):
  @parameterized.product(
    seed=(0, 1), width=(None, 3), max_rows=(1, 7, 64, 1 << 20)
  )
  def test_sums_equal_a_loop_for_every_block_size(self, seed, width, max_rows):
    log = _log(seed, rows=120, width=width)
    np.testing.assert_array_equal(
      causal.visible_sums(*log, max_rows=max_rows), _brute_force(*log)
    )

  def test_one_key_may_hold_every_row(self):
    key, time, part, values = _log(2, rows=200)
    key = np.zeros_like(key)
    np.testing.assert_array_equal(
      causal.visible_sums(key, time, part, values, max_rows=16),
      _brute_force(key, time, part, values),
    )

  def test_equal_times_do_not_see_each_other(self):
    ones = np.ones((50, 1), np.int64)
    zero = np.zeros(50, np.int64)
    sums = causal.visible_sums(zero, zero + 9, zero, ones, max_rows=8)
    np.testing.assert_array_equal(sums, 0)

  def test_a_planted_future_is_seen_by_nothing_before_it(self):
    key, time, part, values = _log(3)
    changed = values.copy()
    changed[time >= 20] += 100
    before = causal.visible_sums(key, time, part, values)
    after = causal.visible_sums(key, time, part, changed)
    np.testing.assert_array_equal(before[time <= 20], after[time <= 20])
    self.assertTrue((before != after).any())

  def test_later_parts_stay_unseen(self):
    key, time, part, values = _log(4)
    before = causal.visible_sums(key, time, part, values)
    for changed_part, seeing in ((1, 2), (2, None)):
      changed = values + 100 * (part == changed_part)[:, None]
      after = causal.visible_sums(key, time, part, changed)
      blind = part != seeing if seeing else np.ones(len(part), bool)
      np.testing.assert_array_equal(before[blind], after[blind])
      if seeing:
        self.assertTrue((before != after).any())

  def test_sums_are_written_to_the_array_given(self):
    log = _log(5)
    out = np.zeros(log[3].shape, np.int32)
    self.assertIs(causal.visible_sums(*log, out=out), out)
    np.testing.assert_array_equal(out, causal.visible_sums(*log))

  @parameterized.parameters(0, 1, 2)
  def test_slices_hold_the_visible_events_in_order(self, seed):
    key, time, part, _ = _log(seed, num_keys=5)
    key = np.maximum(key, 0)
    order = np.lexsort((time, part, key))
    events = key[order], time[order], part[order]
    start, length = causal.visible_slices(*events, key, time, part)
    for row in range(len(key)):
      mine = events[0] == key[row]
      training = mine & (events[2] == 0)
      seen = training & (events[1] < time[row])
      if part[row] == 2 and seen.sum() == training.sum():
        seen |= mine & (events[2] == 1) & (events[1] < time[row])
      expected = np.flatnonzero(seen)
      given = np.arange(start[row], start[row] + length[row])
      np.testing.assert_array_equal(given, expected)

  def test_users_without_events_get_empty_slices(self):
    none = np.zeros(0, np.int64)
    row = np.array([4])
    start, length = causal.visible_slices(none, none, none, row, row, row - 4)
    self.assertEqual((start.tolist(), length.tolist()), ([0], [0]))

  def test_smoothing_moves_from_prior_to_data(self):
    count = np.array([0, 10, 10**6])
    rate = causal.smoothed_rate(0.8 * count, count, 0.2, 10.0)
    np.testing.assert_allclose(rate, [0.2, 0.5, 0.8], atol=1e-5)
    np.testing.assert_allclose(
      causal.log_odds(np.array([0.5, 0.8])), [0, np.log(4)]
    )


if __name__ == "__main__":
  absltest.main()
