"""For LEMUR: words whose meaning the labels alone tell, on items that are new.

    logit = intercept + main_strength * main + rule_strength * rule[u, i, t]
    label ~ Bernoulli(sigmoid(logit))

An item's text holds words of its topic, filler, and `MARKERS` markers, each
drawn evenly and on its own from `NUM_MARKERS`. A marker has a hidden vector,
and `rule` is the product of what the user's cluster likes (`user_code`, in
plain sight) and the mean vector of the item's markers; all clusters like the
first entry alike. The markers are alike in all but that: to swap two of them
changes nothing in the law of the texts, nor in which of the texts that found
favour goes with which query. So an encoder that learned from text, or from
queries and their positive documents, cannot tell one from another; only the
gradient of the label can. It meets each marker in thousands of rows.

The query is of the item's topic, always: a contrast of queries and documents
has something to learn, the topic, whose effect is a part of `main` and is in
plain sight as an id. What users like does not depend on the query.

Time is the share of the rows before a row, from 0 to 1. Items appear at a
steady rate and live for `LIFE`; those with `item_age` 1 are younger than `NEW`,
and since that is the share of the validation part, none of them in the test
part was ever in a training row. Every item has its row of the vocabulary, as
in a hashed one. Meanings drift: a marker's vector turns by `DRIFT` radians
over the whole. A history holds items that the user's cluster liked at the
start of the current of `PERIODS` periods.

In the control `rule` is left out and `main` scaled up to the standard deviation
of both: texts are the same and say nothing.
"""

import numpy as np

from recjax.data.claims.common import SHARE, Claim, standardise
from recjax.data.columns import Block
from recjax.schema import TOKENS, Feature, Label, Roles, Schema, Split

LATENT_DIM = 4
QUALITY = 0.7  # Share of the rule's variance that all users agree on.
NUM_MARKERS = 128
MARKERS = 4  # In a text.
FILLERS = 2
TOPIC_WORDS = 8  # Of each topic.
NUM_FILLERS = 100
DOCUMENT_LEN = 10
QUERY_LEN = 3
QUERIES_PER_TOPIC = 4
HISTORY_LEN = 10
LIFE = 0.3
NEW = SHARE
DRIFT = 0.6
PERIODS = 20
SHARPNESS = 1.0


def make(config) -> Claim:
  """The law of `config`, a `synthetic.Config`."""
  rng = np.random.default_rng([config.seed, 0])
  num_topics = config.num_item_clusters
  user_cluster = rng.permutation(
    np.arange(config.num_users) % config.num_user_clusters
  )
  topic = rng.permutation(np.arange(config.num_items) % num_topics)
  taste = _tastes(rng, config.num_user_clusters)
  topics, hours = (standardise(rng.normal(size=n)) for n in (num_topics, 24))
  markers = rng.integers(NUM_MARKERS, size=(config.num_items, MARKERS))
  meaning = _Meaning(rng, markers)
  documents = _documents(rng, topic, markers)
  queries = np.arange(num_topics).repeat(QUERIES_PER_TOPIC)
  queries = _topic_words(rng, queries, QUERY_LEN)
  number = rng.permutation(config.num_items)  # An id tells no age.
  history = _histories(rng, config, taste, meaning, user_cluster)
  # Shares of the main effects' variance: topic, hour, dense feature.
  weights = config.main_strength * np.sqrt([0.4, 0.3, 0.3])
  strength = config.rule_strength
  if config.control:
    weights *= np.hypot(1.0, config.rule_strength / config.main_strength)
    strength = 0.0

  def draw(rng: np.random.Generator, size: int, first_row: int):
    time = (first_row + np.arange(size)) / config.num_rows
    user = rng.integers(config.num_users, size=size)
    item, age = _alive(time, rng.random(size), config.num_items)
    variant = rng.integers(QUERIES_PER_TOPIC, size=size)
    hour = rng.integers(24, size=size)
    dense = rng.normal(size=(size, 1)).astype(np.float32)
    main = weights @ np.stack([topics[topic[item]], hours[hour], dense[:, 0]])
    liked = taste[user_cluster[user]]
    rule = np.sum(liked * meaning.of(item, time[:, None]), axis=1)
    logits = config.intercept + main + strength * rule
    ids = {
      "user_id": user + 1,
      "user_cluster": user_cluster[user] + 1,
      "item_id": number[item] + 1,
      "item_topic": topic[item] + 1,
      "item_age": 1 + (age >= NEW) + (age >= 2 * NEW),
      "hour": hour + 1,
    }
    period = (time * PERIODS).astype(np.int64)
    query = topic[item] * QUERIES_PER_TOPIC + variant
    lists = {
      "history": _slices(period * config.num_users + user, HISTORY_LEN),
      "document": _slices(item, DOCUMENT_LEN),
      "query": _slices(query, QUERY_LEN),
    }
    vectors = {"user_code": liked.astype(np.float32)}
    groups = {"group": user, "query": topic[item]}
    return Block(dense, ids, lists, vectors, {}, groups), {"click": logits}

  sizes = {
    "user_id": config.num_users + 1,
    "user_cluster": config.num_user_clusters + 1,
    "item_id": config.num_items + 1,
    "item_topic": num_topics + 1,
    "item_age": 4,
    "hour": 25,
    TOKENS: 1 + NUM_MARKERS + NUM_FILLERS + num_topics * TOPIC_WORDS,
  }
  values = {
    "history": number[history.reshape(-1)] + 1,
    "document": documents.reshape(-1),
    "query": queries.reshape(-1),
  }
  return Claim(_schema(sizes), draw, values, drifts=True)


