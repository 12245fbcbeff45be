"""Streams the columns of a Parquet or CSV table, block by block.

Nothing holds more than a block. Rows are counted from 1 in each file, without
a CSV file's header, in every error.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from recjax.errors import UserError
from recjax.schema import suggest

_SUFFIXES = (".parquet", ".csv")
_BLOCK_ROWS = 8192
_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass
class Rows:
  """Consecutive rows of one file.

  Attributes:
    path: The file.
    first: Number of rows before these in the file.
    first_in_table: Number of rows before these in all files.
    data: The columns asked for.
  """

  path: pathlib.Path
  first: int
  first_in_table: int
  data: pa.RecordBatch

  def __len__(self) -> int:
    return self.data.num_rows

  def column(self, name: str) -> pa.Array:
    """One column, dictionaries decoded."""
    array = self.data.column(name)
    if pa.types.is_dictionary(array.type):
      array = array.dictionary_decode()
    return array

  def error(self, column: str, row: int, message: str) -> UserError:
    """The error that names file, column and (0-based) row."""
    return UserError(
      f"{self.path}: column {column!r}, row {self.first + row + 1}: {message}"
    )

  def require(
    self,
    column: str,
    good: Bool[np.ndarray, " rows"],
    message: Callable[[int], str],
  ) -> None:
    """Raises the error of the first row that is not good."""
    if not good.all():
      row = int(np.argmin(good))
      raise self.error(column, row, message(row))

  def cast(
    self,
    column: str,
    array: pa.Array,
    to: pa.DataType,
    owner: Int[np.ndarray, " values"] | None = None,
  ) -> pa.Array:
    """`array` as another type; a misfit names its row.

    It holds one value a row, or those of the rows that `owner` names.
    """
    if is_string(array.type) and not is_string(to):
      array = pc.utf8_trim_whitespace(array)
    try:
      return array.cast(to)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
      at = _first_misfit(array, to)
      raise self.error(
        column,
        at if owner is None else int(owner[at]),
        f"{array[at].as_py()!r} is not {_describe(to)}",
      ) from None

  def floats(self, column: str) -> Float[np.ndarray, " rows"]:
    """A column of numbers as float64; null is NaN."""
    array = self.cast(column, self.column(column), pa.float64())
    return array.to_numpy(zero_copy_only=False)

  def lists(
    self, column: str, separator: str | None
  ) -> tuple[pa.Array, Int[np.ndarray, " rows"]]:
    """The values of a list or separated string column, and their counts.

    A null list is empty; null and empty values are left out.
    """
    array = self.column(column)
    if is_string(array.type):
      array = pc.split_pattern(array, separator)
    lengths = pc.list_value_length(array).fill_null(0).to_numpy()
    lengths = lengths.astype(np.int64)
    values = array.flatten()
    keep = pc.is_valid(values)
    if is_string(values.type):
      keep = pc.and_kleene(keep, pc.not_equal(values, "")).fill_null(False)
    keep = keep.to_numpy(zero_copy_only=False)
    if not keep.all():
      owner = np.repeat(np.arange(len(array)), lengths)
      lengths = np.bincount(owner[keep], minlength=len(array))
      values = values.filter(pa.array(keep))
    return values, lengths


class Source:
  """One file or a folder of parts, all Parquet or all CSV.

  Args:
    path: The file or folder; parts are read in the order of their names.

  Raises:
    UserError: If nothing usable is there.
  """

  def __init__(self, path: str):
    self.files = _find_files(pathlib.Path(path).expanduser())
    self.is_csv = self.files[0].suffix == ".csv"

  def schema(self, path: pathlib.Path) -> pa.Schema:
    """Names and types of a file's columns; CSV columns are all strings."""
    with _explained(path):
      if self.is_csv:
        with self._open_csv(path, None) as reader:
          names = reader.schema.names
        return pa.schema([(name, pa.string()) for name in names])
      with pq.ParquetFile(path) as file:
        return file.schema_arrow

  def check_columns(self, columns: Sequence[str]) -> None:
    """Raises a `UserError` where a part lacks a column or holds it twice."""
    for path in self.files:
      names = self.schema(path).names
      for column in columns:
        if column not in names:
          raise UserError(
            f"{path}: no column {column!r}" + suggest(column, names)
          )
        if names.count(column) > 1:
          raise UserError(
            f"{path}: column {column!r} is there {names.count(column)} times;"
            " rename the others"
          )

  def read(self, columns: Sequence[str]) -> Iterator[Rows]:
    """Blocks of the given columns, in the order of files and rows."""
    columns = sorted(set(columns))
    first_in_table = 0
    for path in self.files:
      first = 0
      with _explained(path):
        for data in self._read_file(path, columns):
          if data.num_rows:
            yield Rows(path, first, first_in_table, data)
          first += data.num_rows
          first_in_table += data.num_rows

  def estimate_bytes(self, columns: Sequence[str]) -> int:
    """About how much disk the prepared columns need."""
    if self.is_csv:
      return 3 * sum(path.stat().st_size for path in self.files)
    total = 0
    for path in self.files:
      with _explained(path), pq.ParquetFile(path) as file:
        for group in map(
          file.metadata.row_group, range(file.metadata.num_row_groups)
        ):
          for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.split(".list.")[0] in columns:
              total += 4 * chunk.num_values + chunk.total_uncompressed_size
    return total

  def _read_file(self, path, columns) -> Iterator[pa.RecordBatch]:
    if self.is_csv:
      with self._open_csv(path, columns) as reader:
        yield from reader
      return
    # A buffered stream: without it a row group's columns are loaded whole.
    with pq.ParquetFile(path, buffer_size=1 << 18, pre_buffer=False) as file:
      yield from file.iter_batches(
        _BLOCK_ROWS, columns=columns, use_threads=False
      )

  def _open_csv(self, path, columns):
    convert = pa.csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
    if columns is not None:
      convert.include_columns = columns
      convert.column_types = {name: pa.string() for name in columns}
    return pa.csv.open_csv(
      path,
      read_options=pa.csv.ReadOptions(
        block_size=_BLOCK_BYTES, use_threads=False
      ),
      parse_options=pa.csv.ParseOptions(newlines_in_values=True),
      convert_options=convert,
    )


