"""What the planted histories hold, and what the control leaves out."""

import dataclasses
import functools
import tempfile

import numpy as np
from absl.testing import absltest
from sklearn import metrics as sklearn_metrics

from recjax.data import pipeline, synthetic
from recjax.data.claims import where_to_look
from recjax.schema import SPLITS

SMALL = synthetic.Config(
  "where_to_look",
  num_rows=20_000,
  num_users=64,
  num_items=128,
  num_user_clusters=16,
  num_item_clusters=16,
  rule_strength=2.5,
)
# As it is trained on.
FULL = dataclasses.replace(SMALL, num_rows=200_000, num_users=512)


@functools.cache
def load(is_control):
  """Batches of each split as they are read back, and the true logits."""
  config = dataclasses.replace(SMALL, control=is_control)
  with tempfile.TemporaryDirectory() as directory:
    columns = pipeline.open_dataset(
      {
        "name": "synthetic",
        "cache_dir": directory,
        **dataclasses.asdict(config),
      }
    )
    batches = {
      split: columns.read(split, np.arange(number))
      for split, number in columns.num_rows.items()
    }
  logits = synthetic.true_logits(config)
  return columns.schema, batches, {s: v["click"] for s, v in logits.items()}


@functools.cache
def shares(split, names=tuple(where_to_look.WHERE)):
  """Share of each value among the events that match: in loops."""
  ids = {k: np.asarray(v) for k, v in load(False)[1][split].ids.items()}
  found = np.zeros((len(ids["user_id"]), 1 + where_to_look.NUM_VALUES))
  for row in range(len(found)):
    matching = [
      value
      for event, value in enumerate(ids["history"][row])
      if all(ids[f"history_{n}"][row, event] == ids[n][row] for n in names)
    ]
    for value in matching:
      found[row, value] += 1 / len(matching)
  return found


def main_parts(batch):
  ids = {name: np.asarray(value) for name, value in batch.ids.items()}
  one_hot = lambda name, size: np.eye(size)[ids[name]]  # noqa: E731
  return (
    one_hot("user_cluster", 17),
    one_hot("item_cluster", 17),
    one_hot("hour", 25),
    np.asarray(batch.dense),
  )


def explained(target, *parts):
  """Share of the variance that a regression explains, for its size."""
  x = np.concatenate([np.ones((len(target), 1)), *parts], axis=1)
  residual = target - x @ np.linalg.lstsq(x, target, rcond=None)[0]
  free = 1 - np.linalg.matrix_rank(x) / len(target)
  return 1 - residual.var() / target.var() / free


