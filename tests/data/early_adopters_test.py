"""PROMO's planted data: lists tell an item's type, content does not."""

import dataclasses
import functools
import tempfile

import numpy as np
from absl.testing import absltest
from sklearn import linear_model
from sklearn import metrics as sklearn_metrics

from recjax.data import pipeline, synthetic
from recjax.data.claims import early_adopters

FROZEN = 0.7982596119  # Best AUC of the test part of SMALL.

SMALL = synthetic.Config(
  "early_adopters",
  num_rows=40_000,
  num_users=300,
  num_items=200,
  num_user_clusters=10,
  num_item_clusters=10,
  code_dim=4,
)


@functools.cache
def load(is_control):
  """The training part, and its true logits."""
  config = dataclasses.replace(SMALL, control=is_control)
  with tempfile.TemporaryDirectory() as directory:
    columns = pipeline.open_dataset(
      {"name": "synthetic", "cache_dir": directory} | dataclasses.asdict(config)
    )
    batch = columns.read("train", np.arange(columns.num_rows["train"]))
  return batch, synthetic.true_logits(config)["train"]["click"]


def hidden():
  """Types of users and what they think of types, drawn again from the seed."""
  rng = np.random.default_rng([SMALL.seed, 0])
  user_type = rng.permutation(np.arange(SMALL.num_users) % 10)
  num_items = (1 + early_adopters.COLD_PER_WARM) * SMALL.num_items
  item_type = rng.permutation(np.arange(num_items) % 10)
  return user_type, item_type


def likeness(batch, name):
  """How often a row's user shares the type of a user in the list."""
  user_type, _ = hidden()
  mine = user_type[batch.ids["user_id"] - 1]
  return (user_type[batch.ids[name] - 1] == mine[:, None]).mean(axis=1)


def cold(batch):
  return batch.ids["item_positives"] == early_adopters.COLD_ROW


class EarlyAdoptersTest(absltest.TestCase):
  def test_adopters_tell_the_type_of_a_cold_item(self):
    aucs = {}
    for is_control in (False, True):
      batch, _ = load(is_control)
      score = likeness(batch, "pinnacle_users")
      score -= likeness(batch, "negative_users")
      rows = cold(batch)
      aucs[is_control] = sklearn_metrics.roc_auc_score(
        batch.labels["click"][rows], score[rows]
      )
    self.assertGreater(aucs[False], 0.65)
    self.assertLess(abs(aucs[True] - 0.5), 0.02)

  def test_content_and_attributes_say_nothing_of_the_type(self):
    batch, _ = load(False)
    _, item_type = hidden()
    item, row = np.unique(batch.ids["item_id"], return_index=True)
    inputs = np.concatenate(
      [
        batch.vectors["content"][row],
        np.eye(21)[batch.ids["item_attribute"][row]],
      ],
      axis=1,
    )
    half = len(item) // 2
    model = linear_model.LogisticRegression(max_iter=500)
    model.fit(inputs[:half], item_type[item[:half] - 1])
    accuracy = model.score(inputs[half:], item_type[item[half:] - 1])
    self.assertLess(accuracy, 0.16)  # By chance: 0.1.

  def test_the_control_differs_in_the_lists_alone(self):
    (planted, logits), (control, same_logits) = load(False), load(True)
    np.testing.assert_array_equal(logits, same_logits)
    lists = ("pinnacle_users", "negative_users")
    for name, values in planted.ids.items():
      same = np.array_equal(values, control.ids[name])
      self.assertEqual(same, name not in lists, name)
    for name in ("labels", "vectors"):
      for key, values in getattr(planted, name).items():
        np.testing.assert_array_equal(values, getattr(control, name)[key])

  def test_half_of_the_rows_are_about_items_seen_few_times(self):
    batch, _ = load(False)
    rows = cold(batch)
    self.assertBetween(rows.mean(), 0.48, 0.52)
    _, times = np.unique(batch.ids["item_id"][rows], return_counts=True)
    _, warm = np.unique(batch.ids["item_id"][~rows], return_counts=True)
    self.assertBetween(times.mean(), 5, 15)
    self.assertGreater(warm.min(), 40)

  def test_histories_are_of_warm_items_the_user_may_like(self):
    batch, _ = load(False)
    self.assertLessEqual(batch.ids["positive_history"].max(), SMALL.num_items)
    # Users of one type choose the same types of items.
    user_type, item_type = hidden()
    user, row = np.unique(batch.ids["user_id"], return_index=True)
    chosen = item_type[batch.ids["positive_history"][row] - 1]
    table = np.zeros((10, 10))
    np.add.at(table, (user_type[user - 1][:, None], chosen), 1)
    table /= table.sum(axis=1, keepdims=True)
    self.assertGreater(table.max(axis=1).min(), 0.2)

  def test_frozen(self):
    """Change `VERSION` and say so if this must change."""
    scores = synthetic.best_scores(SMALL)
    self.assertAlmostEqual(scores["test"]["click/auc"], FROZEN, places=6)


if __name__ == "__main__":
  absltest.main()
