import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl.testing import absltest, parameterized
from table_case import SCHEMA, TableTestCase, small_table

from recjax.data import table
from recjax.errors import UserError


class SplitTest(TableTestCase):
  def split(
    self, times, valid=0.2, test=0.2, by="time", name="a.parquet", fold=0
  ):
    """Number of the part of each row; rows are told by their dense value."""
    count = len(times)
    columns = self.open(
      {"t": times, "x": np.arange(count), "y": np.arange(count) % 2},
      {
        "features": {"x": {"kind": "dense"}},
        "labels": {"y": "binary"},
        "split": {
          "by": by,
          "column": "t",
          "valid": valid,
          "test": test,
          "fold": fold,
        },
      },
      name,
    )
    parts = np.empty(count, int)
    for i, split in enumerate(("train", "valid", "test")):
      parts[columns.raw_dense(split)[:, 0].astype(int)] = i
    return parts

  @parameterized.named_parameters(
    ("ints", lambda t: t, "a.parquet"),
    ("negative", lambda t: t - 50, "a.parquet"),
    ("floats", lambda t: (t - 50) / 7, "a.parquet"),
    ("nanoseconds", lambda t: t + 1_700_000_000_000_000_000, "a.parquet"),
    ("dates", lambda t: t.astype("datetime64[D]"), "a.parquet"),
    ("timestamps", lambda t: t.astype("datetime64[ms]"), "a.parquet"),
    ("csv numbers", lambda t: t / 4, "a.csv"),
    ("csv dates", lambda t: t.astype("datetime64[D]"), "a.csv"),
    (
      "zones",
      lambda t: pa.array(t, pa.timestamp("us", tz="Europe/Paris")),
      "a.parquet",
    ),
  )
  def test_time_split_takes_the_last(self, make, name):
    times = np.random.default_rng(0).permutation(100)
    parts = self.split(make(times), name=name)
    np.testing.assert_array_equal(
      parts, (times >= 60).astype(int) + (times >= 80)
    )

  def test_equal_times_stay_together(self):
    # Day 8 would straddle; the boundary nearest to the share is taken.
    days = np.repeat([1, 2, 8, 9], [50, 22, 9, 19])
    parts = self.split(days)
    self.assertEqual(parts[days == 9].tolist(), [2] * 19)
    self.assertEqual(parts[days == 8].tolist(), [1] * 9)
    self.assertEqual(set(parts[days <= 2].tolist()) - {0, 1}, set())
    for day in (1, 2, 8, 9):
      self.assertLen(set(parts[days == day].tolist()), 1)

  def test_folds_test_every_row_once(self):
    folds = [
      self.split(np.zeros(2000), 0.25, 0.25, "random", f"{k}.parquet", k)
      for k in range(4)
    ]
    tested = np.stack(folds) == 2
    np.testing.assert_array_equal(tested.sum(axis=0), 1)
    np.testing.assert_allclose(tested.mean(axis=1), 0.25, atol=0.03)
    # What is left is trained on but for the validation part.
    self.assertBetween(np.mean(np.stack(folds) == 0), 0.48, 0.52)
    for by, fold in (("random", 4), ("random", -1), ("time", 1)):
      with self.assertRaisesRegex(UserError, "split: fold must be from 0 to 3"):
        self.split(np.arange(20.0), 0.25, 0.25, by, "x.parquet", fold)

  def test_random_split_has_the_shares(self):
    columns = self.split(np.zeros(20_000), 0.1, 0.3, by="random")
    shares = np.bincount(columns) / 20_000
    np.testing.assert_allclose(shares, [0.6, 0.1, 0.3], atol=0.015)
    again = self.split(np.zeros(20_000), 0.1, 0.3, by="random", name="b.csv")
    np.testing.assert_array_equal(columns, again)

  @parameterized.parameters(
    ([5] * 20, "no train rows"),
    ([1] * 19 + [2], "no valid rows"),
    ([1, None] * 10, "'t', row 2: time is missing"),
    ([1.0, float("inf")] * 10, "'t', row 2: time inf is not finite"),
    ([True, False] * 10, "cannot split by time of type bool"),
  )
  def test_bad_times(self, times, message):
    with self.assertRaisesRegex(UserError, message):
      self.split(pa.array(times))

  def test_bad_csv_times(self):
    for times in (["1", "2", "soon"] * 5, ["2020-01-01", "x", "3"] * 5):
      with self.assertRaisesRegex(UserError, "'t', row [23]: '.*' is not"):
        self.split(times, name="a.csv")


