"""Borrowed users against a loop over all events, and what they never are."""

import dataclasses

import numpy as np
from absl.testing import absltest
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.data import feedback, pseudo_feedback
from tests.data.feedback_test import brute_force, make_log

NUM_ITEMS = 4


class PseudoFeedbackTest(absltest.TestCase):
  @settings(max_examples=25, deadline=None, derandomize=True)
  @given(
    seed=st.integers(0, 10**6),
    max_len=st.integers(1, 7),
    num=st.integers(1, 3),
    scored=st.booleans(),
  )
  def test_lists_equal_a_loop(self, seed, max_len, num, scored):
    log, chosen, score = make_log(seed)
    rng = np.random.default_rng(seed)
    # The nearest first; an item may have fewer than `num`.
    nearest = np.stack([rng.permutation(NUM_ITEMS)[:num] for _ in range(4)])
    nearest[rng.random(nearest.shape) < 0.3] = -1
    marks = score if scored else None
    rows = np.flatnonzero(rng.random(len(log.user)) < 0.7)
    own = feedback.feedback_lists(
      log, chosen, marks, max_len=max_len, rows=rows
    )
    users, length = pseudo_feedback.borrow(
      log, chosen, marks, *own, nearest, rows=rows
    )
    marks = np.zeros(len(log.user)) if marks is None else marks
    for place, row in enumerate(rows):
      expected = brute_force(log, chosen, marks, max_len, row)
      for item in nearest[log.item[row]]:
        if item < 0:
          continue
        # The same row, had it been about the other item.
        items = log.item.copy()
        items[row] = item
        mine = chosen.copy()
        mine[row] = False
        asking = dataclasses.replace(log, item=items)
        more = brute_force(asking, mine, marks, max_len, row)
        new = [user for user in more if user not in expected]
        expected = (new + expected)[-max_len:]
      self.assertEqual(users[place, : length[place]].tolist(), expected)
      self.assertTrue(np.all(users[place, length[place] :] == -1))
      self.assertNotIn(log.user[row], users[place])

  def test_own_feedback_goes_first(self):
    log = feedback.Log(
      user=np.array([1, 2, 3, 4, 9]),
      item=np.array([1, 1, 0, 1, 0]),
      time=np.arange(5),
      part=np.zeros(5, int),
    )
    chosen = np.ones(5, bool)
    own = feedback.feedback_lists(log, chosen, max_len=3)
    self.assertEqual(own[0][4].tolist(), [3, -1, -1])
    users, length = pseudo_feedback.borrow(
      log, chosen, None, *own, np.array([[1], [-1]])
    )
    self.assertEqual(users[4].tolist(), [2, 4, 3])
    self.assertEqual(length[4], 3)
    # Item 1 has no neighbour: nothing changes.
    np.testing.assert_array_equal(users[3], own[0][3])

  def test_nearest_popular_equals_a_loop(self):
    rng = np.random.default_rng(0)
    content = rng.integers(0, 2, (40, 6)).astype(float)
    content[3] = 0
    popular = rng.random(40) < 0.4
    nearest = pseudo_feedback.nearest_popular(content, popular, 5)
    for item in range(40):
      near = []
      for other in np.flatnonzero(popular):
        norms = np.linalg.norm(content[item]) * np.linalg.norm(content[other])
        if other != item and content[item] @ content[other] > 0:
          near.append((-content[item] @ content[other] / norms, other))
      found = [n for n in nearest[item].tolist() if n >= 0]
      self.assertLen(found, min(5, len(near)))
      similar = dict((other, -value) for value, other in near)
      np.testing.assert_allclose(
        [similar[n] for n in found],
        sorted(similar.values(), reverse=True)[: len(found)],
      )
    self.assertEqual(nearest[3].tolist(), [-1] * 5)
    nobody = pseudo_feedback.nearest_popular(content, popular & False, 2)
    self.assertTrue(np.all(nobody == -1))

  def test_popular_items_are_those_of_the_training_part(self):
    item = np.repeat([0, 1, 2], [50, 49, 60])
    log = feedback.Log(
      user=np.arange(159),
      item=item,
      time=np.arange(159),
      part=np.where(item == 2, 1, 0),
    )
    popular = pseudo_feedback.popular_items(log, np.ones(159, bool), 3)
    self.assertEqual(popular.tolist(), [True, False, False])


if __name__ == "__main__":
  absltest.main()
