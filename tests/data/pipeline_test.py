import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import types

import grain
import numpy as np
import orbax.checkpoint as ocp
from absl.testing import absltest, parameterized

import recjax.data
from recjax.data import length_buckets, permutation, pipeline
from recjax.data.columns import Block, Columns, ColumnWriter
from recjax.errors import UserError
from recjax.schema import Feature, Label, Schema


def write_rows(directory, num_rows):
  """A store whose `row` ids are the row numbers."""
  schema = Schema((Feature("row", "sparse"),), (Label("y"),))
  writer = ColumnWriter(directory, schema)
  rows = np.arange(num_rows)
  writer.append(
    "train",
    Block(
      np.zeros((num_rows, 0), np.float32),
      {"row": rows},
      {},
      {},
      {"y": rows % 2.0},
      {},
    ),
  )
  writer.finish(dataclasses.replace(schema, vocab_sizes={"row": num_rows}))


def rows_of(batches):
  return [b.ids["row"][b.example_mask].tolist() for b in batches]


class PermuteTest(parameterized.TestCase):
  @parameterized.parameters(
    *range(1, 20), 63, 64, 65, 255, 256, 257, 1000, 12345, 65537
  )
  def test_every_row_once(self, num_rows):
    for seed, epoch in ((0, 0), (0, 1), (7, 0)):
      rows = permutation.permute(
        np.arange(num_rows), num_rows, seed=seed, epoch=epoch
      )
      np.testing.assert_array_equal(np.sort(rows), np.arange(num_rows))

  def test_random_access_agrees_with_the_whole(self):
    whole = permutation.permute(np.arange(1000), 1000, seed=3, epoch=2)
    places = np.array([999, 0, 500, 3])
    np.testing.assert_array_equal(
      permutation.permute(places, 1000, seed=3, epoch=2), whole[places]
    )

  def test_huge_tables(self):
    num_rows = 3 * 10**12
    places = num_rows - 1 - np.arange(10000)
    rows = permutation.permute(places, num_rows, seed=0, epoch=0)
    self.assertLen(set(rows.tolist()), 10000)
    self.assertTrue(((rows >= 0) & (rows < num_rows)).all())
    self.assertAlmostEqual(rows.mean() / num_rows, 0.5, delta=0.02)

  def test_looks_random(self):
    num_rows, cells = 10_000, 10
    for epoch in range(3):
      rows = permutation.permute(
        np.arange(num_rows), num_rows, seed=0, epoch=epoch
      )
      # Counts of (place, row) over a 10 x 10 grid: chi-square, 81 degrees of
      # freedom; 140 is beyond the 0.9999 quantile.
      grid = np.zeros((cells, cells))
      np.add.at(
        grid,
        (np.arange(num_rows) * cells // num_rows, rows * cells // num_rows),
        1,
      )
      expected = num_rows / cells**2
      self.assertLess(((grid - expected) ** 2 / expected).sum(), 140)
      # Neighbours part: the next row is above as often as below.
      self.assertAlmostEqual((np.diff(rows) > 0).mean(), 0.5, delta=0.02)
      self.assertLess((np.abs(np.diff(rows)) == 1).mean(), 0.001)

  def test_small_permutations_are_about_equally_likely(self):
    counts = {}
    for epoch in range(6000):
      key = tuple(
        permutation.permute(np.arange(3), 3, seed=1, epoch=epoch).tolist()
      )
      counts[key] = counts.get(key, 0) + 1
    self.assertLen(counts, 6)
    self.assertBetween(min(counts.values()), 850, 1150)
    self.assertBetween(max(counts.values()), 850, 1150)


class LoaderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    write_rows(self.directory / "store", 103)
    self.columns = Columns(self.directory / "store")

  def load(self, **options):
    options = {"batch_size": 10, "shuffle": True, **options}
    return pipeline.make_loader(self.columns, "train", **options)

  @parameterized.product(shuffle=[True, False], num_threads=[0, 3])
  def test_each_epoch_has_every_row_once(self, shuffle, num_threads):
    batches = list(
      self.load(shuffle=shuffle, num_epochs=2, num_threads=num_threads)
    )
    steps = length_buckets.steps_per_epoch(103, 10)
    self.assertEqual(steps, 11)
    self.assertLen(batches, 2 * steps)
    self.assertEqual({b.size for b in batches}, {10})
    epochs = rows_of(batches[:steps]), rows_of(batches[steps:])
    for epoch in epochs:
      self.assertEqual(sorted(sum(epoch, [])), list(range(103)))
      self.assertLen(epoch[-1], 3)
    if shuffle:
      self.assertNotEqual(*epochs)
    else:
      self.assertEqual(sum(epochs[0], []), list(range(103)))

  def test_seed_decides_the_order(self):
    first = rows_of(self.load(seed=1))
    self.assertEqual(first, rows_of(self.load(seed=1)))
    self.assertNotEqual(first, rows_of(self.load(seed=2)))

  def test_processes_share_every_global_batch(self):
    whole = rows_of(self.load(num_epochs=2, batch_size=12))
    parts = [
      rows_of(
        self.load(num_epochs=2, batch_size=12, process_index=i, process_count=3)
      )
      for i in range(3)
    ]
    self.assertEqual({len(p) for p in parts}, {len(whole)})
    for step, rows in enumerate(whole):
      union = [row for part in parts for row in part[step]]
      self.assertCountEqual(union, rows)
      self.assertLessEqual(max(len(p[step]) for p in parts), 4)

  @parameterized.parameters(0, 2)
  def test_resumes_exactly(self, num_threads):
    def start():
      return iter(self.load(num_epochs=None, seed=5, num_threads=num_threads))

    undisturbed = start()
    for _ in range(17):
      next(undisturbed)
    state = undisturbed.get_state()
    self.assertLess(len(json.dumps(state)), 100)
    expected = rows_of(next(undisturbed) for _ in range(20))
    resumed = start()
    next(resumed)
    resumed.set_state(json.loads(json.dumps(state)))
    self.assertEqual(rows_of(next(resumed) for _ in range(20)), expected)

  def test_position_lies_in_an_orbax_checkpoint(self):
    iterator = iter(self.load(num_epochs=None))
    next(iterator)
    with ocp.CheckpointManager(self.directory / "checkpoints") as manager:
      manager.save(
        1,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave({"x": np.zeros(2)}),
          data=grain.checkpoint.CheckpointSave(iterator),
        ),
      )
      manager.wait_until_finished()
      expected = rows_of(next(iterator) for _ in range(5))
      fresh = iter(self.load(num_epochs=None))
      restored = manager.restore(
        1,
        args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)),
      )
    self.assertEqual(
      rows_of(next(restored["data"]) for _ in range(5)), expected
    )

  @parameterized.parameters(
    ({"batch_size": 10, "process_count": 3}, "divisible"),
    ({"batch_size": 0}, "positive"),
    ({"seed": -1}, "seed"),
    ({"num_epochs": 0}, "num_epochs"),
  )
  def test_bad_arguments(self, options, message):
    with self.assertRaisesRegex(UserError, message):
      self.load(**options)

  def test_empty_and_unknown_splits(self):
    for split, message in (("test", "no rows"), ("trian", "'train'")):
      with self.assertRaisesRegex(UserError, message):
        pipeline.make_loader(self.columns, split, batch_size=2, shuffle=False)


