"""The MovieLens adapter on the bundled set and on every public form."""

import functools
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from recjax.data import movielens, movielens_source, text
from recjax.data.columns import Columns
from recjax.data.vocabulary import load_values
from recjax.errors import UserError
from recjax.schema import SPLITS, TOKENS

_TITLES = {
  1: ("Toy Story (1995)", ["Animation", "Comedy"]),
  2: ("Heat: A Story, of Two (1995)", ["Action"]),
  7: ("Nothing Known", []),
}


def small_ratings(seed=0, rows=200):
  """(user, film, stars, seconds) of users 1, 3, 5 and so on."""
  rng = np.random.default_rng(seed)
  user = 1 + 2 * rng.integers(0, 8, rows)
  film = rng.choice([1, 2, 7], rows)
  stars = rng.integers(1, 6, rows)
  return np.stack([user, film, stars, 1000 + rng.integers(0, 90, rows)], 1)


def write_archive(folder, form):
  """An archive as GroupLens describes it."""
  rows = small_ratings().tolist()
  genres = movielens_source._GENRES_100K
  if form == "csv":
    lines = ["userId,movieId,rating,timestamp"]
    lines += [f"{u},{m},{s}.0,{t}" for u, m, s, t in rows]
    films = ["movieId,title,genres"]
    for m, (title, names) in _TITLES.items():
      films.append(f'{m},"{title}",{"|".join(names) or "(no genres listed)"}')
    files = {"ratings.csv": lines, "movies.csv": films}
  elif form == "dat":
    lines = [f"{u}::{m}::{s}::{t}" for u, m, s, t in rows]
    films = [f"{m}::{t}::{'|'.join(g)}" for m, (t, g) in _TITLES.items()]
    files = {"ratings.dat": lines, "movies.dat": films}
  else:
    lines = [f"{u}\t{m}\t{s}\t{t}" for u, m, s, t in rows]
    films = []
    for m, (title, names) in _TITLES.items():
      flags = "|".join(str(int(g in names)) for g in genres)
      films.append(f"{m}|{title}|01-Jan-1995||http://imdb|{flags}")
    files = {"u.data": lines, "u.item": films}
  for name, content in files.items():
    path = pathlib.Path(folder) / name
    path.write_text("\n".join(content) + "\n", encoding="latin-1")


def prepare(**options):
  """Split -> all rows, and the vocabularies."""
  with tempfile.TemporaryDirectory() as folder:
    movielens.prepare(movielens.Config(**options), folder)
    columns = Columns(folder)
    data = {
      split: columns.read(split, np.arange(columns.num_rows[split]))
      for split in SPLITS
    }
    names = {f.vocab for f in columns.schema.id_features}
    return data, {n: load_values(folder, n).to_pylist() for n in names}


@functools.cache
def bundled(split="time"):
  return prepare(split=split)