def is_list(data_type: pa.DataType) -> bool:
  """True for list types of any kind."""
  return (
    pa.types.is_list(data_type)
    or pa.types.is_large_list(data_type)
    or pa.types.is_fixed_size_list(data_type)
  )


def is_string(data_type: pa.DataType) -> bool:
  """True for string types of any kind."""
  return (
    pa.types.is_string(data_type)
    or pa.types.is_large_string(data_type)
    or pa.types.is_string_view(data_type)
  )


def is_number(found: pa.DataType) -> bool:
  """True for integers, floats, decimals, booleans, and nulls alone."""
  return (
    pa.types.is_integer(found)
    or pa.types.is_floating(found)
    or pa.types.is_decimal(found)
    or pa.types.is_boolean(found)
    or pa.types.is_null(found)
  )


class _explained:
  """Turns Arrow's complaints about a file into a `UserError`."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if isinstance(error, pa.ArrowInvalid | OSError | UnicodeDecodeError):
      form = "Parquet" if self._path.suffix == ".parquet" else "CSV"
      reason = " ".join(str(error).split())
      raise UserError(
        f"{self._path}: cannot be read as {form}: {reason}"
      ) from error


def _find_files(path: pathlib.Path) -> list[pathlib.Path]:
  if path.is_file():
    files = [path]
  elif path.is_dir():
    files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
    if len({p.suffix for p in files}) > 1:
      raise UserError(f"{path}: holds Parquet and CSV files; keep one kind")
  else:
    raise UserError(f"{path}: no such file or folder; give the table's path")
  if not files or files[0].suffix not in _SUFFIXES:
    raise UserError(
      f"{path}: no table here; it must be a .parquet or .csv file, or a "
      "folder of such parts"
    )
  return files


def _first_misfit(array: pa.Array, to: pa.DataType) -> int:
  begin, end = 0, len(array)
  while end - begin > 1:
    middle = (begin + end) // 2
    try:
      array.slice(begin, middle - begin).cast(to)
      begin = middle
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
      end = middle
  return begin


def _describe(data_type: pa.DataType) -> str:
  if pa.types.is_floating(data_type):
    return "a number"
  if pa.types.is_integer(data_type):
    return "a 64-bit integer"
  return "a date or time (ISO 8601) or a number"
