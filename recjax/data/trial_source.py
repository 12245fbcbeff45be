"""What the adapters of public trials share: rows to a prepared data set.

An adapter reads its source into named columns and says by a schema what they
are; the rest, splits, checks and the trial itself, is `recjax.data.table`'s.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from recjax.data import table
from recjax.errors import UserError

BUNDLED = pathlib.Path(__file__).parent / "bundled"


def prepare(
  batches: Iterable[pa.RecordBatch | pa.Table],
  schema: Mapping[str, Any],
  directory: pathlib.Path,
) -> None:
  """Prepares rows as `recjax.data.table` does its own.

  Args:
    batches: The rows, all of the same columns.
    schema: What a schema file would hold.
    directory: Where the data set goes; also holds a copy of the rows meanwhile.
  """
  rows, description = directory / "rows.parquet", directory / "rows.json"
  description.write_text(json.dumps(schema))
  writer = None
  for batch in batches:
    if writer is None:
      writer = pq.ParquetWriter(rows, batch.schema)
    if isinstance(batch, pa.Table):
      writer.write_table(batch)
    else:
      writer.write_batch(batch)
  if writer is None:
    raise UserError("the source has no rows")
  writer.close()
  table.prepare(table.Config(str(rows), str(description)), directory)
  rows.unlink()
  description.unlink()


def read_file(path: pathlib.Path, columns: Iterable[str]) -> pa.Table:
  """A small Parquet or CSV file, `.gz` too, whole, with these columns in it."""
  try:
    if path.suffix == ".parquet":
      found = pq.read_table(path)
    else:
      found = pa.csv.read_csv(path)
  except (pa.ArrowInvalid, OSError) as error:
    raise UserError(f"{path}: cannot be read ({error}); check the file") from (
      error
    )
  check_columns(path, found.column_names, columns)
  return found


def stream_csv(
  path: pathlib.Path, needed: Iterable[str]
) -> Iterator[pa.RecordBatch]:
  """The rows of a CSV file, `.gz` too, block by block.

  A column's type is that of its first block; an empty field is null.
  """
  try:
    with pa.csv.open_csv(
      path,
      read_options=pa.csv.ReadOptions(block_size=1 << 24),
      convert_options=pa.csv.ConvertOptions(
        strings_can_be_null=True, null_values=["", "NA", "NaN", "nan"]
      ),
    ) as reader:
      check_columns(path, reader.schema.names, needed)
      yield from reader
  except (pa.ArrowInvalid, OSError) as error:
    raise UserError(f"{path}: cannot be read ({error}); check the file") from (
      error
    )


def check_columns(path, found: Iterable[str], needed: Iterable[str]) -> None:
  """Raises unless all columns are there."""
  missing = [name for name in needed if name not in set(found)]
  if missing:
    raise UserError(
      f"{path}: lacks the columns {', '.join(missing)}; it has "
      f"{', '.join(found)}"
    )


def random_split(seed: int, fold: int = 0) -> dict[str, Any]:
  """Three fifths for training, a fifth each for validation and test.

  Folds 0 to 4 test every row once.
  """
  split = {"by": "random", "valid": 0.2, "test": 0.2, "seed": seed}
  return split | {"fold": fold}
