"""Columns larger than memory: appended to files, mapped, sorted by time."""

import pathlib

import numpy as np
from jaxtyping import Shaped


class ColumnFiles:
  """Columns that grow on disk and are mapped when complete.

  Args:
    folder: An existing empty folder.
    types: Name -> NumPy type of each column.
  """

  def __init__(self, folder: pathlib.Path, types: dict[str, type]):
    self._paths = {name: folder / f"{name}.column" for name in types}
    self._types = types
    self._files = {n: open(path, "wb") for n, path in self._paths.items()}

  def append(self, rows: dict[str, Shaped[np.ndarray, " rows"]]):
    """Appends equally many rows to every column."""
    for name, file in self._files.items():
      file.write(np.ascontiguousarray(rows[name], self._types[name]).data)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    for file in self._files.values():
      file.close()

  def mapped(self) -> dict[str, Shaped[np.ndarray, " rows"]]:
    """The completed columns as writable memory maps."""
    return {
      name: np.memmap(path, self._types[name], "r+")
      for name, path in self._paths.items()
    }


def sort_by_time(
  events: dict[str, Shaped[np.ndarray, " rows"]],
  scratch: pathlib.Path,
  max_rows: int,
) -> dict[str, Shaped[np.ndarray, " rows"]]:
  """A stable external sort: parted by time, then sorted part by part.

  Args:
    events: Columns of equal length, at least one row; `time` is the key.
    scratch: Existing folder; the result lies in its new folder `sorted`.
    max_rows: Rows held in memory at a time. A part may exceed it by one bin,
      a 65,536th of the time span.

  Returns:
    New memory maps; rows of equal time keep their order.
  """
  time = events["time"]
  blocks = [slice(s, s + max_rows) for s in range(0, len(time), max_rows)]
  low = min(int(time[b].min()) for b in blocks)
  high = max(int(time[b].max()) for b in blocks)
  num_bins = 1 << 16
  width = (high - low) // num_bins + 1
  histogram = np.zeros(num_bins, np.int64)
  for block in blocks:
    histogram += np.bincount((time[block] - low) // width, minlength=num_bins)
  begin = np.cumsum(histogram) - histogram
  # Whole bins go to a part, which holds max_rows and at most one bin more.
  part_of_bin = begin // max_rows
  part_of_bin = np.unique(part_of_bin, return_inverse=True)[1]
  sizes = np.bincount(part_of_bin, weights=histogram).astype(np.int64)
  ends = np.cumsum(sizes)
  offset = ends - sizes
  (scratch / "sorted").mkdir()
  result = {
    name: np.memmap(
      scratch / "sorted" / f"{name}.column", column.dtype, "w+", 0, column.shape
    )
    for name, column in events.items()
  }
  for block in blocks:
    part = part_of_bin[(time[block] - low) // width]
    order = np.argsort(part, kind="stable")
    count = np.bincount(part, minlength=len(sizes))
    within = np.arange(len(part)) - np.repeat(np.cumsum(count) - count, count)
    target = offset[part[order]] + within
    for name, column in events.items():
      result[name][target] = column[block][order]
    offset = offset + count
  for end, size in zip(ends, sizes, strict=True):
    rows = slice(end - size, end)
    order = np.argsort(result["time"][rows], kind="stable")
    for column in result.values():
      column[rows] = column[rows][order]
  return result
