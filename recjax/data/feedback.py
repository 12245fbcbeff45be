"""Who gave an item its feedback before a row: best, latest or random users.

PROMO (arXiv 2412.18082) describes an item by the users whose positive feedback
on it stood out, its *pinnacle feedback*, beside users who passed it by. Here a
row gets such a list from the part of the log that it may see:

* events of its item that `recjax.data.causal` lets it see: strictly earlier,
  and from parts that are open to it;
* never one of its own user, whatever the row's label is;
* a user once, by its best event.

`score` orders the events: alpha * stay + beta * interaction for pinnacle
feedback (`pinnacle_score`), nothing for the latest users, `random_score` for a
random draw. Equal scores: the later event is the better one.

`protocol="released"` is for comparison with published numbers only. The
authors' released evaluation shows a positive row itself: its own event is the
last of its lists, and its own user is not left out. What such a model scores
is no forecast.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from recjax.data import causal

PROTOCOLS = ("causal", "released")
# Counts from these on fall into the next bucket: 0, 1-4, 5-9, 10-49, 50+.
BUCKET_EDGES = (1, 5, 10, 50)
BUCKET_NAMES = ("0", "1-4", "5-9", "10-49", "50+")
# Items in a lower bucket are cold: fewer than 5.
WARM_FROM = 2
_NONE = -1


@dataclasses.dataclass(frozen=True)
class Log:
  """Events in time order; every row is an event, and may ask for a list.

  Attributes:
    user: Who, at least 0.
    item: On what, at least 0.
    time: When, ascending, any unit.
    part: 0 = training and older, 1 = validation, 2 = test.
  """

  user: Int[np.ndarray, " rows"]
  item: Int[np.ndarray, " rows"]
  time: Int[np.ndarray, " rows"]
  part: Int[np.ndarray, " rows"]


def feedback_lists(
  log: Log,
  is_feedback: Bool[np.ndarray, " rows"],
  score: Float[np.ndarray, " rows"] | None = None,
  *,
  max_len: int,
  rows: Int[np.ndarray, " asking"] | None = None,
  items: Int[np.ndarray, " asking"] | None = None,
  protocol: str = "causal",
  sees_itself: Bool[np.ndarray, " rows"] | None = None,
  max_events: int = 1 << 18,
) -> tuple[Int[np.ndarray, "asking max_len"], Int[np.ndarray, " asking"]]:
  """Users with the best feedback on each row's item.

  Args:
    log: The events.
    is_feedback: Which of them count.
    score: Order of the events; None for the latest.
    max_len: Longest list.
    rows: Numbers of the rows that ask; None for all.
    items: What each of them asks about; None for its own item.
    protocol: `causal`, or `released`: all parts are open, and a row's own
      user may be in its list.
    sees_itself: Rows that see themselves under `released`; None for those
      that are feedback.
    max_events: Events held in memory at a time; an item's are held together.

  Returns:
    Users, the best last, filled up with -1; and how many there are.

  Example:
    >>> log = Log(
    ...   np.array([7, 8, 7]), np.zeros(3, int), np.arange(3), np.zeros(3, int)
    ... )
    >>> feedback_lists(log, np.ones(3, bool), max_len=2)[0].tolist()
    [[-1, -1], [7, -1], [8, -1]]
  """
  _check_protocol(protocol)
  rows = np.arange(len(log.user)) if rows is None else rows
  users = np.full((len(rows), max_len), _NONE, np.int64)
  length = np.zeros(len(rows), np.int64)
  events = np.flatnonzero(is_feedback)
  rank = np.empty(len(events), np.int64)
  keys = (events, log.time[events])
  if score is not None:
    keys = (*keys, score[events])
  rank[np.lexsort(keys)] = np.arange(len(events))
  order = _sort(log, log.item[events], events, protocol)
  events, rank = events[order], rank[order]
  itself = is_feedback if sees_itself is None else sees_itself
  asked = log.item[rows] if items is None else items
  start, visible = _slices(log, log.item, asked, events, rows, itself, protocol)
  by_start = np.argsort(start, kind="stable")
  excluded = log.user[rows] if protocol == "causal" else np.full(len(rows), -2)
  # One more than asked for: a row's own user may be among them.
  width = max_len + (protocol == "causal")
  for low, high in _blocks(log.item[events], max_events):
    top_rank, top_user = _running_top(
      log.item[events[low:high]],
      log.user[events[low:high]],
      rank[low:high],
      width,
    )
    asking = by_start[slice(*np.searchsorted(start[by_start], [low, high]))]
    asking = asking[visible[asking] > 0]
    last = start[asking] + visible[asking] - 1 - low
    found, given = top_user[last], top_rank[last]
    given = np.where(found == excluded[asking, None], _NONE, given)
    users[asking], length[asking] = compact(found, given, max_len)
  return users, length


def history_slices(
  log: Log,
  is_feedback: Bool[np.ndarray, " rows"],
  *,
  rows: Int[np.ndarray, " asking"] | None = None,
  protocol: str = "causal",
) -> tuple[
  Int[np.ndarray, " events"],
  Int[np.ndarray, " asking"],
  Int[np.ndarray, " asking"],
]:
  """What each row's user gave feedback on before it.

  Returns:
    Numbers of the feedback events sorted by user and time, and for each row
    start and length of its slice of them, oldest first.
  """
  _check_protocol(protocol)
  rows = np.arange(len(log.user)) if rows is None else rows
  events = np.flatnonzero(is_feedback)
  events = events[_sort(log, log.user[events], events, protocol)]
  asked = log.user[rows]
  start, length = _slices(
    log, log.user, asked, events, rows, is_feedback, protocol
  )
  return events, start, length


def pinnacle_score(
  stay: Float[np.ndarray, " rows"],
  interaction: Float[np.ndarray, " rows"],
  reference: Bool[np.ndarray, " rows"],
  *,
  alpha: float = 1.0,
  beta: float = 1.0,
) -> Float[np.ndarray, " rows"]:
  """`alpha * stay + beta * interaction`, both standardised.

  The paper does not state alpha, beta or units: standardising by the rows in
  `reference` (positive feedback of the training part), weights of 1 and 0 for
  what is missing (NaN) are our choice.
  """
  score = np.zeros(len(stay))
  for weight, values in ((alpha, stay), (beta, interaction)):
    known = values[reference & ~np.isnan(values)]
    if len(known) and known.std() > 0:
      standard = (values - known.mean()) / known.std()
      score += weight * np.nan_to_num(standard)
  return score


def random_score(num_rows: int, seed: int) -> Float[np.ndarray, " rows"]:
  """A random order of events: the paper's draw of negative feedback."""
  return np.random.default_rng(seed).random(num_rows)


