"""KuaiRand's feedback lists against a loop over a small log."""

import functools
import pathlib
import tempfile
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from absl.testing import absltest, parameterized

from recjax.data import kuairand, kuairand_source, pseudo_feedback
from recjax.data.columns import Columns
from recjax.data.vocabulary import load_values
from recjax.errors import UserError
from recjax.schema import SPLITS

_BUNDLED = kuairand_source.find_sources("", "")
_LISTS = ("positive_history", "pinnacle_users", "negative_users")
_LEN = 3


@functools.cache
def small_log():
  """Rows of some users on few videos, with many equal times, in order."""
  log = pa.parquet.read_table(_BUNDLED.log[0])
  log = {name: log[name].to_numpy().copy() for name in log.column_names}
  log = {k: v[log["user_id"] % 600 == 3] for k, v in log.items()}
  log["video_id"] %= 40
  log["time_ms"] -= log["time_ms"] % 1_800_000
  order = np.argsort(log["time_ms"], kind="stable")
  return {name: column[order] for name, column in log.items()}


@functools.cache
def prepare(**options):
  """Split -> everything that a prepared small log holds."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "log.parquet"
    pa.parquet.write_table(pa.table(small_log()), path)
    found = kuairand_source.Sources((path,), _BUNDLED.users, _BUNDLED.videos)
    out = pathlib.Path(folder) / "out"
    out.mkdir()
    with mock.patch.object(kuairand_source, "find_sources", return_value=found):
      kuairand.prepare(kuairand.Config(**options), out)
    columns = Columns(out)
    data = {
      split: columns.read(split, np.arange(columns.num_rows[split]))
      for split in SPLITS
    }
    values = {n: load_values(out, n).to_pylist() for n in ("user_id",)}
  return data, values


def parts():
  return np.digitize(small_log()["date"], kuairand_source.LAST_DAYS, right=True)


def pinnacle_score(log, part):
  stay = np.log1p(log["play_time_ms"] / 1000)
  names = ("like", "follow", "comment", "forward", "profile_enter")
  interaction = sum(log[f"is_{n}"].astype(float) for n in names)
  interaction = interaction - log["is_hate"]
  reference = (log["is_click"] == 1) & (part == 0)
  total = np.zeros(len(stay))
  for values in (stay, interaction):
    spread = values[reference].std()
    if spread:
      total += (values - values[reference].mean()) / spread
  return total


class KuaiRandFeedbackTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.scores = pinnacle_score(small_log(), parts())

  def test_everything_else_stays_bit_identical(self):
    before, _ = prepare()
    after, _ = prepare(feedback="pinnacle", feedback_len=_LEN)
    for split in SPLITS:
      for kind in ("ids", "id_mask", "labels"):
        new = getattr(after[split], kind)
        for name, values in getattr(before[split], kind).items():
          np.testing.assert_array_equal(new[name], values, name)
      np.testing.assert_array_equal(after[split].dense, before[split].dense)
    added = set(after["train"].ids) - set(before["train"].ids)
    self.assertEqual(added, {*_LISTS, "item_exposures", "item_positives"})

  @parameterized.parameters(
    ("recent", "causal"), ("recent", "released"), ("pinnacle", "causal")
  )
  def test_lists_equal_a_loop(self, kind, protocol):
    log, part = small_log(), parts()
    data, values = prepare(feedback=kind, feedback_len=_LEN, protocol=protocol)
    known = {user: i + 1 for i, user in enumerate(values["user_id"])}
    num_checked = 0
    for number, split in enumerate(SPLITS):
      for place, row in enumerate(np.flatnonzero(part == number)):
        for name, label in (("pinnacle_users", 1), ("negative_users", 0)):
          if kind == "pinnacle" and label == 0:
            continue  # A random draw.
          users = self._expected(log, part, row, label, kind, protocol)
          expected = [known.get(user, 0) for user in users]
          if protocol == "released" and number == 2:
            if not log["is_click"][row]:
              expected = [1] * len(expected)
          mask = data[split].id_mask[name][place]
          ids = data[split].ids[name][place][mask].tolist()
          self.assertEqual(ids, expected, (split, place, name))
          num_checked += len(expected)
    self.assertGreater(num_checked, 300)

  def test_short_lists_borrow_from_popular_videos_alike(self):
    own, _ = prepare(feedback="pinnacle", feedback_len=_LEN)
    # No video of the small log has 50 clicks.
    with mock.patch.object(
      pseudo_feedback,
      "popular_items",
      side_effect=lambda log, chosen, num: np.ones(num, bool),
    ):
      filled, _ = prepare(
        feedback="pinnacle", feedback_len=_LEN, pseudo_neighbors=2
      )
    num_borrowed = 0
    for split in SPLITS:
      for name in ("pinnacle_users", "negative_users"):
        before, after = (
          (x[split].ids[name], x[split].id_mask[name]) for x in (own, filled)
        )
        for old, new, old_mask, new_mask, user in zip(
          *(before[0], after[0], before[1], after[1]),
          filled[split].ids["user_id"],
          strict=True,
        ):
          old, new = old[old_mask].tolist(), new[new_mask].tolist()
          self.assertEqual(new[len(new) - len(old) :], old)
          self.assertTrue(user == 0 or user not in new)
          if name == "negative_users":
            self.assertEqual(new, old)
          num_borrowed += len(new) - len(old)
    self.assertGreater(num_borrowed, 100)

  def _expected(self, log, part, row, label, kind, protocol):
    """The best users by a loop over all events."""
    clicks = log["is_click"]
    best = {}
    mine = (log["video_id"] == log["video_id"][row]) & (clicks == label)
    training = mine & (part == 0)
    all_training = np.all(log["time_ms"][training] < log["time_ms"][row])
    for event in np.flatnonzero(mine):
      if protocol == "released":
        if event > row or (event == row and not label):
          continue
      else:
        if log["time_ms"][event] >= log["time_ms"][row]:
          continue
        allowed = (0, 1) if part[row] == 2 and all_training else (0,)
        if part[event] not in allowed:
          continue
        if log["user_id"][event] == log["user_id"][row]:
          continue
      score = self.scores[event] if kind == "pinnacle" else 0.0
      mark = (score, log["time_ms"][event], event)
      user = int(log["user_id"][event])
      best[user] = max(best.get(user, mark), mark)
    return sorted(best, key=lambda user: best[user])[-_LEN:]

  def test_buckets_count_what_a_row_may_see(self):
    log, part = small_log(), parts()
    data, _ = prepare(feedback="recent", feedback_len=_LEN)
    for number, split in enumerate(SPLITS):
      for place, row in enumerate(np.flatnonzero(part == number)[::3]):
        mine = (log["video_id"] == log["video_id"][row]) & (
          log["time_ms"] < log["time_ms"][row]
        )
        mine &= (part == 0) | ((part == 1) & (part[row] == 2))
        for name, count in (
          ("item_exposures", mine.sum()),
          ("item_positives", (mine & (log["is_click"] == 1)).sum()),
        ):
          expected = 1 + sum(count >= edge for edge in (1, 5, 10, 50))
          self.assertEqual(data[split].ids[name][3 * place], expected)

  @parameterized.parameters(
    ({"feedback": "best"}, "feedback: unknown kind 'best'"),
    ({"feedback": "recent", "feedback_len": 0}, "at least 1, got 0"),
    ({"protocol": "leaky"}, "unknown protocol 'leaky'"),
    ({"protocol": "released"}, "set data.feedback"),
  )
  def test_mistakes_are_user_errors(self, options, message):
    with self.assertRaisesRegex(UserError, message):
      kuairand.Config(**options)


if __name__ == "__main__":
  absltest.main()
