import dataclasses
import functools
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized
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
)


@functools.cache
def load(is_control):
  """Batches of each split as they are read back, and the true logits."""
  config = dataclasses.replace(SMALL, control=is_control)
  with tempfile.TemporaryDirectory() as directory:
    columns = pipeline.open_dataset(
      {
        "name": "synthetic",
        "cache_dir": str(pathlib.Path(directory)),
        **dataclasses.asdict(config),
      }
    )
    batches = {
      split: columns.read(split, np.arange(number))
      for split, number in columns.num_rows.items()
    }
  logits = synthetic.true_logits(config)
  return columns.schema, batches, {s: v["click"] for s, v in logits.items()}


def look(batch):
  """Values of both events, row by row: the law once more, in loops."""
  ids = {name: np.asarray(value) for name, value in batch.ids.items()}
  found = []
  for row in range(batch.size):
    place, values = ids["place"][row], []
    for _ in range(2):
      (event,) = (
        n
        for n in range(ids["history"].shape[1])
        if ids["history"][row, n] == place
        and ids["history_kind"][row, n] == ids["item_kind"][row]
      )
      values.append(ids["history_value"][row, event])
      place = ids["history_next"][row, event]
    found.append(values)
  return np.array(found).T


def one_hot(x, size):
  return np.eye(size)[x]


def explained(target, *parts):
  """Share of the variance that a linear regression on the parts explains."""
  x = np.concatenate([np.ones((len(target), 1)), *parts], axis=1)
  residual = target - x @ np.linalg.lstsq(x, target, rcond=None)[0]
  return 1 - residual.var() / target.var()


def main_parts(batch):
  return (
    one_hot(np.asarray(batch.ids["user_cluster"]), 17),
    one_hot(np.asarray(batch.ids["item_cluster"]), 17),
    one_hot(np.asarray(batch.ids["hour"]), 25),
    np.asarray(batch.dense),
  )


class WhereToLookTest(parameterized.TestCase):
  def test_histories_hold_every_pair_of_place_and_kind_once(self):
    schema, batches, _ = load(False)
    ids, mask = batches["train"].ids, batches["train"].id_mask["history"]
    self.assertTrue(np.all(mask))
    pair = 2 * (np.asarray(ids["history"]) - 1)
    pair = pair + np.asarray(ids["history_kind"]) - 1
    length = where_to_look.NUM_PLACES * where_to_look.NUM_KINDS
    np.testing.assert_array_equal(
      np.sort(pair, axis=1)[:100],
      np.broadcast_to(np.arange(length), (100, length)),
    )
    # Their order is no help.
    self.assertGreater(len(np.unique(pair[:100, 0])), 20)
    names = [s.name for s in schema.sides(schema.feature("history"))]
    self.assertEqual(names, ["history_kind", "history_next", "history_value"])
    self.assertEqual(schema.feature("history_next").vocab, "place")

  def test_two_steps_and_main_effects_explain_the_logit(self):
    _, batches, logits = load(False)
    batch, logit = batches["test"], logits["test"]
    steps = [one_hot(value, 9) for value in look(batch)]
    main = main_parts(batch)
    self.assertGreater(explained(logit, *main, *steps), 1 - 1e-8)
    # 0.7 ** 2 of main effects; 0.4 and 0.6 of 1.3 ** 2 of the two steps.
    variance = 0.7**2 + 1.3**2
    shares = {
      "main": (explained(logit, *main), 0.7**2 / variance),
      "first": (explained(logit, steps[0]), 0.4 * 1.3**2 / variance),
      "second": (explained(logit, steps[1]), 0.6 * 1.3**2 / variance),
    }
    for name, (found, expected) in shares.items():
      self.assertAlmostEqual(found, expected, delta=0.08, msg=name)

  def test_the_mean_over_the_candidates_events_says_next_to_nothing(self):
    """What a query that knows the candidate alone can read."""
    _, batches, logits = load(False)
    batch, logit = batches["test"], logits["test"]
    ids = {name: np.asarray(value) for name, value in batch.ids.items()}
    of_kind = ids["history_kind"] == ids["item_kind"][:, None]
    histogram = (one_hot(ids["history_value"], 9) * of_kind[..., None]).mean(1)
    main = main_parts(batch)
    gain = explained(logit, *main, histogram) - explained(logit, *main)
    self.assertLess(gain, 0.1 * explained(logit, one_hot(look(batch)[0], 9)))

  def test_in_the_control_the_steps_say_nothing(self):
    _, batches, logits = load(True)
    batch, logit = batches["test"], logits["test"]
    main = main_parts(batch)
    self.assertGreater(explained(logit, *main), 1 - 1e-8)
    steps = [one_hot(value, 9) for value in look(batch)]
    self.assertLess(explained(logit, *steps), 0.03)

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
    config = synthetic.Config("where_to_look")
    first = synthetic.best_scores(config)
    second = synthetic.best_scores(dataclasses.replace(config, control=True))
    for split in SPLITS:
      for metric in ("click/auc", "click/logloss"):
        self.assertAlmostEqual(
          first[split][metric], second[split][metric], delta=0.02
        )

  def test_the_best_score_is_that_of_the_true_logit(self):
    _, batches, logits = load(False)
    scores = synthetic.best_scores(SMALL)
    for split in SPLITS:
      auc = sklearn_metrics.roc_auc_score(
        batches[split].labels["click"], logits[split]
      )
      self.assertAlmostEqual(scores[split]["click/auc"], auc, places=10)


if __name__ == "__main__":
  absltest.main()
