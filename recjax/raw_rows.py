"""Raw rows become the arrays that a model reads; needs only NumPy.

`recjax.export` puts this text into each export's `score.py`, so it imports
nothing of recjax. A column is a list or an array with one entry a row. How
entries are read:

* `sparse`: an integer or a string; None (or NaN) is a missing value. What the
  training part did not hold gets row 0 of its vocabulary.
* several values (`multi`, `sequence`): a list, or a string where the manifest
  gives a separator; None is an empty list, and None or "" in it is left out.
  Of too long a list the last values of a sequence are kept, the first of a set.
* `text`: a string, or None for an empty one; its first tokens are kept.
* `dense`: a finite number. `vector`: a list of finite numbers.
* of a sequence whose events have sides or times: lists as long as its own. A
  side's None or "" is a missing value. Times are seconds, ISO 8601 texts or
  datetimes (without a zone: UTC), oldest first, and so is the row's own. An
  event at the row's own time is left out, one after it is a mistake.
"""

import datetime
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_DENSE_LIMIT = 10.0  # Standardised values are clipped to +- this.


class InputError(ValueError):
  """A mistake in the rows to score or in the export, told in one line."""


class Encoder:
  """From raw columns to the arrays that the program takes.

  Args:
    manifest: Its `features`, `vocabularies` and `dense`.
    vocabularies: Name -> `<name>/keys`, sorted, and `<name>/rows`.
    tokenizer: A `tokenizers.Tokenizer`, where columns hold text.
  """

  def __init__(
    self,
    manifest: Mapping[str, Any],
    vocabularies: Mapping[str, np.ndarray],
    tokenizer: Any = None,
  ):
    self._manifest, self._vocabularies = manifest, vocabularies
    self._tokenizer = tokenizer

  @property
  def columns(self) -> list[str]:
    """Names of the columns that a row needs."""
    names = []
    for feature in self._manifest["features"]:
      names.append(feature["name"])
      names += [side["name"] for side in feature.get("sides", ())]
      names += [feature["time"]] if "time" in feature else []
    if "time" in self._manifest:
      names.append(self._manifest["time"])
    return list(dict.fromkeys(names))

  def encode(
    self, columns: Mapping[str, Sequence[Any]]
  ) -> dict[str, np.ndarray]:
    """`dense`, `ids/<name>`, `id_mask/<name>`, `event_age/<name>`,
    `tokens/<name>`, `token_mask/<name>`, `vectors/<name>` and
    `example_mask`, one entry a row."""
    features = self._manifest["features"]
    for name in self.columns:
      if name not in columns:
        raise InputError(
          f"column {name!r} is missing; the model needs "
          + ", ".join(self.columns)
        )
    num_rows = len(columns[features[0]["name"]])
    for name in self.columns:
      if len(columns[name]) != num_rows:
        raise InputError(
          f"column {name!r} has {len(columns[name])} rows, "
          f"{features[0]['name']!r} has {num_rows}"
        )
    arrays, dense = {}, []
    for feature in features:
      name, values = feature["name"], columns[feature["name"]]
      if feature["kind"] == "dense":
        dense.append(_numbers(values, name))
      elif feature["kind"] == "vector":
        arrays[f"vectors/{name}"] = _vectors(values, feature)
      elif feature["kind"] == "text":
        tokens, mask = self._tokens(values, feature)
        arrays[f"tokens/{name}"], arrays[f"token_mask/{name}"] = tokens, mask
      elif "time" in feature or "sides" in feature:
        arrays |= self._events(columns, feature)
      elif "max_len" in feature:
        ids, mask = self._lists(values, feature)
        arrays[f"ids/{name}"], arrays[f"id_mask/{name}"] = ids, mask
      else:
        arrays[f"ids/{name}"] = self._rows(values, feature)
    scale = self._manifest["dense"]
    stacked = np.zeros((num_rows, len(dense)), np.float32)
    for position, numbers in enumerate(dense):
      stacked[:, position] = numbers
    stacked -= np.asarray(scale["mean"], np.float32)
    stacked /= np.asarray(scale["std"], np.float32)
    arrays["dense"] = np.clip(stacked, -_DENSE_LIMIT, _DENSE_LIMIT)
    arrays["example_mask"] = np.ones(num_rows, bool)
    return arrays

  def _rows(self, values, feature: dict[str, Any]) -> np.ndarray:
    """Vocabulary row of each value."""
    name = feature["vocabulary"]
    vocabulary = self._manifest["vocabularies"][name]
    keys, missing = _keys(values, vocabulary["type"], feature["name"])
    if vocabulary["buckets"]:
      buckets = np.uint64(vocabulary["buckets"])
      rows = 1 + (_mix(keys) % buckets).astype(np.int32)
      return np.where(missing, np.int32(0), rows)
    known = self._vocabularies[f"{name}/keys"]
    if not len(known):
      return np.where(missing, vocabulary["missing_row"], 0).astype(np.int32)
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    rows = self._vocabularies[f"{name}/rows"][at]
    rows = np.where(known[at] == keys, rows, 0)
    return np.where(missing, vocabulary["missing_row"], rows).astype(np.int32)

  def _lists(self, values, feature) -> tuple[np.ndarray, np.ndarray]:
    lists = [
      [v for v in row if not _is_empty(v)] for row in _split(values, feature)
    ]
    max_len = feature["max_len"]
    kept = slice(-max_len, None) if feature["kind"] == "sequence" else None
    kept = kept or slice(max_len)
    return self._pack([row[kept] for row in lists], feature, max_len)

  def _tokens(self, values, feature) -> tuple[np.ndarray, np.ndarray]:
    texts = ["" if _is_missing(value) else value for value in values]
    for row, value in enumerate(texts):
      if not isinstance(value, str):
        raise InputError(
          f"column {feature['name']!r}, row {row + 1}: must be text, got "
          f"{value!r}"
        )
    max_len = feature["max_len"]
    found = self._tokenizer.encode_batch(texts)
    lists = [encoding.ids[:max_len] for encoding in found]
    return _filled(lists, max_len, lambda tokens: tokens)

  def _pack(self, lists, feature, max_len: int):
    """Ids and their mask, of lists of at most `max_len` values."""
    return _filled(lists, max_len, lambda flat: self._rows(flat, feature))

  def _events(self, columns, feature) -> dict[str, np.ndarray]:
    """A sequence, its sides and the ages of its events."""
    name, sides = feature["name"], feature.get("sides", [])
    events = _Events(columns, feature, self._manifest.get("time"))
    arrays = {}
    for side in (feature, *sides):
      lists = events.kept(side["name"])
      arrays[f"ids/{side['name']}"], mask = self._pack(
        lists, side, feature["max_len"]
      )
      arrays[f"id_mask/{side['name']}"] = mask
    if "time" in feature:
      age = np.zeros(mask.shape, np.float32)
      times = list(itertools.chain.from_iterable(events.kept(feature["time"])))
      own = np.repeat(np.array(events.own), mask.sum(axis=1))
      age[mask] = own - np.array(times)
      arrays[f"event_age/{name}"] = age
    return arrays


