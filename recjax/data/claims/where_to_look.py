"""For HyFormer: where to look in a history is known step by step.

    logit = intercept + main_strength * main
            + rule_strength * (sqrt(0.4) * first[v1] + sqrt(0.6) * second[v2])
    label ~ Bernoulli(sigmoid(logit))

A user's history holds `NUM_PLACES * NUM_KINDS` events, every pair of a place
and a kind once, in an order that means nothing. Each event also has a value
and the place to go to next, both drawn at random.

* The first event is the one at the row's `place`, a feature of the context, of
  the candidate's kind. v1 is its value.
* The second event is the one at the place that the first points to, of the same
  kind. v2 is its value.

The candidate alone leaves `NUM_PLACES` events to choose from, and what they
average to says next to nothing of one of them. Where the second event is
depends on what the first says, so one reading of the history cannot find it,
however well its query knows the context. An item has a
value too, which says nothing, nor do values, pointers and places outside of
these two steps. A history serves the rows of one user, about 122 of them.

`main` is a sum of effects of the user's and the item's cluster, the hour and
one dense feature, all in plain sight. In the control the two steps are left out
and `main` scaled up to the standard deviation that both had together.
"""

import numpy as np

from recjax.data.claims.common import Claim, Things, standardise, time_schema
from recjax.data.columns import Block
from recjax.schema import Feature

NUM_PLACES = 32
NUM_KINDS = 2
NUM_VALUES = 8
STEP_SHARES = (0.4, 0.6)  # Of the variance that both steps explain.


def make(config) -> Claim:
  """The law of `config`, a `synthetic.Config`."""
  rng = np.random.default_rng([config.seed, 0])
  users = Things(rng, config.num_users, config.num_user_clusters, (8, 5))
  items = Things(rng, config.num_items, config.num_item_clusters, (20, 4))
  item_kind = rng.permutation(np.arange(config.num_items) % NUM_KINDS)
  item_value = rng.integers(NUM_VALUES, size=config.num_items)
  hours = standardise(rng.normal(size=24))
  effects = [standardise(rng.normal(size=NUM_VALUES)) for _ in STEP_SHARES]
  history = Histories(rng, config.num_users)
  # Shares of the main effects' variance: clusters, hour, dense feature.
  weights = config.main_strength * np.sqrt([0.3, 0.3, 0.2, 0.2])
  steps = config.rule_strength * np.sqrt(STEP_SHARES)
  if config.control:
    weights *= np.hypot(1.0, config.rule_strength / config.main_strength)
    steps *= 0.0

  def draw(rng: np.random.Generator, size: int):
    user = rng.integers(config.num_users, size=size)
    item = rng.integers(config.num_items, size=size)
    place = rng.integers(NUM_PLACES, size=size)
    hour = rng.integers(24, size=size)
    dense = rng.normal(size=(size, 2)).astype(np.float32)
    kind = item_kind[item]
    found = history.look(user, place, kind)
    main = weights @ np.stack(
      [
        users.effect[users.cluster[user]],
        items.effect[items.cluster[item]],
        hours[hour],
        dense[:, 0],
      ]
    )
    rules = sum(
      step * effect[value]
      for step, effect, value in zip(steps, effects, found, strict=True)
    )
    ids = {
      **{f"user_{name}": v[user] + 1 for name, v in users.columns.items()},
      **{f"item_{name}": v[item] + 1 for name, v in items.columns.items()},
      "item_kind": kind + 1,
      "item_value": item_value[item] + 1,
      "place": place + 1,
      "hour": hour + 1,
    }
    lists = {"history": history.slices(user)}
    block = Block(dense, ids, lists, {}, {}, {"group": user})
    return block, {"click": config.intercept + main + rules}

  sizes = {f"user_{name}": n + 1 for name, n in users.sizes.items()}
  sizes |= {f"item_{name}": n + 1 for name, n in items.sizes.items()}
  sizes |= {"item_kind": NUM_KINDS + 1, "item_value": NUM_VALUES + 1}
  sizes |= {"place": NUM_PLACES + 1, "hour": 25}
  sequence = Feature(
    "history",
    "sequence",
    vocabulary="place",
    max_len=history.length,
    side={
      "history_kind": "item_kind",
      "history_next": "place",
      "history_value": "item_value",
    },
  )
  schema = time_schema(
    sizes, [sequence, *(Feature(f"dense_{i}", "dense") for i in range(2))]
  )
  return Claim(schema, draw, history.columns)


class Histories:
  """One history a user, all of equal length.

  Attributes:
    length: Events of a history.
    columns: Side -> its ids, one user after the other.
  """

  def __init__(self, rng: np.random.Generator, num_users: int):
    self.length = NUM_PLACES * NUM_KINDS
    shape = num_users, self.length
    # Of each user: which pair of place and kind is the n-th event.
    pair = rng.permuted(np.broadcast_to(np.arange(self.length), shape), axis=1)
    value = rng.integers(NUM_VALUES, size=shape)
    following = rng.integers(NUM_PLACES, size=shape)
    self.columns = {
      name: (column + 1).astype(np.int32).ravel()
      for name, column in (
        ("history", pair // NUM_KINDS),
        ("history_kind", pair % NUM_KINDS),
        ("history_next", following),
        ("history_value", value),
      )
    }
    # By pair.
    order = np.argsort(pair, axis=1)
    self._value = np.take_along_axis(value, order, axis=1)
    self._next = np.take_along_axis(following, order, axis=1)

  def look(self, user, place, kind):
    """Values of the first and of the second event."""
    first = user, place * NUM_KINDS + kind
    second = user, self._next[first] * NUM_KINDS + kind
    return self._value[first], self._value[second]

  def slices(self, user):
    """Start and length of the users' histories."""
    return user * self.length, np.full(len(user), self.length, np.int32)
