"""For HyFormer: features outside of a history say where in it to look.

    logit = intercept + main_strength * main + rule_strength * found
    label ~ Bernoulli(sigmoid(logit))

A row shows the last `LENGTH` events of its user. An event has a slot, a device
and a value, all drawn at random. `found` is the mean effect of the values of
those events whose slot and device are the row's, two of 32 on average, scaled
to a mean square of 1 over rows; 0 where there is none.

Slot and device are features of the context: neither the candidate's nor the
user's, and drawn anew for each row. What the history must be asked for is known
only where they meet it. A model that compresses the history before it has met
them must keep 16 numbers, one for each pair of slot and device; one whose
reading starts from all features keeps one. The mean over the whole history
explains a sixteenth of the variance of `found`, that over the events of the
row's slot alone a quarter: a model comes upon one feature after the other.

Of each user there is one stream of `STREAM_LEN` events, and a row's history is
a window of it that ends anywhere: rows of one user see other events, so what
is where cannot be learned by heart from the user's id.

`main` is a sum of effects of the user's and the item's cluster, the hour and
one dense feature, all in plain sight. The candidate has a value too, which says
nothing. In the control `found` is left out and `main` scaled up to the standard
deviation that both had together. The draws are the same.
"""

import math

import numpy as np

from recjax.data.claims.common import Claim, Things, standardise, time_schema
from recjax.data.columns import Block
from recjax.schema import Feature

# Attribute of an event, and feature of the context -> number of its values.
WHERE = {"slot": 4, "device": 4}
NUM_VALUES = 8
LENGTH = 32
STREAM_LEN = 128
PLAIN = ("id", "cluster")  # Columns of users and of items.


def make(config) -> Claim:
  """The law of `config`, a `synthetic.Config`."""
  rng = np.random.default_rng([config.seed, 0])
  users = Things(rng, config.num_users, config.num_user_clusters, (8, 5))
  items = Things(rng, config.num_items, config.num_item_clusters, (20, 4))
  item_value = rng.integers(NUM_VALUES, size=config.num_items)
  hours = standardise(rng.normal(size=24))
  streams = Streams(rng, config.num_users)
  # Shares of the main effects' variance: clusters, hour, dense feature.
  weights = config.main_strength * np.sqrt([0.3, 0.3, 0.2, 0.2])
  strength = config.rule_strength
  if config.control:
    weights *= np.hypot(1.0, strength / config.main_strength)
    strength = 0.0

  def draw(rng: np.random.Generator, size: int):
    user, start, where = streams.ask(rng, size)
    item = rng.integers(config.num_items, size=size)
    hour = rng.integers(24, size=size)
    dense = rng.normal(size=(size, 2)).astype(np.float32)
    effects = [
      users.effect[users.cluster[user]],
      items.effect[items.cluster[item]],
      hours[hour],
      dense[:, 0],
    ]
    found = streams.find(user, start, where)
    logits = config.intercept + weights @ np.stack(effects) + strength * found
    ids = {
      **{f"user_{name}": users.columns[name][user] + 1 for name in PLAIN},
      **{f"item_{name}": items.columns[name][item] + 1 for name in PLAIN},
      **{name: value + 1 for name, value in where.items()},
      "item_value": item_value[item] + 1,
      "hour": hour + 1,
    }
    history = user * STREAM_LEN + start, np.full(size, LENGTH, np.int64)
    block = Block(dense, ids, {"history": history}, {}, {}, {"group": user})
    return block, {"click": logits}

  sizes = {f"user_{name}": users.sizes[name] + 1 for name in PLAIN}
  sizes |= {f"item_{name}": items.sizes[name] + 1 for name in PLAIN}
  sizes |= {name: number + 1 for name, number in WHERE.items()}
  sizes |= {"item_value": NUM_VALUES + 1, "hour": 25}
  history = Feature(
    "history",
    "sequence",
    vocabulary="item_value",
    max_len=LENGTH,
    side={f"history_{name}": name for name in WHERE},
  )
  dense = [Feature(f"dense_{i}", "dense") for i in range(2)]
  return Claim(time_schema(sizes, [history, *dense]), draw, streams.columns)


class Streams:
  """The events of every user, one after the other.

  Attributes:
    columns: List or side -> its ids, one user after the other.
  """

  def __init__(self, rng: np.random.Generator, num_users: int):
    shape = num_users, STREAM_LEN
    self._where = {n: rng.integers(k, size=shape) for n, k in WHERE.items()}
    self._value = rng.integers(NUM_VALUES, size=shape)
    self._effect = standardise(rng.normal(size=NUM_VALUES))
    self.columns = {"history": self._value.ravel() + 1}
    for name, values in self._where.items():
      self.columns[f"history_{name}"] = values.ravel() + 1

  def ask(self, rng: np.random.Generator, size: int):
    """Users, starts of their windows, and slots and devices of rows."""
    num_users = len(self._value)
    return (
      rng.integers(num_users, size=size),
      rng.integers(STREAM_LEN - LENGTH + 1, size=size),
      {name: rng.integers(n, size=size) for name, n in WHERE.items()},
    )

  def find(self, user, start, where):
    """`found` of each row."""
    seen = user[:, None], start[:, None] + np.arange(LENGTH)[None]
    counts = np.ones((len(user), LENGTH), bool)
    for name, value in where.items():
      counts &= self._where[name][seen] == value[:, None]
    total = np.sum(self._effect[self._value[seen]] * counts, axis=1)
    mean = total / np.maximum(counts.sum(axis=1), 1)
    return mean / np.sqrt(mean_square(math.prod(WHERE.values())))


def mean_square(num_cells: int) -> float:
  """Expected 1 / n of n > 0 of `LENGTH` events that are in a cell of so many.

  The variance over histories of the mean of n values of variance 1.
  """
  share = 1 / num_cells
  return sum(
    math.comb(LENGTH, n) * share**n * (1 - share) ** (LENGTH - n) / n
    for n in range(1, LENGTH + 1)
  )
