"""Event times and sides of sequences, from raw tables and in the store."""

import copy
import dataclasses
import datetime
import json
import tempfile

import numpy as np
import pyarrow as pa
from absl.testing import absltest, parameterized
from table_case import TableTestCase

from experiments import trees
from recjax import export, raw_rows
from recjax.data import table
from recjax.data.columns import Block, Columns, ColumnWriter, pad_batch
from recjax.data.row_layout import RowLayout
from recjax.errors import UserError
from recjax.schema import SPLITS, Feature, Label, Roles, Schema

TABLE_SCHEMA = {
  "features": {
    "item": {"kind": "sparse"},
    "author": {"kind": "sparse"},
    "history": {
      "kind": "sequence",
      "vocabulary": "item",
      "max_len": 3,
      "separator": " ",
      "time": "history_time",
      "side": {"history_author": "author"},
    },
    "likes": {
      "kind": "sequence",
      "vocabulary": "item",
      "max_len": 2,
      "separator": " ",
      "side": {"like_author": "author", "like_item": "item"},
    },
  },
  "labels": {"click": "binary"},
  "roles": {"time": "at"},
  "split": {"by": "column", "column": "part"},
}
START = 1_650_000_000


def raw_table(**columns):
  """Six rows; times are seconds after START."""
  data = {
    "part": ["train", "train", "train", "valid", "test", "test"],
    "item": [10, 20, 30, 10, 10, 20],
    "author": ["a", "b", None, "a", "c", "a"],
    "history": [[], [10, 20], [10, None, 20, 30, 10], None, [99, 10], [20]],
    "history_time": [[], [5, 7], [1, 2, 3, 3, 9], None, [1, 2], [3]],
    "history_author": [
      [],
      ["a", "b"],
      ["b", "a", "new", None, "a"],
      None,
      ["x", "a"],
      ["b"],
    ],
    "likes": [[20], [], [10, 20, 30], [7], [], None],
    "like_author": [["b"], None, ["a", "b", "a"], [None], [], None],
    "like_item": [[10], [], [20, 30, 10], [10], [], None],
    "click": [0, 1, 0, 1, 0, 1],
    "at": [4, 8, 9, 10, 11, 12],
  }
  return {**data, **columns}


def shift(values, change):
  """`change` of every number in a column of numbers or of lists of them."""
  return [
    None
    if v is None
    else [change(x) for x in v]
    if isinstance(v, list)
    else change(v)
    for v in values
  ]


def joined(values):
  """Lists as separated texts, as a CSV file has them."""
  return [
    None if v is None else " ".join("" if x is None else str(x) for x in v)
    for v in values
  ]


def timestamp(second):
  zone = datetime.UTC
  return datetime.datetime.fromtimestamp(START + second, zone).replace(
    tzinfo=None
  )


def in_form(form):
  data, name = raw_table(), "log.parquet"
  change = {
    "integers": lambda s: START + s,
    "floats": lambda s: float(START + s),
    "timestamps": timestamp,
    "numbers_in_csv": lambda s: START + s,
    "iso_in_csv": lambda s: timestamp(s).isoformat(),
    "zones_in_csv": lambda s: timestamp(s).isoformat() + "Z",
  }[form]
  for column in ("history_time", "at"):
    data[column] = shift(data[column], change)
  if form.endswith("csv"):
    name = "log.csv"
    for column, values in data.items():
      if any(isinstance(v, list) for v in values):
        data[column] = joined(values)
  return data, name


FORMS = (
  "integers",
  "floats",
  "timestamps",
  "numbers_in_csv",
  "iso_in_csv",
  "zones_in_csv",
)


def everything(columns, split):
  return columns.read(split, np.arange(columns.num_rows[split]))


