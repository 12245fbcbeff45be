import dataclasses
import functools
import json
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized
from sklearn import linear_model
from sklearn import metrics as sklearn_metrics

from recjax.data import pipeline, synthetic
from recjax.data.claims import memory_rules
from recjax.errors import UserError
from recjax.schema import SPLITS

SMALL = synthetic.Config(
  "memory_rules",
  num_rows=60_000,
  num_users=256,
  num_items=256,
  num_user_clusters=16,
  num_item_clusters=16,
)


class Data:
  """One prepared data set, read whole, and its true logits."""

  def __init__(self, config, directory):
    columns = pipeline.open_dataset(
      {
        "name": "synthetic",
        "cache_dir": directory,
        **dataclasses.asdict(config),
      }
    )
    self.directory = pathlib.Path(columns.directory)
    self.schema, self.num_rows = columns.schema, columns.num_rows
    self.batches = {
      split: columns.read(split, np.arange(num))
      for split, num in columns.num_rows.items()
    }
    self.dense = {split: columns.raw_dense(split) for split in SPLITS}
    logits = synthetic.true_logits(config)
    self.logits = {split: v["click"] for split, v in logits.items()}

  def labels(self, split):
    return self.batches[split].labels["click"]


@functools.cache
def load(config):
  with tempfile.TemporaryDirectory() as directory:
    data = Data(config, directory)
    data.scores = json.loads((data.directory / "best_scores.json").read_text())
  return data


@functools.cache
def planted():
  return load(SMALL)


@functools.cache
def control():
  return load(dataclasses.replace(SMALL, control=True))


def interaction_f(data, split):
  """Variance ratio of what pairs of clusters explain beyond each alone.

  A logistic regression takes out all that is additive in the logit. About 1
  (its standard deviation is 0.09 for 16 x 16 cells) without interaction.
  """
  batch, labels = data.batches[split], data.labels(split)
  names = ("user_cluster", "item_cluster", "hour")
  one_hot = [np.eye(25)[batch.ids[name]] for name in names]
  additive = np.concatenate([*one_hot, data.dense[split]], axis=1)
  model = linear_model.LogisticRegression(C=100.0, max_iter=1000)
  probs = model.fit(additive, labels).predict_proba(additive)[:, 1]
  cell = batch.ids["user_cluster"] * 17 + batch.ids["item_cluster"]
  excess = np.bincount(cell, weights=labels - probs)
  variance = np.bincount(cell, weights=probs * (1 - probs))
  used = variance > 0
  return np.sum(excess[used] ** 2 / variance[used]) / (15 * 15)


