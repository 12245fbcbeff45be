"""Batches of rows whose sequences have similar lengths.

Where histories differ much in length, most of a batch is padding. With limits
such as `(16, 64)` the rows of a batch belong to one bucket and its sequences
are cut to that length: batches have three shapes, the third with all that is
kept. A program is compiled for each shape, so few buckets are best; powers of 4
keep the padding below three quarters of any row.
"""

import itertools

import numpy as np
from jaxtyping import Int

from recjax.data.columns import Columns
from recjax.data.permutation import permute
from recjax.errors import UserError


class LengthBuckets:
  """Which rows the batches of an epoch hold, grouped by sequence length.

  Args:
    columns: The prepared data.
    split: `train`, `valid` or `test`.
    batch_size: Examples a batch.
    limits: Ascending lengths. A row belongs to the first that its longest
      sequence does not exceed, or to a last bucket of all that is kept. None:
      one bucket of all rows, with nothing cut.

  Raises:
    UserError: If limits are given and do not ascend from 1 on, or the data
      have no sequence.

  Example:
    >>> buckets = LengthBuckets(columns, "train", 512, (16, 64))
    >>> buckets.num_steps                               # doctest: +SKIP
    811
  """

  def __init__(
    self,
    columns: Columns,
    split: str,
    batch_size: int,
    limits: tuple[int, ...] = (),
  ):
    self._batch_size = batch_size
    num_rows = columns.num_rows[split]
    # Rows of each bucket, where they are not all; their number; the cut.
    self._members, self._sizes, self._limits = [None], [num_rows], [None]
    if limits:
      _check_limits(columns, limits)
      bucket = np.concatenate(
        [
          np.searchsorted(limits, columns.lengths(split, rows).max(axis=1))
          for rows in _blocks(num_rows)
        ]
      )
      every = [np.flatnonzero(bucket == i) for i in range(len(limits) + 1)]
      held = [i for i, members in enumerate(every) if len(members)]
      self._members = [every[i] for i in held]
      self._sizes = [len(members) for members in self._members]
      self._limits = [(*limits, None)[i] for i in held]
    steps = [steps_per_epoch(size, batch_size) for size in self._sizes]
    self._last = np.cumsum(steps)
    self.num_steps = int(self._last[-1])

  def rows(
    self,
    step: int,
    positions: Int[np.ndarray, " positions"],
    *,
    seed: int | None,
    epoch: int,
  ) -> tuple[Int[np.ndarray, " rows"], int | None]:
    """Rows of a batch, and the length that its sequences are cut to.

    Args:
      step: In [0, num_steps).
      positions: Which of the batch; those past the bucket's end give no row.
      seed: Of the shuffling; None for the order of the rows.
      epoch: Another one is another order.

    Returns:
      Ascending row numbers, and the length or None for all that is kept.
    """
    # Each bucket, and the order of the batches, has permutations of its own.
    count = len(self._sizes)
    turn = epoch if count == 1 else epoch * (count + 1)
    if seed is not None and count > 1:
      at = np.array([step])
      step = permute(at, self.num_steps, seed=seed, epoch=turn + count)[0]
    bucket = int(np.searchsorted(self._last, step, side="right"))
    first = self._last[bucket - 1] if bucket else 0
    positions = (step - first) * self._batch_size + positions
    positions = positions[positions < self._sizes[bucket]]
    if seed is not None:
      positions = permute(
        positions, self._sizes[bucket], seed=seed, epoch=turn + bucket
      )
      positions.sort()
    if self._members[bucket] is not None:
      positions = self._members[bucket][positions]
    return positions, self._limits[bucket]

  @property
  def order(self) -> Int[np.ndarray, " rows"]:
    """The rows of an unshuffled epoch, one after another."""
    if self._members[0] is None:
      return np.arange(self._sizes[0])
    return np.concatenate(self._members)


def masked_share(
  columns: Columns,
  split: str,
  limits: tuple[int, ...] = (),
  *,
  num_rows: int = 1 << 16,
) -> float:
  """Share of sequence positions that hold no event.

  Args:
    columns: The prepared data.
    split: `train`, `valid` or `test`.
    limits: As `LengthBuckets` takes them.
    num_rows: Rows to look at, evenly spaced.

  Returns:
    A number in [0, 1]; 0 where there are no sequences.
  """
  total = columns.num_rows[split]
  rows = np.unique(np.linspace(0, total - 1, num_rows, dtype=np.int64))
  lengths = columns.lengths(split, rows)
  if not lengths.shape[1]:
    return 0.0
  width = np.array([feature.max_len for feature in columns.schema.sequences])
  cut = np.array([*limits, width.max()])
  width = np.minimum(
    width, cut[np.searchsorted(limits, lengths.max(axis=1))][:, None]
  )
  return float(1 - lengths.sum() / width.sum())


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
  """Number of batches that hold every row once, the last one padded.

  Example:
    >>> steps_per_epoch(10, 4)
    3
  """
  return -(-num_rows // batch_size)


def _check_limits(columns: Columns, limits):
  if not columns.schema.sequences:
    raise UserError(
      f"length_buckets: {columns.directory} holds no sequence; leave them out"
    )
  if min(limits) < 1 or any(a >= b for a, b in itertools.pairwise(limits)):
    raise UserError(
      f"length_buckets must ascend and be at least 1, got {tuple(limits)}"
    )


def _blocks(num_rows: int):
  for start in range(0, num_rows, 1 << 16):
    yield np.arange(start, min(start + (1 << 16), num_rows))
