"""Random reads from large files in little resident memory.

The kernel counts every page touched through a memory map as the process's own
until somebody gives it back, so a shuffled pass over a file would grow to the
file's size. `Resident` gives the pages back (they stay in the page cache).
"""

import mmap
import os
import threading

import numpy as np
from jaxtyping import Int

from recjax.errors import UserError

# What one page fault may make resident: Linux maps a huge page of the page
# cache as a whole, and 64 KiB around the fault otherwise.
_WINDOW = 2 << 20
_WINDOWS_A_GATHER = 8


class MappedRows:
  """Rows of 32-bit words in a file, gathered through a memory map.

  Args:
    path: The file.
    shape: Number of rows and words a row.
    resident: Shares its limit among the maps of one data set.
    width: Rows to read from a row's start on; a start must have so many.

  Raises:
    UserError: If the file does not have the size that `shape` says.
  """

  def __init__(
    self,
    path: os.PathLike,
    shape: tuple[int, int],
    resident: "Resident",
    width: int = 1,
  ):
    num_rows, words = shape
    self.size = 4 * num_rows * words
    self.touched = 0
    self._step = 4 * words
    self._resident = resident
    found = os.path.getsize(path) if os.path.exists(path) else 0
    if found != self.size:
      raise UserError(
        f"{path}: has {found} bytes, expected {self.size}; the prepared data "
        "is incomplete, delete its folder and prepare it again"
      )
    self._map = None
    flat = np.empty(0, "<i4")
    if self.size:  # An empty file cannot be mapped.
      with open(path, "rb") as file:
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
      self._map.madvise(mmap.MADV_RANDOM)
      flat = np.frombuffer(self._map, "<i4")
    if width > 1:
      window = np.lib.stride_tricks.sliding_window_view(flat, width * words)
      self._array = window[::words]
    else:
      self._array = flat.reshape(num_rows, words)
    self._words = words
    self._kept = resident.add(self)

  def gather(
    self, rows: Int[np.ndarray, " batch"], width: int | None = None
  ) -> Int[np.ndarray, "batch words"]:
    """A copy of the rows at `rows`; fastest where they are sorted.

    Args:
      rows: Their numbers.
      width: Rows to read from each on, at most the map's own; None for that.

    Raises:
      IndexError: If a row is outside the file.
    """
    if len(rows) and rows.min() < 0:
      raise IndexError(f"row {rows.min()} is negative")
    rows = rows.astype(np.int64, copy=False)
    array = self._array
    if width is not None:
      array = array[:, : width * self._words]
    out = np.empty((len(rows), array.shape[1]), np.int32)
    num_bytes = 4 * array.shape[1]
    # Few windows at a time, so that no single call maps the whole file.
    moves = np.flatnonzero(np.diff(rows * self._step // _WINDOW)) + 1
    ends = [*moves[_WINDOWS_A_GATHER - 1 :: _WINDOWS_A_GATHER], len(rows)]
    touched = _WINDOW * min(len(moves) + 1, _WINDOWS_A_GATHER)
    begin = 0
    for end in ends:
      chunk = rows[begin:end]
      out[begin:end] = array[chunk]
      begin = end
      if len(chunk) and chunk.max() * self._step + num_bytes > self._kept:
        self._resident.touch(self, touched)
    return out

  def drop(self) -> None:
    """Gives the pages back, but for those that may stay."""
    if self.touched:
      self._map.madvise(mmap.MADV_DONTNEED, self._kept)
      self.touched = 0


class Resident:
  """Bounds the resident pages of several maps to about `limit` bytes.

  The first seven eighths, in the order of the maps, stay for good:
  random reads return to all places alike, so keeping the latest would be no
  better. The pages of the rest are dropped together when they fill the last
  eighth.
  """

  def __init__(self, limit: int):
    self._limit = limit // 8
    self._free = limit - self._limit
    self._lock = threading.Lock()
    self._maps: list[MappedRows] = []

  def add(self, mapped: MappedRows) -> int:
    """Counts this map from now on; returns how many first bytes may stay."""
    self._maps.append(mapped)
    kept = min(mapped.size, self._free)
    if kept < mapped.size:
      kept -= kept % _WINDOW
    self._free -= kept
    return kept

  def touch(self, mapped: MappedRows, num_bytes: int) -> None:
    """Records that up to `num_bytes` more of a map have become resident."""
    with self._lock:
      mapped.touched = min(mapped.touched + num_bytes, mapped.size)
      if sum(m.touched for m in self._maps) < self._limit:
        return
      for m in self._maps:
        m.drop()