class MemoryRulesTest(parameterized.TestCase):
  def test_split_and_schema(self):
    data = planted()
    self.assertEqual(
      data.num_rows, {"train": 48_000, "valid": 6_000, "test": 6_000}
    )
    self.assertEqual(data.schema.vocab_sizes["user_cluster"], 17)
    self.assertEqual(data.schema.roles.group, "user_id")
    for batch in data.batches.values():
      for name, ids in batch.ids.items():
        self.assertGreaterEqual(ids.min(), 1)
        self.assertLess(ids.max(), data.schema.vocab_sizes[name])

  def test_the_same_seed_gives_the_same_rows(self):
    with tempfile.TemporaryDirectory() as directory:
      again = Data(SMALL, directory)
    other = synthetic.true_logits(dataclasses.replace(SMALL, seed=1))
    for split in SPLITS:
      np.testing.assert_array_equal(
        again.labels(split), planted().labels(split)
      )
      np.testing.assert_array_equal(again.dense[split], planted().dense[split])
      np.testing.assert_array_equal(
        again.logits[split], planted().logits[split]
      )
      self.assertGreater(
        np.abs(other[split]["click"] - again.logits[split]).min(), 0
      )

  def test_parts_are_other_draws_of_one_world(self):
    logits = planted().logits
    size = len(logits["test"])
    self.assertLess(
      abs(np.corrcoef(logits["valid"], logits["test"])[0, 1]), 0.05
    )
    self.assertLess(
      abs(np.corrcoef(logits["train"][:size], logits["test"])[0, 1]), 0.05
    )
    users = [planted().batches[split].ids for split in ("train", "test")]
    clusters = []
    for ids in users:
      cluster = np.zeros(257, int)
      cluster[ids["user_id"]] = ids["user_cluster"]
      clusters.append(cluster)
    np.testing.assert_array_equal(*clusters)

  def test_clusters_have_equal_size(self):
    ids = planted().batches["train"].ids
    for thing in ("user", "item"):
      pairs = {*zip(ids[f"{thing}_id"], ids[f"{thing}_cluster"], strict=True)}
      self.assertLen(pairs, 256)
      count = np.bincount([cluster for _, cluster in pairs])
      self.assertEqual(count.tolist(), [0] + [16] * 16)

  def test_a_code_is_one_to_one_with_a_cluster(self):
    batch = planted().batches["train"]
    for thing in ("user", "item"):
      codes = batch.vectors[f"{thing}_code"]
      self.assertEqual(codes.shape[1], SMALL.code_dim)
      first = np.zeros((17, codes.shape[1]), np.float32)
      first[batch.ids[f"{thing}_cluster"]] = codes
      np.testing.assert_array_equal(first[batch.ids[f"{thing}_cluster"]], codes)
      self.assertLen(np.unique(first[1:], axis=0), 16)

  @parameterized.parameters(planted, control)
  def test_label_rates_are_the_probabilities(self, make):
    data = make()
    logits, labels = data.logits["train"], data.labels("train")
    order = np.array_split(np.argsort(logits), 20)
    for rows in order:
      probs = 1 / (1 + np.exp(-logits[rows]))
      error = np.sqrt(np.sum(probs * (1 - probs))) / len(rows)
      self.assertLess(abs(labels[rows].mean() - probs.mean()), 4 * error)

  def test_nothing_beats_the_true_logit(self):
    data = planted()
    logits, labels = data.logits["test"], data.labels("test")
    best = data.scores["test"]
    rng = np.random.default_rng(0)
    rivals = {
      "noisy": logits + rng.normal(size=len(logits)) * 0.5,
      "main effects": data.logits["test"] - self._rules(data, "test"),
      "shrunken": 0.7 * logits,
      "shifted": logits + 0.2,
      "constant": np.full_like(logits, np.log(1 / labels.mean() - 1)) * -1,
    }
    for name, rival in rivals.items():
      auc = sklearn_metrics.roc_auc_score(labels, rival)
      loss = sklearn_metrics.log_loss(labels, 1 / (1 + np.exp(-rival)))
      self.assertLessEqual(auc, best["click/auc"] + 1e-12, name)
      self.assertGreater(loss, best["click/logloss"], name)

  def test_knowing_the_rules_is_worth_much(self):
    """Main effects alone are far below, in AUC, so there is room to win."""
    data = planted()
    main = data.logits["test"] - self._rules(data, "test")
    auc = sklearn_metrics.roc_auc_score(data.labels("test"), main)
    self.assertLess(auc, data.scores["test"]["click/auc"] - 0.1)

  def _rules(self, data, split):
    """The interaction part: the mean logit of each cell, centred twice."""
    ids = data.batches["train"].ids
    cell = ids["user_cluster"] * 17 + ids["item_cluster"]
    count = np.bincount(cell, minlength=17 * 17)
    total = np.bincount(cell, weights=data.logits["train"], minlength=17 * 17)
    mean = (total / np.maximum(count, 1)).reshape(17, 17)[1:, 1:]
    rules = mean - mean.mean(1, keepdims=True) - mean.mean(0) + mean.mean()
    ids = data.batches[split].ids
    return rules[ids["user_cluster"] - 1, ids["item_cluster"] - 1]

  @parameterized.parameters(planted, control)
  def test_best_scores_agree_with_scikit_learn(self, make):
    data = make()
    self.assertCountEqual(data.scores, SPLITS)
    for split, scores in data.scores.items():
      labels, logits = data.labels(split), data.logits[split]
      auc = sklearn_metrics.roc_auc_score(labels, logits)
      loss = sklearn_metrics.log_loss(labels, 1 / (1 + np.exp(-logits)))
      self.assertAlmostEqual(scores["click/auc"], auc, places=10)
      self.assertAlmostEqual(scores["click/logloss"], loss, places=10)

  def test_only_the_planted_data_has_an_interaction(self):
    for split, least in (("train", 20), ("test", 3)):
      ratio = [interaction_f(make(), split) for make in (planted, control)]
      self.assertGreater(ratio[0], least)
      self.assertBetween(ratio[1], 0.65, 1.35)

  def test_the_control_differs_in_the_labels_only(self):
    for split in SPLITS:
      first, second = planted().batches[split], control().batches[split]
      for name, ids in first.ids.items():
        np.testing.assert_array_equal(ids, second.ids[name])
      for name, values in first.vectors.items():
        np.testing.assert_array_equal(values, second.vectors[name])
      np.testing.assert_array_equal(first.dense, second.dense)
      np.testing.assert_array_equal(
        first.groups["group"], second.groups["group"]
      )
      self.assertGreater(
        np.mean(first.labels["click"] != second.labels["click"]), 0.1
      )

  def test_the_control_is_as_hard(self):
    """At the sizes that are trained on."""
    config = synthetic.Config("memory_rules")
    first = synthetic.best_scores(config)
    second = synthetic.best_scores(dataclasses.replace(config, control=True))
    for split in SPLITS:
      self.assertAlmostEqual(
        first[split]["click/auc"], second[split]["click/auc"], delta=0.02
      )
      self.assertAlmostEqual(
        first[split]["click/logloss"],
        second[split]["click/logloss"],
        delta=0.02,
      )

  def test_no_embeddings_of_few_dimensions_factor_the_rules(self):
    claim = memory_rules.make(synthetic.Config("memory_rules"))
    block, logits = claim.draw(np.random.default_rng(0), 400_000)
    ids = block.ids["user_cluster"] - 1, block.ids["item_cluster"] - 1
    total, count = np.zeros((32, 64)), np.zeros((32, 64))
    np.add.at(total, ids, logits["click"])
    np.add.at(count, ids, 1)
    mean = total / count
    rules = mean - mean.mean(1, keepdims=True) - mean.mean(0) + mean.mean()
    energy = np.linalg.svd(rules, compute_uv=False) ** 2
    self.assertLess(energy[:8].sum() / energy.sum(), 0.55)

  def test_the_rows_are_frozen(self):
    """Raise VERSION and measure every table anew if this must change."""
    config = synthetic.Config("memory_rules", num_rows=1000)
    logits = synthetic.true_logits(config)
    np.testing.assert_allclose(
      logits["train"]["click"][:3], FROZEN["train"], rtol=1e-6
    )
    np.testing.assert_allclose(
      logits["test"]["click"][:3], FROZEN["test"], rtol=1e-6
    )
    self.assertEqual(synthetic.VERSION, 2)


