"""MovieLens: ratings of films, with histories and feedback lists.

Without `root` the adapter reads the small set that ships with the package (604
users, 1996 to 2018). With `root` it reads an unpacked archive, from ml-100k to
ml-32m and ml-latest; `recjax.data.movielens_source` has their forms.

A row is a rating. `positive` is 1 from 4 stars on, else 0: rows are no
exposures, and negatives are films that were seen and liked less. `split`:

* `time`: the last tenth of the ratings is the test part, the tenth before it
  validation; equal times stay together.
* `user`: the same for the ratings of each user alone. Most users rate all
  their films within days, so that under `time` nearly all of them are new.
* `items`: a tenth of the films each, drawn by `seed`, with all their ratings:
  nothing is known of a film in these parts but its genres and year.
* `exposure`: films with fewer than `cold_below` ratings in all, half of them
  for validation and half for test, with all their ratings.

What a row sees of the past follows `recjax.data.causal`: strictly earlier
events of parts that are open to it. Features: ids of user and film, genres,
year of release, counts and smoothed rates of positives as log odds, the films
rated before and those rated well, and who gave a film its feedback
(`recjax.data.feedback`): `pinnacle_users` by their stars, `negative_users` at
random, with `feedback="recent"` the latest of both. The choices are ours.

With `text` two columns of tokens are added: `document`, title and genres of the
film, and, since nobody typed a query, `query`: the titles of the films that the
user last rated well, as far back as `query_len` tokens go. A session is then
the user. Subwords are those of the films of training rows.

Source: Harper and Konstan, ACM TiiS 5, 4 (2015), doi 10.1145/2827872.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
from etils import epath

from recjax.data import causal, movielens_source, pseudo_feedback
from recjax.data import feedback as feedback_lib
from recjax.data import text as text_lib
from recjax.data.columns import Block, ColumnWriter
from recjax.data.vocabulary import save_values
from recjax.errors import UserError
from recjax.schema import (
  SPLITS,
  TOKENS,
  Feature,
  Label,
  Roles,
  Schema,
  Split,
  suggest,
)

VERSION = 2

RULES = ("time", "user", "items", "exposure")
FEEDBACK = ("pinnacle", "recent")
_LISTS = ("history", "positive_history")
_USER_LISTS = ("pinnacle_users", "negative_users")
_BUCKETS = ("item_exposures", "item_positives")
_DENSE = (
  "positive_rate_user",
  "positive_rate_movie",
  "count_user",
  "count_movie",
)
_PRIOR_STRENGTH = 10.0


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the adapter.

  Attributes:
    root: Folder of an unpacked archive; empty for the bundled set.
    split: `time`, `user`, `items` or `exposure`.
    valid: Share of ratings (or films) of the validation part, in (0, 1).
    test: Likewise of the test part.
    cold_below: Ratings from which a film is no cold one; for `exposure`.
    seed: Of the draw of films, and of negative feedback.
    positive_from: Stars from which a rating is positive.
    max_len: Events kept of a history.
    feedback: `pinnacle` or `recent`.
    feedback_len: Users kept of each feedback list.
    pseudo_neighbors: Popular films alike, by genres, whose users fill up short
      lists of `pinnacle_users`; see `recjax.data.pseudo_feedback`. 0 for none.
    protocol: `causal`, or `released`; see `recjax.data.feedback`.
    text: Whether there are columns of text.
    text_vocab_size: Most subwords.
    document_len: Tokens kept of a film's text.
    query_len: Tokens kept of a query.
  """

  root: str = ""
  split: str = "time"
  valid: float = 0.1
  test: float = 0.1
  cold_below: int = 10
  seed: int = 0
  positive_from: float = 4.0
  max_len: int = 50
  feedback: str = "pinnacle"
  feedback_len: int = 10
  pseudo_neighbors: int = 0
  protocol: str = "causal"
  text: bool = False
  text_vocab_size: int = 4000
  document_len: int = 24
  query_len: int = 24

  def __post_init__(self):
    for name, allowed in (
      ("split", RULES),
      ("feedback", FEEDBACK),
      ("protocol", feedback_lib.PROTOCOLS),
    ):
      value = getattr(self, name)
      if value not in allowed:
        raise UserError(
          f"unknown data.{name} {value!r}" + suggest(value, allowed)
        )
    least_1 = ("cold_below", "max_len", "feedback_len", "document_len")
    for name in (*least_1, "query_len"):
      if getattr(self, name) < 1:
        raise UserError(
          f"data.{name} must be at least 1, got {getattr(self, name)}"
        )
    if self.seed < 0:
      raise UserError(f"data.seed must be at least 0, got {self.seed}")
    pseudo_feedback.check(self.pseudo_neighbors, self.protocol)
    if not (self.valid > 0 and self.test > 0 and self.valid + self.test < 1):
      raise UserError(
        f"data.valid ({self.valid}) and data.test ({self.test}) must be shares "
        "in (0, 1) that leave ratings for training"
      )


