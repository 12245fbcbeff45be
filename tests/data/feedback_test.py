"""Feedback lists against a loop over all events, and what they never hold."""

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.data import feedback


def make_log(seed, rows=80, num_users=6, num_items=4, num_times=25):
  rng = np.random.default_rng(seed)
  time = np.sort(rng.integers(0, num_times, rows))
  # Parts follow time but overlap, as days cut by another clock do.
  late = time + rng.integers(-3, 4, rows)
  log = feedback.Log(
    user=rng.integers(0, num_users, rows),
    item=rng.integers(0, num_items, rows),
    time=time,
    part=np.digitize(late, [num_times // 2, 3 * num_times // 4]),
  )
  # Few different scores, so that many are equal.
  return log, rng.random(rows) < 0.6, rng.integers(0, 3, rows).astype(float)


def is_visible(log, key, event, row):
  """The rule of `causal`: the prefix of (part, time) that a row may see."""
  if key[event] != key[row] or log.time[event] >= log.time[row]:
    return False
  if log.part[event] == 0:
    return True
  return log.part[row] == 2 and log.part[event] == 1


def sees_all_training(log, key, is_feedback, row):
  training = (key == key[row]) & is_feedback & (log.part == 0)
  return bool(np.all(log.time[training] < log.time[row]))


def brute_force(log, is_feedback, score, max_len, row):
  """One row's list by looking at every event."""
  best = {}
  for event in np.flatnonzero(is_feedback):
    if not is_visible(log, log.item, event, row):
      continue
    if log.part[event] == 1 and not sees_all_training(
      log, log.item, is_feedback, row
    ):
      continue
    if log.user[event] == log.user[row]:
      continue
    mark = (score[event], log.time[event], event)
    user = int(log.user[event])
    best[user] = max(best.get(user, mark), mark)
  users = sorted(best, key=lambda user: best[user])
  return users[-max_len:]


def brute_force_released(log, is_feedback, score, max_len, row):
  best = {}
  for event in np.flatnonzero(is_feedback):
    if log.item[event] != log.item[row] or event > row:
      continue
    mark = (score[event], log.time[event], event)
    user = int(log.user[event])
    best[user] = max(best.get(user, mark), mark)
  return sorted(best, key=lambda user: best[user])[-max_len:]


class FeedbackTest(parameterized.TestCase):
  @settings(max_examples=30, deadline=None, derandomize=True)
  @given(
    seed=st.integers(0, 10**6),
    max_len=st.integers(1, 7),
    scored=st.booleans(),
    max_events=st.sampled_from((1, 9, 1000)),
    protocol=st.sampled_from(feedback.PROTOCOLS),
  )
  def test_lists_equal_a_loop(
    self, seed, max_len, scored, max_events, protocol
  ):
    log, is_feedback, score = make_log(seed)
    users, length = feedback.feedback_lists(
      log,
      is_feedback,
      score if scored else None,
      max_len=max_len,
      protocol=protocol,
      max_events=max_events,
    )
    score = score if scored else np.zeros(len(score))
    oracle = brute_force if protocol == "causal" else brute_force_released
    for row in range(len(users)):
      expected = oracle(log, is_feedback, score, max_len, row)
      self.assertEqual(users[row, : length[row]].tolist(), expected)
      self.assertTrue(np.all(users[row, length[row] :] == -1))

  @settings(max_examples=30, deadline=None, derandomize=True)
  @given(seed=st.integers(0, 10**6))
  def test_nothing_of_a_rows_own_or_a_later_moment_gets_in(self, seed):
    """Changed labels from a moment on leave all rows up to it as they are."""
    log, is_feedback, score = make_log(seed)
    moment = log.time[len(log.time) // 2]
    late = log.time >= moment
    before = feedback.feedback_lists(log, is_feedback, score, max_len=3)
    after = feedback.feedback_lists(
      log, is_feedback ^ late, score - 9.0 * late, max_len=3
    )
    # Test rows see no validation event before they see all of training.
    rows = ~late & (log.part < 2)
    for old, new in zip(before, after, strict=True):
      np.testing.assert_array_equal(old[rows], new[rows])

  @parameterized.parameters(0, 1, 2)
  def test_no_row_finds_its_own_user_whatever_its_label(self, seed):
    log, is_feedback, score = make_log(seed, rows=400)
    for chosen in (is_feedback, ~is_feedback):
      users, length = feedback.feedback_lists(log, chosen, score, max_len=5)
      self.assertGreater(length.max(), 3)
      self.assertFalse(np.any(users == log.user[:, None]))

  @parameterized.parameters(0, 1)
  def test_the_label_of_a_row_does_not_shape_its_lists(self, seed):
    log, is_feedback, score = make_log(seed)
    users, _ = feedback.feedback_lists(log, is_feedback, score, max_len=4)
    for row in range(0, len(users), 7):
      other = is_feedback.copy()
      other[row] = ~other[row]
      again, _ = feedback.feedback_lists(
        log, other, score, max_len=4, rows=np.array([row])
      )
      np.testing.assert_array_equal(again[0], users[row])

  def test_the_released_protocol_shows_a_positive_its_target(self):
    log, is_feedback, _ = make_log(0)
    events, start, length = feedback.history_slices(
      log, is_feedback, protocol="released"
    )
    users, count = feedback.feedback_lists(
      log, is_feedback, max_len=4, protocol="released"
    )
    for row in np.flatnonzero(is_feedback):
      self.assertEqual(events[start[row] + length[row] - 1], row)
      self.assertEqual(users[row, count[row] - 1], log.user[row])

  @parameterized.parameters(0, 1)
  def test_histories_hold_only_earlier_events_of_the_user(self, seed):
    log, is_feedback, _ = make_log(seed)
    events, start, length = feedback.history_slices(log, is_feedback)
    self.assertGreater(length.max(), 3)
    for row in range(len(log.user)):
      seen = events[start[row] : start[row] + length[row]]
      expected = [
        event
        for event in np.flatnonzero(is_feedback)
        if is_visible(log, log.user, event, row)
        and (
          log.part[event] == 0
          or sees_all_training(log, log.user, is_feedback, row)
        )
      ]
      self.assertCountEqual(seen.tolist(), expected)

  def test_an_empty_log_and_an_item_without_feedback(self):
    log, is_feedback, _ = make_log(0)
    users, length = feedback.feedback_lists(
      log, np.zeros_like(is_feedback), max_len=3
    )
    self.assertEqual((length.max(), users.max()), (0, -1))
    none = np.zeros(0, np.int64)
    empty = feedback.Log(none, none, none, none)
    users, length = feedback.feedback_lists(empty, none == 1, max_len=3)
    self.assertEqual(users.shape, (0, 3))

  def test_scores_are_standardised_by_the_reference(self):
    stay = np.array([1.0, 3.0, np.nan, 100.0])
    interaction = np.array([0.0, 2.0, 1.0, 1.0])
    reference = np.array([True, True, True, False])
    score = feedback.pinnacle_score(stay, interaction, reference, beta=2.0)
    spread = np.std([0.0, 2.0, 1.0])
    expected = [-1 - 2 / spread, 1 + 2 / spread, 0.0, 98.0]
    np.testing.assert_allclose(score, expected)

  def test_an_unknown_protocol_is_named(self):
    log, is_feedback, _ = make_log(0)
    with self.assertRaisesRegex(ValueError, "'leaky'"):
      feedback.feedback_lists(log, is_feedback, max_len=1, protocol="leaky")


if __name__ == "__main__":
  absltest.main()