def _filled(lists, max_len: int, numbers_of):
  """Lists of values as rows of numbers, zeros behind, and their mask."""
  lengths = np.fromiter(map(len, lists), np.int64, len(lists))
  mask = np.arange(max_len) < lengths[:, None]
  numbers = np.zeros(mask.shape, np.int32)
  numbers[mask] = numbers_of(list(itertools.chain.from_iterable(lists)))
  return numbers, mask


class _Events:
  """The events that rows see of one sequence.

  Args:
    columns: Raw columns.
    feature: The sequence, as the manifest describes it.
    time: Column of the rows' own times; None if no sequence has any.
  """

  def __init__(self, columns, feature, time: str | None):
    name = feature["name"]
    self._lists = {name: _event_lists(columns[name], feature, name, None)}
    lengths = [len(row) for row in self._lists[name]]
    others = [side["name"] for side in feature.get("sides", [])]
    for other in (*others, *filter(None, [feature.get("time")])):
      self._lists[other] = _event_lists(columns[other], feature, other, lengths)
    keep = [[not _is_empty(v) for v in row] for row in self._lists[name]]
    self.own = None
    if "time" in feature:
      self.own = [_seconds(v, time, r) for r, v in enumerate(columns[time])]
      times = self._times(feature["time"])
      self._lists[feature["time"]] = times
      keep = [
        [k and t < own for k, t in zip(row, seconds, strict=True)]
        for row, seconds, own in zip(keep, times, self.own, strict=True)
      ]
    limit = feature["max_len"]
    self._kept = [np.flatnonzero(row)[-limit:].tolist() for row in keep]

  def kept(self, column: str) -> list[list[Any]]:
    """What a column holds of the events that are seen."""
    return [
      [row[i] for i in chosen]
      for row, chosen in zip(self._lists[column], self._kept, strict=True)
    ]

  def _times(self, column: str) -> list[list[float]]:
    """When the events were; oldest first and none after its row."""
    lists = []
    for row, values in enumerate(self._lists[column]):
      times = [_seconds(value, column, row) for value in values]
      if times != sorted(times):
        raise InputError(
          f"column {column!r}, row {row + 1}: events must stand oldest first"
        )
      if times and times[-1] > self.own[row]:
        raise InputError(
          f"column {column!r}, row {row + 1}: an event at {times[-1]:.15g} s, "
          f"after the row's own time, {self.own[row]:.15g} s"
        )
      lists.append(times)
    return lists


