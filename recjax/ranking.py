"""Ranks every positive example's item among the others: HR and NDCG.

The protocol that retrieval and cold-start papers report. A query is an example
with label 1; its candidates are the items of its part of the data:

* all of them (`full`), the number to trust;
* `num_samples` drawn ones (`sampled`), for comparison with papers.

Out of both stay the items that the query's user has in any part of the data,
whatever the label: they are known. A candidate's features are those of its
first row in the part; where a test row sees nothing of its own part, which is
the rule of this package's adapters, they are the same in all its rows. The
item's own list of users is then that of its first row: without that row's user.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from recjax.batch import Batch
from recjax.data.columns import Columns
from recjax.errors import UserError
from recjax.evaluate import item_slices
from recjax.method import Method
from recjax.metrics import ranking
from recjax.serve import Ranker
from recjax.train_state import TrainState

# Candidates that are scored at a time; the last ones are filled up to it.
_BLOCK = 2048
_READ_ROWS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Ranks:
  """What `rank_items` finds; ranks count from 0, the best place.

  Attributes:
    metrics: `full/hr@5`, `sampled/ndcg@10` and so on; with a role `popularity`
      also of cold, of warm and of each bucket's true items.
    row: Number of each query's row in its part.
    full: Rank among all items.
    sampled: Rank among the drawn ones.
  """

  metrics: dict[str, float]
  row: Int[np.ndarray, " queries"]
  full: Int[np.ndarray, " queries"]
  sampled: Int[np.ndarray, " queries"]


def rank_items(
  method: Method,
  state: TrainState,
  columns: Columns,
  split: str,
  candidate_features: Iterable[str],
  *,
  num_samples: int = 100,
  max_queries: int = 1000,
  seed: int = 0,
) -> Ranks:
  """Ranks by the method's first task.

  Args:
    method: What scores.
    state: Its parameters and tables.
    columns: The data.
    split: `valid` or `test`.
    candidate_features: Features of the item; see `recjax.serve.Ranker`.
    num_samples: Drawn candidates of a query.
    max_queries: Queries; drawn from all of them if there are more.
    seed: Of both draws, the same for every model.

  Raises:
    UserError: If the data names no user and item, the part has no positive
      example, or a query knows nearly all items.

  Example:
    >>> found = rank_items(method, state, columns, "test",     # doctest: +SKIP
    ...                    ("movie_id", "genres"))
    >>> found.metrics["full/ndcg@10"]
  """
  schema, task = method.schema, method.tasks[0]
  user_role, item_role = schema.roles.user, schema.roles.item
  for role, name in (("user", user_role), ("item", item_role)):
    if name not in [f.name for f in schema.id_features if not f.is_list]:
      raise UserError(
        f"ranking needs the role {role!r} to name a sparse feature of the "
        f"data, got {name!r}"
      )
  if item_role not in candidate_features:
    raise UserError(
      f"candidate_features: the item itself, {item_role!r}, is missing"
    )
  if schema.label(task).kind != "binary":
    raise UserError(f"ranking needs a binary label, and {task!r} is none")
  user, item, is_positive = _pairs(columns, split, task)
  if not is_positive.any():
    raise UserError(f"the {split} part has no example with {task} = 1")
  rng = np.random.default_rng(seed)
  queries = np.flatnonzero(is_positive)
  if len(queries) > max_queries:
    queries = np.sort(rng.choice(queries, max_queries, replace=False))
  items, first = np.unique(item, return_index=True)
  target = np.searchsorted(items, item[queries])
  known = _known(columns, user[queries], items)
  drawn = _draw(known, num_samples, seed)

  ranker = Ranker(method, candidate_features)
  blocks = list(_candidates(columns, split, first))
  full, sampled = np.empty((2, len(queries)), np.int64)
  for i, row in enumerate(queries):
    user_batch = columns.read(split, np.array([row]))
    scores = _score(ranker, state, user_batch, blocks, task)[: len(items)]
    own = scores[target[i] : target[i] + 1]
    rank = ranking.rank_of_target
    full[i] = rank(own, scores[None], where=~known[i : i + 1])[0]
    sampled[i] = rank(own, scores[None, drawn[i]])[0]

  slices = None
  if schema.roles.popularity is not None:
    ids = columns.read(split, queries).ids[schema.roles.popularity]
    slices = item_slices(ids)
  metrics = {}
  for name, ranks in (("full", full), ("sampled", sampled)):
    values = ranking.summarize_ranks(ranks, slices=slices)
    metrics |= {f"{name}/{k}": v for k, v in values.items()}
  metrics["candidates"] = float(np.mean((~known).sum(axis=1)))
  return Ranks(metrics, queries, full, sampled)


def _pairs(columns: Columns, split: str, task: str | None = None):
  """User and item of each row of a part, and whether its label is 1."""
  roles, parts = columns.schema.roles, []
  for start in range(0, columns.num_rows[split], _READ_ROWS):
    end = min(start + _READ_ROWS, columns.num_rows[split])
    batch = columns.read(split, np.arange(start, end))
    positive = np.zeros(end - start, bool)
    if task is not None:
      positive = batch.label_mask[task] & (batch.labels[task] == 1)
    parts.append((batch.ids[roles.user], batch.ids[roles.item], positive))
  return tuple(np.concatenate(x) for x in zip(*parts, strict=True))


def _known(
  columns: Columns,
  users: Int[np.ndarray, " queries"],
  items: Int[np.ndarray, " items"],
) -> Bool[np.ndarray, "queries items"]:
  """Items that each query's user has in any part, its own among them."""
  names, number = np.unique(users, return_inverse=True)
  had = np.zeros((len(names), len(items)), bool)
  for split in columns.num_rows:
    user, item, _ = _pairs(columns, split)
    row, column = (
      np.minimum(np.searchsorted(all_, x), len(all_) - 1)
      for all_, x in ((names, user), (items, item))
    )
    seen = (names[row] == user) & (items[column] == item)
    had[row[seen], column[seen]] = True
  return had[number]


def _draw(known, num_samples: int, seed: int):
  try:
    return ranking.sample_candidates(known.shape[1], known, num_samples, seed)
  except ValueError as error:
    raise UserError(f"{error}; give a smaller number of samples") from error


def _candidates(columns: Columns, split: str, rows) -> Iterator[Batch]:
  """One example an item, in blocks of one size."""
  padding = -len(rows) % min(_BLOCK, len(rows))
  rows = np.concatenate([rows, np.repeat(rows[:1], padding)])
  for start in range(0, len(rows), _BLOCK):
    yield columns.read(split, rows[start : start + _BLOCK])


def _score(
  ranker: Ranker, state: TrainState, user_batch: Batch, blocks, task: str
) -> Float[np.ndarray, " candidates"]:
  user_state = ranker.encode_user(state, user_batch)
  scores = [ranker.score(state, user_state, block)[task] for block in blocks]
  return np.concatenate(jax.device_get(scores))