def _tastes(rng, num: int):
  """`[clusters, LATENT_DIM]`; rows have a mean square sum of 1."""
  own = rng.normal(size=(num, LATENT_DIM - 1))
  own = standardise(own - own.mean(axis=0)) / np.sqrt(LATENT_DIM - 1)
  shared = np.full((num, 1), np.sqrt(QUALITY))
  return np.concatenate([shared, np.sqrt(1 - QUALITY) * own], axis=1)


class _Meaning:
  """The hidden vectors of markers, which turn as time goes by."""

  def __init__(self, rng, markers):
    plane = rng.normal(size=(2, NUM_MARKERS, LATENT_DIM))
    plane -= plane.mean(axis=1, keepdims=True)
    # The mean of `MARKERS` has mean square 1, and so, in the end, the rule.
    plane = np.sqrt(MARKERS) * standardise(plane)
    self._plane = plane[:, markers].mean(axis=2)

  def of(self, item, time):
    """`[items, LATENT_DIM]` at `time`, a number or `[items, 1]`."""
    start, end = self._plane[:, item]
    return np.cos(DRIFT * time) * start + np.sin(DRIFT * time) * end


def _alive(time, quantile, num_items: int):
  """One of the items that live at a time, and how long it does."""
  rate = num_items / (1 + LIFE)
  place = (time + quantile * LIFE) * rate
  item = np.minimum(place.astype(np.int64), num_items - 1)
  # Item k is born at k / rate - LIFE.
  return item, time + LIFE - item / rate


def _documents(rng, topic, markers):
  """`[items, DOCUMENT_LEN]` tokens in random order."""
  words = _topic_words(rng, topic, DOCUMENT_LEN - MARKERS - FILLERS)
  fillers = rng.integers(NUM_FILLERS, size=(len(topic), FILLERS))
  tokens = [1 + markers, 1 + NUM_MARKERS + fillers, words]
  return rng.permuted(np.concatenate(tokens, axis=1), axis=1)


def _topic_words(rng, topic, num: int):
  """`[texts, num]` words of each text's topic."""
  first = 1 + NUM_MARKERS + NUM_FILLERS + topic[:, None] * TOPIC_WORDS
  return first + rng.integers(TOPIC_WORDS, size=(len(topic), num))


def _histories(rng, config, taste, meaning: _Meaning, user_cluster):
  """`[periods, users, HISTORY_LEN]` items, by odds of what clusters like."""
  chosen = np.empty((PERIODS, config.num_users, HISTORY_LEN), np.int64)
  for period in range(PERIODS):
    time = period / PERIODS
    span = np.array([0.0, 1.0 - 1e-9])
    first, last = _alive(time, span, config.num_items)[0]
    alive = np.arange(first, last + 1)
    odds = np.exp(SHARPNESS * taste @ meaning.of(alive, time).T)
    upto = np.cumsum(odds, axis=1)
    for cluster, row in enumerate(upto):
      users = np.flatnonzero(user_cluster == cluster)
      drawn = rng.random((len(users), HISTORY_LEN)) * row[-1]
      at = np.minimum(np.searchsorted(row, drawn), len(alive) - 1)
      chosen[period, users] = alive[at]
  return chosen


def _schema(vocab_sizes) -> Schema:
  names = [name for name in vocab_sizes if name != TOKENS]
  return Schema(
    features=(
      *(Feature(name, "sparse") for name in names),
      Feature("history", "sequence", vocabulary="item_id", max_len=HISTORY_LEN),
      Feature("dense_0", "dense"),
      Feature("user_code", "vector", dim=LATENT_DIM),
      Feature("document", "text", max_len=DOCUMENT_LEN),
      Feature("query", "text", max_len=QUERY_LEN),
    ),
    labels=(Label("click"),),
    roles=Roles(
      user="user_id",
      item="item_id",
      time="row",
      query="item_topic",
      group="user_id",
      scenario="item_age",
    ),
    split=Split(by="time", column="row", valid=SHARE, test=SHARE),
    vocab_sizes=vocab_sizes,
  )


def _slices(owner, num: int):
  return owner.astype(np.int64) * num, np.full(len(owner), num, np.int64)
