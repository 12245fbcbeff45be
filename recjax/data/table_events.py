"""Sequences of a table whose events have times or side columns.

Beside the list of ids stand lists of the same length: `time`, when each event
was, and `side`, further ids. They are list columns or strings with the
sequence's separator. How they are read:

* Times are numbers, which count as seconds, or dates and timestamps (strings:
  ISO 8601; without a zone: UTC). The row's own time (`roles.time`) is read
  likewise, and must be of the same scale.
* Events stand oldest first, as the last `max_len` are kept.
* A row sees nothing of its own or a later moment. An event at the row's own
  time is left out, and a warning tells how many were: a log often counts in
  whole seconds, and holds the row itself. An event after it is an error: it
  would leak the future, or one of the two times is in another unit.
* An event without an id is left out, with its time and sides. A side without
  a value is missing, as in a sparse column. A time must be there.
"""

import dataclasses
import itertools
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from recjax.data.table_source import Rows, is_list, is_number, is_string
from recjax.errors import UserError
from recjax.schema import Feature, Schema


@dataclasses.dataclass(frozen=True)
class Events:
  """The events that the rows of a block see of one sequence.

  Attributes:
    ids: The sequence and its sides -> value of each event; rows one after
      another.
    lengths: Events of each row.
    time: When they were, in seconds; None if the schema does not say.
    num_simultaneous: Events left out since they are at their row's own time.
  """

  ids: dict[str, pa.Array]
  lengths: Int[np.ndarray, " rows"]
  time: Float[np.ndarray, " events"] | None
  num_simultaneous: int


def has_events(feature: Feature) -> bool:
  """True for a sequence that names times or sides."""
  return feature.time is not None or bool(feature.side)


def has_times(schema: Schema) -> bool:
  """True if examples need a time of their own, to count back from."""
  return any(feature.time is not None for feature in schema.sequences)


def columns_of(schema: Schema) -> list[str]:
  """The columns that are read for times and sides alone."""
  return [
    *(f.time for f in schema.sequences if f.time is not None),
    *(side for f in schema.sequences for side in f.side or {}),
    *([schema.roles.time] if has_times(schema) else []),
  ]


def read_events(rows: Rows, feature: Feature, schema: Schema) -> Events:
  """What the rows of a block see of `feature`.

  Raises:
    UserError: If lengths do not agree, a time is missing, out of order or
      after the row's own.
  """
  values, lengths = _lists(rows, feature, feature.name, None)
  columns = {feature.name: values} | {
    side.name: _lists(rows, feature, side.name, lengths)[0]
    for side in schema.sides(feature)
  }
  owner = np.repeat(np.arange(len(rows)), lengths)
  keep, time = _is_id(values), None
  num_simultaneous = 0
  if feature.time is not None:
    time = _event_times(rows, feature, lengths, owner)
    own = row_times(rows, schema)[owner]
    _check_not_after(rows, feature, schema, time, own, owner)
    num_simultaneous = int(np.sum(keep & (time == own)))
    keep &= time < own
  keep &= _last(keep, owner, len(rows), feature.max_len)
  chosen = pa.array(keep)
  return Events(
    ids={name: _missing(v).filter(chosen) for name, v in columns.items()},
    lengths=np.bincount(owner[keep], minlength=len(rows)),
    time=None if time is None else time[keep],
    num_simultaneous=num_simultaneous,
  )


def row_times(rows: Rows, schema: Schema) -> Float[np.ndarray, " rows"]:
  """Each row's own time in seconds."""
  return _seconds(rows, schema.roles.time, rows.column(schema.roles.time), None)


def check_types(
  feature: Feature, schema: Schema, found: pa.Schema, path: pathlib.Path
) -> None:
  """Checks the columns of times; those of sides are ids like others."""
  if feature.time is None:
    return
  for column in (feature.time, schema.roles.time):
    where = f"{path}: column {column!r}"
    kind = found.field(column).type
    if column == feature.time:
      if is_string(kind) and feature.separator is None:
        raise UserError(
          f"{where}: holds strings; the schema must give {feature.name!r} a "
          '"separator"'
        )
      if not is_string(kind) and not is_list(kind):
        raise UserError(
          f"{where}: has type {kind}; the times of events need a list column "
          "or strings with a separator"
        )
      kind = kind.value_type if is_list(kind) else kind
    if pa.types.is_boolean(kind) or not (
      is_string(kind) or is_number(kind) or _is_date(kind)
    ):
      raise UserError(
        f"{where}: has type {kind}; times must be numbers (seconds), dates or "
        "timestamps"
      )


def raw_times(times: pa.Array) -> list:
  """A column of times, or of lists of them, as JSON can hold it."""
  kind = times.type
  if _is_date(kind):
    return _date_seconds(times).tolist()
  if is_list(kind) and _is_date(kind.value_type):
    seconds = iter(_date_seconds(times.flatten()).tolist())
    lengths = pc.list_value_length(times).to_pylist()
    return [
      None if n is None else list(itertools.islice(seconds, n)) for n in lengths
    ]
  return times.to_pylist()