def _features(**changes):
  features = {**SCHEMA["features"], **changes}
  features = {k: v for k, v in features.items() if v is not None}
  return {**SCHEMA, "features": features}


class MistakesTest(TableTestCase):
  @parameterized.named_parameters(
    (
      "dense_null",
      {"price": [1, 2, None] + [1] * 5},
      r"log.parquet: column 'price', row 3: None in a dense",
    ),
    ("dense_nan", {"price": [1.0, float("nan")] + [1.0] * 6}, "row 2: nan"),
    ("dense_inf", {"price": [-float("inf")] + [1.0] * 7}, "row 1: -inf"),
    ("dense_overflow", {"price": [1e39] + [1.0] * 7}, "row 1: 1e.39"),
    ("dense_string", {"price": ["1"] * 8}, "'price': has type string"),
    (
      "label_value",
      {"click": [0, 1, 2, 1, 0, 1, 0, 0]},
      "'click', row 3: 2 in a label; a binary label is 0, 1 or missing",
    ),
    ("label_inf", {"secs": [float("inf")] * 8}, "'secs', row 1: inf"),
    ("label_string", {"click": ["0"] * 8}, "'click': has type string"),
    ("no_positive", {"click": [0] * 8}, "'click': no positive"),
    ("no_negative", {"click": [1] * 8}, "'click': no negative"),
    ("only_test_positive", {"click": [0] * 7 + [1]}, "no positive"),
    (
      "vector_length",
      {"content": [[1, 2]] * 7 + [[1]]},
      "'content', row 8: 1 numbers, but \"dim\" is 2",
    ),
    ("vector_null", {"content": [[1, 2]] * 7 + [None]}, "row 8: 0 numbers"),
    (
      "vector_nan",
      {"content": [[1, 2.0]] * 7 + [[1, float("nan")]]},
      "'content', row 8: .* finite",
    ),
    ("vector_type", {"content": [["a", "b"]] * 8}, "must hold numbers"),
    (
      "id_fraction",
      {"item": [1.0, 1.5] + [1.0] * 6},
      "'item', row 2: 1.5 is not a 64-bit integer",
    ),
    (
      "id_overflow",
      {"item": pa.array([1] * 7 + [2**64 - 1], pa.uint64())},
      "'item', row 8: 18446744073709551615 is not a 64-bit integer",
    ),
    ("id_list", {"item": [[1]] * 8}, 'give the feature "multi": true'),
    (
      "id_time",
      {"item": pa.array([1] * 8, pa.timestamp("s"))},
      "ids must be integers or strings",
    ),
    ("scalar_history", {"history": [1] * 8}, "needs a list column"),
    ("no_separator", {"history": ["1 2"] * 8}, 'give its "separator"'),
    ("history_fraction", {"history": [[1.5]] * 8}, "'history', rows 1 to 8"),
    (
      "part",
      {"part": ["train", "dev"] + ["test"] * 6},
      "'part', row 2: 'dev' is no part; allowed are train, valid, test",
    ),
    ("part_type", {"part": [0] * 8}, "'part', row 1: 0 is no part"),
    ("part_null", {"part": [None, "train"] * 4}, "row 1: None is no part"),
    ("no_valid", {"part": ["train", "test"] * 4}, "leaves no valid rows"),
    ("group_list", {"page": [[1]] * 8}, "'page', row 1: "),
    ("group_fraction", {"page": [1.5] * 8}, "'page', row 1: 1.5 is not"),
  )
  def test_values(self, columns, message):
    with self.assertRaisesRegex(UserError, message) as caught:
      self.open(small_table(**columns))
    self.assertNotIn("\n", str(caught.exception))
    self.assertIn("log.parquet", str(caught.exception))

  @parameterized.named_parameters(
    (
      "missing",
      _features(prise={"kind": "dense"}),
      "no column 'prise'; did you mean 'price'",
    ),
    (
      "missing_role",
      {**SCHEMA, "roles": {"query": "pag"}},
      "no column 'pag'; did you mean 'page'",
    ),
    (
      "missing_split",
      {**SCHEMA, "split": {"by": "time", "column": "tim"}},
      "no column 'tim'; did you mean 'time'",
    ),
    (
      "popularity",
      {**SCHEMA, "roles": {"popularity": "item"}},
      "popularity is for data whose adapter counts",
    ),
    (
      "scenario_list",
      {**SCHEMA, "roles": {"scenario": "genres"}},
      "scenario 'genres' must be a single-valued",
    ),
    ("text", _features(title={"kind": "text"}), 'a text needs "max_len"'),
    ("image", _features(title={"kind": "image"}), "'image' is not supp"),
    (
      "chain",
      _features(item={"kind": "sparse", "vocabulary": "user"}),
      "'item' has no vocabulary of its own; name 'user'",
    ),
    (
      "two_vocabularies",
      _features(shop={"kind": "sparse", "vocabulary": "user", "buckets": 5}),
      'give "buckets" there',
    ),
  )
  def test_schemas(self, schema, message):
    with self.assertRaisesRegex(UserError, message):
      self.open(small_table(), schema)

  def test_missing_schema(self):
    config = table.Config(str(self.directory), str(self.directory / "no.json"))
    with self.assertRaisesRegex(UserError, "no such schema file"):
      table.prepare(config, self.directory / "out")

  def test_duplicate_columns(self):
    data = pa.table(small_table())
    data = data.append_column("price", data.column("price"))
    with self.assertRaisesRegex(UserError, "'price' is there 2 times"):
      self.open(data)

  def test_no_rows(self):
    for schema in (
      SCHEMA,
      {**SCHEMA, "split": {"by": "time", "column": "time"}},
    ):
      with self.assertRaisesRegex(UserError, "has no rows"):
        self.open(pa.table(small_table()).slice(0, 0), schema)

  @parameterized.parameters(
    ("log.parquet", b"a,b\n1,2\n", "cannot be read as Parquet"),
    ("log.parquet", b"", "cannot be read as Parquet"),
    ("log.csv", b"", "cannot be read as CSV"),
    ("log.csv", b"x,y\n1,2\n3\n", "cannot be read as CSV: .*columns"),
    ("log.csv", b"x,y\n1,\xff\xfe\n", "'y', row|cannot be read as CSV"),
    ("log.csv", b"x,x,y\n1,2,3\n", "'x' is there 2 times"),
    ("log.csv", b"x,y\n", "has no rows"),
    ("log.csv", b"x,y\n1,0\na,1\n", "'x', row 2: 'a' is not a number"),
    ("log.csv", b"x,y\n1,0\n,1\n", "'x', row 2: None in a dense"),
    ("log.csv", b"x,y\n1,0\nnan,1\n", "'x', row 2: nan in a dense"),
    ("log.csv", b"x,y\n1,0\n2,yes\n", "'y', row 2: 'yes' is not a number"),
    ("log.txt", b"x,y\n1,0\n", "must be a .parquet or .csv file"),
    ("folder/readme.txt", b"", "no table here"),
  )
  def test_files(self, name, content, message):
    path = self.directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    schema = {"features": {"x": {"kind": "dense"}}, "labels": {"y": "binary"}}
    with self.assertRaisesRegex(UserError, message):
      self.open(None, schema, name.split("/")[0])

  def test_mixed_and_missing_files(self):
    folder = self.directory / "folder"
    folder.mkdir()
    with self.assertRaisesRegex(UserError, "no table here"):
      self.open(None, name="folder")
    (folder / "a.csv").write_text("x")
    (folder / "a.parquet").write_text("x")
    with self.assertRaisesRegex(UserError, "keep one kind"):
      self.open(None, name="folder")
    with self.assertRaisesRegex(UserError, "no such file or folder"):
      self.open(None, name="nothing.parquet")

  def test_a_mistake_late_in_a_later_part_names_its_row(self):
    schema = {"features": {"x": {"kind": "dense"}}, "labels": {"y": "binary"}}
    values = np.zeros(20_000)
    values[17_000] = np.nan
    for i, x in enumerate((np.zeros(100), values)):
      path = self.directory / "parts" / f"{i}.parquet"
      path.parent.mkdir(exist_ok=True)
      pq.write_table(pa.table({"x": x, "y": np.arange(len(x)) % 2}), path)
    with self.assertRaisesRegex(
      UserError, "1.parquet: column 'x', row 17001: "
    ):
      self.open(None, schema, "parts")


if __name__ == "__main__":
  absltest.main()
