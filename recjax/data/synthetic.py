"""Planted data: the labels follow a known law, so the best score is known.

A claim about a method is first tested where it should hold. Each claim has
one generator here and a control, which is the same data set, from the same
draws, without the structure that the claim is about: there a gain must vanish.
Both were frozen before any method was tuned on them; raise `VERSION` and say
so if either must change.

```sh
python -m experiments.run --config=experiments/configs/msn.py:base \\
    --workdir=DIR --config.data.name=synthetic \\
    --config.data.claim=memory_rules --config.data.control=True
```

`memory_rules` (for MSN): thousands of unrelated rules, one for each pair of a
user cluster and an item cluster,

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

The rows are in the order of their time; the last tenth is the test part, the
tenth before it validation. Beside the rows lies `best_scores.json`, what
`best_scores` returns.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from etils import epath
from jaxtyping import Float

from recjax.data.columns import Block, ColumnWriter
from recjax.data.vocabulary import save_values
from recjax.errors import UserError
from recjax.schema import SPLITS, Feature, Label, Roles, Schema, Split, suggest

VERSION = 1

_BLOCK_ROWS = 1 << 16
_SHARE = 0.1  # Of the validation and of the test part.


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the planted data.

  Attributes:
    claim: What is planted: `memory_rules`.
    control: True leaves the planted structure out.
    seed: Of the data; the seed of a run is another.
    num_rows: Rows of all parts together, at least 10.
    num_users: Users, at least one a cluster.
    num_items: Items, at least one a cluster.
    num_user_clusters: Clusters of users, of equal size; at least 2.
    num_item_clusters: Likewise of items.
    code_dim: Width of a cluster's vector, at least 1.
    intercept: Logit of an average row.
    main_strength: Standard deviation of the main effects' logit.
    rule_strength: Standard deviation of the rules' logit.
  """

  claim: str
  control: bool = False
  seed: int = 0
  num_rows: int = 250_000
  num_users: int = 2048
  num_items: int = 2048
  num_user_clusters: int = 32
  num_item_clusters: int = 64
  code_dim: int = 16
  intercept: float = -0.5
  main_strength: float = 0.7
  rule_strength: float = 1.3

  def __post_init__(self):
    if self.claim not in _CLAIMS:
      raise UserError(
        f"data.claim: unknown claim {self.claim!r}"
        + suggest(self.claim, _CLAIMS)
      )
    for name, low in (
      ("seed", 0),
      ("num_rows", 10),
      ("num_user_clusters", 2),
      ("num_item_clusters", 2),
      ("num_users", self.num_user_clusters),
      ("num_items", self.num_item_clusters),
      ("code_dim", 1),
    ):
      if getattr(self, name) < low:
        raise UserError(
          f"data.{name} must be at least {low}, got {getattr(self, name)}"
        )
    for name in ("main_strength", "rule_strength"):
      if not 0 < getattr(self, name) < np.inf:
        raise UserError(
          f"data.{name} must be above 0 and finite, got {getattr(self, name)}"
        )
    if not np.isfinite(self.intercept):
      raise UserError(f"data.intercept must be finite, got {self.intercept}")


def sources(config: Config) -> list:
  """No files: the options are all that the data depends on."""
  del config
  return []


def estimate_bytes(config: Config) -> int:
  """About how much disk the prepared data needs."""
  return (128 + 8 * config.code_dim) * config.num_rows


def prepare(config: Config, directory: epath.PathLike) -> None:
  """Writes the data set, and `best_scores.json` beside its rows.

  Example:
    >>> prepare(Config("memory_rules"), "/tmp/planted")   # doctest: +SKIP
  """
  directory = epath.Path(directory)
  claim = _CLAIMS[config.claim](config)
  writer = ColumnWriter(directory, claim.schema)
  for split, block, _ in _generate(config, claim):
    writer.append(split, block)
  writer.finish(claim.schema)
  for name, size in claim.schema.vocab_sizes.items():
    save_values(directory, name, pa.array(np.arange(size - 1)))
  scores = json.dumps(best_scores(config), indent=1)
  (directory / "best_scores.json").write_text(scores)


def true_logits(config: Config) -> dict[str, Float[np.ndarray, " rows"]]:
  """The logit that each row's label was drawn with, by split, in row order.

  No predictor is better than it but by luck. Drawn again from the seed: it is
  nowhere in the prepared data.

  Example:
    >>> logits = true_logits(Config("memory_rules", num_rows=1000))
    >>> {split: len(values) for split, values in logits.items()}
    {'train': 800, 'valid': 100, 'test': 100}
  """
  parts = {split: [] for split in SPLITS}
  for split, _, logits in _generate(config, _CLAIMS[config.claim](config)):
    parts[split].append(logits)
  return {split: np.concatenate(blocks) for split, blocks in parts.items()}


