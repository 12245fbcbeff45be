"""Anyone's table: a Parquet or CSV file and a schema file that describes it.

```sh
python -m experiments.run --config=experiments/configs/msn.py:base \\
    --workdir=DIR --config.data.name=table \\
    --config.data.path=log.parquet --config.data.schema=log.json
```

The schema file's form is in `recjax.schema`. How values are read:

* `sparse`: integers or strings. A feature's vocabulary holds the values of the
  training part (and of the features that share it); other values get row 0.
  A null is a value like any other. With `buckets`, values are hashed into rows
  1 to `buckets` and null gets row 0.
* `multi` and `sequence`: a list column, or strings with a `separator`. Null is
  an empty list; null and empty values in a list are left out. For the times
  and sides of events see `recjax.data.table_events`.
* `text`: strings; null has no tokens. See `recjax.data.text`.
* `dense` and `vector`: finite numbers; null is an error.
* labels: null and NaN are missing, and masked; binary ones are 0 or 1.
* In CSV files an empty field is null, and ids are strings.

The table is streamed twice (once more if split by time, and once more if it
has text), so memory does not grow with its rows, only with the number of
distinct values, texts and groups.
"""

import collections
import dataclasses
import pathlib
import tempfile

import numpy as np
import pyarrow as pa
from absl import logging

from recjax.data import table_events
from recjax.data import text as text_lib
from recjax.data.columns import Block, ColumnWriter
from recjax.data.table_columns import (
  group_keys,
  read_ids,
  value_types_of,
  without_nan,
)
from recjax.data.table_source import Rows, Source
from recjax.data.table_split import make_splitter
from recjax.data.table_trial import TrialReader
from recjax.data.vocabulary import (
  Buckets,
  Vocabulary,
  VocabularyBuilder,
  save_values,
)
from recjax.errors import UserError
from recjax.schema import SPLITS, TOKENS, Schema

