"""The id columns of a table: which types they may have, and their values."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.data import table_events
from recjax.data.table_source import Rows, Source, is_list, is_number, is_string
from recjax.data.vocabulary import VALUE_TYPES, hash_values
from recjax.errors import UserError
from recjax.schema import Feature, Schema


def value_types_of(schema: Schema, source: Source) -> dict[str, pa.DataType]:
  """Vocabulary -> integer if all its columns are, else string."""
  types = {f.vocab: VALUE_TYPES[0] for f in schema.id_features}
  for path in source.files:
    file_schema = source.schema(path)
    for feature in schema.sequences:
      table_events.check_types(feature, schema, file_schema, path)
    others = [f for f in schema.features if not f.is_id]
    for feature in (*schema.id_features, *others):
      found = _element_type(feature, file_schema.field(feature.name).type, path)
      if feature.is_id and found != VALUE_TYPES[0]:
        types[feature.vocab] = found
    for label in schema.labels:
      _check_number(label.name, file_schema.field(label.name).type, path)
  return types


def read_ids(rows: Rows, feature: Feature, schema: Schema, value_types):
  """What a block holds of an id feature.

  Returns:
    The values of the feature and its sides by name, each row's count if there
    are lists, and the `Events` if the schema says more of them.
  """
  if not table_events.has_events(feature):
    values, lengths = _values(rows, feature, value_types[feature.vocab])
    return {feature.name: values}, lengths, None
  events = table_events.read_events(rows, feature, schema)
  values = {
    name: _cast_ids(rows, name, array, value_types[schema.feature(name).vocab])
    for name, array in events.ids.items()
  }
  return values, events.lengths, events


def group_keys(rows: Rows, column: str) -> pa.Array:
  """A 64-bit integer for each distinct value of any scalar column."""
  array = rows.column(column)
  if pa.types.is_temporal(array.type):
    array = array.cast(f"int{array.type.bit_width}")
  if not is_string(array.type):
    return rows.cast(column, without_nan(array), pa.int64())
  encoded = array.dictionary_encode()
  keys = hash_values(encoded.dictionary).view(np.int64)
  return pa.array(keys).take(encoded.indices)


def without_nan(array: pa.Array) -> pa.Array:
  """Pandas writes an integer column with nulls as floats with NaN."""
  if not pa.types.is_floating(array.type):
    return array
  return pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)


def _values(rows: Rows, feature: Feature, value_type: pa.DataType):
  """A feature's values in a block, and each row's count if it has lists.

  Of a longer list the last `max_len` values of a sequence are kept, the first
  of a set.
  """
  if not feature.is_list:
    return _as_values(rows, feature.name, value_type), None
  values, lengths = rows.lists(feature.name, feature.separator)
  kept = lengths
  if feature.max_len is not None and (lengths > feature.max_len).any():
    kept = np.minimum(lengths, feature.max_len)
    place = np.arange(len(values)) - np.repeat(
      np.cumsum(lengths) - lengths, lengths
    )
    skipped = lengths - kept if feature.kind == "sequence" else 0 * lengths
    first = np.repeat(skipped, lengths)
    keep = (place >= first) & (place < first + np.repeat(kept, lengths))
    values = values.filter(pa.array(keep))
  return _cast_ids(rows, feature.name, values, value_type), kept


def _cast_ids(rows: Rows, name: str, values: pa.Array, value_type: pa.DataType):
  try:
    if not is_string(values.type):
      values = values.cast(pa.int64())
    return values.cast(value_type)
  except pa.ArrowInvalid as error:
    raise UserError(
      f"{rows.path}: column {name!r}, rows {rows.first + 1} to "
      f"{rows.first + len(rows)}: an id must be a 64-bit integer or a string "
      f"({error})"
    ) from error


def _as_values(rows: Rows, name: str, value_type: pa.DataType) -> pa.Array:
  array = rows.column(name)
  if not is_string(array.type):
    array = rows.cast(name, without_nan(array), VALUE_TYPES[0])
  return array.cast(value_type)


def _element_type(feature: Feature, found: pa.DataType, path) -> pa.DataType:
  """Checks a column's type; returns that of its ids."""
  where = f"{path}: column {feature.name!r}"
  if pa.types.is_dictionary(found):
    found = found.value_type
  if feature.kind == "dense":
    _check_number(feature.name, found, path)
    return found
  if feature.kind == "text":
    if not is_string(found) and not pa.types.is_null(found):
      raise UserError(f"{where}: has type {found}; text must be strings")
    return found
  if feature.is_list or feature.kind == "vector":
    if is_list(found):
      found = found.value_type
    elif not is_string(found):
      raise UserError(
        f"{where}: has type {found}; a {feature.kind} feature with several "
        "values needs a list column or strings with a separator"
      )
    elif feature.separator is None:
      raise UserError(
        f'{where}: holds strings; the schema must give its "separator"'
      )
  elif is_list(found):
    raise UserError(
      f'{where}: has type {found}; give the feature "multi": true or make it '
      "a sequence"
    )
  if feature.kind == "vector":
    if not is_string(found):
      _check_number(feature.name, found, path)
    return found
  if is_string(found):
    return VALUE_TYPES[1]
  if is_number(found):
    return VALUE_TYPES[0]
  raise UserError(f"{where}: has type {found}; ids must be integers or strings")


def _check_number(name: str, found: pa.DataType, path):
  if path.suffix == ".parquet" and not is_number(found):
    raise UserError(f"{path}: column {name!r}: has type {found}, not numbers")