@dataclasses.dataclass(frozen=True)
class FakeConfig:
  source: str
  num_rows: int = 5
  share: float = 0.5
  tags: tuple[str, ...] = ()


class OpenDatasetTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.source = self.directory / "source"
    self.source.write_text("x")
    self.cache = self.directory / "cache"
    self.prepared = 0

    def prepare(config, directory):
      self.prepared += 1
      write_rows(directory, config.num_rows)

    self.adapter = types.ModuleType("recjax.data.table")
    self.adapter.Config = FakeConfig
    self.adapter.VERSION = 1
    self.adapter.sources = lambda config: [pathlib.Path(config.source)]
    self.adapter.prepare = prepare
    self.enter_context(
      absltest.mock.patch.dict(sys.modules, {"recjax.data.table": self.adapter})
    )
    self.enter_context(
      absltest.mock.patch.object(
        recjax.data, "table", self.adapter, create=True
      )
    )

  def open(self, **options):
    return pipeline.open_dataset(
      {
        "name": "table",
        "source": str(self.source),
        "cache_dir": str(self.cache),
        **options,
      }
    )

  def test_prepares_once_per_content(self):
    self.assertEqual(self.open().num_rows["train"], 5)
    self.open()
    self.assertEqual(self.prepared, 1)
    self.assertEqual(self.open(num_rows=6).num_rows["train"], 6)
    self.assertEqual(self.prepared, 2)
    self.source.write_text("xy")
    self.open()
    self.adapter.VERSION = 2
    self.open()
    self.assertEqual(self.prepared, 4)
    os.utime(self.source, ns=(1, 1))
    self.open()
    self.assertEqual(self.prepared, 5)
    self.assertEqual([p for p in self.cache.iterdir() if p.name[0] == "."], [])

  def test_default_cache_follows_the_environment(self):
    with absltest.mock.patch.dict(
      os.environ, {"XDG_CACHE_HOME": str(self.directory / "xdg")}
    ):
      columns = self.open(cache_dir=None)
    self.assertEqual(columns.directory.parent, self.directory / "xdg/recjax")

  @parameterized.parameters("manifest.json", "train.rows")
  def test_a_broken_cache_is_prepared_again(self, name):
    directory = pathlib.Path(self.open().directory)
    (directory / name).unlink()
    self.assertEqual(self.open().num_rows["train"], 5)
    self.assertEqual(self.prepared, 2)

  def test_failed_preparing_leaves_nothing(self):
    def fail(config, directory):
      (directory / "train.rows").write_text("half")
      raise UserError("row 3")

    self.adapter.prepare = fail
    with self.assertRaisesRegex(UserError, "row 3"):
      self.open()
    self.assertEqual(list(self.cache.iterdir()), [])

  def test_the_slower_of_two_processes_gives_way(self):
    prepare = self.adapter.prepare

    def prepare_in_a_race(config, directory):
      prepare(config, directory)
      self.adapter.prepare = prepare
      self.open()  # The faster process.

    self.adapter.prepare = prepare_in_a_race
    self.assertEqual(self.open().num_rows["train"], 5)
    self.assertEqual(self.prepared, 2)
    self.assertLen(list(self.cache.iterdir()), 1)

  def test_a_small_disk_is_noticed_before(self):
    usage = types.SimpleNamespace(free=2)
    with absltest.mock.patch.object(
      pipeline.shutil, "disk_usage", return_value=usage
    ):
      with self.assertRaisesRegex(
        UserError, "needs about 3 bytes, but only 2 .* data.cache_dir"
      ):
        self.open()
    self.assertEqual(self.prepared, 0)

  def test_a_full_disk_is_told(self):
    def fail(config, directory):
      raise OSError(28, "No space left on device")

    self.adapter.prepare = fail
    with self.assertRaisesRegex(UserError, "disk is full"):
      self.open()

  @parameterized.parameters(
    ({"name": "tabel"}, "unknown data set 'tabel'; did you mean 'table'"),
    ({"name": "columns"}, "unknown data set 'columns'"),
    ({"name": None}, "unknown data set None"),
    ({"num_row": 3}, "data.num_row: unknown .* 'num_rows'"),
    ({"num_rows": "3"}, "data.num_rows: must be int, got '3'"),
    ({"num_rows": True}, "data.num_rows: must be int"),
    ({"share": "a"}, "data.share: must be float"),
    ({"tags": 3}, "data.tags: must be"),
    ({"source": "/missing/file"}, "/missing/file: cannot be read"),
    ({"cache_dir": "/proc/none"}, "data.cache_dir"),
  )
  def test_bad_options(self, options, message):
    with self.assertRaisesRegex(UserError, message):
      self.open(**options)

  def test_good_options_of_all_types(self):
    columns = self.open(share=1, tags=("a",))
    self.assertEqual(columns.num_rows["train"], 5)

  def test_missing_option(self):
    with self.assertRaisesRegex(UserError, "data.source: .* needs"):
      pipeline.open_dataset({"name": "table"})


if __name__ == "__main__":
  absltest.main()
