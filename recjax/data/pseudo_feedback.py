"""Pseudo-pinnacle feedback: users borrowed from similar popular items.

PROMO (arXiv 2412.18082) gives an item with too little feedback of its own the
users of popular items that resemble it. The released code has nothing of it,
and the paper leaves open how it is done; here

* two items are as similar as the cosine of their content, a vector an item;
* an item borrows from its `num` nearest popular items, the nearest first;
* a row sees of them what it may see of its own item: strictly earlier events,
  and never one of its own user.

Which items are popular is counted over the whole training part: a choice of
places to look, not a view of what happened there.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from recjax.data import feedback as feedback_lib
from recjax.errors import UserError

# Popular items to look among: every item is compared with all of them.
MAX_POPULAR = 2048
_NONE = -1
_BLOCK = 4096


def nearest_popular(
  content: Float[np.ndarray, "items dim"],
  is_popular: Bool[np.ndarray, " items"],
  num: int,
) -> Int[np.ndarray, "items num"]:
  """The most similar popular items of each, the nearest first.

  Items without content, and popular ones that share nothing with an item, are
  left out; an item is not its own neighbour. -1 fills up. Of equal similarity
  the lower number comes first.

  Example:
    >>> content = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    >>> nearest_popular(content, np.array([False, True, True]), 2).tolist()
    [[1, -1], [2, -1], [1, -1]]
  """
  norm = np.linalg.norm(content, axis=1, keepdims=True)
  unit = content / np.where(norm > 0, norm, 1.0)
  popular = np.flatnonzero(is_popular)
  nearest = np.full((len(content), num), _NONE, np.int64)
  if not len(popular):
    return nearest
  kept = min(num, len(popular))
  for start in range(0, len(content), _BLOCK):
    similarity = unit[start : start + _BLOCK] @ unit[popular].T
    own = np.arange(start, start + len(similarity))[:, None] == popular
    similarity[own] = 0.0
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :kept]
    found = np.take_along_axis(similarity, best, axis=1)
    # Rounding leaves what shares nothing near zero.
    nearest[start : start + _BLOCK, :kept] = np.where(
      found > 1e-6, popular[best], _NONE
    )
  return nearest


def check(num: int, protocol: str) -> None:
  """Raises a `UserError` unless so many neighbours fit the protocol."""
  if num < 0:
    raise UserError(f"data.pseudo_neighbors must be at least 0, got {num}")
  if num and protocol != "causal":
    raise UserError(
      "data.pseudo_neighbors is no part of the released evaluation; leave it "
      "at 0, or data.protocol at causal"
    )


def popular_items(
  log: feedback_lib.Log, is_feedback: Bool[np.ndarray, " rows"], num_items: int
) -> Bool[np.ndarray, " items"]:
  """Items in the last bucket of feedback within the training part.

  At most `MAX_POPULAR` of them, those with the most feedback.
  """
  counted = is_feedback & (log.part == 0)
  count = np.bincount(log.item[counted], minlength=num_items)
  found = np.zeros(num_items, bool)
  found[np.argsort(-count, kind="stable")[:MAX_POPULAR]] = True
  return found & (count >= feedback_lib.BUCKET_EDGES[-1])


def fill(
  log: feedback_lib.Log,
  is_feedback: Bool[np.ndarray, " rows"],
  score: Float[np.ndarray, " rows"] | None,
  users: Int[np.ndarray, "asking max_len"],
  length: Int[np.ndarray, " asking"],
  content: Float[np.ndarray, "items dim"],
  num: int,
  *,
  rows: Int[np.ndarray, " asking"] | None = None,
) -> tuple[Int[np.ndarray, "asking max_len"], Int[np.ndarray, " asking"]]:
  """`borrow` from each item's `num` nearest popular items by content."""
  popular = popular_items(log, is_feedback, len(content))
  nearest = nearest_popular(content, popular, num)
  return borrow(log, is_feedback, score, users, length, nearest, rows=rows)


def borrow(
  log: feedback_lib.Log,
  is_feedback: Bool[np.ndarray, " rows"],
  score: Float[np.ndarray, " rows"] | None,
  users: Int[np.ndarray, "asking max_len"],
  length: Int[np.ndarray, " asking"],
  nearest: Int[np.ndarray, "items num"],
  *,
  rows: Int[np.ndarray, " asking"] | None = None,
) -> tuple[Int[np.ndarray, "asking max_len"], Int[np.ndarray, " asking"]]:
  """Lists of `feedback.feedback_lists`, filled up from the nearest items.

  Args:
    log: The events.
    is_feedback: As for the lists.
    score: As for the lists.
    users: The lists, the best user last.
    length: How many each holds.
    nearest: From `nearest_popular`.
    rows: As for the lists.

  Returns:
    The same with borrowed users before the item's own, the nearest item's best
    last; a user stands there once.
  """
  rows = np.arange(len(log.user)) if rows is None else rows
  max_len = users.shape[1]
  short = np.flatnonzero(length < max_len)
  held = [_ranked(users[short], length[short], nearest.shape[1])]
  for place in range(nearest.shape[1]):
    items = nearest[log.item[rows[short]], place]
    found, count = feedback_lib.feedback_lists(
      log,
      is_feedback,
      score,
      max_len=max_len,
      rows=rows[short],
      items=np.maximum(items, 0),
    )
    count = np.where(items == _NONE, 0, count)
    held.append(_ranked(found, count, nearest.shape[1] - 1 - place))
  rank, user = (np.concatenate(x, axis=1) for x in zip(*held, strict=True))
  rank, user = feedback_lib.best_users(rank, user, max_len)
  users, length = users.copy(), length.copy()
  users[short], length[short] = feedback_lib.compact(user, rank, max_len)
  return users, length


def _ranked(users, length, level: int):
  """Ranks above all of lower levels, rising to the end of each list."""
  place = np.arange(users.shape[1])
  held = place < length[:, None]
  rank = np.where(held, level * users.shape[1] + place, _NONE)
  return rank, np.where(held, users, _NONE)
