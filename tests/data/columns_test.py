import dataclasses
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from recjax.data import columns as columns_lib
from recjax.data import mapped_rows
from recjax.data.columns import Block, Columns, ColumnWriter, pad_batch
from recjax.data.moments import Moments
from recjax.errors import UserError
from recjax.schema import Feature, Label, Roles, Schema

SCHEMA = Schema(
  features=(
    Feature("item", "sparse"),
    Feature("tab", "sparse"),
    Feature("price", "dense"),
    Feature("flat", "dense"),
    Feature("history", "sequence", vocabulary="item", max_len=3),
    Feature("tags", "sparse", multi=True),
    Feature("content", "vector", dim=2),
  ),
  labels=(Label("click"), Label("secs", "real", "s")),
  roles=Roles(user="item", scenario="tab"),
)
SIZES = {"item": 100, "tab": 4, "tags": 50}


def make_block(num_rows, rng, history, tags):
  return Block(
    dense=np.stack(
      [
        rng.normal(3, 5, num_rows).astype(np.float32),
        np.full(num_rows, 0.1, np.float32),
      ],
      axis=1,
    ),
    ids={
      "item": rng.integers(0, 100, num_rows),
      "tab": rng.integers(0, 4, num_rows),
    },
    lists={"history": history, "tags": tags},
    vectors={"content": rng.normal(size=(num_rows, 2)).astype(np.float32)},
    labels={
      "click": rng.choice([0.0, 1.0, np.nan], num_rows),
      "secs": rng.normal(size=num_rows),
    },
    groups={"group": rng.integers(0, 9, num_rows)},
  )


def write_store(directory, *, num_rows=40, blocks=3):
  """Writes a store with overlapping histories; returns what it should hold."""
  rng = np.random.default_rng(0)
  writer = ColumnWriter(directory, SCHEMA)
  written = []
  values = {"history": [], "tags": []}
  for _ in range(blocks):
    parts = {}
    for name, longest in (("history", 7), ("tags", 4)):
      new = rng.integers(1, 50, 60).astype(np.int32)
      first = writer.append_values(name, new)
      assert first == len(values[name])
      values[name].extend(new.tolist())
      lengths = rng.integers(0, longest + 1, num_rows)
      starts = rng.integers(0, len(values[name]) - lengths + 1)
      parts[name] = (starts, lengths)
    block = make_block(num_rows, rng, parts["history"], parts["tags"])
    writer.append("train", block)
    written.append(block)
  writer.append("valid", written[0])
  writer.finish(dataclasses.replace(SCHEMA, vocab_sizes=SIZES))
  return written, values


class ColumnsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def test_reads_back_what_was_written_in_any_order(self):
    blocks, values = write_store(self.directory)
    columns = Columns(self.directory)
    self.assertEqual(columns.num_rows, {"train": 120, "valid": 40, "test": 0})
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 120, 200)
    batch = columns.read("train", rows)

    def whole(part, name):
      return np.concatenate([getattr(b, part)[name] for b in blocks])[rows]

    for name in ("item", "tab"):
      np.testing.assert_array_equal(batch.ids[name], whole("ids", name))
      self.assertEqual(batch.ids[name].dtype, np.int32)
    np.testing.assert_array_equal(batch.scenario, whole("ids", "tab"))
    np.testing.assert_array_equal(
      batch.groups["group"], whole("groups", "group")
    )
    self.assertNotIn("query", batch.groups)
    np.testing.assert_array_equal(
      batch.vectors["content"], whole("vectors", "content")
    )
    for name in ("click", "secs"):
      expected = whole("labels", name).astype(np.float32)
      np.testing.assert_array_equal(batch.label_mask[name], ~np.isnan(expected))
      np.testing.assert_array_equal(batch.labels[name], np.nan_to_num(expected))
    self.assertFalse(batch.label_mask["click"].all())
    self.assertTrue(batch.example_mask.all())
    for name, last in (("history", True), ("tags", False)):
      self._check_lists(batch, blocks, values[name], rows, name, last)

  def _check_lists(self, batch, blocks, values, rows, name, last):
    starts = np.concatenate([b.lists[name][0] for b in blocks])
    lengths = np.concatenate([b.lists[name][1] for b in blocks])
    max_len = 3 if last else lengths.max()
    self.assertEqual(batch.ids[name].shape, (len(rows), max_len))
    for i, row in enumerate(rows):
      full = values[starts[row] : starts[row] + lengths[row]]
      kept = full[-max_len:] if last else full[:max_len]
      padding = max_len - len(kept)
      self.assertEqual(batch.ids[name][i].tolist(), kept + [0] * padding)
      self.assertEqual(
        batch.id_mask[name][i].tolist(),
        [True] * len(kept) + [False] * padding,
      )

  def test_dense_is_standardised_by_the_training_part(self):
    blocks, _ = write_store(self.directory)
    columns = Columns(self.directory)
    raw = np.concatenate([b.dense for b in blocks]).astype(np.float64)
    batch = columns.read("train", np.arange(120))
    expected = (raw[:, 0] - raw[:, 0].mean()) / raw[:, 0].std()
    np.testing.assert_allclose(batch.dense[:, 0], expected, atol=1e-5)
    # Constant: std 1, so exactly the mean.
    np.testing.assert_array_equal(batch.dense[:, 1], 0)
    np.testing.assert_array_equal(
      columns.raw_dense("train"), raw.astype(np.float32)
    )
    self.assertEqual(columns.raw_dense("test").shape, (0, 2))

  def test_outliers_are_clipped(self):
    schema = Schema((Feature("x", "dense"),), (Label("y"),))
    writer = ColumnWriter(self.directory, schema)
    for split, values in (("train", [0.0, 2.0]), ("test", [1e9, -1e9, 3.0])):
      dense = np.array(values, np.float32)[:, None]
      writer.append(
        split, Block(dense, {}, {}, {}, {"y": np.zeros(len(values))}, {})
      )
    writer.finish(schema)
    batch = Columns(self.directory).read("test", np.arange(3))
    np.testing.assert_array_equal(batch.dense[:, 0], [10, -10, 2])
    self.assertEqual(batch.scenario.tolist(), [0, 0, 0])

  def test_empty_reads(self):
    write_store(self.directory)
    batch = Columns(self.directory).read("test", np.zeros(0, np.int64))
    self.assertEqual(batch.size, 0)
    self.assertEqual(batch.ids["history"].shape, (0, 3))

  @parameterized.parameters(-1, 120)
  def test_rows_out_of_range_raise(self, row):
    write_store(self.directory)
    with self.assertRaises(IndexError):
      Columns(self.directory).read("train", np.array([0, row]))

  def test_dropping_pages_changes_nothing(self):
    write_store(self.directory)
    rows = np.random.default_rng(2).integers(0, 120, 300)
    expected = Columns(self.directory).read("train", rows)
    with (
      absltest.mock.patch.object(columns_lib, "_RESIDENT_BYTES", 1),
      absltest.mock.patch.object(mapped_rows, "_WINDOW", 64),
      absltest.mock.patch.object(mapped_rows, "_WINDOWS_A_GATHER", 2),
    ):
      batch = Columns(self.directory).read("train", rows)
    np.testing.assert_array_equal(batch.dense, expected.dense)
    for name in expected.ids:
      np.testing.assert_array_equal(batch.ids[name], expected.ids[name])

  @parameterized.parameters(
    "manifest.json", "train.rows", "values_0.i32", "valid.rows"
  )
  def test_incomplete_store_is_refused(self, name):
    write_store(self.directory)
    path = self.directory / name
    path.write_bytes(path.read_bytes()[:-1])
    with self.assertRaisesRegex(UserError, "prepare it again"):
      Columns(self.directory)

  def test_other_format_is_refused(self):
    write_store(self.directory)
    path = self.directory / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 0'))
    with self.assertRaisesRegex(UserError, "format 0"):
      Columns(self.directory)

  def test_adapter_mistakes_raise(self):
    rng = np.random.default_rng(0)
    empty = (np.zeros(4, np.int64), np.zeros(4, np.int64))
    good = make_block(4, rng, empty, empty)
    full = dataclasses.replace(SCHEMA, vocab_sizes=SIZES)

    def write(block, schema=full):
      writer = ColumnWriter(self.directory, SCHEMA)
      writer.append("train", block)
      writer.finish(schema)

    write(good)
    nan = np.full_like(good.dense, np.nan)
    long = (np.zeros(4, np.int64), np.full(4, 9))
    replace = dataclasses.replace
    for block, message in (
      (replace(good, dense=nan), "finite"),
      (replace(good, labels={}), "labels"),
      (replace(good, ids={**good.ids, "item": np.full(4, -1)}), "negative"),
      (replace(good, ids={**good.ids, "item": np.full(4, 100)}), "100 rows"),
      (replace(good, lists={**good.lists, "tags": long}), "ends at 9"),
      (replace(good, groups={"user": good.groups["group"]}), "allowed"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        write(block)
    with self.assertRaisesRegex(ValueError, "changed"):
      write(good, replace(full, features=full.features[:-1]))

  def test_padding_is_masked(self):
    write_store(self.directory)
    batch = Columns(self.directory).read("train", np.arange(5))
    padded = pad_batch(batch, 8)
    self.assertEqual(padded.size, 8)
    self.assertEqual(padded.example_mask.tolist(), [True] * 5 + [False] * 3)
    for part in ("ids", "id_mask", "vectors", "labels", "label_mask", "groups"):
      for name, array in getattr(padded, part).items():
        np.testing.assert_array_equal(array[:5], getattr(batch, part)[name])
        self.assertFalse(array[5:].any())
        self.assertEqual(array.dtype, getattr(batch, part)[name].dtype)
    self.assertFalse(padded.dense[5:].any() or padded.scenario[5:].any())
    with self.assertRaisesRegex(ValueError, "cannot pad"):
      pad_batch(batch, 4)


class MomentsTest(absltest.TestCase):
  def test_blocks_of_any_size_give_the_whole_columns_moments(self):
    rng = np.random.default_rng(0)
    values = rng.normal(1e6, 2, (1000, 3))
    moments = Moments(3)
    for part in np.split(values, [1, 2, 500, 500, 999]):
      moments.update(part)
    mean, std = moments.result()
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(0), rtol=1e-6)

  def test_rounding_does_not_hide_a_constant_column(self):
    values = np.full((1000, 1), 123.456)
    moments = Moments(1)
    for part in np.split(values, [1, 3, 501, 999]):
      moments.update(part)
    self.assertGreater(moments.squares[0], 0)
    self.assertEqual(moments.result()[1].tolist(), [1])


if __name__ == "__main__":
  absltest.main()
