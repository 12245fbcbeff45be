"""From the values of id columns to rows of an embedding table.

A value is a 64-bit integer or a string, in Arrow arrays of type `VALUE_TYPES`.
Row 0 is for values that the training part does not hold. Nothing here depends
on the machine, the process or the order in which values arrive.
"""

import urllib.parse

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Int, UInt64

from recjax.errors import UserError

VALUE_TYPES = (pa.int64(), pa.large_string())

_HASHED_BYTES = 1 << 16


class VocabularyBuilder:
  """Collects distinct values; memory grows with their number alone."""

  def __init__(self, value_type: pa.DataType):
    self._merged = pa.array([], value_type)
    self._pending: list[pa.Array] = []
    self._num_pending = 0
    self._has_null = False

  def add(self, values: pa.Array) -> None:
    """Adds the values of a block."""
    self._has_null |= values.null_count > 0
    values = values.unique().drop_null()
    self._pending.append(values)
    self._num_pending += len(values)
    # Merging costs the vocabulary's size, so it waits for as many values.
    if self._num_pending > max(1 << 16, len(self._merged)):
      self._merge()

  def finish(self) -> "Vocabulary":
    """The vocabulary, in the order of the values, null last."""
    self._merge()
    values = self._merged.take(pc.array_sort_indices(self._merged))
    return Vocabulary(values, self._has_null)

  def _merge(self):
    values = pa.concat_arrays([self._merged, *self._pending])
    self._merged = values.unique()
    self._pending, self._num_pending = [], 0


class Vocabulary:
  """Distinct values; the i-th has row i + 1, a null the row after the last.

  Example:
    >>> vocabulary = Vocabulary(pa.array([5, 9]), has_null=False)
    >>> vocabulary.lookup(pa.array([9, 5, 7, None])).tolist()
    [2, 1, 0, 0]
  """

  def __init__(self, values: pa.Array, has_null: bool):
    self._values = values
    self._null_row = len(values) + 1 if has_null else 0
    self.size = len(values) + 1 + has_null
    keys = hash_values(values)
    self._rows = np.argsort(keys)
    self._keys = keys[self._rows]
    same = np.flatnonzero(self._keys[1:] == self._keys[:-1])
    if len(same):
      pair = values.take(pa.array(self._rows[same[0] : same[0] + 2]))
      raise UserError(
        f"values {pair[0]} and {pair[1]} have the same 64-bit hash; rename one"
      )

  def lookup(self, values: pa.Array) -> Int[np.ndarray, " values"]:
    """Row of each value, 0 for values that are not in the vocabulary."""
    encoded = values.dictionary_encode()
    # The last row is what a null, index -1, finds.
    rows = np.zeros(len(encoded.dictionary) + 1, np.int32)
    rows[-1] = self._null_row
    if len(self._keys):
      keys = hash_values(encoded.dictionary)
      found = np.searchsorted(self._keys, keys)
      found = np.minimum(found, len(self._keys) - 1)
      rows[:-1] = np.where(self._keys[found] == keys, self._rows[found] + 1, 0)
    return rows[encoded.indices.fill_null(-1).to_numpy()]

  @property
  def values(self) -> pa.Array:
    """What rows 1, 2, ... stand for."""
    if self._null_row:
      return pa.concat_arrays([self._values, pa.nulls(1, self._values.type)])
    return self._values


class Buckets:
  """Rows 1 to `num_buckets` by hash; row 0 is for null.

  Example:
    >>> Buckets(10).lookup(pa.array([3, None])).tolist()
    [4, 0]
  """

  def __init__(self, num_buckets: int):
    self._num_buckets = num_buckets
    self.size = num_buckets + 1

  def lookup(self, values: pa.Array) -> Int[np.ndarray, " values"]:
    """Row of each value."""
    encoded = values.dictionary_encode()
    rows = np.zeros(len(encoded.dictionary) + 1, np.int32)
    hashed = mix(hash_values(encoded.dictionary))
    rows[:-1] = 1 + (hashed % np.uint64(self._num_buckets)).astype(np.int32)
    return rows[encoded.indices.fill_null(-1).to_numpy()]


def save_values(directory: epath.PathLike, name: str, values: pa.Array) -> None:
  """Writes what rows 1, 2, ... of a vocabulary stand for.

  Args:
    directory: Of the prepared data; the file is `vocabulary/<name>.parquet`,
      with the columns `value` and `row`.
    name: The vocabulary's.
    values: Of one of `VALUE_TYPES`; null stands for missing values. None at
      all for a vocabulary of buckets, whose type is thereby known.
  """
  path = _path(directory, name)
  path.parent.mkdir(exist_ok=True)
  rows = pa.array(np.arange(1, len(values) + 1, dtype=np.int32))
  pq.write_table(pa.table({"value": values, "row": rows}), path)


def load_values(directory: epath.PathLike, name: str) -> pa.Array:
  """What `save_values` wrote.

  Raises:
    UserError: If the data set keeps no vocabularies.
  """
  path = _path(directory, name)
  if not path.exists():
    raise UserError(
      f"{path}: the data set keeps no vocabulary of {name!r}, so its raw "
      "values are not known; an adapter writes it with save_values"
    )
  return pq.read_table(path)["value"].combine_chunks()


def hash_values(values: pa.Array) -> UInt64[np.ndarray, " values"]:
  """A 64-bit key of each value: an integer's is itself, a string's a hash.

  A string's hash is the sum over its bytes of a random number that stands for
  the pair of byte and position (tabulation hashing).

  Args:
    values: Without nulls.
  """
  if pa.types.is_integer(values.type):
    return values.to_numpy().astype(np.int64).view(np.uint64)
  values = values.cast(pa.large_string())
  _, offsets, data = values.buffers()
  offsets = (
    np.frombuffer(offsets, np.int64)[
      values.offset : values.offset + len(values) + 1
    ]
    if len(values)
    else np.zeros(1, np.int64)
  )
  data = np.frombuffer(data or b"", np.uint8)
  hashed = np.empty(len(values), np.uint64)
  begin = 0
  while begin < len(values):  # In chunks, since a byte becomes 8 and more.
    end = int(np.searchsorted(offsets, offsets[begin] + _HASHED_BYTES))
    end = min(max(end, begin + 1), len(values))
    hashed[begin:end] = _hash_chunk(offsets[begin : end + 1], data)
    begin = end
  return hashed


def mix(numbers: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
  """A bijection that scatters 64-bit numbers.

  Source:
    Steele, Lea and Flood, Fast splittable pseudorandom number generators,
    OOPSLA 2014: the output function of SplitMix64.
  """
  numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
  numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(
    0xBF58476D1CE4E5B9
  )
  numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(
    0x94D049BB133111EB
  )
  return numbers ^ (numbers >> np.uint64(31))


def _path(directory, name: str) -> epath.Path:
  quoted = urllib.parse.quote(name, safe="")
  return epath.Path(directory) / "vocabulary" / f"{quoted}.parquet"


def _hash_chunk(offsets, data):
  lengths = np.diff(offsets)
  begin, end = offsets[0], offsets[-1]
  place = np.arange(end - begin) - np.repeat(offsets[:-1] - begin, lengths)
  pairs = place.astype(np.uint64) << np.uint64(8)
  sums = np.zeros(end - begin + 1, np.uint64)
  # Differences of a running sum modulo 2^64 are the strings' sums.
  np.cumsum(mix(pairs | data[begin:end]), out=sums[1:])
  total = sums[offsets[1:] - begin] - sums[offsets[:-1] - begin]
  return mix(total + lengths.astype(np.uint64))
