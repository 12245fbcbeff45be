"""A prepared data set, cut into days.

A day is an equal share of all rows, one after another: of the training part,
then of validation and test. So the rows of each part must be in the order of
their time, which is how every adapter that splits by time writes them; a table
of one's own must be sorted by it.
"""

import jax
import numpy as np
from jaxtyping import Int

from recjax.batch import Batch
from recjax.data.columns import Columns
from recjax.errors import UserError
from recjax.schema import SPLITS


class Day(Columns):
  """One day to train on and the next to evaluate on.

  `read`, `lengths` and `num_rows` are of these two; all else is as it was.

  Args:
    columns: The data.
    day: From 0; its rows are the `train` part, those of the day after both
      `valid` and `test`.
    num_days: Days in all, more than `day` + 1.

  Raises:
    UserError: If a day would have no row, or the split is not by time.

  Example:
    >>> day = Day(columns, 3, num_days=10)              # doctest: +SKIP
    >>> day.read("test", np.arange(2)).labels["click"]  # doctest: +SKIP
  """

  def __init__(self, columns: Columns, day: int, num_days: int):
    super().__init__(columns.directory)
    self._sizes = [self.num_rows[part] for part in SPLITS]
    total = sum(self._sizes)
    if not 2 <= num_days <= total:
      raise UserError(
        f"num_days must be from 2 to {total}, the number of rows, got "
        f"{num_days}"
      )
    if self.schema.split.by != "time":
      raise UserError(
        f"days follow time, but this data is split by {self.schema.split.by}; "
        'use a split of "time"'
      )
    edges = np.linspace(0, total, num_days + 1).round().astype(np.int64)
    start, end, after = edges[day : day + 3].tolist()
    self._first = {"train": start, "valid": end, "test": end}
    self.num_rows = {
      "train": end - start,
      "valid": after - end,
      "test": after - end,
    }

  def read(
    self,
    split: str,
    indices: Int[np.ndarray, " batch"],
    *,
    max_len: int | None = None,
  ) -> Batch:
    """As `Columns.read`."""
    read = super().read
    return self._of_parts(
      split, indices, lambda part, rows: read(part, rows, max_len=max_len)
    )

  def lengths(
    self, split: str, indices: Int[np.ndarray, " batch"]
  ) -> Int[np.ndarray, "batch sequences"]:
    """As `Columns.lengths`."""
    return self._of_parts(split, indices, super().lengths)

  def _of_parts(self, split: str, indices, read):
    """`read(part, rows)` of the parts that hold the rows, in their order."""
    if (
      len(indices)
      and not 0 <= indices.min() <= indices.max() < (self.num_rows[split])
    ):
      raise IndexError(
        f"a row of {split} is not in [0, {self.num_rows[split]})"
      )
    rows = self._first[split] + np.asarray(indices, np.int64)
    ends = np.cumsum(self._sizes)
    which = np.searchsorted(ends, rows, side="right")
    places, found = [], []
    for number in np.unique(which):
      place = np.flatnonzero(which == number)
      places.append(place)
      first = ends[number] - self._sizes[number]
      found.append(read(SPLITS[number], rows[place] - first))
    if len(found) == 1:
      return found[0]
    order = np.argsort(np.concatenate(places))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[order], *found)
