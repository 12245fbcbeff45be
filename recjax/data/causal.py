"""What a row may know of the outcomes before it: counts, rates, histories.

Every adapter of a log with times builds its rates, histories and overlap
features with these functions, so that one rule holds everywhere. A row sees
an event when both are true:

* the event's time is strictly earlier (events at the row's own time, the row
  itself included, stay invisible, whoever they belong to);
* the event's part is open to the row's part: rows of training and validation
  see training events, rows of the test part see training and validation
  events. So validation and test rows find the past frozen at the end of the
  part before them.

`part` counts 0 = training (and everything older), 1 = validation, 2 = test.
Rows are events too, in time order. Sums are integers: they are exact, and the
same however the rows are cut into blocks.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int, Shaped

# 2 ** 64 / golden ratio: Knuth's multiplicative hash spreads dense keys.
_HASH = np.uint64(0x9E3779B97F4A7C15)


def visible_sums(
  key: Int[np.ndarray, "rows ..."],
  time: Int[np.ndarray, " rows"],
  part: Int[np.ndarray, " rows"],
  values: Int[np.ndarray, "rows columns"],
  *,
  max_rows: int = 1 << 22,
  out: Shaped[np.ndarray, "rows columns"] | None = None,
) -> Shaped[np.ndarray, "rows columns"]:
  """Sums of `values` over the visible events that share a row's key.

  Memory stays near `max_rows` rows plus one total for each key of a
  partition; the arguments may be memory maps of any length. Keys are parted
  by hash, and each partition is read in time order with its totals carried,
  so that one key may hold most of the log.

  Args:
    key: Group of each row, at least 0; negative keys are in no group. With a
      second axis a row is in several groups (tags) and gets the sum over
      them.
    time: Time of each row, any unit, in ascending order.
    part: 0, 1 or 2, as in the module docstring.
    values: What each event contributes, for instance 1 and the click.
    max_rows: Rows held in memory at a time.
    out: Where to write; None makes an int64 array.

  Returns:
    `out`: for each row the sums over the events it may see.

  Example:
    >>> visible_sums(
    ...     np.array([7, 7, 7]), np.array([1, 1, 2]), np.zeros(3, np.int8),
    ...     np.array([[1], [1], [0]])
    ... ).tolist()
    [[0], [0], [2]]
  """
  if out is None:
    out = np.zeros(values.shape, np.int64)
  entries = key.size
  num_partitions = max(1, -(-entries // max_rows))
  for partition in range(num_partitions):
    totals = _Totals(values.shape[1]), _Totals(values.shape[1])
    for row, block_key, is_last in _blocks(
      key, time, partition, num_partitions, max_rows
    ):
      sums = _block_sums(
        block_key, time[row], part[row], values[row], totals, is_last
      )
      if key.ndim > 1:
        # A row of several groups has several entries, maybe in one block.
        first = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
        row, sums = row[first], np.add.reduceat(sums, first, axis=0)
      out[row] += sums.astype(out.dtype, copy=False)
  return out


def smoothed_rate(
  positives: Shaped[np.ndarray, "*rows"],
  count: Shaped[np.ndarray, "*rows"],
  prior: Float[np.ndarray, "*rows"] | float,
  strength: float,
) -> Float[np.ndarray, "*rows"]:
  """`(positives + strength * prior) / (count + strength)`, in (0, 1).

  The posterior mean of a rate under a Beta prior of mean `prior` that weighs
  as much as `strength` observations.

  Example:
    >>> float(smoothed_rate(np.array(3), np.array(4), 0.5, 4.0))
    0.625
  """
  return (positives + strength * prior) / (count + strength)


def log_odds(rate: Float[np.ndarray, "*rows"]) -> Float[np.ndarray, "*rows"]:
  """`log(rate / (1 - rate))` of rates inside (0, 1)."""
  return np.log(rate) - np.log1p(-rate)


def visible_slices(
  event_key: Int[np.ndarray, " events"],
  event_time: Int[np.ndarray, " events"],
  event_part: Int[np.ndarray, " events"],
  row_key: Int[np.ndarray, " rows"],
  row_time: Int[np.ndarray, " rows"],
  row_part: Int[np.ndarray, " rows"],
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
  """Where each row's visible events lie in a list sorted by key.

  Args:
    event_key: Owner of each event (a user), at least 0.
    event_time: Time of each event.
    event_part: 0 or 1, or 2 for events that no row sees. The events must be
      sorted by (key, part, time).
    row_key: Whose events the row sees.
    row_time: Time of each row; its events are strictly earlier.
    row_part: 0, 1 or 2.

  Returns:
    Start and length of each row's slice of the events, both int64. Should a
    test row lie before the end of its user's training events, the slice ends
    there, so it never holds more than the row may see.

  Example:
    >>> zero = np.zeros(3, np.int64)
    >>> start, length = visible_slices(
    ...     zero, np.array([1, 5, 5]), zero, zero, np.array([1, 5, 6]), zero
    ... )
    >>> length.tolist()
    [0, 1, 3]
  """
  if not len(row_key):
    return np.zeros(0, np.int64), np.zeros(0, np.int64)
  times = np.concatenate([event_time, row_time]).astype(np.int64)
  first = times.min()
  span = int(times.max() - first) + 1
  keys = max(int(row_key.max()), int(event_key.max(initial=0))) + 1
  if keys * 3 * span >= 2**63:
    raise ValueError(
      f"{keys} keys over {span} units of time do not fit 64 bits: number the "
      "keys from 0, or take a coarser unit"
    )

  def rank(key, part, time):
    return (key.astype(np.int64) * 3 + part) * span + (time - first)

  events = rank(event_key, event_part, event_time)

  def position(part, time):
    return np.searchsorted(events, rank(row_key, part, time))

  start = position(0, first)
  end = position(0, row_time)
  all_training = position(1, first)
  sees_valid = (row_part == 2) & (end == all_training)
  end = np.where(sees_valid, position(1, row_time), end)
  return start, end - start


class _Totals:
  """Sums of the keys met so far in one partition."""

  def __init__(self, columns: int):
    self.key = np.zeros(0, np.int64)
    self.sums = np.zeros((0, columns), np.int64)

  def read(self, key: np.ndarray) -> np.ndarray:
    """Totals of sorted distinct keys; 0 for a new one."""
    sums = np.zeros((len(key), self.sums.shape[1]), np.int64)
    if len(self.key):
      at = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
      known = self.key[at] == key
      sums[known] = self.sums[at[known]]
    return sums

  def write(self, key: np.ndarray, sums: np.ndarray):
    """Replaces the totals of sorted distinct keys."""
    at = np.searchsorted(self.key, key)
    new = np.append(self.key, -1)[at] != key
    merged = np.insert(self.key, at[new], key[new])
    table = np.zeros((len(merged), sums.shape[1]), np.int64)
    table[np.searchsorted(merged, self.key)] = self.sums
    table[np.searchsorted(merged, key)] = sums
    self.key, self.sums = merged, table


def _blocks(
  key: np.ndarray,
  time: np.ndarray,
  partition: int,
  num_partitions: int,
  max_rows: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
  """(row, key, is last) of a partition's entries; equal times stay together."""
  row, held = np.zeros(0, np.int64), np.zeros(0, np.int64)
  for start in range(0, len(key), max_rows):
    chunk = np.asarray(key[start : start + max_rows], np.int64)
    chunk = chunk.reshape(len(chunk), -1)
    hashed = (chunk.astype(np.uint64) * _HASH) >> np.uint64(32)
    mine = (chunk >= 0) & (hashed % np.uint64(num_partitions) == partition)
    row = np.concatenate([row, start + np.nonzero(mine)[0]])
    held = np.concatenate([held, chunk[mine]])
    if len(row) < max_rows or start + max_rows >= len(key):
      continue
    cut = np.searchsorted(time[row], time[row[-1]])
    if cut:
      yield row[:cut], held[:cut], False
      row, held = row[cut:], held[cut:]
  if len(row):
    yield row, held, True