def _event_lists(values, feature, column: str, lengths) -> list[list[Any]]:
  """A list for each row, as long as `lengths` says, if that is given."""
  values = [None if isinstance(v, str) and v == "" else v for v in values]
  lists = _split(values, feature | {"name": column})
  for row, length in enumerate(lengths or ()):
    # An empty text has no value, unless it stands for one that is missing.
    if not lists[row] and length == 1 and "separator" in feature:
      lists[row] = [None]
    if len(lists[row]) != length:
      raise InputError(
        f"column {column!r}, row {row + 1}: {len(lists[row])} values, but "
        f"{feature['name']!r} has {length}"
      )
  return [[None if _is_empty(v) else v for v in row] for row in lists]


def _seconds(value, column: str, row: int) -> float:
  """A time in seconds; dates and texts of them count from 1970."""
  where = f"column {column!r}, row {row + 1}"
  if isinstance(value, np.datetime64):
    value = value.astype("datetime64[us]").item()
  try:
    if isinstance(value, str):
      try:
        value = float(value)
      except ValueError:
        value = datetime.datetime.fromisoformat(value.strip())
    if isinstance(value, datetime.date):
      value = _since_1970(value)
    number = float(value)
  except (TypeError, ValueError) as error:
    raise InputError(
      f"{where}: {value!r} is no time; give seconds, ISO 8601 or a datetime"
    ) from error
  if isinstance(value, (bool, np.bool_)) or not np.isfinite(number):
    raise InputError(f"{where}: {value!r} must be a finite time")
  return number


def _since_1970(value: datetime.date) -> float:
  if not isinstance(value, datetime.datetime):
    value = datetime.datetime(value.year, value.month, value.day)
  utc = datetime.UTC
  if value.tzinfo is None:
    value = value.replace(tzinfo=utc)
  return (value - datetime.datetime(1970, 1, 1, tzinfo=utc)).total_seconds()


def _is_empty(value) -> bool:
  return _is_missing(value) or (isinstance(value, str) and value == "")


def _keys(values, kind: str, column: str) -> tuple[np.ndarray, np.ndarray]:
  """64-bit key of each value, and which are missing (their key is 0)."""
  # Not as an array: NumPy would turn a NaN among strings into the text "nan",
  # and large integers beside it into floats that are other integers.
  values = values.tolist() if isinstance(values, np.ndarray) else list(values)
  missing = np.array([_is_missing(value) for value in values], bool)
  present = [v for v, gone in zip(values, missing, strict=True) if not gone]
  if kind == "string":
    found = _hash(
      value if isinstance(value, str) else str(_integer(value, column))
      for value in present
    )
  else:
    integers = [_integer(value, column) for value in present]
    found = np.array(integers, np.int64).view(np.uint64)
  keys = np.zeros(len(missing), np.uint64)
  keys[~missing] = found
  return keys, missing


