"""Planted data: the labels follow a known law, so the best score is known.

A claim about a method is first tested where it should hold. Each claim has
one generator here and a control, which is the same data set, from the same
draws, without the structure that the claim is about: there a gain must vanish.
Both were frozen before any method was tuned on them (`content` and
`where_to_look` after single runs that showed that their own method learns
them at all); raise `VERSION` and say so if either must change.

```sh
python -m experiments.run --config=experiments/configs/msn.py:base \\
    --workdir=DIR --config.data.name=synthetic \\
    --config.data.claim=memory_rules --config.data.control=True
```

Of the claims, `memory_rules` is MSN's: thousands of rules to remember;
`scenario_tasks` is MDL's: scenarios that shift what matters, tasks that
conflict or help; `early_adopters` is PROMO's: users who tell the type of a
new item; `content` is LEMUR's: words whose meaning the labels alone tell;
`where_to_look` is HyFormer's: features that say where in a history to look.
What a claim plants stands in its file under `recjax/data/claims/`.

The rows are in the order of their time; the last tenth is the test part, the
tenth before it validation. Beside the rows lies `best_scores.json`, what
`best_scores` returns.
"""

import dataclasses
import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from etils import epath
from jaxtyping import Float

from recjax.data.claims import (
  content,
  early_adopters,
  memory_rules,
  scenario_tasks,
  where_to_look,
)
from recjax.data.claims.common import SHARE, Claim
from recjax.data.columns import Block, ColumnWriter
from recjax.data.vocabulary import save_values
from recjax.errors import UserError
from recjax.schema import SPLITS, TOKENS, suggest

VERSION = 2

_BLOCK_ROWS = 1 << 16

CLAIMS = {
  "content": content.make,
  "early_adopters": early_adopters.make,
  "memory_rules": memory_rules.make,
  "scenario_tasks": scenario_tasks.make,
  "where_to_look": where_to_look.make,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the planted data.

  Attributes:
    claim: What is planted, a name of `CLAIMS`.
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
    if self.claim not in CLAIMS:
      raise UserError(
        f"data.claim: unknown claim {self.claim!r}"
        + suggest(self.claim, CLAIMS)
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
  claim = CLAIMS[config.claim](config)
  writer = ColumnWriter(directory, claim.schema)
  for feature in claim.schema.features:
    if feature.is_list:
      values = claim.list_values
      sides = {s.name: values[s.name] for s in claim.schema.sides(feature)}
      writer.append_values(feature.name, values[feature.name], sides=sides)
  for split, block, _ in _generate(config, claim):
    writer.append(split, block)
  writer.finish(claim.schema)
  for name, size in claim.schema.vocab_sizes.items():
    if name == TOKENS:  # They are of no text that could be tokenised.
      continue
    save_values(directory, name, pa.array(np.arange(size - 1)))
  scores = json.dumps(best_scores(config), indent=1)
  (directory / "best_scores.json").write_text(scores)


def true_logits(
  config: Config,
) -> dict[str, dict[str, Float[np.ndarray, " rows"]]]:
  """Split -> label -> the logit that each row's label was drawn with.

  No predictor is better than it but by luck. Drawn again from the seed: it is
  nowhere in the prepared data.

  Example:
    >>> logits = true_logits(Config("memory_rules", num_rows=1000))
    >>> {split: len(values["click"]) for split, values in logits.items()}
    {'train': 800, 'valid': 100, 'test': 100}
  """
  logits, _ = _laws(config)
  return logits


def best_scores(config: Config) -> dict[str, dict[str, float]]:
  """AUC and log loss (nats) of `true_logits` on the labels of each split.

  Returns:
    {split: {"<label>/auc": ..., "<label>/logloss": ...}}; the AUC is NaN where
    all labels are equal.

  Example:
    >>> scores = best_scores(Config("memory_rules", num_rows=1000))
    >>> sorted(scores["test"])
    ['click/auc', 'click/logloss']
  """
  scores = {split: {} for split in SPLITS}
  logits, labels = _laws(config)
  for split, laws in logits.items():
    for label, logit in laws.items():
      outcome = labels[split][label]
      loss = np.mean(np.logaddexp(0, logit) - outcome * logit)
      scores[split][f"{label}/auc"] = _auc(logit, outcome)
      scores[split][f"{label}/logloss"] = float(loss)
  return scores


def _laws(config: Config):
  """Logits and labels of all rows, each split -> label -> values."""
  parts = {split: [] for split in SPLITS}
  for split, block, logits in _generate(config, CLAIMS[config.claim](config)):
    parts[split].append((logits, block.labels))
  return tuple(
    {
      split: {
        label: np.concatenate([block[which][label] for block in blocks])
        for label in blocks[0][which]
      }
      for split, blocks in parts.items()
    }
    for which in (0, 1)
  )


def _generate(
  config: Config, claim: Claim
) -> Iterator[tuple[str, Block, dict[str, Float[np.ndarray, " rows"]]]]:
  """The split, the rows and the logits of one block after the other."""
  held_out = int(SHARE * config.num_rows)
  num_rows = config.num_rows - 2 * held_out, held_out, held_out
  for part, (split, num) in enumerate(zip(SPLITS, num_rows, strict=True)):
    for start in range(0, num, _BLOCK_ROWS):
      rng = np.random.default_rng([config.seed, 1 + part, start])
      row = (sum(num_rows[:part]) + start,) if claim.drifts else ()
      block, logits = claim.draw(rng, min(_BLOCK_ROWS, num - start), *row)
      labels = {
        label: (rng.random(len(v)) < 1 / (1 + np.exp(-v))).astype(np.float32)
        for label, v in logits.items()
      }
      yield split, dataclasses.replace(block, labels=labels), logits


def _auc(scores, labels) -> float:
  """Mann and Whitney's; `recjax.metrics` is above the data. No ties."""
  labels = labels[np.argsort(scores)] == 1
  num_positive = np.count_nonzero(labels)
  num_pairs = num_positive * (len(labels) - num_positive)
  rank_sum = np.flatnonzero(labels).sum() + num_positive
  if not num_pairs:
    return float("nan")
  return float((rank_sum - num_positive * (num_positive + 1) / 2) / num_pairs)