def bucket(count: Int[np.ndarray, "*rows"]) -> Int[np.ndarray, "*rows"]:
  """Bucket of a count: 0, 1-4, 5-9, 10-49, 50+.

  Example:
    >>> bucket(np.array([0, 4, 5, 50])).tolist()
    [0, 1, 2, 4]
  """
  return np.digitize(count, BUCKET_EDGES)


def _check_protocol(protocol: str):
  if protocol not in PROTOCOLS:
    raise ValueError(f"unknown protocol {protocol!r}; use one of {PROTOCOLS}")


def _sort(log: Log, key, events, protocol: str):
  if protocol == "released":
    return np.lexsort((events, key))
  return np.lexsort((events, log.time[events], log.part[events], key))


def _slices(log: Log, key, asked, events, rows, itself, protocol: str):
  """Start and length of what each row sees of the sorted events."""
  if protocol == "released":
    # Rows are numbered in time order: all before a row, and maybe itself.
    number = key[events].astype(np.int64) * len(key) + events
    first = asked.astype(np.int64) * len(key)
    start = np.searchsorted(number, first)
    end = first + rows + itself[rows]
    return start, np.searchsorted(number, end) - start
  # Nobody sees the test part's events.
  open_parts = np.minimum(log.part[events], 2)
  return causal.visible_slices(
    key[events],
    log.time[events],
    open_parts,
    asked,
    log.time[rows],
    log.part[rows],
  )


def _blocks(item, max_events: int) -> Iterator[tuple[int, int]]:
  """Ranges of sorted events that hold whole items."""
  first = (
    np.flatnonzero(np.r_[True, item[1:] != item[:-1]]) if len(item) else []
  )
  first = np.append(first, len(item)).astype(np.int64)
  low = 0
  while low < len(first) - 1:
    high = np.searchsorted(first, first[low] + max_events, side="right") - 1
    high = max(int(high), low + 1)
    yield int(first[low]), int(first[high])
    low = high


def _running_top(item, user, rank, width: int):
  """For each event the `width` best users of its item up to it.

  A scan by doubling (Hillis and Steele): after step j a list covers the last
  2 ** j events, so the work is the events times the logarithm of the longest
  item. A user that `width` others beat in one half is out of the whole, so
  lists of `width` distinct users lose nothing.

  Returns:
    Ranks (-1 for none), and the users they belong to.
  """
  size = len(item)
  top_rank = np.full((size, width), _NONE, np.int64)
  top_user = np.full((size, width), _NONE, np.int64)
  top_rank[:, 0], top_user[:, 0] = rank, user
  position = np.arange(size)
  first = np.maximum.accumulate(
    np.where(np.r_[True, item[1:] != item[:-1]], position, 0)
  )
  depth, step = position - first, 1
  while (more := np.flatnonzero(depth >= step)).size:
    # From values before this step, as `more` and `more - step` overlap.
    merged_rank = np.concatenate([top_rank[more], top_rank[more - step]], 1)
    merged_user = np.concatenate([top_user[more], top_user[more - step]], 1)
    top_rank[more], top_user[more] = best_users(merged_rank, merged_user, width)
    step *= 2
  return top_rank, top_user


def best_users(rank, user, width: int):
  """The `width` best of each line, a user once, the best first."""
  order = np.lexsort((-rank, user), axis=1)
  rank, user = (np.take_along_axis(x, order, 1) for x in (rank, user))
  again = np.zeros(rank.shape, bool)
  again[:, 1:] = user[:, 1:] == user[:, :-1]
  rank = np.where(again, _NONE, rank)
  order = np.argsort(-rank, axis=1, kind="stable")[:, :width]
  rank, user = (np.take_along_axis(x, order, 1) for x in (rank, user))
  return rank, np.where(rank == _NONE, _NONE, user)


def compact(user, rank, max_len: int):
  """The best `max_len` entries in rising order, -1 behind them."""
  best = np.argsort(-rank, axis=1, kind="stable")[:, :max_len]
  rank, user = (np.take_along_axis(x, best, 1) for x in (rank, user))
  length = np.sum(rank != _NONE, axis=1)
  key = np.where(rank == _NONE, np.iinfo(np.int64).max, rank)
  order = np.argsort(key, axis=1, kind="stable")
  user = np.take_along_axis(user, order, 1)
  valid = np.arange(max_len) < length[:, None]
  return np.where(valid, user, _NONE), length
