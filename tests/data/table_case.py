"""What the tests of tables share: a small table and how to prepare it."""

import json
import pathlib
import tempfile

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from absl.testing import parameterized

from recjax.data import pipeline

SCHEMA = {
  "features": {
    "user": {"kind": "sparse"},
    "item": {"kind": "sparse"},
    "price": {"kind": "dense"},
    "history": {"kind": "sequence", "vocabulary": "item", "max_len": 3},
    "genres": {"kind": "sparse", "multi": True, "separator": "|"},
    "shop": {"kind": "sparse", "buckets": 50},
    "content": {"kind": "vector", "dim": 2},
  },
  "labels": {"click": "binary", "secs": {"kind": "real", "unit": "s"}},
  "roles": {"user": "user", "item": "item", "time": "time", "query": "page"},
  "split": {"by": "column", "column": "part"},
}


def small_table(**columns):
  """Eight rows: five for training, one for validation, two for test."""
  data = {
    "part": ["train"] * 3 + ["test", "valid", "train", "train", "test"],
    "user": ["b", "a", "b", "a", "c", "a", None, None],
    "item": [30, 10, 20, 40, 10, 10, 30, -7],
    "price": [1.0, 2, 3, 4, 5, 6, 7, 8],
    "history": [[], [30], [30, 10, 20, 10], [40, 99], None, [50], [10], [7]],
    "genres": ["x|y", "", None, "z|x", "y|y", "|x|", "y", "new"],
    "shop": ["s1", "s2", "s1", "s3", None, "s2", "s1", "s1"],
    "content": [[i, -i] for i in range(8)],
    "click": [0, 1, None, 1, 0, 1, 0, 0],
    "secs": [1.5, float("nan"), None, 2, 3, 4, 5, 6],
    "page": [5, 5, 7, 7, 5, 5, 9, 123456789012345],
    "time": [1, 2, 3, 4, 5, 6, 7, 8],
  }
  return {**data, **columns}


class TableTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def open(self, data, schema=SCHEMA, name="log.parquet"):
    """Prepares `data` (a table, columns, or None if the file exists)."""
    path = self.directory / name
    if data is not None:
      path.parent.mkdir(exist_ok=True)
      data = data if isinstance(data, pa.Table) else pa.table(data)
      write = pq if path.suffix == ".parquet" else pa.csv
      (pq.write_table if write is pq else pa.csv.write_csv)(data, path)
    schema_path = self.directory / "schema.json"
    schema_path.write_text(json.dumps(schema))
    return pipeline.open_dataset(
      {
        "name": "table",
        "path": str(path if path.exists() else self.directory / name),
        "schema": str(schema_path),
        "cache_dir": str(self.directory / "cache"),
      }
    )
