"""For MSN: one unrelated rule for each pair of a user and an item cluster.

    logit = intercept + main_strength * main + rule_strength * rule[u, i]
    label ~ Bernoulli(sigmoid(logit))

`rule` is normal noise, centred over rows and columns: one of the clusters
alone says nothing about it, and its singular values fall slowly, so no
embeddings of few dimensions can factor it. The clusters of user and item are
features in plain sight, as ids and as vectors of normal noise, one a cluster
(as if from a content encoder, which spares a model the slow start from small
embeddings). So a model need not find the clusters; it must hold
num_user_clusters * num_item_clusters numbers, about 98 training rows each at
the defaults. `main` is a sum of effects of each cluster alone, the hour and
one dense feature. The ids of users and items, four sparse features and one
dense one say nothing more. In the control `rule` is left out and `main` scaled
up to the standard deviation that both had together: both logits being nearly
normal, the best AUC stays about where it was.
"""

import numpy as np

from recjax.data.claims.common import Claim, Things, standardise, time_schema
from recjax.data.columns import Block
from recjax.schema import Feature


def make(config) -> Claim:
  """The law of `config`, a `synthetic.Config`."""
  rng = np.random.default_rng([config.seed, 0])
  shape = config.num_user_clusters, config.num_item_clusters
  users = Things(rng, config.num_users, shape[0], (8, 5))
  items = Things(rng, config.num_items, shape[1], (20, 4))
  hours = standardise(rng.normal(size=24))
  rules = rng.normal(size=shape)
  rules -= rules.mean(axis=1, keepdims=True)
  rules = standardise(rules - rules.mean(axis=0))
  codes = [rng.normal(size=(n, config.code_dim)) for n in shape]
  codes = [code.astype(np.float32) for code in codes]
  # Shares of the main effects' variance: clusters, hour, dense feature.
  weights = config.main_strength * np.sqrt([0.3, 0.3, 0.2, 0.2])
  if config.control:
    weights *= np.hypot(1.0, config.rule_strength / config.main_strength)
    rules *= 0.0

  def draw(rng: np.random.Generator, size: int):
    user = rng.integers(config.num_users, size=size)
    item = rng.integers(config.num_items, size=size)
    hour = rng.integers(24, size=size)
    dense = rng.normal(size=(size, 2)).astype(np.float32)
    pair = users.cluster[user], items.cluster[item]
    effects = [users.effect[pair[0]], items.effect[pair[1]], hours[hour]]
    main = weights @ np.stack([*effects, dense[:, 0]])
    logits = config.intercept + main + config.rule_strength * rules[pair]
    ids = {
      **{f"user_{name}": v[user] + 1 for name, v in users.columns.items()},
      **{f"item_{name}": v[item] + 1 for name, v in items.columns.items()},
      "hour": hour + 1,
    }
    vectors = {
      "user_code": codes[0][pair[0]],
      "item_code": codes[1][pair[1]],
    }
    return Block(dense, ids, {}, vectors, {}, {"group": user}), {
      "click": logits
    }

  sizes = {f"user_{name}": n + 1 for name, n in users.sizes.items()}
  sizes |= {f"item_{name}": n + 1 for name, n in items.sizes.items()}
  extra = [Feature(f"dense_{i}", "dense") for i in range(2)] + [
    Feature(f"{thing}_code", "vector", dim=config.code_dim)
    for thing in ("user", "item")
  ]
  return Claim(time_schema(sizes | {"hour": 25}, extra), draw)
