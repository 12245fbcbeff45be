"""For MDL: scenarios that shift what matters, tasks that conflict or help.

    z_t = main_strength * shared_t(x) + rule_strength * own_{s,t}(x)
    label t ~ Bernoulli(sigmoid(intercept_t + z_t))

A row has a user and an item, each with a vector in plain sight, a scenario and
numbers. `shared` is a bilinear form of the two vectors, of low rank, and is
the same in every scenario. `own` is another, one for each scenario, and so
the scenario shifts what a pair is worth; the distribution of users shifts with
it, each scenario having its own favourites. What the tasks take of it:

| task | takes | share of 1 |
| --- | --- | --- |
| `click` | shared + own | 0.35 |
| `like` | shared + own: helps `click`, and is helped | 0.2 |
| `skip` | - shared - own: conflicts with `click` | 0.4 |
| `buy` | another form of the same vectors + own; rare | 0.04 |

Scenarios are of unequal size; the last holds a twentieth of the rows, few to
learn its form from them alone: its form is the mean of two large scenarios' and
something of its own, so a model that shares between scenarios can. In the
control the scenarios share all (`own` is the same for each, and users come
alike) and so do the tasks (all take `shared + own`, but for the intercepts):
then a model that parts them can gain nothing. The draws are the same, and each
logit has the same standard deviation.
"""

import numpy as np

from recjax.data.claims.common import SHARE, Claim
from recjax.data.columns import Block
from recjax.schema import Feature, Label, Roles, Schema, Split

# Shares of the rows; the last scenario is the rare one.
SCENARIOS = (0.38, 0.3, 0.2, 0.07, 0.05)
# Intercepts for about the rates above at a standard deviation of 1.4.
TASKS = {"click": -0.8, "like": -1.8, "skip": -0.5, "buy": -4.2}
SIGN = {"click": 1.0, "like": 1.0, "skip": -1.0, "buy": 1.0}
_RANK = 3


def make(config) -> Claim:
  """The law of `config`, a `synthetic.Config`."""
  rng = np.random.default_rng([config.seed, 0])
  dim, num = config.code_dim, len(SCENARIOS)
  users = rng.normal(size=(config.num_users, dim)).astype(np.float32)
  items = rng.normal(size=(config.num_items, dim)).astype(np.float32)
  # Scenario -> weight of each user; a scenario's favourites come more often.
  taste = rng.normal(size=(num, config.num_users))
  forms = _forms(rng, 2 + num, dim)
  shared, other, own = forms[0], forms[1], forms[2:].copy()
  own[-1] = _unit((own[0] + own[1]) / 2 + 0.5 * own[-1])
  if config.control:
    own[:] = own[0]
    taste[:] = 0.0
  odds = np.cumsum(np.exp(taste), axis=1)
  odds /= odds[:, -1:]

  def draw(rng: np.random.Generator, size: int):
    scenario = rng.choice(num, p=SCENARIOS, size=size)
    quantile = rng.random(size)
    user = np.empty(size, np.int64)
    for s in range(num):
      rows = scenario == s
      user[rows] = np.searchsorted(odds[s], quantile[rows])
    user = np.minimum(user, config.num_users - 1)
    item = rng.integers(config.num_items, size=size)
    dense = rng.normal(size=(size, 2)).astype(np.float32)
    x, y = users[user].astype(np.float64), items[item].astype(np.float64)
    base = np.einsum("bi,ij,bj->b", x, shared, y)
    extra = np.einsum("bi,bij,bj->b", x, own[scenario], y)
    another = np.einsum("bi,ij,bj->b", x, other, y)
    logits = {}
    for task, intercept in TASKS.items():
      if config.control:
        logit = config.main_strength * base + config.rule_strength * extra
      else:
        first = another if task == "buy" else base
        logit = config.main_strength * first + config.rule_strength * extra
        logit = SIGN[task] * logit
      logits[task] = intercept + logit + 0.3 * dense[:, 0]
    ids = {
      "user_id": user + 1,
      "item_id": item + 1,
      "scenario": scenario + 1,
    }
    vectors = {"user_code": users[user], "item_code": items[item]}
    return Block(dense, ids, {}, vectors, {}, {"group": user}), logits

  return Claim(_schema(config), draw)


def _forms(rng, num: int, dim: int):
  """Matrices of low rank whose form of two normal vectors varies as 1."""
  left = rng.normal(size=(num, dim, _RANK))
  right = rng.normal(size=(num, _RANK, dim))
  return np.stack([_unit(a @ b) for a, b in zip(left, right, strict=True)])


def _unit(form):
  return form / np.sqrt(np.sum(form**2))


def _schema(config) -> Schema:
  sizes = {
    "user_id": config.num_users + 1,
    "item_id": config.num_items + 1,
    "scenario": len(SCENARIOS) + 1,
  }
  return Schema(
    features=(
      *(Feature(name, "sparse") for name in sizes),
      *(Feature(f"dense_{i}", "dense") for i in range(2)),
      *(
        Feature(f"{thing}_code", "vector", dim=config.code_dim)
        for thing in ("user", "item")
      ),
    ),
    labels=tuple(Label(task) for task in TASKS),
    roles=Roles(
      user="user_id",
      item="item_id",
      time="row",
      group="user_id",
      scenario="scenario",
    ),
    split=Split(by="time", column="row", valid=SHARE, test=SHARE),
    vocab_sizes=sizes,
  )