def sources(config: Config) -> list[pathlib.Path]:
  """The files that `prepare` reads."""
  found = movielens_source.find_source(config.root)
  return [found.ratings, found.movies]


def estimate_bytes(config: Config) -> int:
  """About how much disk the prepared data needs."""
  ratings = movielens_source.find_source(config.root).ratings
  # 25 bytes a row of text, 4 of Parquet; prepared, one takes about 200.
  factor = 50 if ratings.suffix == ".parquet" else 8
  return ratings.stat().st_size * factor


def prepare(config: Config, directory: epath.PathLike) -> None:
  """Writes the data set with `recjax.data.columns.ColumnWriter`.

  Raises:
    UserError: If a file is missing or broken, or a part would be empty.

  Example:
    >>> prepare(Config(), "/tmp/movielens")               # doctest: +SKIP
  """
  found = movielens_source.find_source(config.root)
  ratings = movielens_source.read_ratings(found.ratings)
  movies = movielens_source.read_movies(found.movies, ratings.movie_ids)
  part = split_parts(ratings, config)
  for number, split in enumerate(SPLITS):
    if not np.any(part == number):
      raise UserError(
        f"{found.ratings}: the {split} part would have no rating; change "
        "data.split or its shares"
      )
  schema = _schema(config)
  writer = ColumnWriter(directory, schema)
  data = _Data(ratings, movies, part, config)
  lists = data.write_lists(writer)
  sizes = {}
  if config.text:
    lists |= data.write_texts(writer, directory)
    sizes[TOKENS] = data.num_tokens
  dense, buckets = data.numbers()
  ids = data.ids() | buckets
  labels = {
    "positive": data.positive.astype(np.float32),
    "rating": ratings.rating,
  }
  for number, split in enumerate(SPLITS):
    rows = np.flatnonzero(part == number)
    writer.append(
      split,
      Block(
        dense=dense[rows],
        ids={name: column[rows] for name, column in ids.items()},
        lists={name: (s[rows], k[rows]) for name, (s, k) in lists.items()},
        vectors={},
        labels={name: column[rows] for name, column in labels.items()},
        groups={
          name: ratings.user[rows]
          for name in ("group", *(("query",) if config.text else ()))
        },
      ),
    )
  sizes |= {name: len(values) + 1 for name, values in data.values.items()}
  writer.finish(dataclasses.replace(schema, vocab_sizes=sizes))
  for name, values in data.values.items():
    save_values(directory, name, values)


