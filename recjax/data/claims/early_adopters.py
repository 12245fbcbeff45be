"""For PROMO: who takes up an item first tells its type, its content does not.

    logit = intercept + main_strength * main + rule_strength * rule[u, i]
    label ~ Bernoulli(sigmoid(logit))

`rule` is what a hidden type of users thinks of a hidden type of items: a
product of normal noise in `LATENT_DIM` dimensions, so that two towers can hold
it. Half of the rows are about one of `num_items` warm items (about 100 training
rows each at the defaults, enough to learn an item by its id), half about one
of `COLD_PER_WARM` times as many cold ones (about 6 rows each, too few).

Each item comes with `LIST_LEN` early adopters (`pinnacle_users`) and as many
users who passed it by (`negative_users`), drawn by odds of
`exp(+-SHARPNESS * rule)`: the users that rows show to think alike. Users have
about 100 rows each, which tell their types, and a history of warm items drawn
by the same odds. An item's attribute and its content vector are noise. `main`
is the hour and a dense number.

In the control adopters and passers-by are drawn without regard to the item.
The labels are the same, and so is the best score: what the lists gave must be
gone.
"""

import dataclasses

import numpy as np

from recjax.data.claims.common import Claim, standardise, time_schema
from recjax.data.columns import Block
from recjax.schema import Feature

COLD_PER_WARM = 8
LATENT_DIM = 8
LIST_LEN = 10
HISTORY_LEN = 20
SHARPNESS = 2.0
# Rows of `item_positives`: as `recjax.data.feedback.bucket` counts, plus 1.
COLD_ROW, WARM_ROW = 2, 5


def make(config) -> Claim:
  """The law of `config`, a `synthetic.Config`."""
  rng = np.random.default_rng([config.seed, 0])
  num_types = config.num_user_clusters, config.num_item_clusters
  num_items = (1 + COLD_PER_WARM) * config.num_items
  user_type = rng.permutation(np.arange(config.num_users) % num_types[0])
  item_type = rng.permutation(np.arange(num_items) % num_types[1])
  left, right = (rng.normal(size=(n, LATENT_DIM)) for n in num_types)
  rule = left @ right.T
  rule -= rule.mean(axis=1, keepdims=True)
  rule = standardise(rule - rule.mean(axis=0))
  hours = standardise(rng.normal(size=24))
  user_attribute = rng.integers(8, size=config.num_users)
  item_attribute = rng.integers(20, size=num_items)
  content = rng.normal(size=(num_items, config.code_dim)).astype(np.float32)
  lists = {}
  for name, sign in (("pinnacle_users", 1.0), ("negative_users", -1.0)):
    # Drawn in the control too, so that what follows is the same.
    matching = _draw(rng, sign * rule[:, item_type], user_type, LIST_LEN)
    anybody = rng.integers(config.num_users, size=matching.shape)
    lists[name] = anybody if config.control else matching
  warm_type = item_type[: config.num_items]
  history = _draw(rng, rule[user_type].T, warm_type, HISTORY_LEN)
  weights = config.main_strength * np.sqrt([0.5, 0.5])

  def draw(rng: np.random.Generator, size: int):
    user = rng.integers(config.num_users, size=size)
    is_cold = rng.random(size) < 0.5
    warm = rng.integers(config.num_items, size=size)
    cold = rng.integers(config.num_items, num_items, size=size)
    item = np.where(is_cold, cold, warm)
    hour = rng.integers(24, size=size)
    dense = rng.normal(size=(size, 1)).astype(np.float32)
    main = weights @ np.stack([hours[hour], dense[:, 0]])
    affinity = rule[user_type[user], item_type[item]]
    logits = config.intercept + main + config.rule_strength * affinity
    ids = {
      "user_id": user + 1,
      "item_id": item + 1,
      "user_attribute": user_attribute[user] + 1,
      "item_attribute": item_attribute[item] + 1,
      "item_positives": np.where(is_cold, COLD_ROW, WARM_ROW),
      "hour": hour + 1,
    }
    slices = {name: _slices(item, LIST_LEN) for name in lists}
    slices["positive_history"] = _slices(user, HISTORY_LEN)
    return Block(
      dense, ids, slices, {"content": content[item]}, {}, {"group": user}
    ), {"click": logits}

  sizes = {
    "user_id": config.num_users + 1,
    "item_id": num_items + 1,
    "user_attribute": 9,
    "item_attribute": 21,
    "item_positives": WARM_ROW + 1,
    "hour": 25,
  }
  extra = [
    Feature(name, "sequence", vocabulary="user_id", max_len=LIST_LEN)
    for name in lists
  ]
  extra += [
    Feature(
      "positive_history", "sequence", vocabulary="item_id", max_len=HISTORY_LEN
    ),
    Feature("dense_0", "dense"),
    Feature("content", "vector", dim=config.code_dim),
  ]
  values = {name: users.reshape(-1) + 1 for name, users in lists.items()}
  values["positive_history"] = history.reshape(-1) + 1
  schema = time_schema(sizes, extra)
  roles = dataclasses.replace(schema.roles, popularity="item_positives")
  return Claim(dataclasses.replace(schema, roles=roles), draw, values)


def _draw(rng, taste, type_of, num: int):
  """Things drawn for each owner by odds of `exp(SHARPNESS * taste)`.

  Args:
    rng: Where the draws come from.
    taste: `[types, owners]`.
    type_of: Type of each thing that may be drawn; none without a thing.
    num: Draws an owner.

  Returns:
    `[owners, num]` numbers of things.
  """
  count = np.bincount(type_of, minlength=len(taste))
  odds = np.exp(SHARPNESS * taste) * (count > 0)[:, None]
  upto = np.cumsum(odds / odds.sum(axis=0), axis=0)
  drawn = rng.random((taste.shape[1], num))
  chosen = np.stack(
    [(drawn > row[:, None]).astype(np.int64) for row in upto[:-1]]
  ).sum(axis=0)
  members = np.argsort(type_of, kind="stable")
  first = np.cumsum(count) - count
  place = (rng.random(chosen.shape) * count[chosen]).astype(np.int64)
  return members[first[chosen] + place]


def _slices(owner, num: int):
  return owner.astype(np.int64) * num, np.full(len(owner), num, np.int64)