class MovieLensTest(parameterized.TestCase):
  @parameterized.parameters("csv", "dat", "u.data")
  def test_every_public_form_gives_the_same_ratings(self, form):
    with tempfile.TemporaryDirectory() as folder:
      write_archive(folder, form)
      found = movielens_source.find_source(folder)
      ratings = movielens_source.read_ratings(found.ratings)
      movies = movielens_source.read_movies(found.movies, ratings.movie_ids)
      data, values = prepare(root=folder, max_len=3)
    rows = small_ratings()
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0], rows[:, 3]))]
    np.testing.assert_array_equal(ratings.user_ids[ratings.user], rows[:, 0])
    np.testing.assert_array_equal(ratings.movie_ids[ratings.movie], rows[:, 1])
    np.testing.assert_array_equal(ratings.rating, rows[:, 2])
    np.testing.assert_array_equal(ratings.time, rows[:, 3])
    self.assertEqual(movies.genres, [g for _, g in _TITLES.values()])
    self.assertEqual(movies.year.tolist(), [1995, 1995, 0])
    self.assertEqual(values["movie_id"], [1, 2, 7])
    self.assertEqual(values["genres"], ["Action", "Animation", "Comedy"])
    self.assertEqual(sum(b.size for b in data.values()), 200)

  def test_the_bundled_set(self):
    data, values = bundled()
    sizes = {split: batch.size for split, batch in data.items()}
    self.assertEqual(sum(sizes.values()), 100_374)
    for split in ("valid", "test"):
      self.assertBetween(sizes[split], 9_900, 10_200)
    self.assertBetween(data["train"].labels["positive"].mean(), 0.45, 0.55)
    folder = movielens_source.find_source("").ratings.parent
    for name in ("LICENSE", "README.md"):
      self.assertIn("GroupLens", (folder / name).read_text())
    self.assertLen(values["genres"], 20 if "IMAX" in values["genres"] else 19)

  def test_a_part_begins_after_the_one_before(self):
    ratings = movielens_source.read_ratings(
      movielens_source.find_source("").ratings
    )
    part = movielens.split_parts(ratings, movielens.Config())
    for number in (1, 2):
      before, after = ratings.time[part < number], ratings.time[part >= number]
      self.assertLess(before.max(), after.min())

  def test_each_users_last_ratings(self):
    ratings = movielens_source.read_ratings(
      movielens_source.find_source("").ratings
    )
    part = movielens.split_parts(ratings, movielens.Config(split="user"))
    for user in range(0, len(ratings.user_ids), 50):
      mine = part[ratings.user == user]
      self.assertTrue(np.all(np.diff(mine) >= 0))
      self.assertAlmostEqual(np.mean(mine == 2), 0.1, delta=1.01 / len(mine))
      self.assertAlmostEqual(np.mean(mine == 0), 0.8, delta=1.01 / len(mine))

  @parameterized.parameters("items", "exposure")
  def test_films_left_out_are_unknown_in_every_way(self, split):
    data, _ = bundled(split)
    for name in ("valid", "test"):
      batch = data[name]
      self.assertEqual(batch.ids["movie_id"].max(), 0)
      self.assertEqual(batch.ids["item_exposures"].max(), 1)
      self.assertFalse(batch.id_mask["pinnacle_users"].any())
      # Of their users much is known.
      self.assertGreater(batch.id_mask["history"].mean(), 0.5)
      self.assertGreater((batch.ids["user_id"] > 0).mean(), 0.99)
    self.assertTrue(np.all(data["train"].ids["movie_id"] > 0))

  def test_lists_hold_earlier_ratings_of_others(self):
    data, values = bundled()
    batch = data["train"]
    found = movielens_source.find_source("")
    ratings = movielens_source.read_ratings(found.ratings)
    rng = np.random.default_rng(0)
    training = np.flatnonzero(
      movielens.split_parts(ratings, movielens.Config()) == 0
    )
    num_users = 0
    for place in rng.choice(len(training), 300, replace=False):
      row = training[place]
      earlier = ratings.time < ratings.time[row]
      same = earlier & (ratings.movie == ratings.movie[row])
      for name, good in (("pinnacle_users", True), ("negative_users", False)):
        users = same & ((ratings.rating >= 4) == good)
        allowed = set(ratings.user_ids[ratings.user[users]].tolist())
        allowed -= {int(ratings.user_ids[ratings.user[row]])}
        ids = batch.ids[name][place][batch.id_mask[name][place]]
        given = [values["user_id"][i - 1] for i in ids.tolist()]
        self.assertLen(given, min(len(allowed), 10))
        self.assertContainsSubset(given, allowed)
        self.assertLen(set(given), len(given))
        num_users += len(given)
      mine = earlier & (ratings.user == ratings.user[row])
      self.assertEqual(
        batch.id_mask["history"][place].sum(), min(mine.sum(), 50)
      )
    self.assertGreater(num_users, 1000)

  def test_short_lists_borrow_from_popular_films_alike(self):
    own, values = bundled()
    filled, _ = prepare(pseudo_neighbors=3)
    num_borrowed = 0
    for split in SPLITS:
      before, after = (
        (x[split].ids["pinnacle_users"], x[split].id_mask["pinnacle_users"])
        for x in (own, filled)
      )
      full = before[1].all(axis=1)
      np.testing.assert_array_equal(before[0][full], after[0][full])
      self.assertTrue(np.all(after[1].sum(1) >= before[1].sum(1)))
      num_borrowed += (after[1].sum(1) > before[1].sum(1)).sum()
      for old, new, old_mask, new_mask, user in zip(
        before[0],
        after[0],
        before[1],
        after[1],
        filled[split].ids["user_id"],
        strict=True,
      ):
        old, new = old[old_mask].tolist(), new[new_mask].tolist()
        self.assertEqual(new[len(new) - len(old) :], old)
        self.assertTrue(user == 0 or user not in new)
      np.testing.assert_array_equal(
        own[split].ids["negative_users"], filled[split].ids["negative_users"]
      )
    self.assertGreater(num_borrowed, 1000)

  def test_the_released_protocol_holds_the_target(self):
    for protocol, expected in (("causal", 0.0), ("released", 1.0)):
      data, _ = prepare(protocol=protocol)
      batch = data["train"]
      positive = batch.labels["positive"] == 1
      last = batch.id_mask["positive_history"].sum(1) - 1
      found = np.take_along_axis(
        batch.ids["positive_history"], np.maximum(last, 0)[:, None], 1
      )[:, 0]
      share = np.mean((found == batch.ids["movie_id"])[positive])
      self.assertAlmostEqual(share, expected, delta=0.001)

  @parameterized.parameters(
    ({"split": "half"}, "unknown data.split 'half'"),
    ({"feedback": "best"}, "unknown data.feedback 'best'"),
    ({"valid": 0.6, "test": 0.5}, "leave ratings for training"),
    ({"max_len": 0}, "max_len must be at least 1"),
    ({"pseudo_neighbors": -1}, "pseudo_neighbors must be at least 0"),
    (
      {"pseudo_neighbors": 2, "protocol": "released"},
      "no part of the released evaluation",
    ),
    ({"root": "/nowhere"}, "/nowhere holds none of ratings.parquet"),
  )
  def test_mistakes_in_options(self, options, message):
    with self.assertRaisesRegex(UserError, message):
      movielens.sources(movielens.Config(**options))

  @parameterized.parameters(
    ("1,1,9.0,5", "row 1: 9.0 is no rating"),
    ("1,1,,5", "column rating, row 1: a value is missing"),
    ("1,x,3.0,5", "ratings.csv.*x"),
    ("", "holds no rating"),
  )
  def test_mistakes_in_files_name_the_place(self, line, message):
    with tempfile.TemporaryDirectory() as folder:
      write_archive(folder, "csv")
      path = pathlib.Path(folder) / "ratings.csv"
      path.write_text(f"userId,movieId,rating,timestamp\n{line}\n")
      with self.assertRaisesRegex(UserError, message):
        prepare(root=folder)