def _lists(rows: Rows, feature: Feature, column: str, wanted):
  """All values of a list column, missing ones too, and each row's count.

  `wanted` are the counts that they must have.
  """
  array = rows.column(column)
  empty = np.zeros(len(rows), bool)
  if is_string(array.type):
    # An empty text has no value, unless it stands for one that is missing.
    array = array.fill_null("")
    empty = pc.equal(array, "").to_numpy(zero_copy_only=False)
    if wanted is not None:
      empty &= wanted == 0
    array = pc.split_pattern(array, feature.separator)
  lengths = pc.list_value_length(array).fill_null(0).to_numpy()
  lengths = lengths.astype(np.int64)
  values = array.flatten()
  if empty.any():
    values = values.filter(pa.array(np.repeat(~empty, lengths)))
    lengths = np.where(empty, 0, lengths)
  if wanted is not None:
    rows.require(
      column,
      lengths == wanted,
      lambda row: (
        f"{lengths[row]} values, but {feature.name!r} has {wanted[row]}; "
        "the two lists must have one value for each event"
      ),
    )
  return values, lengths


def _event_times(rows: Rows, feature: Feature, lengths, owner):
  """When each event was; oldest first in each row."""
  values, _ = _lists(rows, feature, feature.time, lengths)
  time = _seconds(rows, feature.time, values, owner)
  falls = (owner[1:] == owner[:-1]) & (time[1:] < time[:-1])
  if falls.any():
    at = int(np.argmax(falls))
    raise rows.error(
      feature.time,
      int(owner[at]),
      f"{time[at + 1]:.15g} s comes after {time[at]:.15g} s; events must "
      "stand oldest first, in all lists of the sequence",
    )
  return time


def _check_not_after(rows: Rows, feature: Feature, schema, time, own, owner):
  late = time > own
  if late.any():
    at = int(np.argmax(late))
    raise rows.error(
      feature.time,
      int(owner[at]),
      f"an event at {time[at]:.15g} s, after the row's own "
      f"{schema.roles.time!r}, {own[at]:.15g} s; a row must not see what comes "
      "later: take such events out, or bring both times to one unit",
    )


def _is_id(values: pa.Array) -> np.ndarray:
  return pc.is_valid(_missing(values)).to_numpy(zero_copy_only=False)


def _missing(values: pa.Array) -> pa.Array:
  """Values whose empty texts and NaN are null."""
  if is_string(values.type):
    none = pc.equal(values, "")
  elif pa.types.is_floating(values.type):
    none = pc.is_nan(values)
  else:
    return values
  return pc.if_else(none, pa.scalar(None, values.type), values)


def _last(keep, owner, num_rows: int, max_len: int) -> np.ndarray:
  """True for the last `max_len` kept events of each row."""
  kept = np.bincount(owner[keep], minlength=num_rows)
  before = np.cumsum(kept) - kept
  place = np.cumsum(keep) - 1 - before[owner]
  return place >= kept[owner] - max_len


def _seconds(rows: Rows, column: str, values: pa.Array, owner):
  """Times as float64 seconds; `owner` is the row of each, None for its own."""
  if values.null_count:
    at = int(np.argmax(pc.is_null(values).to_numpy(zero_copy_only=False)))
    raise rows.error(
      column,
      at if owner is None else int(owner[at]),
      "a time is missing; fill it or take the event out",
    )
  if is_string(values.type):
    values = _parse(rows, column, values, owner)
  if _is_date(values.type):
    return _date_seconds(values)
  numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
  finite = np.isfinite(numbers)
  if not finite.all():
    at = int(np.argmin(finite))
    raise rows.error(
      column,
      at if owner is None else int(owner[at]),
      f"time {numbers[at]} is not finite",
    )
  return numbers


def _parse(rows: Rows, column: str, texts: pa.Array, owner) -> pa.Array:
  """Texts as numbers, or as ISO 8601 with a zone or without, like the first."""
  texts = pc.utf8_trim_whitespace(texts)
  for kind in (pa.float64(), pa.timestamp("us", "UTC")):
    try:
      texts[:1].cast(kind)
    except pa.ArrowInvalid:
      continue
    return rows.cast(column, texts, kind, owner)
  return rows.cast(column, texts, pa.timestamp("us"), owner)


def _date_seconds(values: pa.Array) -> np.ndarray:
  zone = getattr(values.type, "tz", None)
  micros = values.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64())
  return micros.to_numpy() / 1e6


def _is_date(kind: pa.DataType) -> bool:
  return pa.types.is_timestamp(kind) or pa.types.is_date(kind)
