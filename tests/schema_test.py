"""Sequences whose events have times and side columns."""

import copy

from absl.testing import absltest, parameterized

from recjax import method
from recjax.errors import UserError
from recjax.schema import Schema
from recjax.sparse import table

DATA = {
  "features": {
    "user": {"kind": "sparse"},
    "history": {
      "kind": "sequence",
      "vocabulary": "item",
      "max_len": 4,
      "separator": " ",
      "time": "history_time",
      "side": {"history_author": "author", "history_user": "user"},
    },
    "item": {"kind": "sparse"},
    "likes": {"kind": "sequence", "vocabulary": "item", "max_len": 2},
    "author": {"kind": "sparse"},
  },
  "labels": {"click": "binary"},
  "roles": {"time": "at"},
  "vocab_sizes": {"user": 3, "item": 5, "author": 7},
}
SCHEMA = Schema.from_dict(DATA)


class SequencesTest(parameterized.TestCase):
  def test_sides_are_features_right_after_their_sequence(self):
    names = [f.name for f in SCHEMA.id_features]
    sides = ["history_author", "history_user"]
    self.assertEqual(
      names, ["user", "history", *sides, "item", "likes", "author"]
    )
    self.assertEqual([f.name for f in SCHEMA.sequences], ["history", "likes"])
    found = SCHEMA.sides(SCHEMA.feature("history"))
    self.assertEqual([f.name for f in found], sides)
    self.assertEqual(SCHEMA.sides(SCHEMA.feature("likes")), ())
    for side in found:
      self.assertEqual(SCHEMA.feature(side.name), side)
      self.assertTrue(side.is_list and side.is_id)
      self.assertEqual((side.max_len, side.separator), (4, " "))
    self.assertEqual([f.vocab for f in found], ["author", "user"])

  def test_sides_share_the_rows_of_the_vocabulary_named(self):
    first = table.embedding_table(SCHEMA, 2).first_row
    self.assertEqual(first["history_author"], first["author"])
    self.assertEqual(first["history_user"], first["user"])
    self.assertEqual(first["history"], first["item"])

  def test_an_empty_batch_has_sides_and_ages(self):
    batch = method.empty_batch(SCHEMA, ("click",), 3)
    for name in ("history", "history_author", "history_user"):
      self.assertEqual(batch.ids[name].shape, (3, 4))
      self.assertEqual(batch.id_mask[name].shape, (3, 4))
    self.assertEqual(list(batch.event_age), ["history"])
    self.assertEqual(batch.event_age["history"].shape, (3, 4))

  def test_json_round_trip(self):
    self.assertEqual(Schema.from_dict(SCHEMA.to_dict()), SCHEMA)

  @parameterized.named_parameters(
    ("no_role", ("roles",), {}, 'name its column as "time" of "roles"'),
    ("time", ("features", "user", "time"), "t", '"time" is for sequences'),
    ("side", ("features", "user", "side"), {}, '"side" is for sequences'),
    (
      "time_is_a_feature",
      ("features", "history", "time"),
      "user",
      "time 'user' is a feature already",
    ),
    (
      "time_is_a_label",
      ("features", "history", "time"),
      "click",
      "time 'click' is a label already",
    ),
    (
      "side_is_a_feature",
      ("features", "history", "side"),
      {"item": "item"},
      "side 'item' is a feature already",
    ),
    (
      "side_is_its_time",
      ("features", "history", "side"),
      {"history_time": "item"},
      "side 'history_time' is its time already",
    ),
    (
      "side_twice",
      ("features", "likes", "side"),
      {"history_user": "user"},
      "side 'history_user' is a side of 'history' already",
    ),
    (
      "side_of_nothing",
      ("features", "history", "side"),
      {"history_author": "autor"},
      "'autor', which is no sparse feature; did you mean 'author'",
    ),
    (
      "side_of_a_number",
      ("features", "history", "side"),
      {"history_author": 3},
      "side has the wrong type: {'history_author': 3}",
    ),
    (
      "side_of_a_borrower",
      ("features", "author", "vocabulary"),
      "item",
      "'author' has no vocabulary of its own; name 'item'",
    ),
  )
  def test_mistakes(self, path, value, message):
    data = copy.deepcopy(DATA)
    entry = data
    for key in path[:-1]:
      entry = entry[key]
    entry[path[-1]] = value
    with self.assertRaisesRegex(UserError, message):
      Schema.from_dict(data, "log.json")


if __name__ == "__main__":
  absltest.main()