class TableEventsTest(TableTestCase):
  @parameterized.parameters(*FORMS)
  def test_by_hand(self, form):
    data, name = in_form(form)
    with self.assertLogs(level="WARNING") as logs:
      columns = self.open(data, TABLE_SCHEMA, name)
    # The event at 9 is at the row's own time.
    self.assertRegex("\n".join(logs.output), "1 events of 'history'")
    # Authors of training: a b new null; items 10 20 30.
    self.assertEqual(dict(columns.schema.vocab_sizes), {"item": 4, "author": 5})
    batches = [everything(columns, split) for split in SPLITS]
    whole = lambda part, name: [  # noqa: E731
      row for b in batches for row in getattr(b, part)[name].tolist()
    ]
    # An event without an item is left out with its time and author.
    self.assertEqual(
      whole("ids", "history"),
      [[0] * 3, [1, 2, 0], [1, 2, 3], [0] * 3, [0, 1, 0], [2, 0, 0]],
    )
    self.assertEqual(
      whole("ids", "history_author"),
      [[0] * 3, [1, 2, 0], [2, 3, 4], [0] * 3, [0, 1, 0], [2, 0, 0]],
    )
    self.assertEqual(
      whole("event_age", "history"),
      [[0] * 3, [3, 1, 0], [8, 6, 6], [0] * 3, [10, 9, 0], [9, 0, 0]],
    )
    lengths = [sum(mask) for mask in whole("id_mask", "history")]
    self.assertEqual(lengths, [0, 2, 3, 0, 2, 1])
    self.assertEqual(
      whole("id_mask", "history"), whole("id_mask", "history_author")
    )
    # Without times every event counts, and the last are kept.
    self.assertEqual(
      whole("ids", "likes"), [[2, 0], [0, 0], [2, 3], [0, 0], [0, 0], [0, 0]]
    )
    self.assertEqual(
      whole("ids", "like_author"),
      [[2, 0], [0, 0], [2, 1], [4, 0], [0, 0], [0, 0]],
    )
    self.assertEqual(
      whole("ids", "like_item"),
      [[1, 0], [0, 0], [3, 1], [1, 0], [0, 0], [0, 0]],
    )
    self.assertNotIn("likes", batches[0].event_age)

  @parameterized.parameters(*FORMS)
  def test_the_scorer_reads_rows_as_the_pipeline_does(self, form):
    data, name = in_form(form)
    columns = self.open(data, TABLE_SCHEMA, name)
    description, tensors = export.describe_data(columns)
    description["dense"] = {"mean": [], "std": []}
    encoder = raw_rows.Encoder(json.loads(json.dumps(description)), tensors)
    source = table.Config(
      str(self.directory / name), str(self.directory / "schema.json")
    )
    for split in SPLITS:
      batch = everything(columns, split)
      chosen = [i for i, part in enumerate(data["part"]) if part == split]
      own = {n: [v[i] for i in chosen] for n, v in data.items()}
      stored = json.dumps(table.read_raw(source, split, 9), allow_nan=False)
      for raw in (own, json.loads(stored)):
        arrays = encoder.encode(raw)
        for kind in ("ids", "id_mask", "event_age"):
          for feature, expected in getattr(batch, kind).items():
            actual = arrays[f"{kind}/{feature}"]
            np.testing.assert_array_equal(actual, expected, f"{feature} {raw}")
            self.assertEqual(actual.dtype, expected.dtype)

  @parameterized.named_parameters(
    (
      "side_length",
      {"like_author": [["b"], [], ["a", "b"], [None], [], None]},
      "'like_author', row 3: 2 values, but 'likes' has 3",
    ),
    (
      "time_length",
      {"history_time": [[], [5], [1, 2, 3, 3, 9], None, [1, 2], [3]]},
      "'history_time', row 2: 1 values, but 'history' has 2",
    ),
    (
      "late",
      {"at": [4, 8, 9, 10, 1, 12]},
      "'history_time', row 5: an event at 2 s, after the row's own 'at', 1 s",
    ),
    (
      "order",
      {"history_time": [[], [7, 5], [1, 2, 3, 3, 9], None, [1, 2], [3]]},
      "'history_time', row 2: 5 s comes after 7 s; events must stand oldest",
    ),
    (
      "no_time",
      {"history_time": [[], [5, 7], [1, 2, None, 3, 9], None, [1, 2], [3]]},
      "'history_time', row 3: a time is missing",
    ),
    ("no_own_time", {"at": [4, 8, 9, None, 11, 12]}, "'at', row 4: a time is"),
    (
      "infinite",
      {"at": [4.0, 8, 9, 10, float("inf"), 12]},
      "'at', row 5: time inf is not finite",
    ),
    (
      "word",
      {"at": ["4", "8", "noon", "10", "11", "12"]},
      "'at', row 3: 'noon' is not a number",
    ),
    ("boolean", {"at": [True] * 6}, "'at': has type bool; times must be"),
    (
      "no_list",
      {"history_time": [1] * 6},
      "'history_time': has type int64; th",
    ),
    (
      "side_type",
      {"like_item": [[1.5], [], [2, 3, 1], [1], [], None]},
      "'like_item', rows 1 to 6: an id must be",
    ),
  )
  def test_mistakes(self, columns, message):
    with self.assertRaisesRegex(UserError, message) as caught:
      self.open(raw_table(**columns), TABLE_SCHEMA)
    self.assertNotIn("\n", str(caught.exception))

  @parameterized.named_parameters(
    ("time", "history_tim", {"time": "history_tim"}),
    ("side", "history_autor", {"side": {"history_autor": "author"}}),
  )
  def test_a_missing_column_is_named(self, name, change):
    schema = copy.deepcopy(TABLE_SCHEMA)
    schema["features"]["history"].update(change)
    with self.assertRaisesRegex(UserError, f"no column '{name}'; did you mean"):
      self.open(raw_table(), schema)

  def test_texts_of_times_need_a_separator(self):
    schema = copy.deepcopy(TABLE_SCHEMA)
    del schema["features"]["history"]["separator"]
    data = raw_table(history_time=joined(raw_table()["history_time"]))
    with self.assertRaisesRegex(
      UserError, "must give 'history' a \"separator\""
    ):
      self.open(data, schema)

  def test_rows_see_exactly_the_earlier_events(self):
    """Against a loop, on a log of ties, nulls and long lists."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(300):
      times = np.sort(rng.integers(0, 30, rng.integers(0, 9)))
      own = max(int(rng.integers(0, 30)), times.max(initial=0))
      items = [None if rng.random() < 0.2 else int(v) for v in times * 7 % 5]
      rows.append(
        {
          "part": SPLITS[i % 3],
          "item": int(rng.integers(0, 5)),
          "author": "abc"[i % 3],
          "history": items,
          "history_time": times.tolist(),
          "history_author": [str(t) for t in times],
          "likes": [],
          "like_author": [],
          "like_item": [],
          "click": i // 3 % 2,
          "at": own,
        }
      )
    columns = self.open(pa.Table.from_pylist(rows), TABLE_SCHEMA)
    items = [None, 0, 1, 2, 3, 4]
    for part, split in enumerate(SPLITS):
      batch = everything(columns, split)
      for i, row in enumerate(rows[part::3]):
        seen = [
          (item, row["at"] - time)
          for item, time in zip(
            row["history"], row["history_time"], strict=True
          )
          if item is not None and time < row["at"]
        ][-3:]
        mask = batch.id_mask["history"][i]
        ids = [items[k] for k in batch.ids["history"][i][mask]]
        ages = batch.event_age["history"][i][mask].tolist()
        self.assertEqual(list(zip(ids, ages, strict=True)), seen)
        self.assertTrue((batch.event_age["history"][i][~mask] == 0).all())


STORE_SCHEMA = Schema(
  features=(
    Feature("item", "sparse"),
    Feature("tab", "sparse"),
    Feature("tags", "sparse", multi=True, max_len=2),
    Feature(
      "watched",
      "sequence",
      vocabulary="item",
      max_len=4,
      time="watched_at",
      side={"watched_tab": "tab", "watched_tag": "tags"},
    ),
    Feature("liked", "sequence", vocabulary="item", max_len=6, time="liked_at"),
    Feature("seen", "sequence", vocabulary="item", max_len=3),
  ),
  labels=(Label("click"),),
  roles=Roles(time="at"),
  vocab_sizes={"item": 50, "tab": 5, "tags": 9},
)


class StoreTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.directory = self.enter_context(tempfile.TemporaryDirectory())
    writer = ColumnWriter(self.directory, STORE_SCHEMA)
    self.values = {
      name: {
        "ids": rng.integers(1, size, 200),
        # Absolute times that float32 cannot tell apart.
        "time": 1.65e9 + np.sort(rng.uniform(0, 100, 200)),
      }
      for name, size in (
        ("tags", 9),
        ("watched", 50),
        ("liked", 50),
        ("seen", 50),
      )
    }
    self.sides = {
      "watched_tab": rng.integers(0, 5, 200),
      "watched_tag": rng.integers(0, 9, 200),
    }
    for name, held in self.values.items():
      writer.append_values(
        name,
        held["ids"],
        time=held["time"] if name in ("watched", "liked") else None,
        sides=self.sides if name == "watched" else None,
      )
    self.block = Block(
      dense=np.zeros((60, 0), np.float32),
      ids={"item": rng.integers(0, 50, 60), "tab": rng.integers(0, 5, 60)},
      lists={
        name: (rng.integers(0, 190, 60), rng.integers(0, 9, 60))
        for name in self.values
      },
      vectors={},
      labels={"click": rng.integers(0, 2, 60).astype(np.float32)},
      groups={},
      time=1.65e9 + 101 + rng.uniform(0, 5, 60),
    )
    writer.append("train", self.block)
    writer.finish(STORE_SCHEMA)
    self.columns = Columns(self.directory)

  @parameterized.parameters(None, 1, 3, 5, 100)
  def test_reads_aligned_ids_sides_and_ages(self, max_len):
    rows = np.array([7, 3, 3, 59, 0, 12])
    batch = self.columns.read("train", rows, max_len=max_len)
    for name, held in self.values.items():
      feature = STORE_SCHEMA.feature(name)
      width = feature.max_len
      if feature.kind == "sequence":
        width = min(width, max_len or width)
      columns = {name: held["ids"]}
      if name == "watched":
        columns |= self.sides
      starts, lengths = self.block.lists[name]
      for i, row in enumerate(rows):
        end = starts[row] + lengths[row]
        place = np.arange(starts[row], end)
        kept = place[:width] if name == "tags" else place[-width:]
        mask = np.arange(width) < len(kept)
        for column, values in columns.items():
          np.testing.assert_array_equal(batch.id_mask[column][i], mask)
          found = batch.ids[column][i]
          np.testing.assert_array_equal(found[mask], values[kept])
          self.assertFalse(found[~mask].any())
        if feature.time is None:
          self.assertNotIn(name, batch.event_age)
          continue
        age = (self.block.time[row] - held["time"][kept]).astype(np.float32)
        np.testing.assert_array_equal(batch.event_age[name][i][mask], age)
        self.assertTrue((age > 0).all())
        self.assertFalse(batch.event_age[name][i][~mask].any())
    self.assertEqual(batch.event_age["liked"].dtype, np.float32)

  def test_lengths_are_those_that_are_kept(self):
    rows = np.array([59, 0, 7])
    expected = [
      np.minimum(self.block.lists[name][1][rows], limit)
      for name, limit in (("watched", 4), ("liked", 6), ("seen", 3))
    ]
    np.testing.assert_array_equal(
      self.columns.lengths("train", rows), np.stack(expected, axis=1)
    )

  def test_trees_see_lengths_and_the_last_age(self):
    names, _ = trees._columns(self.columns)
    found = trees._read(self.columns, "train", ("click",))["x"]
    self.assertEqual(found.shape, (60, len(names)))
    columns = dict(zip(names, found.T, strict=True))
    self.assertNotIn("watched_tab_length", columns)
    self.assertNotIn("seen_last_age", columns)
    lengths = self.block.lists["liked"][1]
    np.testing.assert_array_equal(
      columns["liked_length"], np.minimum(lengths, 6)
    )
    last = self.block.lists["liked"][0] + lengths - 1
    age = self.block.time - self.values["liked"]["time"][last]
    np.testing.assert_array_equal(
      columns["liked_last_age"],
      np.where(lengths > 0, age, np.nan).astype(np.float32),
    )

  def test_padding_has_no_events(self):
    padded = pad_batch(self.columns.read("train", np.arange(2)), 4)
    self.assertEqual(padded.event_age["watched"].shape, (4, 4))
    self.assertFalse(padded.event_age["watched"][2:].any())

  def test_contradictions_of_an_adapter_are_errors(self):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    writer = ColumnWriter(folder, STORE_SCHEMA)
    ids, time = np.array([1, 2]), np.array([1.0, 2.0])
    sides = {"watched_tab": ids, "watched_tag": ids}
    for message, name, options in (
      ("times must be given", "watched", {"sides": sides}),
      ("got sides .*watched_tab", "watched", {"time": time}),
      ("got sides", "liked", {"time": time, "sides": sides}),
      ("times must be given", "seen", {"time": time}),
      ("must be finite", "liked", {"time": time * np.inf}),
      (
        "negative id -2",
        "watched",
        {"time": time, "sides": sides | {"watched_tag": -ids}},
      ),
    ):
      with self.assertRaisesRegex(ValueError, message):
        writer.append_values(name, ids, **options)
    with self.assertRaisesRegex(ValueError, "have lengths"):
      RowLayout(STORE_SCHEMA).pack_values("liked", ids, time[:1], {})
    for time in (None, np.full(60, np.nan)):
      with self.assertRaisesRegex(ValueError, "block time"):
        writer.append("train", dataclasses.replace(self.block, time=time))
    # A side's ids are held against the vocabulary that it shares.
    writer.append_values(
      "watched", ids, time=np.ones(2), sides=sides | {"watched_tab": ids + 4}
    )
    with self.assertRaisesRegex(ValueError, "'watched_tab': id 6 in a vocab"):
      writer.finish(STORE_SCHEMA)


if __name__ == "__main__":
  absltest.main()