def _is_missing(value) -> bool:
  return value is None or (
    isinstance(value, (float, np.floating)) and bool(value != value)
  )


def _integer(value, column: str) -> int:
  """An integer, or a text or float that names one."""
  if isinstance(value, str):
    try:
      value = int(value)
    except ValueError as error:
      raise InputError(
        f"column {column!r}: {error}; its ids are 64-bit integers"
      ) from error
  elif isinstance(value, (float, np.floating)):
    # Beyond it a float does not tell neighbouring integers apart.
    if not (abs(value) <= 2**53 and value == int(value)):
      raise _no_id(column)
  elif not isinstance(value, (int, np.integer)):
    raise _no_id(column)
  if not -(2**63) <= int(value) < 2**63:
    raise _no_id(column)
  return int(value)


def _no_id(column: str) -> InputError:
  return InputError(
    f"column {column!r}: an id must be a string or a 64-bit integer, one a "
    "row, or None"
  )


def _hash(texts: Iterable[str]) -> np.ndarray:
  """Key of each string: it sums a random number for each of its bytes.

  The number stands for the pair of byte and position (tabulation hashing).
  """
  encoded = [text.encode() for text in texts]
  lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
  data = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint64)
  ends = np.cumsum(lengths)
  place = np.arange(len(data)) - np.repeat(ends - lengths, lengths)
  sums = np.zeros(len(data) + 1, np.uint64)
  np.cumsum(_mix(place.astype(np.uint64) << np.uint64(8) | data), out=sums[1:])
  return _mix(sums[ends] - sums[ends - lengths] + lengths.astype(np.uint64))


def _mix(numbers: np.ndarray) -> np.ndarray:
  """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
  numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
  numbers ^= numbers >> np.uint64(30)
  numbers *= np.uint64(0xBF58476D1CE4E5B9)
  numbers ^= numbers >> np.uint64(27)
  numbers *= np.uint64(0x94D049BB133111EB)
  return numbers ^ (numbers >> np.uint64(31))


def _split(values, feature: dict[str, Any]) -> list[list[Any]]:
  """A list for each row."""
  separator = feature.get("separator")
  lists = []
  for row, value in enumerate(values):
    if isinstance(value, str):
      if separator is None:
        raise InputError(
          f"column {feature['name']!r}, row {row + 1}: must hold a list, got "
          f"{value!r}"
        )
      lists.append(value.split(separator))
    elif value is None:
      lists.append([])
    elif isinstance(value, list | tuple | np.ndarray):
      lists.append(list(value))
    else:
      raise InputError(
        f"column {feature['name']!r}, row {row + 1}: must hold lists, got "
        f"{value!r}"
      )
  return lists


def _numbers(values, column: str) -> np.ndarray:
  """A dense column in float32."""
  try:
    with np.errstate(over="ignore"):
      numbers = np.array(values, np.float64).astype(np.float32)
  except (TypeError, ValueError) as error:
    raise InputError(
      f"column {column!r}: {error}; every value must be a number"
    ) from error
  if numbers.ndim != 1 or not np.isfinite(numbers).all():
    row = int(np.argmin(np.isfinite(numbers))) if numbers.ndim == 1 else 0
    raise InputError(
      f"column {column!r}, row {row + 1}: {values[row]!r} must be one finite "
      "number"
    )
  return numbers


def _vectors(values, feature: dict[str, Any]) -> np.ndarray:
  """A vector column; the width is checked."""
  name, dim = feature["name"], feature["dim"]
  if not isinstance(values, np.ndarray) or values.dtype == object:
    values = _split(values, feature)
    for row, value in enumerate(values):
      if len(value) != dim:
        raise InputError(
          f"column {name!r}, row {row + 1}: {len(value)} numbers, must be {dim}"
        )
  try:
    numbers = np.array(values, np.float32).reshape(len(values), dim)
  except (TypeError, ValueError) as error:
    raise InputError(
      f"column {name!r}: {error}; a row must hold {dim} numbers"
    ) from error
  finite = np.isfinite(numbers).all(axis=1)
  if not finite.all():
    row = int(np.argmin(finite))
    raise InputError(f"column {name!r}, row {row + 1}: must be finite numbers")
  return numbers
