"""LEMUR's planted data: what words mean is told by labels, and by no text."""

import dataclasses
import functools
import json
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats
from sklearn import linear_model
from sklearn import metrics as sklearn_metrics

from recjax.data import pipeline, synthetic
from recjax.data.claims import content
from recjax.schema import SPLITS, TOKENS

CONFIG = synthetic.Config(
  "content",
  num_rows=60_000,
  num_users=256,
  num_items=4096,
  num_user_clusters=16,
  num_item_clusters=16,
)
NUM_TRAIN = 48_000


@functools.cache
def load(is_control=False):
  """Split -> all its rows; the schema; what `best_scores.json` holds."""
  config = dataclasses.replace(CONFIG, control=is_control)
  with tempfile.TemporaryDirectory() as directory:
    columns = pipeline.open_dataset(
      {"name": "synthetic", "cache_dir": directory} | dataclasses.asdict(config)
    )
    batches = {
      s: columns.read(s, np.arange(n)) for s, n in columns.num_rows.items()
    }
    path = pathlib.Path(columns.directory) / "best_scores.json"
    return batches, columns.schema, json.loads(path.read_text())


def marker_counts(batch):
  """How often each marker stands in each row's document."""
  tokens = batch.tokens["document"]
  counts = np.zeros((len(tokens), content.NUM_MARKERS))
  row, place = np.nonzero((tokens >= 1) & (tokens <= content.NUM_MARKERS))
  np.add.at(counts, (row, tokens[row, place] - 1), 1)
  return counts


def inputs(batch, *, with_markers):
  """What a logistic regression needs to find the law, or without its words."""
  topic = np.eye(17)[batch.ids["item_topic"]]
  hour = np.eye(25)[batch.ids["hour"]]
  parts = [topic, hour, batch.dense]
  if with_markers:
    counts, code = marker_counts(batch), batch.vectors["user_code"]
    parts += [counts * code[:, i : i + 1] for i in range(content.LATENT_DIM)]
  return np.concatenate(parts, axis=1)


@functools.cache
def scores_of_test(is_control, with_markers):
  """What a ridge regression on the labels gives to the test part."""
  batches, *_ = load(is_control)
  model = linear_model.Ridge(10.0)
  model.fit(
    inputs(batches["train"], with_markers=with_markers),
    batches["train"].labels["click"],
  )
  return model.predict(inputs(batches["test"], with_markers=with_markers))


def auc(batch, scores, rows=slice(None)):
  return sklearn_metrics.roc_auc_score(
    batch.labels["click"][rows], scores[rows]
  )


