"""The VK-LSVD adapter on files with the columns that the authors document."""

import pathlib
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl.testing import absltest, parameterized

from recjax.data import vk_lsvd
from recjax.data.columns import Columns
from recjax.data.vocabulary import load_values
from recjax.errors import UserError
from recjax.schema import SPLITS

NUM_USERS, NUM_ITEMS, NUM_AUTHORS = 9, 12, 5
WEEKS = (
  ("train", "week_00"),
  ("train", "week_01"),
  ("train", "week_02"),
  ("validation", "week_25"),
  ("test", "week_26"),
)


def write_files(root, seed=0, weeks=WEEKS, num_rows=60):
  """Files as they are distributed; returns the rows by week."""
  rng = np.random.default_rng(seed)
  rows = []
  for folder, name in weeks:
    path = root / folder / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    # The last user and item come in validation and test alone.
    late = 0 if folder == "train" else 1
    columns = {
      "user_id": 100 + rng.integers(NUM_USERS - 1 + late, size=num_rows),
      "item_id": 7 * rng.integers(NUM_ITEMS - 1 + late, size=num_rows),
      "place": rng.integers(3, size=num_rows),
      "platform": rng.integers(2, size=num_rows),
      "agent": rng.integers(4, size=num_rows),
      "timespent": rng.integers(0, 60, size=num_rows),
    }
    types = [pa.uint32()] * 2 + [pa.uint8()] * 4
    arrays = [
      pa.array(v, t) for v, t in zip(columns.values(), types, strict=True)
    ]
    for label in vk_lsvd.LABELS:
      columns[label] = rng.random(num_rows) < 0.2
      arrays.append(pa.array(columns[label]))
    pq.write_table(pa.table(dict(zip(columns, arrays, strict=True))), path)
    rows.append(columns)
  return rows


def write_metadata(root):
  folder = root / "metadata"
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(1)
  users = {
    "user_id": rng.permutation(100 + np.arange(NUM_USERS)).astype(np.uint32),
    "age": rng.integers(18, 70, NUM_USERS).astype(np.uint8),
    "gender": rng.integers(1, 3, NUM_USERS).astype(np.uint8),
    "geo": rng.integers(80, size=NUM_USERS).astype(np.uint8),
  }
  items = {
    "item_id": rng.permutation(7 * np.arange(NUM_ITEMS)).astype(np.uint32),
    "author_id": rng.integers(NUM_AUTHORS, size=NUM_ITEMS).astype(np.uint32),
    "duration": rng.integers(5, 180, NUM_ITEMS).astype(np.uint8),
  }
  for name, columns in (("users", users), ("items", items)):
    pq.write_table(pa.table(columns), folder / f"{name}_metadata.parquet")
  return users, items


class VkLsvdTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.root = pathlib.Path(folder.name) / "source"
    self.rows = write_files(self.root / "interactions")
    self.users, self.items = write_metadata(self.root)

  def prepare(self, **options):
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    vk_lsvd.prepare(vk_lsvd.Config(str(self.root), **options), folder.name)
    columns = Columns(folder.name)
    batches = {
      split: columns.read(split, np.arange(columns.num_rows[split]))
      for split in SPLITS
    }
    dense = {split: columns.raw_dense(split) for split in SPLITS}
    return columns, folder.name, batches, dense

  def test_rows_keep_their_week_order_and_values(self):
    columns, folder, batches, _ = self.prepare()
    self.assertEqual(columns.num_rows, {"train": 180, "valid": 60, "test": 60})
    self.assertEqual(columns.schema.roles.scenario, "place")
    parts = {"train": self.rows[:3], "valid": [self.rows[3]]}
    parts["test"] = [self.rows[4]]
    for split, weeks in parts.items():
      batch = batches[split]
      for name in ("user_id", "item_id", "place", "platform", "agent"):
        values = load_values(folder, name).to_pylist()
        known = dict(zip(values, range(1, len(values) + 1), strict=True))
        raw = np.concatenate([week[name] for week in weeks])
        expected = [known.get(int(v), 0) for v in raw]
        np.testing.assert_array_equal(batch.ids[name], expected, name)
        train = {int(v) for week in parts["train"] for v in week[name]}
        self.assertEqual(set(values), train)
      np.testing.assert_array_equal(batch.scenario, batch.ids["place"])
      for label in (*vk_lsvd.LABELS, "timespent"):
        raw = np.concatenate([week[label] for week in weeks])
        np.testing.assert_array_equal(batch.labels[label], raw.astype(float))
    # The late user and item are unknown to training.
    self.assertTrue(np.any(batches["test"].ids["user_id"] == 0))
    self.assertTrue(np.any(batches["valid"].ids["item_id"] == 0))

  @parameterized.parameters(1 << 20, 7)
  def test_a_row_sees_the_weeks_before_its_own(self, max_rows):
    config = dict(max_len=4, max_count=9, max_rows_in_memory=max_rows)
    columns, folder, batches, dense = self.prepare(**config)
    names = [f.name for f in columns.schema.dense_features]
    values = load_values(folder, "item_id").to_pylist()
    known = dict(zip(values, range(1, len(values) + 1), strict=True))
    author = dict(
      zip(self.items["item_id"], self.items["author_id"], strict=True)
    )
    length = dict(
      zip(self.items["item_id"], self.items["duration"], strict=True)
    )
    before, place = [], dict.fromkeys(SPLITS, 0)
    splits = ("train", "train", "train", "valid", "test")
    for split, week in zip(splits, self.rows, strict=True):
      for i in range(60):
        row = place[split]
        place[split] += 1
        actual = dict(zip(names, dense[split][row], strict=True))
        user, item = week["user_id"][i], week["item_id"][i]
        own = [event["item"] for event in before if event["user"] == user][-4:]
        batch = batches[split]
        mask = batch.id_mask["history"][row]
        np.testing.assert_array_equal(
          batch.ids["history"][row][mask], [known.get(v, 0) for v in own]
        )
        self.assertAlmostEqual(
          actual["duration"], np.log1p(float(length[item])), places=5
        )
        keys = {"user": user, "item": item, "author": author[item]}
        num = len(before)
        like = (sum(e["like"] for e in before) + 3.0) / (num + 100.0)
        share = (sum(e["share"] for e in before) + 50 * 64) / (num + 100.0)
        for key, value in keys.items():
          mine = [event for event in before if event[key] == value]
          count = len(mine)
          rate = (sum(e["like"] for e in mine) + 20 * like) / (count + 20)
          part = (sum(e["share"] for e in mine) + 20 * share) / (count + 20)
          self.assertAlmostEqual(
            actual[f"like_rate_{key}"], np.log(rate / (1 - rate)), places=4
          )
          self.assertAlmostEqual(
            actual[f"watched_share_{key}"], part / 64, places=4
          )
          self.assertAlmostEqual(
            actual[f"count_{key}"], np.log1p(min(count, 9)), places=5
          )
      for i in range(60):
        item = week["item_id"][i]
        ratio = min(week["timespent"][i] / max(float(length[item]), 1.0), 2.0)
        before.append(
          {
            "user": week["user_id"][i],
            "item": item,
            "author": author[item],
            "like": bool(week["like"][i]),
            "share": round(ratio * 64),
          }
        )

  def test_a_subsample_without_a_test_part_moves_one_week_on(self):
    write_files(self.root / "subsamples" / "ur0.01", 3, WEEKS[:4])
    columns, *_ = self.prepare(subsample="ur0.01")
    self.assertEqual(columns.num_rows, {"train": 120, "valid": 60, "test": 60})

  def test_first_week_leaves_the_earlier_ones_out(self):
    columns, *_ = self.prepare(first_week=2)
    self.assertEqual(columns.num_rows["train"], 60)

  def test_a_missing_file_or_column_is_a_mistake(self):
    for break_it, message in (
      (self._drop_column, "column 'place' is missing"),
      (self._drop_item, "has no row for"),
      (self._bad_label, "column like, row 3: must be 0 or 1"),
      (self._drop_test, "no week_.*parquet"),
      (self._drop_users, "users_metadata.parquet: missing"),
    ):
      break_it()
      with self.assertRaisesRegex(UserError, message):
        self.prepare()
      self.rows = write_files(self.root / "interactions")
      write_metadata(self.root)

  @parameterized.parameters(
    ({"max_len": 0}, "max_len must be at least 1"),
    ({"first_week": -1}, "first_week must be at least 0"),
    ({"prior_strength": 0.0}, "prior_strength must be above 0"),
  )
  def test_options(self, options, message):
    with self.assertRaisesRegex(UserError, message):
      vk_lsvd.Config("x", **options)

  def _week(self):
    return self.root / "interactions/train/week_01.parquet"

  def _drop_column(self):
    table = pq.read_table(self._week()).drop_columns(["place"])
    pq.write_table(table, self._week())

  def _bad_label(self):
    table = pq.read_table(self._week())
    like = np.zeros(60, np.int8)
    like[3] = 2
    at = table.column_names.index("like")
    pq.write_table(table.set_column(at, "like", [like]), self._week())

  def _drop_item(self):
    path = self.root / "metadata/items_metadata.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)

  def _drop_test(self):
    for name in ("test/week_26", "train/week_01", "train/week_02"):
      (self.root / f"interactions/{name}.parquet").unlink()

  def _drop_users(self):
    (self.root / "metadata/users_metadata.parquet").unlink()


if __name__ == "__main__":
  absltest.main()