def best_scores(config: Config) -> dict[str, dict[str, float]]:
  """AUC and log loss (nats) of `true_logits` on the labels of each split.

  Returns:
    {split: {"auc": ..., "logloss": ...}}; the AUC is NaN where all labels are
    equal.

  Example:
    >>> scores = best_scores(Config("memory_rules", num_rows=1000))
    >>> sorted(scores["test"])
    ['auc', 'logloss']
  """
  parts = {split: [] for split in SPLITS}
  for split, block, logits in _generate(config, _CLAIMS[config.claim](config)):
    parts[split].append((logits, block.labels["click"]))
  scores = {}
  for split, blocks in parts.items():
    logits, labels = map(np.concatenate, zip(*blocks, strict=True))
    scores[split] = {
      "auc": _auc(logits, labels),
      "logloss": float(np.mean(np.logaddexp(0, logits) - labels * logits)),
    }
  return scores


@dataclasses.dataclass(frozen=True)
class _Claim:
  """What the function of a claim returns.

  Attributes:
    schema: With `vocab_sizes`.
    draw: From a generator and a number of rows to a block without labels, and
      the rows' logits. Must draw the same, control or not.
  """

  schema: Schema
  draw: Callable[
    [np.random.Generator, int], tuple[Block, Float[np.ndarray, " rows"]]
  ]


def _memory_rules(config: Config) -> _Claim:
  """One rule for each pair of clusters; see the module's docstring."""
  rng = np.random.default_rng([config.seed, 0])
  shape = config.num_user_clusters, config.num_item_clusters
  users = _Things(rng, config.num_users, shape[0], (8, 5))
  items = _Things(rng, config.num_items, shape[1], (20, 4))
  hours = _standardise(rng.normal(size=24))
  rules = rng.normal(size=shape)
  rules -= rules.mean(axis=1, keepdims=True)
  rules = _standardise(rules - rules.mean(axis=0))
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
    return Block(dense, ids, {}, vectors, {}, {"group": user}), logits

  sizes = {f"user_{name}": n + 1 for name, n in users.sizes.items()}
  sizes |= {f"item_{name}": n + 1 for name, n in items.sizes.items()}
  extra = [Feature(f"dense_{i}", "dense") for i in range(2)] + [
    Feature(f"{thing}_code", "vector", dim=config.code_dim)
    for thing in ("user", "item")
  ]
  return _Claim(_schema(sizes | {"hour": 25}, extra), draw)


_CLAIMS = {"memory_rules": _memory_rules}


class _Things:
  """Users or items: clusters of equal size and two attributes of no effect."""

  def __init__(self, rng, num: int, num_clusters: int, num_values):
    self.cluster = rng.permutation(np.arange(num) % num_clusters)
    self.effect = _standardise(rng.normal(size=num_clusters))
    attributes = [rng.integers(n, size=num) for n in num_values]
    self.columns = {
      "id": np.arange(num),
      "cluster": self.cluster,
      "attribute_0": attributes[0],
      "attribute_1": attributes[1],
    }
    sizes = (num, num_clusters, *num_values)
    self.sizes = dict(zip(self.columns, sizes, strict=True))


def _schema(vocab_sizes: dict[str, int], extra: list[Feature]) -> Schema:
  """Single ids (row 0 of each vocabulary is unused), then other features."""
  return Schema(
    features=(*(Feature(name, "sparse") for name in vocab_sizes), *extra),
    labels=(Label("click"),),
    roles=Roles(user="user_id", item="item_id", time="row", group="user_id"),
    split=Split(by="time", column="row", valid=_SHARE, test=_SHARE),
    vocab_sizes=vocab_sizes,
  )


def _generate(
  config: Config, claim: _Claim
) -> Iterator[tuple[str, Block, Float[np.ndarray, " rows"]]]:
  """The split, the rows and the logits of one block after the other."""
  held_out = int(_SHARE * config.num_rows)
  num_rows = config.num_rows - 2 * held_out, held_out, held_out
  for part, (split, num) in enumerate(zip(SPLITS, num_rows, strict=True)):
    for start in range(0, num, _BLOCK_ROWS):
      rng = np.random.default_rng([config.seed, 1 + part, start])
      block, logits = claim.draw(rng, min(_BLOCK_ROWS, num - start))
      click = rng.random(len(logits)) < 1 / (1 + np.exp(-logits))
      labels = {"click": click.astype(np.float32)}
      yield split, dataclasses.replace(block, labels=labels), logits


def _standardise(values):
  """Mean 0 and mean square 1."""
  values = values - values.mean()
  return values / np.sqrt(np.mean(values**2))


def _auc(scores, labels) -> float:
  """Mann and Whitney's; `recjax.metrics` is above the data. No ties."""
  labels = labels[np.argsort(scores)] == 1
  num_positive = np.count_nonzero(labels)
  num_pairs = num_positive * (len(labels) - num_positive)
  rank_sum = np.flatnonzero(labels).sum() + num_positive
  if not num_pairs:
    return float("nan")
  return float((rank_sum - num_positive * (num_positive + 1) / 2) / num_pairs)