VERSION = 3


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of a table.

  Attributes:
    path: A `.parquet` or `.csv` file, or a folder of such parts.
    schema: The schema file.
    text_vocab_size: Most subwords of the text columns together.
  """

  path: str
  schema: str
  text_vocab_size: int = 30_000


def sources(config: Config) -> list[pathlib.Path]:
  """The files that the prepared data depends on."""
  schema = pathlib.Path(config.schema).expanduser()
  return [*Source(config.path).files, schema]


def estimate_bytes(config: Config) -> int:
  """About how much disk the prepared data needs."""
  schema = Schema.from_file(config.schema)
  source = Source(config.path)
  return source.estimate_bytes(_used_columns(schema))


def prepare(config: Config, directory: pathlib.Path) -> None:
  """Writes the table to `directory` as a column store.

  The vocabularies lie beside it; see `vocabulary.save_values`.

  Raises:
    UserError: At the first mistake in the table or the schema.
  """
  schema = Schema.from_file(config.schema)
  source = Source(config.path)
  _check_supported(schema, config.schema)
  source.check_columns(_used_columns(schema))
  value_types = value_types_of(schema, source)
  splitter = make_splitter(schema.split, source, directory)
  tables, groups = _collect(schema, source, splitter, value_types)
  trial = schema.trial and TrialReader(schema, source, splitter)
  writer = ColumnWriter(directory, schema)
  sizes = {name: table.size for name, table in tables.items()}
  texts = None
  if schema.text_features:
    tokenizer = text_lib.train_tokenizer(
      _training_texts(schema, source, splitter), config.text_vocab_size
    )
    text_lib.save_tokenizer(directory, tokenizer)
    texts = text_lib.TokenStore(tokenizer, writer)
    sizes[TOKENS] = tokenizer.get_vocab_size()
  encoder = _Encoder(schema, value_types, tables, groups, trial, texts)
  counts = _Counts(schema)
  for rows in source.read(_used_columns(schema)):
    parts = splitter(rows)
    block = encoder.encode(rows, writer)
    counts.add(block, parts)
    for part, split in enumerate(SPLITS):
      chosen = np.flatnonzero(parts == part)
      if len(chosen):
        writer.append(split, block.take(chosen))
  counts.check(config.path)
  for name, count in encoder.simultaneous.items():
    if count:
      logging.warning(
        "%s: %d events of %r are at their row's own time and were left out.",
        config.path,
        count,
        name,
      )
  writer.finish(
    dataclasses.replace(
      schema, vocab_sizes=sizes, trial=trial and trial.prepared
    )
  )
  for name, table in tables.items():
    values = pa.array([], value_types[name])
    if isinstance(table, Vocabulary):
      values = table.values
    save_values(directory, name, values)


def read_raw(config: Config, split: str, num_rows: int) -> dict[str, list]:
  """The first rows of a part, as the table holds them.

  Args:
    config: Options of the table.
    split: `train`, `valid` or `test`.
    num_rows: How many; fewer where the part has fewer.

  Returns:
    Feature, side or time -> its values as JSON knows them, in the order of
    the prepared rows; dates are seconds.
  """
  schema, source = Schema.from_file(config.schema), Source(config.path)
  times = {f.time for f in schema.sequences} | {schema.roles.time}
  columns = {feature.name: [] for feature in schema.features}
  columns |= {name: [] for name in table_events.columns_of(schema)}
  with tempfile.TemporaryDirectory() as scratch:
    splitter = make_splitter(schema.split, source, pathlib.Path(scratch))
    for rows in source.read(_used_columns(schema)):
      chosen = np.flatnonzero(splitter(rows) == SPLITS.index(split))
      for name, values in columns.items():
        found = without_nan(rows.column(name))
        if pa.types.is_decimal(found.type):
          found = found.cast(pa.float64())
        found = found.take(pa.array(chosen[: num_rows - len(values)]))
        values.extend(
          table_events.raw_times(found) if name in times else found.to_pylist()
        )
      if all(len(values) == num_rows for values in columns.values()):
        break
  return columns


class _Encoder:
  """Turns rows of the table into blocks of the store, checking each value."""

  def __init__(self, schema, value_types, tables, groups, trial, texts):
    self._schema = schema
    self._value_types = value_types
    self._tables = tables
    self._groups = groups
    self._trial = trial
    self._texts = texts
    self.simultaneous = collections.Counter()

  def encode(self, rows: Rows, writer: ColumnWriter) -> Block:
    schema, ids, lists = self._schema, {}, {}
    for feature in (f for f in schema.features if f.is_id):
      values, lengths, events = read_ids(
        rows, feature, schema, self._value_types
      )
      found = {
        name: self._tables[schema.feature(name).vocab].lookup(array)
        for name, array in values.items()
      }
      own = found.pop(feature.name)
      if lengths is None:
        ids[feature.name] = own
        continue
      time = None if events is None else events.time
      first = writer.append_values(feature.name, own, time=time, sides=found)
      lists[feature.name] = (first + np.cumsum(lengths) - lengths, lengths)
      if events is not None:
        self.simultaneous[feature.name] += events.num_simultaneous
    for feature in schema.text_features:
      lists[feature.name] = self._texts.add(
        feature.name, feature.max_len, _texts(rows, feature.name)
      )
    dense = [self._dense(rows, f.name) for f in schema.dense_features]
    return Block(
      dense=(
        np.stack(dense, axis=1)
        if dense
        else np.zeros((len(rows), 0), np.float32)
      ),
      ids=ids,
      lists=lists,
      vectors={f.name: self._vector(rows, f) for f in schema.vector_features},
      labels={v.name: self._label(rows, v) for v in schema.labels},
      groups={
        name: vocabulary.lookup(group_keys(rows, column))
        for name, (column, vocabulary) in self._groups.items()
      },
      time=(
        table_events.row_times(rows, schema)
        if table_events.has_times(schema)
        else None
      ),
      trial=self._trial and self._trial.read(rows),
    )

  def _dense(self, rows, name):
    with np.errstate(over="ignore"):
      numbers = rows.floats(name).astype(np.float32)
    rows.require(
      name,
      np.isfinite(numbers),
      lambda row: (
        f"{rows.column(name)[row].as_py()} in a dense column; every value "
        "must be a finite float32: fill it or drop the row"
      ),
    )
    return numbers

  def _label(self, rows, label):
    numbers = rows.floats(label.name)
    if label.kind == "binary":
      good = np.isnan(numbers) | (numbers == 0) | (numbers == 1)
      allowed = "a binary label is 0, 1 or missing"
    else:
      good = ~np.isinf(numbers)
      allowed = "a real label is finite or missing"
    rows.require(
      label.name, good, lambda row: f"{numbers[row]:g} in a label; {allowed}"
    )
    return numbers.astype(np.float32)

  def _vector(self, rows, feature):
    name = feature.name
    values, lengths = rows.lists(name, feature.separator)
    rows.require(
      name,
      lengths == feature.dim,
      lambda row: f'{lengths[row]} numbers, but "dim" is {feature.dim}',
    )
    try:
      numbers = values.cast(pa.float32()).to_numpy()
    except pa.ArrowInvalid as error:
      raise UserError(
        f"{rows.path}: column {name!r}, rows {rows.first + 1} to "
        f"{rows.first + len(rows)}: a vector must hold numbers ({error})"
      ) from error
    numbers = numbers.reshape(len(rows), feature.dim)
    rows.require(
      name,
      np.isfinite(numbers).all(axis=1),
      lambda row: "the vector must hold finite numbers",
    )
    return numbers


class _Counts:
  """Rows of each part, and classes of the training part's binary labels."""

  def __init__(self, schema: Schema):
    self._rows = np.zeros(len(SPLITS), np.int64)
    self._classes = {
      v.name: np.zeros(2, np.int64) for v in schema.labels if v.kind == "binary"
    }

  def add(self, block: Block, parts):
    self._rows += np.bincount(parts, minlength=len(SPLITS))
    for name, counts in self._classes.items():
      labels = block.labels[name][parts == SPLITS.index("train")]
      counts += [np.sum(labels == 0), np.sum(labels == 1)]

  def check(self, path: str):
    if not self._rows.sum():
      raise UserError(f"{path}: the table has no rows")
    for split, count in zip(SPLITS, self._rows, strict=True):
      if count == 0:
        raise UserError(
          f"{path}: the split leaves no {split} rows (of "
          f"{self._rows.sum()}); change the schema's split"
        )
    for name, (negatives, positives) in self._classes.items():
      if negatives == 0 or positives == 0:
        missing = "positive (1)" if positives == 0 else "negative (0)"
        raise UserError(
          f"{path}: column {name!r}: no {missing} label in the training "
          f"part ({self._rows[0]} rows); a model cannot learn from it"
        )


