"""Random tables and batches for benchmarks."""

import json
import pathlib

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recjax.batch import Batch
from recjax.schema import Feature, Label, Schema

# Of the table.
_NUM_SPARSE = 8
_NUM_DENSE = 8
_TABLE_HISTORY = 50
_VOCAB_SIZE = 20_000
# Of the batches.
_HISTORY = 20


def write_table(
  folder: pathlib.Path, num_rows: int, seed: int = 0
) -> pathlib.Path:
  """Writes `table.parquet` and its schema `table.json`; returns the first."""
  rng = np.random.default_rng(seed)
  features = {f"sparse_{i}": {"kind": "sparse"} for i in range(_NUM_SPARSE)}
  features |= {f"dense_{i}": {"kind": "dense"} for i in range(_NUM_DENSE)}
  features["history"] = {
    "kind": "sequence",
    "vocabulary": "sparse_0",
    "max_len": _TABLE_HISTORY,
  }
  schema = {
    "features": features,
    "labels": {"click": "binary"},
    "roles": {"user": "sparse_1"},
    # A part for training that is nearly all: one epoch reads it.
    "split": {"by": "random", "valid": 0.01, "test": 0.01},
  }
  path = folder / "table.parquet"
  path.with_suffix(".json").write_text(json.dumps(schema))
  writer = None
  for start in range(0, num_rows, 50_000):
    part = _random_rows(rng, min(50_000, num_rows - start))
    writer = writer or pq.ParquetWriter(path, part.schema)
    writer.write_table(part)
  writer.close()
  return path


def _random_rows(rng, num_rows: int) -> pa.Table:
  data = {
    f"sparse_{i}": rng.integers(0, _VOCAB_SIZE, num_rows)
    for i in range(_NUM_SPARSE)
  }
  for i in range(_NUM_DENSE):
    data[f"dense_{i}"] = rng.standard_normal(num_rows, np.float32)
  events = rng.integers(0, _VOCAB_SIZE, num_rows * _TABLE_HISTORY)
  offsets = np.arange(0, len(events) + 1, _TABLE_HISTORY, dtype=np.int32)
  data["history"] = pa.ListArray.from_arrays(offsets, events)
  data["click"] = (rng.random(num_rows) < 0.3).astype(np.int8)
  return pa.table(data)


def make_schema(num_rows: int) -> Schema:
  """Users and items of `num_rows` ids each, and a history of items."""
  return Schema(
    features=(
      Feature("user_id", "sparse"),
      Feature("item_id", "sparse"),
      Feature("history", "sequence", vocabulary="item_id", max_len=_HISTORY),
      Feature("age", "dense"),
    ),
    labels=(Label("click"),),
    vocab_sizes={"user_id": num_rows, "item_id": num_rows},
  )


def make_batch(rng: np.random.Generator, schema: Schema, size: int) -> Batch:
  """Examples whose ids are spread evenly over the tables, as caches hate it."""
  num_rows = schema.vocab_sizes["item_id"]
  shapes = {"user_id": (size,), "item_id": (size,), "history": (size, _HISTORY)}
  every = np.ones((size,), bool)
  batch = Batch(
    dense=rng.standard_normal((size, 1), np.float32),
    ids={
      name: rng.integers(1, num_rows, shape).astype(np.int32)
      for name, shape in shapes.items()
    },
    id_mask={"history": np.ones(shapes["history"], bool)},
    vectors={},
    labels={"click": (rng.random(size) < 0.3).astype(np.float32)},
    label_mask={"click": every},
    scenario=np.zeros((size,), np.int32),
    groups={},
    example_mask=every,
  )
  return jax.device_put(batch)
