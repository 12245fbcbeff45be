import json
import pathlib

import numpy as np
from absl.testing import absltest, parameterized

from recjax import export
from recjax import scorer as scorer_lib
from recjax.data import table
from recjax.schema import SPLITS
from tests.data import table_case

FORMS = {
  "strings": {},
  "integers": {
    "user": [2**62, -5, 2**62, -5, 7, -5, None, None],
    "shop": [1, 2, 1, 3, None, 2, 1, 1],
    "genres": [["x", "y"], [""], None, ["z", None], [], ["y"], ["y"], ["é"]],
  },
  "a_string_history_of_integer_items": {
    "history": ["", "30", "30 10 20 10", "40 99", None, "50", "10", "7"],
  },
  "texts_of_all_lengths": {
    "user": ["", "ß", "", "b\0", "日本", "日本" * 99, None, "b"],
    "item": [f"item {'x' * i}" for i in range(8)],
    "history": [["item "], ["?"], None, ["item x"], [], ["item xx"], [], []],
    "shop": ["é", "", "b\0", "b", None, "日" * 50, "b" * 99, "?"],
  },
  "floats_with_nan": {
    "item": [3.0, 1.0, float("nan"), 4.0, float("nan"), 9.0, 3.0, 2.0],
    "history": [[3.0], [1.0], [], [4.0], [5.0], [9.0], [], [2.0, 3.0]],
  },
  "booleans": {
    "user": [True, False, True, None, True, True, False, False],
    "price": [True, False, True, True, True, True, False, False],
  },
  "far_numbers": {"price": [1.0, 2, 3, 1e6, -1e6, 6, 7, 8]},
  "titles": {
    "title": [
      "Red wine",
      "red <pad>",
      None,
      "Zebra",
      "ﬁ 日本",
      "",
      "wine",
      "b\0",
    ],
  },
  "texts_of_numbers": {
    "price": ["1", " 2.5", "-3e2 ", "4", "5", "6", "7", "8"],
  },
}


def encoder_of(columns):
  """The encoder of an export, after its way through JSON."""
  description, tensors = export.describe_data(columns)
  description["dense"] = {
    name: values.tolist() for name, values in description["dense"].items()
  }
  path = pathlib.Path(columns.directory) / "tokenizer.json"
  return scorer_lib.Encoder(
    json.loads(json.dumps(description)),
    tensors,
    scorer_lib._read_tokenizer(path),
  )


def take(data, part):
  chosen = [i for i, p in enumerate(data["part"]) if p == part]
  return {name: [v[i] for i in chosen] for name, v in data.items()}