def split_parts(
  ratings: movielens_source.Ratings, config: Config
) -> np.ndarray:
  """0, 1 or 2 for each rating: training, validation, test."""
  if config.split == "time":
    size = len(ratings.time)
    edges = np.array([1 - config.valid - config.test, 1 - config.test])
    cuts = ratings.time[np.minimum((edges * size).astype(int), size - 1)]
    return np.searchsorted(cuts, ratings.time, side="right")
  if config.split == "user":
    order = np.argsort(ratings.user, kind="stable")
    count = np.bincount(ratings.user)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - np.repeat(
      np.cumsum(count) - count, count
    )
    share = (place + 1) / count[ratings.user]
    edges = [1 - config.valid - config.test, 1 - config.test]
    return np.digitize(share, edges, right=True)
  num = len(ratings.movie_ids)
  rng = np.random.default_rng(config.seed)
  part = np.zeros(num, np.int64)
  if config.split == "items":
    order = rng.permutation(num)
    num_test, num_valid = round(config.test * num), round(config.valid * num)
    part[order[:num_test]] = 2
    part[order[num_test : num_test + num_valid]] = 1
  else:
    cold = np.bincount(ratings.movie, minlength=num) < config.cold_below
    cold = rng.permutation(np.flatnonzero(cold))
    part[cold[: len(cold) // 2]] = 1
    part[cold[len(cold) // 2 :]] = 2
  return part[ratings.movie]


def _schema(config: Config) -> Schema:
  def sequence(name, vocabulary, max_len):
    return Feature(name, "sequence", vocabulary=vocabulary, max_len=max_len)

  return Schema(
    features=(
      *(Feature(n, "sparse") for n in ("user_id", "movie_id", "year")),
      Feature("genres", "sparse", multi=True),
      *(Feature(name, "sparse") for name in _BUCKETS),
      *(sequence(name, "movie_id", config.max_len) for name in _LISTS),
      *(sequence(n, "user_id", config.feedback_len) for n in _USER_LISTS),
      *(Feature(name, "dense") for name in _DENSE),
      *(
        (
          Feature("document", "text", max_len=config.document_len),
          Feature("query", "text", max_len=config.query_len),
        )
        if config.text
        else ()
      ),
    ),
    labels=(Label("positive"), Label("rating", "real", unit="stars")),
    roles=Roles(
      user="user_id",
      item="movie_id",
      time="timestamp",
      group="user_id",
      query="user_id" if config.text else None,
      popularity="item_positives",
    ),
    split=Split(by="time", column="timestamp"),
  )


class _Data:
  """Everything that rows are made of."""

  def __init__(self, ratings, movies, part, config: Config):
    self.ratings, self.movies, self.config = ratings, movies, config
    self.part = part
    self.positive = ratings.rating >= config.positive_from
    self.log = feedback_lib.Log(ratings.user, ratings.movie, ratings.time, part)
    training = part == 0
    self.values: dict[str, pa.Array] = {}
    self._user = self._number(
      "user_id", ratings.user_ids, ratings.user, training
    )
    movie = ratings.movie
    self._movie = self._number("movie_id", ratings.movie_ids, movie, training)
    self._year = self._number("year", movies.year, movie, training)
    for name in _BUCKETS:
      self.values[name] = pa.array(feedback_lib.BUCKET_NAMES)

  def _number(self, name: str, values, owner, training) -> np.ndarray:
    """Vocabulary row of each value: 0 unless a training row holds it."""
    seen = np.zeros(len(values), bool)
    seen[owner[training]] = True
    known = np.unique(values[seen])
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    self.values[name] = pa.array(known.astype(np.int64))
    return np.where(known[at] == values, at + 1, 0).astype(np.int32)

  def ids(self) -> dict[str, np.ndarray]:
    """Rows of the single-valued features."""
    user, movie = self.ratings.user, self.ratings.movie
    return {
      "user_id": self._user[user],
      "movie_id": self._movie[movie],
      "year": self._year[movie],
    }

  def numbers(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Dense columns, and the buckets of what is known of the film."""
    log, size = self.log, len(self.part)
    known = np.stack([np.ones(size), self.positive], axis=1).astype(np.int64)
    sums = [
      causal.visible_sums(key, log.time, log.part, known)
      for key in (np.zeros(size, np.int64), log.user, log.item)
    ]
    # Only the first rows of all feel the guess of 0.5.
    overall = causal.smoothed_rate(sums[0][:, 1], sums[0][:, 0], 0.5, 10.0)
    rates = [
      causal.log_odds(
        causal.smoothed_rate(s[:, 1], s[:, 0], overall, _PRIOR_STRENGTH)
      )
      for s in sums[1:]
    ]
    # Capped: what only grows with time takes new values in the test part.
    counts = [np.log1p(np.minimum(s[:, 0], 50)) for s in sums[1:]]
    dense = np.stack([*rates, *counts], axis=1).astype(np.float32)
    return dense, {
      name: (feedback_lib.bucket(sums[2][:, i]) + 1).astype(np.int32)
      for i, name in enumerate(_BUCKETS)
    }

  def write_lists(self, writer: ColumnWriter):
    """Writes all lists; returns each feature's start and length by row."""
    config, size = self.config, len(self.part)
    lists = {"genres": self._write_genres(writer)}
    for name, chosen in (
      ("history", np.ones(size, bool)),
      ("positive_history", self.positive),
    ):
      events, start, length = feedback_lib.history_slices(
        self.log, chosen, protocol=config.protocol
      )
      first = writer.append_values(
        name, self._movie[self.ratings.movie[events]]
      )
      lists[name] = first + start, length.astype(np.int32)
    scores = {
      "pinnacle_users": self.ratings.rating.astype(np.float64),
      "negative_users": feedback_lib.random_score(size, config.seed),
    }
    for name, chosen in zip(
      _USER_LISTS, (self.positive, ~self.positive), strict=True
    ):
      users, length = feedback_lib.feedback_lists(
        self.log,
        chosen,
        scores[name] if config.feedback == "pinnacle" else None,
        max_len=config.feedback_len,
        protocol=config.protocol,
        sees_itself=chosen & self.positive,
      )
      if name == "pinnacle_users" and config.pseudo_neighbors:
        users, length = self._borrow(scores[name], users, length)
      held = np.arange(config.feedback_len) < length[:, None]
      first = writer.append_values(name, self._user[users[held]])
      start = first + np.cumsum(length) - length
      lists[name] = start, length.astype(np.int32)
    return lists

  def _borrow(self, score, users, length):
    """Fills short lists from the nearest popular films by genres."""
    names = sorted({name for held in self.movies.genres for name in held})
    content = np.array(
      [[name in held for name in names] for held in self.movies.genres], float
    )
    score = score if self.config.feedback == "pinnacle" else None
    return pseudo_feedback.fill(
      self.log,
      self.positive,
      score,
      users,
      length,
      content,
      self.config.pseudo_neighbors,
    )

  def write_texts(self, writer: ColumnWriter, directory: epath.PathLike):
    """Writes all tokens; returns start and length of texts by row."""
    movie, config = self.ratings.movie, self.config
    titles, genres = self.movies.titles, self.movies.genres
    documents = [
      " ".join([title, *names])
      for title, names in zip(titles, genres, strict=True)
    ]
    seen = np.unique(movie[self.part == 0]).tolist()
    tokenizer = text_lib.train_tokenizer(
      sorted({documents[m] for m in seen}), config.text_vocab_size
    )
    text_lib.save_tokenizer(directory, tokenizer)
    self.num_tokens = tokenizer.get_vocab_size()
    start, length = text_lib.TokenStore(tokenizer, writer).add(
      "document", config.document_len, pa.array(documents, pa.large_string())
    )
    return {
      "document": (start[movie], length[movie].astype(np.int32)),
      "query": self._write_queries(writer, tokenizer),
    }

  def _write_queries(self, writer: ColumnWriter, tokenizer):
    """Tokens of titles one after the other, as events follow each other.

    So a row's query is a slice that ends with its user's last event.
    """
    events, first, count = feedback_lib.history_slices(
      self.log, self.positive, protocol=self.config.protocol
    )
    tokens = [
      np.array(found.ids, np.int32)
      for found in tokenizer.encode_batch(self.movies.titles)
    ]
    films = self.ratings.movie[events]
    lengths = np.array([len(found) for found in tokens], np.int64)[films]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.concatenate([np.zeros(0, np.int32), *(tokens[f] for f in films)])
    begin = writer.append_values("query", flat)
    start, end = ends[first], ends[first + count]
    length = np.minimum(end - start, self.config.query_len)
    return begin + end - length, length.astype(np.int32)

  def _write_genres(self, writer: ColumnWriter):
    """Genres of a film, known ones alone where a training row has them."""
    movie = self.ratings.movie
    seen = np.unique(movie[self.part == 0])
    names = sorted({g for m in seen.tolist() for g in self.movies.genres[m]})
    row = {name: number + 1 for number, name in enumerate(names)}
    self.values["genres"] = pa.array(names, pa.string())
    rows = [[row.get(g, 0) for g in held] for held in self.movies.genres]
    length = np.array([len(held) for held in rows], np.int64)
    flat = np.array([r for held in rows for r in held], np.int32)
    start = writer.append_values("genres", flat) + np.cumsum(length) - length
    return start[movie], length[movie].astype(np.int32)
