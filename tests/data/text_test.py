"""Text columns, from raw strings to the tokens of a batch."""

import json
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from table_case import SCHEMA, TableTestCase, small_table

from recjax.data import columns as columns_lib
from recjax.data import text
from recjax.errors import UserError
from recjax.schema import TOKENS

TITLES = ["Red wine"] * 3 + ["Zebra crossing", "zebra", "red house", None, ""]
QUERIES = ["wine"] * 5 + ["house", "red", "a long one of many more words"]


def text_schema(max_len=6):
  schema = json.loads(json.dumps(SCHEMA))
  schema["features"]["title"] = {"kind": "text", "max_len": max_len}
  schema["features"]["query"] = {"kind": "text", "max_len": 4}
  return schema


def decode(tokenizer, row, mask):
  return tokenizer.decode(row[mask].tolist()).strip()


class TextTest(TableTestCase):
  def prepare(self, max_len=6):
    data = small_table(title=TITLES, query=QUERIES)
    return self.open(data, text_schema(max_len))

  def test_every_row_has_the_tokens_of_its_text(self):
    columns = self.prepare(max_len=60)
    tokenizer = text.load_tokenizer(columns.directory)
    parts = ["train"] * 3 + ["test", "valid", "train", "train", "test"]
    for split in ("train", "valid", "test"):
      batch = columns.read(split, np.arange(columns.num_rows[split]))
      wanted = [t for t, p in zip(TITLES, parts, strict=True) if p == split]
      tokens, mask = batch.tokens["title"], batch.token_mask["title"]
      self.assertEqual(tokens.dtype, np.int32)
      self.assertEqual(tokens.shape, (len(wanted), 60))
      self.assertEqual(
        [decode(tokenizer, *row) for row in zip(tokens, mask, strict=True)],
        [(title or "").lower() for title in wanted],
      )
      self.assertFalse(tokens[~mask].any())
      self.assertTrue((tokens[mask] > 0).all())
      self.assertNotIn("title", batch.ids)
      self.assertNotIn("title", batch.id_mask)
    sizes = columns.schema.vocab_sizes
    self.assertEqual(sizes[TOKENS], tokenizer.get_vocab_size())

  def test_the_first_tokens_of_a_long_text_are_kept(self):
    columns = self.prepare()
    tokenizer = text.load_tokenizer(columns.directory)
    batch = columns.read("test", np.arange(2))
    wanted = tokenizer.encode(QUERIES[-1]).ids
    self.assertGreater(len(wanted), 4)
    self.assertEqual(batch.tokens["query"][1].tolist(), wanted[:4])
    self.assertTrue(batch.token_mask["query"][1].all())

  def test_subwords_are_those_of_the_training_part_alone(self):
    columns = self.prepare()
    tokens = text.load_tokenizer(columns.directory).get_vocab()
    self.assertIn("Ġred", tokens)
    self.assertFalse([token for token in tokens if "ebra" in token])
    # A zebra is spelt from its bytes.
    batch = columns.read("valid", np.arange(1))
    self.assertEqual(batch.token_mask["title"].sum(), len(" zebra"))

  def test_a_text_is_stored_once(self):
    columns = self.prepare()
    manifest = json.loads(
      (pathlib.Path(columns.directory) / "manifest.json").read_text()
    )
    tokenizer = text.load_tokenizer(columns.directory)
    distinct = {t for t in TITLES if t is not None}
    self.assertEqual(
      manifest["num_values"]["title"],
      sum(min(6, len(tokenizer.encode(t).ids)) for t in distinct),
    )

  def test_a_padded_batch_keeps_tokens_and_masks(self):
    batch = self.prepare().read("test", np.arange(2))
    padded = columns_lib.pad_batch(batch, 5)
    np.testing.assert_array_equal(
      padded.tokens["title"][:2], batch.tokens["title"]
    )
    self.assertFalse(padded.token_mask["title"][2:].any())

  def test_csv_has_the_same_tokens(self):
    expected = self.prepare().read("train", np.arange(5)).tokens
    schema = text_schema()
    for name in ("history", "content"):
      schema["features"][name]["separator"] = " "
    data = small_table(title=TITLES, query=QUERIES)
    for name in ("history", "content"):
      data[name] = [" ".join(map(str, row or [])) for row in data[name]]
    actual = self.open(data, schema, "log.csv").read("train", np.arange(5))
    for name, tokens in expected.items():
      np.testing.assert_array_equal(actual.tokens[name], tokens)

  def test_numbers_are_no_text(self):
    with self.assertRaisesRegex(UserError, "'title'.*int64.*strings"):
      self.open(small_table(title=range(8), query=QUERIES), text_schema())

  def test_a_schema_without_a_length_is_refused(self):
    schema = text_schema()
    del schema["features"]["title"]["max_len"]
    with self.assertRaisesRegex(UserError, "'title'.*a text needs \"max_len\""):
      self.open(small_table(title=TITLES, query=QUERIES), schema)


class TokenizerTest(parameterized.TestCase):
  def test_another_process_numbers_the_subwords_alike(self):
    # Each process has its own seed of hash tables.
    program = (
      "from recjax.data import text;"
      "corpus = [f'{a}{b} {c}' for a in 'abcde' for b in 'xyz' for c in 'pq'];"
      "print(text.train_tokenizer(corpus, 300).to_str())"
    )
    outputs = {
      subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
      ).stdout
      for _ in range(2)
    }
    self.assertLen(outputs, 1)

  @parameterized.parameters("<pad>", "東京 <pad>", "Ａ ﬁ", "Ünïcode\n\ttabs")
  def test_any_text_has_tokens_and_none_is_padding(self, value):
    tokenizer = text.train_tokenizer(["red wine"], 300)
    ids = tokenizer.encode(value).ids
    self.assertNotEmpty(ids)
    self.assertNotIn(0, ids)

  def test_a_saved_one_reads_the_same(self):
    tokenizer = text.train_tokenizer(["red wine", "red house"], 300)
    folder = self.enter_context(tempfile.TemporaryDirectory())
    text.save_tokenizer(folder, tokenizer)
    loaded = text.load_tokenizer(folder)
    for value in ("Red HOUSE", "<pad>", "zebra"):
      self.assertEqual(loaded.encode(value).ids, tokenizer.encode(value).ids)

  def test_too_small_a_vocabulary_is_refused(self):
    with self.assertRaisesRegex(UserError, "text_vocab_size.*above 256"):
      text.train_tokenizer(["a"], 256)

  def test_a_missing_library_is_told_in_one_line(self):
    with (
      mock.patch.dict(sys.modules, {"tokenizers": None}),
      self.assertRaisesRegex(UserError, r"pip install 'recjax\[text\]'"),
    ):
      text.train_tokenizer(["a"], 300)


if __name__ == "__main__":
  absltest.main()