class EncoderTest(table_case.TableTestCase):
  @parameterized.named_parameters(
    (f"_{name}", form) for name, form in FORMS.items()
  )
  def test_raw_rows_become_what_the_pipeline_makes_of_them(self, form):
    schema = json.loads(json.dumps(table_case.SCHEMA))
    schema["features"]["history"]["separator"] = " "
    if "title" in form:
      schema["features"]["title"] = {"kind": "text", "max_len": 4}
    data = table_case.small_table(**form)
    name = "log.csv" if isinstance(data["price"][0], str) else "log.parquet"
    if name == "log.csv":
      del schema["features"]["content"], data["content"]
      data["history"] = [" ".join(map(str, h or ())) for h in data["history"]]
    columns = self.open(data, schema, name)
    encoder = encoder_of(columns)
    source = table.Config(
      str(self.directory / name), str(self.directory / "schema.json")
    )
    for split in SPLITS:
      actual = encoder.encode(take(data, split))
      batch = columns.read(split, np.arange(columns.num_rows[split]))
      expected = {"dense": batch.dense, "example_mask": batch.example_mask}
      for kind in ("ids", "id_mask", "vectors", "tokens", "token_mask"):
        arrays = getattr(batch, kind)
        expected |= {f"{kind}/{k}": v for k, v in arrays.items()}
      self.assertCountEqual(actual, expected)
      for key, value in expected.items():
        np.testing.assert_array_equal(actual[key], value, f"{split} {key}")
        self.assertEqual(actual[key].dtype, value.dtype, key)
      # The same of the rows that an export keeps, after their way through JSON.
      raw = json.dumps(table.read_raw(source, split, 3), allow_nan=False)
      kept = encoder.encode(json.loads(raw))
      for key, value in expected.items():
        np.testing.assert_array_equal(kept[key], value[:3], f"{split} {key}")

  def test_arrays_are_read_as_lists_are(self):
    data = table_case.small_table(user=list(range(8)))
    encoder = encoder_of(self.open(data))
    arrays = data | {
      "user": np.arange(8, dtype=np.uint8),
      "item": np.array(data["item"]),
      "price": np.array(data["price"], np.float32),
      "content": np.array(data["content"], np.float64),
    }
    actual, expected = encoder.encode(arrays), encoder.encode(data)
    for key, value in expected.items():
      np.testing.assert_array_equal(actual[key], value, key)

  def test_no_rows_are_no_mistake(self):
    data = table_case.small_table()
    arrays = encoder_of(self.open(data)).encode({name: [] for name in data})
    self.assertEqual({len(array) for array in arrays.values()}, {0})

  @parameterized.named_parameters(
    ("_among_texts", "user", ["u1", float("nan"), "u2"], ["u1", None, "u2"]),
    ("_large_ids", "shop", [2**53 + 1, float("nan")], [2**53 + 1, None]),
    ("_float32", "shop", [np.float32("nan"), np.float32(3)], [None, 3]),
    ("_in_a_list", "history", [[1, float("nan")], [2]], [[1, None], [2]]),
    ("_numbers_as_texts", "user", ["u1", 5.0, 7], ["u1", "5", "7"]),
  )
  def test_nan_and_floats_are_read_as(self, column, values, expected):
    data = table_case.small_table(
      user=["u1", "u2", "5", "7", None, "u1", "u2", "u1"],
      shop=[2**53, 2**53 + 1, 3, None, 2**53, 3, 3, 3],
    )
    encoder = encoder_of(self.open(data))
    found, wanted = (
      encoder.encode(
        {k: v[: len(values)] for k, v in data.items()} | {column: rows}
      )
      for rows in (values, expected)
    )
    for key, array in wanted.items():
      np.testing.assert_array_equal(found[key], array, key)
    if column == "shop":
      self.assertEqual(len(set(found["ids/shop"].tolist())), 2)

  @parameterized.named_parameters(
    ("_missing_column", {"user": ...}, "column 'user' is missing"),
    ("_short_column", {"item": [1]}, "'item' has 1 rows, 'user' has 2"),
    ("_no_number", {"price": ["a", 1]}, "'price'.*must be a number"),
    ("_nan", {"price": [1, None]}, "'price', row 2: None must be one finite"),
    ("_infinite", {"price": [1e300, 1]}, "'price', row 1: .*finite"),
    ("_fraction", {"item": [1.5, 2]}, "'item': an id must be"),
    ("_large", {"item": [2**63, 2]}, "'item': an id must be"),
    ("_text", {"item": ["x", "1"]}, "'item': .*64-bit integers"),
    ("_list", {"item": [[1], [2]]}, "'item': an id must be"),
    ("_ragged", {"item": [[1], [2, 3]]}, "'item': an id must be"),
    ("_no_list", {"history": [[], 3]}, "'history', row 2: must hold lists"),
    ("_no_separator", {"history": ["1", []]}, "'history', row 1: .*a list"),
    ("_width", {"content": [[1, 2], [1]]}, "'content', row 2: 1 numbers"),
    ("_vector_nan", {"content": [[1, 2], [1, float("nan")]]}, "row 2: must"),
    ("_vector_text", {"content": [[1, 2], ["a", 2]]}, "'content': .*2 numbers"),
  )
  def test_a_mistake_is_one_line(self, wrong, message):
    data = table_case.small_table(user=list(range(8)))
    encoder = encoder_of(self.open(data))
    rows = {name: values[:2] for name, values in data.items()} | wrong
    rows = {name: values for name, values in rows.items() if values is not ...}
    with self.assertRaisesRegex(scorer_lib.InputError, message) as caught:
      encoder.encode(rows)
    self.assertNotIn("\n", str(caught.exception))


if __name__ == "__main__":
  absltest.main()