class ContentTest(parameterized.TestCase):
  def test_split_and_schema(self):
    batches, schema, _ = load()
    self.assertEqual(
      {split: batch.size for split, batch in batches.items()},
      {"train": NUM_TRAIN, "valid": 6000, "test": 6000},
    )
    self.assertEqual(
      [f.name for f in schema.text_features], ["document", "query"]
    )
    self.assertEqual(schema.roles.scenario, "item_age")
    for batch in batches.values():
      for name, ids in batch.ids.items():
        self.assertGreaterEqual(ids.min(), 1)
        vocab = schema.feature(name).vocab
        self.assertLess(ids.max(), schema.vocab_sizes[vocab])
      for tokens in batch.tokens.values():
        self.assertGreaterEqual(tokens.min(), 1)
        self.assertLess(tokens.max(), schema.vocab_sizes[TOKENS])

  def test_a_text_belongs_to_an_item(self):
    texts = {}
    for batch in load()[0].values():
      for item, tokens in zip(
        batch.ids["item_id"].tolist(),
        batch.tokens["document"].tolist(),
        strict=True,
      ):
        self.assertEqual(texts.setdefault(item, tokens), tokens)
    self.assertGreater(len(texts), 0.9 * CONFIG.num_items)

  def test_new_items_of_the_test_part_are_in_no_training_row(self):
    batches, *_ = load()
    seen = np.unique(batches["train"].ids["item_id"])
    batch = batches["test"]
    is_seen = np.isin(batch.ids["item_id"], seen)
    age = batch.ids["item_age"]
    self.assertFalse(is_seen[age == 1].any())
    self.assertGreater(is_seen[age == 3].mean(), 0.95)
    # And they appear all the time, so that what new means can be learned.
    for batch in batches.values():
      shares = np.bincount(batch.ids["item_age"], minlength=4)[1:] / batch.size
      np.testing.assert_allclose(shares, 1 / 3, atol=0.02)

  def test_histories_are_of_items_that_were_there(self):
    batches, *_ = load()
    ids = [b.ids["item_id"] for b in batches.values()]
    rows = np.arange(CONFIG.num_rows)
    first = np.full(CONFIG.num_items + 1, CONFIG.num_rows)
    np.minimum.at(first, np.concatenate(ids), rows)
    # An item is first shown a while after it appears.
    slack = 0.08 * CONFIG.num_rows
    history = np.concatenate([b.ids["history"] for b in batches.values()])
    known = first[history] < CONFIG.num_rows
    late = (first[history] > rows[:, None] + slack) & known
    self.assertLess(late.mean(), 0.002)

  def test_a_history_tells_what_its_user_likes(self):
    batch = load()[0]["train"]
    model = linear_model.Ridge(10.0)
    model.fit(inputs(batch, with_markers=True), batch.labels["click"])
    weights = model.coef_[-content.LATENT_DIM * content.NUM_MARKERS :]
    weights = weights.reshape(content.LATENT_DIM, -1)
    items, row = np.unique(batch.ids["item_id"], return_index=True)
    values = np.zeros((CONFIG.num_items + 1, content.LATENT_DIM))
    values[items] = marker_counts(batch)[row] @ weights.T
    liked = values[batch.ids["history"]].mean(axis=1)
    score = np.sum(liked * batch.vectors["user_code"], axis=1)
    self.assertGreater(score.mean(), 0.05)

  def test_words_that_were_learned_from_labels_rank_new_items(self):
    batch, best = load()[0]["test"], load()[2]["test"]["click/auc"]
    scores = scores_of_test(False, True)
    new = batch.ids["item_age"] == 1
    for rows in (new, ~new):
      self.assertGreater(auc(batch, scores, rows), best - 0.05)
    without = scores_of_test(False, False)
    self.assertLess(auc(batch, without), best - 0.13)

  def test_in_the_control_words_say_nothing(self):
    batch = load(True)[0]["test"]
    self.assertLess(
      auc(batch, scores_of_test(True, True)),
      auc(batch, scores_of_test(True, False)) + 0.002,
    )

  def test_no_text_tells_one_marker_from_another(self):
    """Counts of markers, alone and beside one another, are of one law."""
    batch = load()[0]["train"]
    _, row = np.unique(batch.ids["item_id"], return_index=True)
    counts = marker_counts(batch)[row]
    np.testing.assert_array_equal(counts.sum(axis=1), content.MARKERS)
    self.assertGreater(stats.chisquare(counts.sum(axis=0)).pvalue, 1e-3)
    together = (counts.T @ counts)[np.triu_indices(content.NUM_MARKERS, 1)]
    self.assertGreater(stats.chisquare(together).pvalue, 1e-3)
    topic = np.eye(17)[batch.ids["item_topic"][row]][:, 1:]
    table = topic.T @ counts
    self.assertGreater(stats.chi2_contingency(table).pvalue, 1e-3)

  def test_nor_does_the_query_that_a_positive_goes_with(self):
    batch = load()[0]["train"]
    rows = batch.labels["click"] == 1
    # One row an item: its rows share a text.
    item = np.where(rows, batch.ids["item_id"], 0)
    _, first = np.unique(item, return_index=True)
    first = first[1:]
    counts = marker_counts(batch)[first]
    topic = np.eye(17)[batch.ids["item_topic"][first]][:, 1:]
    self.assertGreater(stats.chi2_contingency(topic.T @ counts).pvalue, 1e-3)
    # Labels do tell: of all rows, positives hold other markers than negatives.
    counts = marker_counts(batch)
    table = [counts[rows].sum(axis=0), counts[~rows].sum(axis=0)]
    self.assertLess(stats.chi2_contingency(table).pvalue, 1e-12)

  def test_query_and_document_are_of_one_topic(self):
    batch = load()[0]["valid"]
    first = 1 + content.NUM_MARKERS + content.NUM_FILLERS
    for name in ("query", "document"):
      tokens = batch.tokens[name]
      topic = (tokens - first) // content.TOPIC_WORDS + 1
      own = batch.ids["item_topic"][:, None]
      self.assertTrue(((topic == own) | (tokens < first)).all())
    np.testing.assert_array_equal(
      batch.groups["query"], batch.ids["item_topic"] - 1
    )

  def test_meanings_drift(self):
    """Rows of the same words: the later, the more the logit has turned."""
    claim = content.make(CONFIG)
    draw = lambda first: claim.draw(  # noqa: E731
      np.random.default_rng(0), 4000, first
    )
    block, logits = draw(0)
    again, same = draw(0)
    np.testing.assert_array_equal(logits["click"], same["click"])
    np.testing.assert_array_equal(block.ids["user_id"], again.ids["user_id"])
    start = content._Meaning(np.random.default_rng(1), np.arange(128)[:, None])
    item = np.arange(128)
    at = [start.of(item, t).ravel() for t in (0.0, 0.5, 1.0)]
    cosines = [
      a @ at[0] / np.linalg.norm(a) / np.linalg.norm(at[0]) for a in at[1:]
    ]
    np.testing.assert_allclose(
      cosines, np.cos(content.DRIFT * np.array([0.5, 1.0])), atol=0.06
    )

  def test_the_control_differs_in_the_labels_only(self):
    for split in SPLITS:
      first, second = load()[0][split], load(True)[0][split]
      for part in ("ids", "tokens", "vectors", "groups"):
        for name, values in getattr(first, part).items():
          np.testing.assert_array_equal(values, getattr(second, part)[name])
      np.testing.assert_array_equal(first.dense, second.dense)
      differ = first.labels["click"] != second.labels["click"]
      self.assertGreater(differ.mean(), 0.1)

  def test_the_control_is_as_hard(self):
    first, second = load()[2], load(True)[2]
    for split in SPLITS:
      self.assertAlmostEqual(
        first[split]["click/auc"], second[split]["click/auc"], delta=0.025
      )

  @parameterized.parameters(False, True)
  def test_nothing_beats_the_true_logit(self, is_control):
    batches, _, best = load(is_control)
    config = dataclasses.replace(CONFIG, control=is_control)
    logits = synthetic.true_logits(config)["test"]["click"]
    labels = batches["test"].labels["click"]
    expected = sklearn_metrics.roc_auc_score(labels, logits)
    self.assertAlmostEqual(best["test"]["click/auc"], expected, places=10)
    self.assertLess(
      auc(batches["test"], scores_of_test(is_control, True)), expected
    )

  def test_the_rows_are_frozen(self):
    """Raise VERSION and measure every table anew if this must change."""
    logits = synthetic.true_logits(synthetic.Config("content", num_rows=1000))
    for split, expected in FROZEN.items():
      np.testing.assert_allclose(
        logits[split]["click"][:3], expected, rtol=1e-5
      )


FROZEN = {
  "train": [-0.902169551, -0.905374179, 1.3377237],
  "test": [0.6031396994, 1.8462242487, -0.6441553663],
}


if __name__ == "__main__":
  absltest.main()
