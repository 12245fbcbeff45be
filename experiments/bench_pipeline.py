r"""Measures the input pipeline against reading the same Parquet file.

    python -m experiments.bench_pipeline [--num_rows=500000] [--repeats=5]

Writes a seeded table (8 sparse, 8 dense, a history of 50, one label) to a
temporary folder and prepares it. Then, in turns, it reads the file with
pyarrow alone (every column to NumPy, in file order) and one shuffled epoch of
ready batches. Prints the median rows a second of each, and the same as JSON in
the last line. Expect at least 80 % of pyarrow.
"""

import json
import pathlib
import statistics
import tempfile
import time

import pyarrow as pa
import pyarrow.parquet as pq
from absl import app, flags

from experiments import bench_data
from recjax.data.columns import Columns
from recjax.data.pipeline import make_loader, open_dataset

_NUM_ROWS = flags.DEFINE_integer("num_rows", 500_000, "Rows of the table.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4096, "Examples a batch.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed readings of each kind.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the table.")


def main(argv) -> None:
  """Runs the benchmark."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  with tempfile.TemporaryDirectory() as folder:
    path = bench_data.write_table(
      pathlib.Path(folder), _NUM_ROWS.value, _SEED.value
    )
    start = time.perf_counter()
    columns = open_dataset(
      {
        "name": "table",
        "path": str(path),
        "schema": str(path.with_suffix(".json")),
        "cache_dir": folder,
      }
    )
    prepare_secs = time.perf_counter() - start
    rates = {"pyarrow": [], "pipeline": []}
    for _ in range(_REPEATS.value):
      rates["pyarrow"].append(_rate(read_parquet, path))
      rates["pipeline"].append(_rate(read_epoch, columns, _BATCH_SIZE.value))
  medians = {name: statistics.median(values) for name, values in rates.items()}
  ratio = medians["pipeline"] / medians["pyarrow"]
  print(f"{'reader':<10}{'rows/s (median)':>18}{'min':>12}{'max':>12}")
  for name, values in rates.items():
    print(
      f"{name:<10}{medians[name]:>18,.0f}{min(values):>12,.0f}"
      f"{max(values):>12,.0f}"
    )
  print(f"pipeline / pyarrow: {ratio:.2f}; preparing took {prepare_secs:.1f} s")
  print(
    json.dumps(
      {
        "num_rows": _NUM_ROWS.value,
        "batch_size": _BATCH_SIZE.value,
        "repeats": _REPEATS.value,
        "pyarrow_rows_per_sec": medians["pyarrow"],
        "pipeline_rows_per_sec": medians["pipeline"],
        "ratio": ratio,
        "prepare_secs": prepare_secs,
      }
    )
  )


def read_parquet(path: pathlib.Path) -> int:
  """Reads all columns to NumPy with pyarrow alone; returns the rows."""
  num_rows = 0
  with pq.ParquetFile(path) as file:
    for block in file.iter_batches(65_536):
      for column in block.columns:
        if pa.types.is_list(column.type):
          column.offsets.to_numpy()
          column = column.flatten()
        column.to_numpy()
      num_rows += block.num_rows
  return num_rows


def read_epoch(columns: Columns, batch_size: int) -> int:
  """Reads one shuffled epoch of batches; returns the rows."""
  loader = make_loader(columns, "train", batch_size=batch_size, shuffle=True)
  return sum(int(batch.example_mask.sum()) for batch in loader)


def _rate(read, *args) -> float:
  start = time.perf_counter()
  num_rows = read(*args)
  return num_rows / (time.perf_counter() - start)


if __name__ == "__main__":
  app.run(main)