FROZEN = {
  "train": [-1.0575451110658198, 1.9234336924251227, 1.2015482409649945],
  "test": [-1.427466197226149, -1.3952960545158586, -0.6088818410292336],
}


class MistakesTest(parameterized.TestCase):
  def test_unknown_claim(self):
    with self.assertRaisesRegex(
      UserError, "unknown claim 'memory_rule'; did you mean 'memory_rules'"
    ):
      pipeline.open_dataset({"name": "synthetic", "claim": "memory_rule"})

  def test_no_claim(self):
    with self.assertRaisesRegex(UserError, "data.claim: .* needs this option"):
      pipeline.open_dataset({"name": "synthetic"})

  @parameterized.parameters(
    ("seed", -1, "at least 0"),
    ("num_rows", 9, "at least 10"),
    ("num_users", 31, "at least 32"),
    ("code_dim", 0, "at least 1"),
    ("num_items", 63, "at least 64"),
    ("num_user_clusters", 1, "at least 2"),
    ("num_item_clusters", 1, "at least 2"),
    ("main_strength", 0.0, "above 0"),
    ("rule_strength", -1.0, "above 0"),
    ("rule_strength", float("inf"), "above 0"),
    ("intercept", float("nan"), "finite"),
  )
  def test_out_of_range(self, name, value, allowed):
    with self.assertRaisesRegex(UserError, f"data.{name} must be .*{allowed}"):
      synthetic.Config("memory_rules", **{name: value})

  def test_the_smallest_data_set(self):
    config = synthetic.Config(
      "memory_rules",
      num_rows=10,
      num_users=2,
      num_items=2,
      num_user_clusters=2,
      num_item_clusters=2,
    )
    data = load(config)
    self.assertEqual(data.num_rows, {"train": 8, "valid": 1, "test": 1})
    self.assertTrue(np.isnan(data.scores["test"]["click/auc"]))


if __name__ == "__main__":
  absltest.main()