def _block_sums(
  key: np.ndarray,
  time: np.ndarray,
  part: np.ndarray,
  values: np.ndarray,
  totals: tuple[_Totals, _Totals],
  is_last: bool,
) -> np.ndarray:
  """Visible sums of one block's entries; adds the block to `totals`."""
  order = np.argsort(key, kind="stable")
  key, time, part, values = key[order], time[order], part[order], values[order]
  sums = _earlier_sums(key, time, values, part == 0, totals[0], is_last)
  # Only test rows see validation events, so the rest need not be looked at.
  late = np.flatnonzero(part > 0)
  if len(late):
    part = part[late]
    seen = _earlier_sums(
      key[late], time[late], values[late], part == 1, totals[1], is_last
    )
    sums[late] += seen * (part == 2)[:, None]
  result = np.empty_like(sums)
  result[order] = sums
  return result


def _earlier_sums(
  key: np.ndarray,
  time: np.ndarray,
  values: np.ndarray,
  evidence: np.ndarray,
  totals: _Totals,
  is_last: bool,
) -> np.ndarray:
  """Sums of each key's strictly earlier evidence, of entries in its order."""
  new_key = np.r_[True, key[1:] != key[:-1]]
  first = np.flatnonzero(new_key)
  last = np.r_[first[1:], len(key)]
  group = np.cumsum(new_key) - 1
  # Equal times of a key start together, so none of them sees another.
  tie = np.flatnonzero(new_key | np.r_[True, time[1:] != time[:-1]])
  tie = np.repeat(tie, np.diff(np.r_[tie, len(key)]))
  carried = totals.read(key[first])
  sums = np.empty(values.shape, np.int64)
  cumulative = np.zeros(len(key) + 1, np.int64)
  for column in range(values.shape[1]):
    value = np.where(evidence, values[:, column], 0)
    np.cumsum(value, dtype=np.int64, out=cumulative[1:])
    base = carried[:, column] - cumulative[first]
    sums[:, column] = base[group] + cumulative[tie]
    carried[:, column] += cumulative[last] - cumulative[first]
  if not is_last:
    totals.write(key[first], carried)
  return sums
