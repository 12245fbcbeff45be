import json
import os
import pathlib
import subprocess
import sys
import textwrap
import urllib.parse

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from absl.testing import absltest, parameterized
from table_case import SCHEMA, TableTestCase, small_table

from experiments import bench_data
from recjax.data import table


def everything(columns, split):
  return columns.read(split, np.arange(columns.num_rows[split]))


class TableTest(TableTestCase):
  def test_small_table_by_hand(self):
    columns = self.open(small_table())
    self.assertEqual(columns.num_rows, {"train": 5, "valid": 1, "test": 2})
    sizes = columns.schema.vocab_sizes
    # Training values; items with the kept part of histories: 10 20 30 50.
    self.assertEqual(
      dict(sizes), {"user": 4, "item": 5, "genres": 3, "shop": 51}
    )
    train, valid, test = (
      everything(columns, s) for s in ("train", "valid", "test")
    )
    # a b null; unseen c is row 0.
    self.assertEqual(train.ids["user"].tolist(), [2, 1, 2, 1, 3])
    self.assertEqual(valid.ids["user"].tolist(), [0])
    self.assertEqual(test.ids["user"].tolist(), [1, 3])
    self.assertEqual(train.ids["item"].tolist(), [3, 1, 2, 1, 3])
    self.assertEqual(test.ids["item"].tolist(), [0, 0])
    self.assertEqual(
      train.ids["history"].tolist(),
      [[0, 0, 0], [3, 0, 0], [1, 2, 1], [4, 0, 0], [1, 0, 0]],
    )
    self.assertEqual(train.id_mask["history"].sum(1).tolist(), [0, 1, 3, 1, 1])
    self.assertEqual(test.ids["history"].tolist(), [[0, 0, 0], [0, 0, 0]])
    self.assertEqual(test.id_mask["history"].sum(1).tolist(), [2, 1])
    # x y; max_len is the longest list.
    self.assertEqual(
      train.ids["genres"].tolist(), [[1, 2], [0, 0], [0, 0], [1, 0], [2, 0]]
    )
    self.assertEqual(valid.ids["genres"].tolist(), [[2, 2]])
    self.assertEqual(test.ids["genres"].tolist(), [[0, 1], [0, 0]])
    self.assertEqual(test.id_mask["genres"].sum(1).tolist(), [2, 1])
    shop = train.ids["shop"]
    self.assertTrue(((shop >= 1) & (shop <= 50)).all())
    self.assertEqual(shop[0], shop[2])
    self.assertEqual(valid.ids["shop"].tolist(), [0])
    self.assertEqual(
      train.vectors["content"].tolist(),
      [[0, 0], [1, -1], [2, -2], [5, -5], [6, -6]],
    )
    self.assertEqual(train.labels["click"].tolist(), [0, 1, 0, 1, 0])
    self.assertEqual(train.label_mask["click"].tolist(), [1, 1, 0, 1, 1])
    self.assertEqual(train.labels["secs"].tolist(), [1.5, 0, 0, 4, 5])
    self.assertEqual(train.label_mask["secs"].tolist(), [1, 0, 0, 1, 1])
    price = np.array([1, 2, 3, 6, 7])
    np.testing.assert_allclose(
      train.dense[:, 0], (price - price.mean()) / price.std(), rtol=1e-5
    )
    # Groups tell users apart, seen in training or not.
    users = np.concatenate([b.groups["group"] for b in (train, valid, test)])
    self.assertEqual(self._pattern(users), [0, 1, 0, 1, 2, 3, 1, 2])
    pages = np.concatenate([b.groups["query"] for b in (train, valid, test)])
    self.assertEqual(self._pattern(pages), [0, 0, 1, 0, 2, 0, 1, 3])

  def _pattern(self, numbers):
    seen = {}
    return [seen.setdefault(int(n), len(seen)) for n in numbers]

  def test_vocabularies_are_kept_for_export(self):
    schema = json.loads(json.dumps(SCHEMA))
    schema["features"]["a/b"] = {"kind": "sparse"}
    columns = self.open(small_table(**{"a/b": list(range(8))}), schema)
    folder = pathlib.Path(columns.directory) / "vocabulary"
    self.assertCountEqual(
      [urllib.parse.unquote(p.stem) for p in folder.iterdir()],
      ["user", "item", "genres", "shop", "a/b"],
    )
    # Hashed values are not kept, but their type is.
    shop = pq.read_table(folder / "shop.parquet")
    self.assertEqual(shop.num_rows, 0)
    self.assertEqual(shop.schema.field("value").type, pa.large_string())
    self.assertEqual(
      pq.read_table(folder / "user.parquet").to_pydict(),
      {"value": ["a", "b", None], "row": [1, 2, 3]},
    )
    self.assertEqual(
      pq.read_table(folder / "item.parquet").to_pydict(),
      {"value": [10, 20, 30, 50], "row": [1, 2, 3, 4]},
    )

  def test_csv_reads_like_parquet(self):
    data = small_table(
      history=["", "30", "30 10 20 10", "40 99", None, "50", "10", "7"],
      content=[f"{i};{-i}" for i in range(8)],
      secs=[1.5, None, None, 2, 3, 4, 5, 6],
    )
    schema = json.loads(json.dumps(SCHEMA))
    schema["features"]["history"]["separator"] = " "
    schema["features"]["content"]["separator"] = ";"
    parquet = self.open(data, schema)
    csv = self.open(data, schema, "log.csv")
    for split in ("train", "valid", "test"):
      one, other = everything(parquet, split), everything(csv, split)
      np.testing.assert_array_equal(one.dense, other.dense)
      for part in ("ids", "id_mask", "vectors", "labels", "label_mask"):
        for name, array in getattr(one, part).items():
          np.testing.assert_array_equal(array, getattr(other, part)[name])

  @parameterized.parameters("parquet", "csv")
  def test_parts_are_one_table(self, kind):
    data = small_table()
    for name in ("history", "content", "genres"):
      del data[name]
    schema = json.loads(json.dumps(SCHEMA))
    for name in ("history", "content", "genres"):
      del schema["features"][name]
    schema["split"] = {"by": "random", "valid": 0.3, "test": 0.3, "seed": 3}
    data = {
      name: [v if v is not None else values[0] for v in values] * 5
      for name, values in data.items()
    }
    whole = self.open(data, schema, f"whole.{kind}")
    for i in range(4):
      part = pa.table(data).slice(10 * i, 10)
      path = self.directory / "parts" / f"part-{i}.{kind}"
      path.parent.mkdir(exist_ok=True)
      (pq.write_table if kind == "parquet" else pa.csv.write_csv)(part, path)
    parts = self.open(None, schema, "parts")
    self.assertEqual(whole.num_rows, parts.num_rows)
    for split in whole.num_rows:
      one, other = everything(whole, split), everything(parts, split)
      np.testing.assert_array_equal(one.dense, other.dense)
      for name in one.ids:
        np.testing.assert_array_equal(one.ids[name], other.ids[name])

  def test_column_types_that_hold_the_same(self):
    plain = self.open(small_table())
    data = small_table(
      click=[False, True, None, True, False, True, False, False]
    )
    schema = pa.schema(
      [
        ("part", pa.dictionary(pa.int8(), pa.string())),
        ("user", pa.large_string()),
        ("item", pa.float64()),
        ("price", pa.int16()),
        ("history", pa.large_list(pa.int32())),
        ("genres", pa.dictionary(pa.int32(), pa.string())),
        ("shop", pa.string_view()),
        ("content", pa.list_(pa.float64(), 2)),
        ("click", pa.bool_()),
        ("secs", pa.float32()),
        ("page", pa.uint64()),
        ("time", pa.timestamp("s")),
      ]
    )
    other = self.open(pa.table(data, schema), name="other.parquet")
    for split in plain.num_rows:
      one, two = everything(plain, split), everything(other, split)
      np.testing.assert_array_equal(one.dense, two.dense)
      for part in ("ids", "vectors", "labels", "label_mask", "groups"):
        for name, array in getattr(one, part).items():
          np.testing.assert_array_equal(array, getattr(two, part)[name])

  def test_many_blocks_against_brute_force(self):
    rng = np.random.default_rng(0)
    num_rows = 20_000
    lengths = rng.integers(0, 6, num_rows)
    events = rng.integers(0, 500, lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    data = {
      "item": rng.integers(0, 500, num_rows),
      "history": pa.ListArray.from_arrays(offsets, events),
      "x": rng.normal(size=num_rows),
      "y": rng.integers(0, 2, num_rows),
      "t": rng.integers(0, 1000, num_rows),
    }
    columns = self.open(
      data,
      {
        "features": {
          "item": {"kind": "sparse"},
          "history": {"kind": "sequence", "vocabulary": "item", "max_len": 4},
          "x": {"kind": "dense"},
        },
        "labels": {"y": "binary"},
        "split": {"by": "time", "column": "t"},
      },
    )
    cut = np.sort(data["t"])
    test = data["t"] >= cut[int(0.9 * num_rows)]
    self.assertLess(abs(columns.num_rows["test"] - test.sum()), 100)
    # The parts keep the table's order; parts are apart in time.
    rows = {}
    order = np.argsort(data["t"], kind="stable")
    begin = 0
    for split in ("train", "valid", "test"):
      rows[split] = np.sort(order[begin : begin + columns.num_rows[split]])
      begin += columns.num_rows[split]
    self.assertLess(
      data["t"][rows["train"]].max(), data["t"][rows["valid"]].min()
    )
    self.assertLess(
      data["t"][rows["valid"]].max(), data["t"][rows["test"]].min()
    )
    train = rows["train"]
    kept = [events[offsets[r] : offsets[r + 1]][-4:] for r in range(num_rows)]
    known = set(data["item"][train]) | {e for r in train for e in kept[r]}
    row_of = {value: i + 1 for i, value in enumerate(sorted(known))}
    for split, chosen in rows.items():
      batch = everything(columns, split)
      self.assertEqual(
        batch.ids["item"].tolist(),
        [row_of.get(v, 0) for v in data["item"][chosen]],
      )
      self.assertEqual(
        [
          ids[m].tolist()
          for ids, m in zip(
            batch.ids["history"], batch.id_mask["history"], strict=True
          )
        ],
        [[row_of.get(v, 0) for v in kept[r]] for r in chosen],
      )


_MEASURE = """
import json, pathlib, re, sys
import experiments.bench_pipeline as bench
from recjax.data.pipeline import open_dataset
def peak():  # In MB; getrusage would count the parent's as well.
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024
folder = pathlib.Path(sys.argv[1])
columns = open_dataset({
    "name": "table", "path": str(folder / "table.parquet"),
    "schema": str(folder / "table.json"), "cache_dir": str(folder)})
prepared = peak()
rows = bench.read_epoch(columns, 4096)
assert rows == columns.num_rows["train"], rows
read = peak()
print(json.dumps([prepared, read]))
"""


class MemoryTest(TableTestCase):
  def _peaks(self, num_rows):
    """MB of the source, and peak memory after preparing and after reading."""
    folder = self.directory / str(num_rows)
    folder.mkdir()
    path = bench_data.write_table(folder, num_rows)
    root = pathlib.Path(table.__file__).parents[2]
    done = subprocess.run(
      [sys.executable, "-c", textwrap.dedent(_MEASURE), str(folder)],
      env={**os.environ, "PYTHONPATH": str(root)},
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    peaks = json.loads(done.stdout)
    print(num_rows, path.stat().st_size / 2**20, peaks)
    return path.stat().st_size / 2**20, max(peaks)

  def test_memory_does_not_grow_with_the_rows(self):
    small_source, small = self._peaks(40_000)
    source, large = self._peaks(800_000)
    self.assertBetween(small_source, 4, 8)
    self.assertBetween(source, 80, 160)
    # About 112 MB of the prepared data stay resident, 10 MB of it also where
    # the table is small; all of it would be 220 MB.
    self.assertLess(large - small, 150)

  @pytest.mark.slow
  def test_memory_does_not_grow_with_half_a_gigabyte(self):
    small_source, small = self._peaks(400_000)
    source, large = self._peaks(4_000_000)
    self.assertGreater(source, 9.5 * small_source)
    self.assertLess(large - small, 150)


if __name__ == "__main__":
  absltest.main()
