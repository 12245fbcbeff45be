"""Which rows of a table are for training, validation and test.

Each rule is a function from a block of rows to the number of each row's part
in `recjax.schema.SPLITS`, the same whenever it is asked.
"""

import pathlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from recjax.data.table_source import Rows, Source, is_string
from recjax.data.vocabulary import mix
from recjax.errors import UserError
from recjax.schema import SPLITS, Split

_SCAN = 1 << 16
_BITS = 16


def make_splitter(
  split: Split, source: Source, scratch: pathlib.Path
) -> Callable[[Rows], Int[np.ndarray, " rows"]]:
  """The function that tells the part of every row of a block.

  Args:
    split: The rule.
    source: The table; a split by time reads its time column once.
    scratch: A folder for a temporary file of that column.

  Raises:
    UserError: If a part would be empty, and from the function at a null or
      malformed time and at an unknown part.
  """
  if split.by == "column":
    return lambda rows: _by_column(rows, split.column)
  if split.by == "random":
    return lambda rows: _by_hash(rows, split)
  form = _time_form(source, split.column)
  bounds = _time_bounds(split, source, form, scratch / "times.u64")
  return lambda rows: np.searchsorted(
    bounds, _time_keys(rows, split.column, form), side="right"
  )


def _by_column(rows: Rows, column: str):
  values = rows.column(column)
  if is_string(values.type):
    parts = pc.index_in(values, pa.array(SPLITS, values.type))
  else:
    parts = pa.nulls(len(values), pa.int32())
  parts = parts.fill_null(-1).to_numpy()
  rows.require(
    column,
    parts >= 0,
    lambda row: (
      f"{values[row].as_py()!r} is no part; allowed are {', '.join(SPLITS)}"
    ),
  )
  return parts


def _by_hash(rows: Rows, split: Split):
  numbers = rows.first_in_table + np.arange(len(rows), dtype=np.uint64)
  seed = mix(np.array([split.seed], np.int64).view(np.uint64))
  uniform = (mix(numbers ^ seed) / 2.0**64 + split.fold * split.test) % 1.0
  bounds = np.array([1 - split.valid - split.test, 1 - split.test])
  return np.searchsorted(bounds, uniform, side="right")


def _time_form(source: Source, column: str) -> str:
  """How to read the times of every part: integer, number or date."""
  types = [source.schema(path).field(column).type for path in source.files]
  if all(is_string(t) for t in types):
    first = next(source.read([column]), None)
    try:
      if first is not None:
        pc.utf8_trim_whitespace(first.column(column)[:1]).cast(pa.float64())
      return "number"
    except pa.ArrowInvalid:
      return "date"
  if all(pa.types.is_integer(t) for t in types):
    return "integer"
  if all(pa.types.is_integer(t) or pa.types.is_floating(t) for t in types):
    return "number"
  if all(pa.types.is_timestamp(t) or pa.types.is_date(t) for t in types):
    return "date"
  raise UserError(
    f"{source.files[0]}: column {column!r}: cannot split by time of type "
    f"{' and '.join(sorted({str(t) for t in types}))}; it must hold numbers, "
    "dates or timestamps"
  )


def _time_keys(rows: Rows, column: str, form: str) -> Int[np.ndarray, " rows"]:
  """Integers in the order of the times."""
  times = rows.column(column)
  rows.require(
    column,
    pc.is_valid(times).to_numpy(zero_copy_only=False),
    lambda row: "time is missing, but the split is by time; fill or drop it",
  )
  if form == "integer":
    return rows.cast(column, times, pa.int64()).to_numpy()
  if form == "date":
    zone = getattr(times.type, "tz", None)
    if is_string(times.type):
      times = rows.cast(column, times, pa.timestamp("us"))
    times = times.cast(pa.timestamp("us", zone), safe=False)
    return times.cast(pa.int64()).to_numpy()
  numbers = rows.floats(column)
  rows.require(
    column,
    np.isfinite(numbers),
    lambda row: f"time {numbers[row]} is not finite",
  )
  # Floats order like their bits, negative ones in reverse. Adding 0 makes
  # -0 the same time as 0.
  bits = (numbers + 0.0).view(np.int64)
  return np.where(bits < 0, ~bits ^ np.int64(-(2**63)), bits)


def _time_bounds(split: Split, source: Source, form: str, path: pathlib.Path):
  """The first time key of the validation and of the test part."""
  num_rows = 0
  with open(path, "wb") as file:
    for rows in source.read([split.column]):
      keys = _time_keys(rows, split.column, form)
      # The sign bit is flipped: unsigned keys have plain digits.
      file.write((keys.view(np.uint64) ^ np.uint64(1 << 63)).data)
      num_rows += len(rows)
  if num_rows == 0:
    raise UserError(f"{source.files[0]}: the table has no rows")
  test = _bound(path, num_rows, split.test)
  valid = _bound(path, num_rows, split.valid + split.test)
  path.unlink()
  return np.array([valid, test])


def _bound(path: pathlib.Path, num_rows: int, share: float) -> int:
  """The key from which on the rows are nearest to a share of all.

  Equal keys stay together. Selection by 16 bits a scan, from the highest:
  memory does not grow with the rows.
  """
  wanted = round(num_rows * share)
  rank = min(num_rows - wanted, num_rows - 1)
  prefix, below = 0, 0
  for shift in range(64 - _BITS, -1, -_BITS):
    counts = np.zeros(1 << _BITS, np.int64)
    with open(path, "rb") as file:
      while len(keys := np.fromfile(file, np.uint64, _SCAN)):
        if shift + _BITS < 64:
          keys = keys[keys >> np.uint64(shift + _BITS) == np.uint64(prefix)]
        digits = keys >> np.uint64(shift) & np.uint64((1 << _BITS) - 1)
        counts += np.bincount(digits.astype(np.int64), minlength=1 << _BITS)
    total = below + np.cumsum(counts)
    digit = int(np.searchsorted(total, rank, side="right"))
    below = int(total[digit] - counts[digit])
    prefix = prefix << _BITS | digit
  equal = int(counts[digit])
  with_ties, without = num_rows - below, num_rows - below - equal
  if without > 0 and wanted - without < with_ties - wanted:
    prefix += 1
  return prefix - (1 << 63)