class WhereToLookTest(absltest.TestCase):
  def test_what_matches_and_main_effects_are_the_logit(self):
    _, batches, logits = load(False)
    for split in ("valid", "test"):
      main = main_parts(batches[split])
      logit = logits[split]
      self.assertGreater(
        explained(logit, *main, shares(split)), 1 - 1e-8, split
      )
      # 0.7 ** 2 of main effects, 2.5 ** 2 of what is found.
      total = 0.7**2 + 2.5**2
      self.assertAlmostEqual(
        explained(logit, *main), 0.7**2 / total, delta=0.03
      )
      self.assertAlmostEqual(
        explained(logit, shares(split)), 2.5**2 / total, delta=0.03
      )
      self.assertAlmostEqual(logit.std(), np.sqrt(total), delta=0.2)

  def test_half_of_the_place_says_a_quarter(self):
    """Without both features next to nothing is known; with one, a quarter."""
    _, batches, logits = load(False)
    logit, main = logits["valid"], main_parts(batches["valid"])
    rule = logit - _fit(logit, *main, shares("valid"))[0]
    for names, share in (
      ((), 1 / 16),
      (("slot",), 1 / 4),
      (("device",), 1 / 4),
    ):
      found = explained(rule, shares("valid", names))
      self.assertAlmostEqual(found, share, delta=0.06, msg=names)

  def test_nothing_else_than_both_features_says_where(self):
    """Slot and device are independent of user, item and of each other."""
    ids = load(False)[1]["train"].ids
    slot, device = (np.asarray(ids[n]) for n in ("slot", "device"))
    self.assertEqual((slot.min(), slot.max()), (1, 4))
    for other in (device, np.asarray(ids["user_cluster"]) % 4):
      counts = np.zeros((5, 5))
      np.add.at(counts, (slot, other), 1)
      expected = len(slot) / 16
      counts = counts[counts > 0]
      self.assertLen(counts, 16)
      self.assertLess(np.abs(counts - expected).max(), 5 * expected**0.5)

  def test_a_history_is_a_window_of_its_users_stream(self):
    schema, batches, _ = load(False)
    batch = batches["train"]
    self.assertTrue(np.all(batch.id_mask["history"]))
    events = np.stack(
      [
        np.asarray(batch.ids[name])
        for name in ("history", "history_slot", "history_device")
      ],
      axis=-1,
    )
    self.assertEqual(events.shape[1], where_to_look.LENGTH)
    one = np.flatnonzero(np.asarray(batch.ids["user_id"]) == 7)
    windows = {events[row].tobytes() for row in one}
    # 97 places where a window can begin, about 250 rows.
    most = where_to_look.STREAM_LEN - where_to_look.LENGTH + 1
    self.assertBetween(len(windows), 0.8 * most, most)
    starts = {events[row, 0].tobytes(): row for row in one}
    other = starts.get(events[one[0], 5].tobytes())
    self.assertIsNotNone(other)
    names = [s.name for s in schema.sides(schema.feature("history"))]
    self.assertEqual(names, ["history_slot", "history_device"])

  def test_in_the_control_what_matches_says_nothing(self):
    _, batches, logits = load(True)
    logit = logits["test"]
    main = main_parts(batches["test"])
    self.assertGreater(explained(logit, *main), 1 - 1e-8)
    self.assertLess(explained(logit, shares("test")), 0.02)

  def test_the_control_differs_in_the_labels_only(self):
    for split in SPLITS:
      first, second = (load(c)[1][split] for c in (False, True))
      for name, ids in first.ids.items():
        np.testing.assert_array_equal(ids, second.ids[name])
      np.testing.assert_array_equal(first.dense, second.dense)
      self.assertGreater(
        np.mean(np.asarray(first.labels["click"]) != second.labels["click"]),
        0.1,
      )

  def test_the_control_is_as_hard(self):
    """At the sizes that are trained on."""
    first = synthetic.best_scores(FULL)
    second = synthetic.best_scores(dataclasses.replace(FULL, control=True))
    # The planted logit has longer tails: some rows are surer, some are not.
    for split in SPLITS:
      for metric, delta in (("click/auc", 0.03), ("click/logloss", 0.05)):
        self.assertAlmostEqual(
          first[split][metric], second[split][metric], delta=delta
        )

  def test_the_best_score_is_that_of_the_true_logit(self):
    _, batches, logits = load(False)
    scores = synthetic.best_scores(SMALL)
    rng = np.random.default_rng(0)
    for split in SPLITS:
      label, logit = batches[split].labels["click"], logits[split]
      auc = sklearn_metrics.roc_auc_score(label, logit)
      self.assertAlmostEqual(scores[split]["click/auc"], auc, places=10)
      noisy = logit + rng.normal(size=len(logit))
      self.assertLess(sklearn_metrics.roc_auc_score(label, noisy), auc)

  def test_the_rows_are_frozen(self):
    """Raise VERSION and measure every table anew if this must change."""
    logits = synthetic.true_logits(
      synthetic.Config("where_to_look", num_rows=1000)
    )
    for split, expected in FROZEN.items():
      np.testing.assert_allclose(
        logits[split]["click"][:3], expected, rtol=1e-6
      )


FROZEN = {
  "train": [-3.125417856828469, 1.1846265027214868, -1.7408479715485448],
  "test": [-0.08978097127062912, 0.9605214154181085, -0.3596472019827133],
}


def _fit(target, *parts):
  """What the first parts explain of the target, the last being fitted too."""
  x = np.concatenate([np.ones((len(target), 1)), *parts], axis=1)
  weights = np.linalg.lstsq(x, target, rcond=None)[0]
  width = x.shape[1] - parts[-1].shape[1]
  return x[:, :width] @ weights[:width], x[:, width:] @ weights[width:]


if __name__ == "__main__":
  absltest.main()
