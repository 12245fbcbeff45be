"""Lenta: a trial of text messages to 687,029 customers of a supermarket.

Reads the CSV file (`.gz` too): `group` (`test` or `control`), `response_att`
(whether the customer came back) and 193 features, which are all other columns:
strings are sparse, numbers dense. A missing number becomes the mean of its
column beside a flag (our choice); a column without any number is left out. A
message costs `contact_cost`, an assumption of ours. The file is streamed twice.

This adapter was written from what scikit-uplift documents of the file, without
the real one at hand; the tests run it on a file of that form.

Source: Lenta, BigTarget hackathon, 2020.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa

from recjax.data import trial_source
from recjax.data.table_source import is_number
from recjax.errors import UserError

VERSION = 1

_DRAWN, _SEEN = "group", "response_att"


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the adapter.

  Attributes:
    path: The CSV file.
    contact_cost: Of one message, in any unit.
    split_seed: Of the random split.
  """

  path: str
  contact_cost: float = 1.0
  split_seed: int = 0

  def __post_init__(self):
    if not 0 < self.contact_cost < float("inf"):
      raise UserError(
        f"data.contact_cost must be above 0 and finite, got {self.contact_cost}"
      )


def sources(config: Config) -> list[pathlib.Path]:
  """The file that it reads."""
  return [pathlib.Path(config.path).expanduser()]


def prepare(config: Config, directory: pathlib.Path) -> None:
  """Writes the data set, streamed; a mistake in the file is a `UserError`."""
  (path,) = sources(config)
  sums, counts, rows = {}, {}, 0
  for batch in trial_source.stream_csv(path, (_DRAWN, _SEEN)):
    rows += batch.num_rows
    for name, values in _numbers(batch):
      sums[name] = sums.get(name, 0.0) + np.nansum(values)
      counts[name] = counts.get(name, 0) + int((~np.isnan(values)).sum())
  means = {name: sums[name] / counts[name] for name in sums if counts[name]}
  flagged = [name for name in means if counts[name] < rows]
  sparse = [
    name
    for name in batch.schema.names
    if name not in sums and name not in (_DRAWN, _SEEN)
  ]
  trial_source.prepare(
    (
      _filled(batch, means, flagged, sparse)
      for batch in trial_source.stream_csv(path, (_DRAWN, _SEEN))
    ),
    _schema(config, means, flagged, sparse),
    directory,
  )


def _numbers(batch: pa.RecordBatch):
  """Name and values of each number column; missing is NaN."""
  for name, column in zip(batch.schema.names, batch.columns, strict=True):
    if name not in (_DRAWN, _SEEN) and is_number(column.type):
      column = column.cast(pa.float64())
      yield name, column.to_numpy(zero_copy_only=False)


def _filled(batch: pa.RecordBatch, means, flagged, sparse) -> pa.RecordBatch:
  columns = {name: batch[name].cast(pa.string()) for name in (_DRAWN, *sparse)}
  columns[_SEEN] = batch[_SEEN].cast(pa.float64())
  for name, values in _numbers(batch):
    if name in means:
      missing = np.isnan(values)
      columns[name] = np.where(missing, means[name], values)
      if name in flagged:
        columns[f"{name}_missing"] = missing.astype(np.float64)
  return pa.RecordBatch.from_pydict(columns)


def _schema(config: Config, means, flagged, sparse) -> dict[str, object]:
  dense = [*means, *(f"{name}_missing" for name in flagged)]
  kinds = dict.fromkeys(dense, "dense") | dict.fromkeys(sparse, "sparse")
  return {
    "features": {name: {"kind": kind} for name, kind in kinds.items()},
    "trial": {
      "treatment": _DRAWN,
      "control": "control",
      "response": _SEEN,
      "arm_cost": {"control": 0.0, "test": config.contact_cost},
    },
    "split": trial_source.random_split(config.split_seed),
  }