def _check_supported(schema: Schema, where: str):
  if schema.roles.popularity is not None:
    raise UserError(
      f"{where}: roles: popularity is for data whose adapter counts what an "
      "item has had so far; rows of a table's vocabulary have no order. Set it "
      "to null"
    )
  for feature in schema.features:
    place = f"{where}: feature {feature.name!r}"
    if feature.kind == "image":
      raise UserError(
        f"{place}: kind 'image' is not supported yet; encode it to a vector "
        "column"
      )
    if feature.buckets is not None and feature.vocabulary is not None:
      raise UserError(
        f"{place}: takes the vocabulary of {feature.vocabulary!r}; give "
        '"buckets" there'
      )


def _used_columns(schema: Schema) -> list[str]:
  roles = dataclasses.asdict(schema.roles).values()
  return [
    *(f.name for f in schema.features),
    *(label.name for label in schema.labels),
    *(name for name in roles if name is not None),
    *table_events.columns_of(schema),
    *(schema.trial.columns if schema.trial else ()),
    *([schema.split.column] if schema.split.by != "random" else []),
  ]


def _collect(schema: Schema, source: Source, splitter, value_types):
  """Vocabularies of the training part, and numberings of all groups."""
  builders = {
    name: VocabularyBuilder(value_type)
    for name, value_type in value_types.items()
    if schema.feature(name).buckets is None
  }
  columns = {
    "group": schema.roles.group or schema.roles.user,
    "query": schema.roles.query,
  }
  columns = {name: column for name, column in columns.items() if column}
  groups = {name: VocabularyBuilder(pa.int64()) for name in columns}
  features = [
    f
    for f in schema.features
    if f.is_id and any(g.vocab in builders for g in (f, *schema.sides(f)))
  ]
  needed = [
    *(f.name for f in features),
    *table_events.columns_of(schema),
    *columns.values(),
    *([schema.split.column] if schema.split.by != "random" else []),
  ]
  if not needed:
    needed = _used_columns(schema)[:1]  # Counts rows for the random split.
  for rows in source.read(needed):
    in_train = splitter(rows) == SPLITS.index("train")
    for feature in features:
      values, lengths, _ = read_ids(rows, feature, schema, value_types)
      chosen = in_train if lengths is None else np.repeat(in_train, lengths)
      for name, array in values.items():
        if schema.feature(name).vocab in builders:
          builders[schema.feature(name).vocab].add(
            array.filter(pa.array(chosen))
          )
    for name, column in columns.items():
      groups[name].add(group_keys(rows, column))
  tables = {
    name: (
      builders[name].finish()
      if name in builders
      else Buckets(schema.feature(name).buckets)
    )
    for name in value_types
  }
  return tables, {
    name: (columns[name], builder.finish()) for name, builder in groups.items()
  }


def _training_texts(schema: Schema, source: Source, splitter) -> list[str]:
  """The distinct texts of the training part, in their own order."""
  names = [feature.name for feature in schema.text_features]
  builder = VocabularyBuilder(pa.large_string())
  by = [schema.split.column] if schema.split.by != "random" else []
  for rows in source.read([*names, *by]):
    chosen = pa.array(splitter(rows) == SPLITS.index("train"))
    for name in names:
      builder.add(_texts(rows, name).filter(chosen))
  return builder.finish().values.drop_null().to_pylist()


def _texts(rows: Rows, name: str) -> pa.Array:
  return rows.column(name).cast(pa.large_string())
