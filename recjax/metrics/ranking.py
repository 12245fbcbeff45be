"""Hit rate and NDCG of one true item among candidates.

The protocols that the field ranks by: the true item against 100 sampled ones
or the whole catalogue, at 5 and 10. Of equal scores the true item comes last,
so that a constant score earns nothing.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from recjax.metrics import arrays
from recjax.metrics.arrays import AnyArray


def rank_of_target(
  target: Float[AnyArray, " queries"],
  others: Float[AnyArray, "queries candidates"],
  *,
  where: Bool[AnyArray, "queries candidates"] | None = None,
) -> Int[AnyArray, " queries"]:
  """How many candidates are scored at least as high; 0 is the top.

  Args:
    target: Score of each query's true item.
    others: Scores of its candidates, the true item not among them.
    where: Candidates that count; None means all. Use it to leave out the true
      item and those that the user has had before.

  Example:
    >>> rank_of_target(np.array([0.5]), np.array([[0.9, 0.5, 0.1]])).tolist()
    [2]
  """
  xp = arrays.namespace(target, others, where)
  # A NaN beats nobody, whichever side it is on.
  ahead = ~(others < target[:, None])
  if where is not None:
    ahead &= where
  return xp.sum(ahead, axis=-1)


def hit_rate(
  rank: Int[AnyArray, " queries"],
  k: int,
  *,
  mask: Bool[AnyArray, " queries"] | None = None,
) -> Float[Array, ""] | float:
  """HR@k: share of queries whose true item is among the first k.

  Example:
    >>> float(hit_rate(np.array([0, 4, 5]), 5))
    0.6666666666666666
  """
  xp = arrays.namespace(rank, mask)
  return arrays.mean(arrays.as_float(rank < k, xp), mask, xp)


def ndcg(
  rank: Int[AnyArray, " queries"],
  k: int,
  *,
  mask: Bool[AnyArray, " queries"] | None = None,
) -> Float[Array, ""] | float:
  """NDCG@k with one relevant item: `1 / log2(2 + rank)` among the first k.

  Example:
    >>> float(ndcg(np.array([0, 2]), 5))
    0.75
  """
  xp = arrays.namespace(rank, mask)
  gain = 1.0 / xp.log2(2.0 + arrays.as_float(rank, xp))
  return arrays.mean(xp.where(rank < k, gain, 0.0), mask, xp)


def summarize_ranks(
  rank: Int[np.ndarray, " queries"],
  *,
  ks: Sequence[int] = (5, 10),
  slices: Mapping[str, Bool[np.ndarray, " queries"]] | None = None,
) -> dict[str, float]:
  """HR and NDCG of all queries, and of each slice.

  Args:
    rank: From `rank_of_target`.
    ks: Cut-offs.
    slices: Name -> its queries, as `bucket_slices` gives them.

  Returns:
    `hr@5`, `ndcg@5` and so on, then `<slice>/hr@5` and so on, and
    `<slice>/queries`. NaN for a slice without queries.
  """
  masks = {"": np.ones(len(rank), bool), **(slices or {})}
  metrics = {}
  for name, mask in masks.items():
    prefix = f"{name}/" if name else ""
    metrics[f"{prefix}queries"] = float(mask.sum())
    for k in ks:
      metrics[f"{prefix}hr@{k}"] = float(hit_rate(rank, k, mask=mask))
      metrics[f"{prefix}ndcg@{k}"] = float(ndcg(rank, k, mask=mask))
  return metrics


def bucket_slices(
  bucket: Int[np.ndarray, " queries"],
  names: Sequence[str],
  warm_from: int,
) -> dict[str, Bool[np.ndarray, " queries"]]:
  """Slices of queries by how well known their true item is.

  Args:
    bucket: Bucket of each query's true item, from 0.
    names: Their names.
    warm_from: Buckets from this one on are warm, those below are cold.

  Returns:
    `cold`, `warm`, and each bucket by its name.

  Example:
    >>> slices = bucket_slices(np.array([0, 2]), ("0", "1-4", "5+"), 2)
    >>> slices["cold"].tolist(), slices["5+"].tolist()
    ([True, False], [False, True])
  """
  slices = {"cold": bucket < warm_from, "warm": bucket >= warm_from}
  return slices | {name: bucket == i for i, name in enumerate(names)}


def sample_candidates(
  num_items: int,
  known: Bool[np.ndarray, "queries items"],
  num_samples: int,
  seed: int,
) -> Int[np.ndarray, "queries num_samples"]:
  """Items drawn for each query without replacement, none of them known to it.

  Args:
    num_items: Size of the catalogue.
    known: Items that must not be drawn: the true one, and those that the user
      has had.
    num_samples: Candidates of a query.
    seed: Of the draw: the same for every model of a table.

  Raises:
    ValueError: If a query has fewer unknown items than that.
  """
  fewest = int((~known).sum(axis=-1).min(initial=num_items))
  if fewest < num_samples:
    raise ValueError(
      f"cannot draw {num_samples} candidates: a query knows all but {fewest} "
      f"of {num_items} items"
    )
  keys = np.random.default_rng(seed).random(known.shape)
  keys[known] = 2.0
  return np.argpartition(keys, num_samples - 1, axis=-1)[:, :num_samples]
