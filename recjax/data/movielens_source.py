"""Reads the files of MovieLens, in any of their public forms, into arrays.

| archive | files | form |
| --- | --- | --- |
| ml-100k | `u.data`, `u.item` | tab; bar, latin-1, 19 genre flags |
| ml-1m, ml-10m | `ratings.dat`, `movies.dat` | `::` |
| ml-20m and later, ml-latest* | `ratings.csv`, `movies.csv` | CSV, header |
| bundled | `ratings.parquet`, `movies.parquet` | columns of the CSV files |

Written from the archives' own descriptions; the tests run on files of that
form, and only the bundled set has been read for real.
"""

import dataclasses
import pathlib
import re

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from recjax.data import columns
from recjax.errors import UserError

RATINGS = ("ratings.parquet", "ratings.csv", "ratings.dat", "u.data")
_MOVIES = {
  "ratings.parquet": "movies.parquet",
  "ratings.csv": "movies.csv",
  "ratings.dat": "movies.dat",
  "u.data": "u.item",
}
_COLUMNS = ("userId", "movieId", "rating", "timestamp")
_GENRES_100K = (
  "unknown Action Adventure Animation Children's Comedy Crime Documentary "
  "Drama Fantasy Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War "
  "Western"
).split()
_NO_GENRES = "(no genres listed)"
_YEAR = re.compile(r"\((\d{4})\)\s*$")


@dataclasses.dataclass(frozen=True)
class Source:
  """The two files that are read."""

  ratings: pathlib.Path
  movies: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Ratings:
  """All ratings in the order of time, then user, then film.

  Attributes:
    user: Number of the user, from 0; `user_ids` holds what it stands for.
    movie: Number of the film; `movie_ids`.
    rating: Stars, 0.5 to 5.
    time: Seconds since 1970.
    user_ids: Sorted.
    movie_ids: Sorted.
  """

  user: np.ndarray
  movie: np.ndarray
  rating: np.ndarray
  time: np.ndarray
  user_ids: np.ndarray
  movie_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Movies:
  """What is known of each film, in the order of `Ratings.movie_ids`.

  Attributes:
    genres: Names, none where unknown.
    year: Of release; 0 where unknown.
    titles: Without the year; empty where unknown.
  """

  genres: list[list[str]]
  year: np.ndarray
  titles: list[str]


def find_source(root: str) -> Source:
  """The bundled files where `root` is empty, else those in that folder."""
  if not root:
    folder = pathlib.Path(columns.__file__).parent / "bundled/movielens_small"
    return Source(folder / "ratings.parquet", folder / "movies.parquet")
  folder = pathlib.Path(root).expanduser()
  for name in RATINGS:
    if (folder / name).is_file():
      movies = folder / _MOVIES[name]
      if not movies.is_file():
        raise UserError(
          f"data.root: {folder} holds {name} but no {movies.name}; give the "
          "folder of the whole archive"
        )
      return Source(folder / name, movies)
  raise UserError(
    f"data.root: {folder} holds none of {', '.join(RATINGS)}; give the folder "
    "of an unpacked MovieLens archive, or leave it empty for the bundled set"
  )


def read_ratings(path: pathlib.Path) -> Ratings:
  """The ratings, checked.

  Raises:
    UserError: If a column is missing, a value is no number, a rating lies
      outside [0.5, 5], or there is none.
  """
  try:
    table = _read_table(path)
  except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError) as error:
    raise UserError(
      f"{path}: {error}; is it the file of an archive?"
    ) from error
  if not table.num_rows:
    raise UserError(f"{path}: holds no rating")
  values = {}
  for name in _COLUMNS:
    column = table[name]
    if column.null_count:
      row = int(np.argmax(column.is_null().to_numpy())) + 1
      raise UserError(f"{path}: column {name}, row {row}: a value is missing")
    values[name] = column.to_numpy()
  rating = values["rating"].astype(np.float32)
  wrong = np.flatnonzero(~((rating >= 0.5) & (rating <= 5)))
  if len(wrong):
    raise UserError(
      f"{path}: column rating, row {wrong[0] + 1}: {rating[wrong[0]]} is no "
      "rating from 0.5 to 5"
    )
  time = values["timestamp"].astype(np.int64)
  user_ids, user = np.unique(values["userId"], return_inverse=True)
  movie_ids, movie = np.unique(values["movieId"], return_inverse=True)
  order = np.lexsort((movie, user, time))
  return Ratings(
    user[order], movie[order], rating[order], time[order], user_ids, movie_ids
  )


def read_movies(path: pathlib.Path, movie_ids: np.ndarray) -> Movies:
  """Genres and years of the films in `movie_ids`; unknown ones have none."""
  known = {movie: (title, genres) for movie, title, genres in _titles(path)}
  genres, titles, years = [], [], np.zeros(len(movie_ids), np.int64)
  for number, movie in enumerate(movie_ids.tolist()):
    title, names = known.get(movie, ("", []))
    year = _YEAR.search(title)
    genres.append(names)
    titles.append(_YEAR.sub("", title).strip())
    years[number] = int(year[1]) if year else 0
  return Movies(genres, years, titles)


def _read_table(path: pathlib.Path) -> pa.Table:
  if path.suffix == ".parquet":
    return pa.parquet.read_table(path, columns=list(_COLUMNS))
  types = dict(
    zip(
      _COLUMNS, (pa.int64(), pa.int64(), pa.float32(), pa.int64()), strict=True
    )
  )
  if path.suffix == ".csv":
    names, delimiter = None, ","
  elif path.suffix == ".dat":
    # "1::2::5::978300760": the values between are empty.
    names = [x for name in _COLUMNS for x in (name, f"after_{name}")][:-1]
    delimiter = ":"
  else:
    names, delimiter = list(_COLUMNS), "\t"
  return pa.csv.read_csv(
    path,
    pa.csv.ReadOptions(column_names=names, encoding="latin-1"),
    pa.csv.ParseOptions(delimiter=delimiter, quote_char=False),
    pa.csv.ConvertOptions(column_types=types, include_columns=list(_COLUMNS)),
  )


def _titles(path: pathlib.Path):
  """(id, title, genres) of every film."""
  if path.suffix == ".parquet":
    for row in pa.parquet.read_table(path).to_pylist():
      yield row["movieId"], row["title"], _split(row["genres"] or "")
    return
  if path.suffix == ".csv":
    types = {"movieId": pa.int64(), "title": pa.string(), "genres": pa.string()}
    options = pa.csv.ConvertOptions(column_types=types)
    try:
      table = pa.csv.read_csv(path, convert_options=options)
    except pa.ArrowInvalid as error:
      raise UserError(f"{path}: {error}") from error
    for row in table.to_pylist():
      yield row["movieId"], row["title"], _split(row["genres"])
    return
  lines = path.read_text(encoding="latin-1").splitlines()
  for number, line in enumerate(lines, 1):
    try:
      if path.suffix == ".dat":
        movie, rest = line.split("::", 1)
        title, genres = rest.rsplit("::", 1)
        yield int(movie), title, _split(genres)
      elif line:
        movie, title, *_, flags = line.split("|", 5)
        flags = flags.split("|") if "|" in flags else line.split("|")[5:]
        genres = [
          name
          for name, flag in zip(_GENRES_100K, flags, strict=True)
          if flag == "1" and name != "unknown"
        ]
        yield int(movie), title, genres
    except ValueError as error:
      raise UserError(f"{path}: row {number}: {error}") from error


def _split(genres: str) -> list[str]:
  return [name for name in genres.split("|") if name and name != _NO_GENRES]