class TextTest(absltest.TestCase):
  def test_documents_and_the_titles_that_a_user_last_liked(self):
    with tempfile.TemporaryDirectory() as source:
      write_archive(source, "csv")
      with tempfile.TemporaryDirectory() as folder:
        movielens.prepare(
          movielens.Config(
            root=source, text=True, text_vocab_size=400, query_len=9
          ),
          folder,
        )
        columns = Columns(folder)
        tokenizer = text.load_tokenizer(folder)
        parts = [
          columns.read(split, np.arange(columns.num_rows[split]))
          for split in SPLITS
        ]
        films = load_values(folder, "movie_id").to_pylist()
    titles = {m: t.split(" (")[0] for m, (t, _) in _TITLES.items()}
    known = {m: tokenizer.encode(t).ids for m, t in titles.items()}
    lengths = set()
    for batch in parts:
      for i in range(batch.size):
        row = batch.ids["movie_id"][i]
        held = batch.tokens["document"][i][batch.token_mask["document"][i]]
        film = films[row - 1]
        expected = " ".join([titles[film], *_TITLES[film][1]]).lower()
        self.assertEqual(tokenizer.decode(held.tolist()).strip(), expected)
        liked = batch.ids["positive_history"][i]
        liked = liked[batch.id_mask["positive_history"][i]]
        tokens = [t for m in liked for t in known[films[m - 1]]][-9:]
        held = batch.tokens["query"][i][batch.token_mask["query"][i]]
        self.assertEqual(held.tolist(), tokens)
        lengths.add(len(tokens))
    self.assertContainsSubset({0, 9}, lengths)
    self.assertEqual(
      columns.schema.vocab_sizes[TOKENS], len(tokenizer.get_vocab())
    )
    np.testing.assert_array_equal(
      parts[0].groups["query"], parts[0].groups["group"]
    )


if __name__ == "__main__":
  absltest.main()
