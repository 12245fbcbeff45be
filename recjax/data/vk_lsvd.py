"""VK-LSVD: what users of a short-video service did, by place of the video.

Reads the public Parquet files below `root`: `interactions/train/week_*`,
`interactions/validation/week_*`, `interactions/test/week_*` (or the same below
`subsamples/<subsample>/`), and `metadata/users_metadata.parquet` and
`items_metadata.parquet`. It was written from the columns that the authors
document, without the real files at hand; the tests run it on files of that
form. The embeddings of the items' content (`item_embeddings.npz`) are not read.

A row is one shown video. Rows are in order of time within a week and carry no
time, so a row sees what happened in the weeks before its own: histories, rates
and counts are those of the end of the week before (our choice; strict, since
the weeks of validation and test see what training may see and no more).
Everything is streamed week by week; what is held is a few numbers a user, item
and author, and `max_len` items a user, twice.

`place` (where in the application the video was shown) is the scenario. A
subsample without a test folder is split by moving one week on: its validation
week is the test part and its last training week the validation part.

Features (our choice): ids of user, item, author, place, platform, agent, the
user's age group, gender and place of living; duration; log odds of smoothed
rates of like and of watched seconds over duration by user, item, author;
counts; the user's last items.

Source: VK-LSVD, huggingface.co/datasets/deepvk/VK-LSVD, Apache-2.0.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath

from recjax.data import causal
from recjax.data.columns import Block, ColumnWriter
from recjax.data.vocabulary import save_values
from recjax.errors import UserError
from recjax.schema import SPLITS, Feature, Label, Roles, Schema, Split

VERSION = 1

LABELS = (
  "like",
  "dislike",
  "share",
  "bookmark",
  "click_on_author",
  "open_comments",
)
_ROW_IDS = ("place", "platform", "agent")
_COLUMNS = ("user_id", "item_id", *_ROW_IDS, "timespent", *LABELS)
_USER_IDS = ("age", "gender", "geo")
_FOLDERS = ("train", "validation", "test")
_KEYS = ("user", "item", "author")
_SHOWN, _LIKES, _RATIO = range(3)
_UNIT = 64  # Watched shares are counted in so many parts.


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the adapter.

  Attributes:
    root: Folder of the data set.
    subsample: Name below `subsamples`, such as `ur0.01`; empty for all.
    first_week: Training weeks before it are left out, histories too.
    max_len: Items kept of a user.
    prior_strength: Observations that the prior of a rate weighs.
    max_count: Counts are capped here.
    max_rows_in_memory: Rows held in memory at a time, at least 1.
  """

  root: str
  subsample: str = ""
  first_week: int = 0
  max_len: int = 20
  prior_strength: float = 20.0
  max_count: int = 50
  max_rows_in_memory: int = 1 << 20

  def __post_init__(self):
    for name in ("max_len", "max_count", "max_rows_in_memory"):
      if getattr(self, name) < 1:
        raise UserError(
          f"data.{name} must be at least 1, got {getattr(self, name)}"
        )
    if self.first_week < 0:
      raise UserError(
        f"data.first_week must be at least 0, got {self.first_week}"
      )
    if not self.prior_strength > 0:
      raise UserError(
        f"data.prior_strength must be above 0, got {self.prior_strength}"
      )


def sources(config: Config) -> list[pathlib.Path]:
  """The files that `prepare` reads."""
  return [*(path for _, path in _weeks(config)), *_metadata(config)]


def estimate_bytes(config: Config) -> int:
  """About how much disk the prepared data needs: 180 bytes a row."""
  rows = sum(_open(path).metadata.num_rows for _, path in _weeks(config))
  return rows * (180 + 4 * config.max_len)


def prepare(config: Config, directory: epath.PathLike) -> None:
  """Writes the data set with `recjax.data.columns.ColumnWriter`.

  Raises:
    UserError: If a file or a column is missing, or a value is not allowed.

  Example:
    >>> prepare(Config("VK-LSVD", "ur0.01"), "/tmp/vk")      # doctest: +SKIP
  """
  weeks = _weeks(config)
  known = _Known(config, weeks)
  schema = _schema(config, known)
  writer = ColumnWriter(directory, schema)
  past = _Past(config, known)
  for number, (split, path) in enumerate(weeks):
    written: dict[int, tuple[int, int]] = {}
    for rows in _read(path, config.max_rows_in_memory):
      codes = known.codes(rows)
      block = Block(
        dense=past.dense(codes),
        ids=known.ids(rows, codes),
        lists={"history": past.slices(codes["user"], writer, written)},
        vectors={},
        labels=_labels(rows),
        groups={
          "group": codes["user"],
          "query": codes["user"] * len(weeks) + number,
        },
      )
      writer.append(split, block)
      past.add(rows, codes)
    past.end_week()
  writer.finish(schema)
  for name, values in known.values.items():
    save_values(directory, name, pa.array(values))


class _Known:
  """The values of the training part, and the users' and items' columns."""

  def __init__(self, config: Config, weeks):
    users, items = _metadata(config)
    self._users = _read_metadata(users, ("user_id", *_USER_IDS))
    self._items = _read_metadata(items, ("item_id", "author_id", "duration"))
    seen = {name: np.zeros(0, np.int64) for name in _COLUMNS[:5]}
    shown = {name: np.zeros(0, np.int64) for name in _COLUMNS[:2]}
    for split, path in weeks:
      for rows in _read(path, config.max_rows_in_memory, _COLUMNS[:5]):
        for found, names in ((seen, _COLUMNS[:5]), (shown, _COLUMNS[:2])):
          if found is seen and split != "train":
            continue
          for name in names:
            found[name] = np.union1d(found[name], rows[name])
    self.user_ids, self.item_ids = shown["user_id"], shown["item_id"]
    self._user_at = _places(self._users["user_id"], self.user_ids, users)
    self._item_at = _places(self._items["item_id"], self.item_ids, items)
    author = self._items["author_id"][self._item_at]
    self.authors, self.author = np.unique(author, return_inverse=True)
    self.duration = self._items["duration"][self._item_at].astype(np.float64)
    in_train = np.isin(self.item_ids, seen["item_id"])
    seen["author_id"] = np.unique(author[in_train])
    is_user = np.isin(self.user_ids, seen["user_id"])
    for name in _USER_IDS:
      seen[name] = np.unique(self._users[name][self._user_at][is_user])
    self.values = seen

  @property
  def sizes(self) -> dict[str, int]:
    """Rows of each vocabulary; row 0 stands for what training lacks."""
    return {name: len(values) + 1 for name, values in self.values.items()}

  def codes(self, rows) -> dict[str, np.ndarray]:
    """Dense numbers of the rows' users, items and authors."""
    item = np.searchsorted(self.item_ids, rows["item_id"])
    return {
      "user": np.searchsorted(self.user_ids, rows["user_id"]),
      "item": item,
      "author": self.author[item],
    }

  def ids(self, rows, codes) -> dict[str, np.ndarray]:
    """Vocabulary rows of the single-valued features."""
    user = self._user_at[codes["user"]]
    columns = {name: rows[name] for name in ("user_id", "item_id", *_ROW_IDS)}
    columns["author_id"] = self.authors[codes["author"]]
    columns |= {name: self._users[name][user] for name in _USER_IDS}
    return {name: self.number(name, v) for name, v in columns.items()}

  def number(self, name: str, values) -> np.ndarray:
    """Vocabulary row of each value."""
    known = self.values[name]
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[at] == values, at + 1, 0).astype(np.int32)


class _Past:
  """What the weeks before the current one say; and the current one, apart."""

  def __init__(self, config: Config, known: _Known):
    self._config, self._known = config, known
    sizes = (len(known.user_ids), len(known.item_ids), len(known.authors))
    self._sums = {
      key: np.zeros((n, 3), np.int64)
      for key, n in zip(_KEYS, sizes, strict=True)
    }
    self._new = {key: np.zeros_like(v) for key, v in self._sums.items()}
    # Latest items last; 0 where there is none, else the item's code plus 1.
    self._items = np.zeros((sizes[0], config.max_len), np.int32)
    self._new_items = self._items.copy()
    self._item_rows = known.number("item_id", known.item_ids)

  def dense(self, codes) -> np.ndarray:
    """Duration, rates and counts, in the order of the schema."""
    config = self._config
    total = self._sums["user"].sum(axis=0, keepdims=True)

    def overall(column, guess):
      # Only the first week feels the guess: it weighs 100 rows.
      rate = causal.smoothed_rate(
        total[:, column], total[:, _SHOWN], guess, 100.0
      )
      return float(rate[0])

    like, ratio = overall(_LIKES, 0.03), overall(_RATIO, 0.5 * _UNIT)
    columns = [np.log1p(self._known.duration[codes["item"]])]
    for key in _KEYS:
      sums = self._sums[key][codes[key]]
      rate = causal.smoothed_rate(
        sums[:, _LIKES], sums[:, _SHOWN], like, config.prior_strength
      )
      share = causal.smoothed_rate(
        sums[:, _RATIO], sums[:, _SHOWN], ratio, config.prior_strength
      )
      count = np.minimum(sums[:, _SHOWN], config.max_count)
      columns += [causal.log_odds(rate), share / _UNIT, np.log1p(count)]
    return np.stack(columns, axis=1).astype(np.float32)

  def slices(self, user, writer: ColumnWriter, written):
    """Start and length of each row's history; one list a user and week."""
    for code in np.unique(user).tolist():
      if code not in written:
        items = self._items[code]
        values = self._item_rows[items[items > 0] - 1]
        written[code] = writer.append_values("history", values), len(values)
    pairs = np.array([written[code] for code in user.tolist()], np.int64)
    return pairs[:, 0], pairs[:, 1].astype(np.int32)

  def add(self, rows, codes) -> None:
    """Rows of the current week, in their order."""
    duration = np.maximum(self._known.duration[codes["item"]], 1.0)
    ratio = np.minimum(rows["timespent"] / duration, 2.0)
    values = np.stack(
      [
        np.ones(len(duration), np.int64),
        rows["like"].astype(np.int64),
        np.rint(ratio * _UNIT).astype(np.int64),
      ],
      axis=1,
    )
    for key in _KEYS:
      np.add.at(self._new[key], codes[key], values)
    order = np.argsort(codes["user"], kind="stable")
    user, first, count = np.unique(
      codes["user"][order], return_index=True, return_counts=True
    )
    # The last places of the old list and the new items behind each other.
    place = np.arange(self._config.max_len) + count[:, None]
    is_old = place < self._config.max_len
    old = np.take_along_axis(
      self._new_items[user], np.minimum(place, self._config.max_len - 1), 1
    )
    at = np.maximum(first[:, None] + place - self._config.max_len, 0)
    new = codes["item"][order][np.minimum(at, len(order) - 1)] + 1
    self._new_items[user] = np.where(is_old, old, new)

  def end_week(self) -> None:
    """From now on rows see the week that ended."""
    for key, new in self._new.items():
      self._sums[key] += new
      new[:] = 0
    self._items[:] = self._new_items


def _schema(config: Config, known: _Known) -> Schema:
  singles = ("user_id", "item_id", *_ROW_IDS, "author_id", *_USER_IDS)
  dense = ["duration"]
  for key in _KEYS:
    dense += [f"like_rate_{key}", f"watched_share_{key}", f"count_{key}"]
  return Schema(
    features=(
      *(Feature(name, "sparse") for name in singles),
      Feature(
        "history", "sequence", vocabulary="item_id", max_len=config.max_len
      ),
      *(Feature(name, "dense") for name in dense),
    ),
    labels=(
      *(Label(name) for name in LABELS),
      Label("timespent", "real", unit="s"),
    ),
    roles=Roles(
      user="user_id",
      item="item_id",
      time="week",
      group="user_id",
      query="user_id x week",
      scenario="place",
    ),
    split=Split(by="time", column="week"),
    vocab_sizes=known.sizes,
  )


def _weeks(config: Config) -> list[tuple[str, pathlib.Path]]:
  """The files in order of time, and the part that each belongs to."""
  root = pathlib.Path(config.root).expanduser()
  folder = root / "interactions"
  if config.subsample:
    folder = root / "subsamples" / config.subsample
  found = {}
  for name in _FOLDERS:
    found[name] = sorted((folder / name).glob("week_*.parquet"))
  for path in [path for paths in found.values() for path in paths]:
    if not path.stem.removeprefix("week_").isdigit():
      raise UserError(
        f"{path}: expected a name such as week_07.parquet; rename or move it"
      )
  found["train"] = [
    path
    for path in found["train"]
    if int(path.stem.removeprefix("week_")) >= config.first_week
  ]
  if not found["test"] and len(found["train"]) > 1:
    found["test"] = found["validation"]
    found["validation"] = [found["train"].pop()]
  for name in _FOLDERS:
    if not found[name]:
      raise UserError(
        f"{folder / name}: no week_*.parquet to read; give data.root (and "
        "data.subsample) of a complete VK-LSVD"
      )
  return [
    (split, path)
    for split, name in zip(SPLITS, _FOLDERS, strict=True)
    for path in found[name]
  ]


def _metadata(config: Config) -> tuple[pathlib.Path, pathlib.Path]:
  folder = pathlib.Path(config.root).expanduser() / "metadata"
  paths = folder / "users_metadata.parquet", folder / "items_metadata.parquet"
  for path in paths:
    if not path.is_file():
      raise UserError(f"{path}: missing; put the data set's metadata there")
  return paths


def _open(path: pathlib.Path) -> pq.ParquetFile:
  try:
    return pq.ParquetFile(path)
  except (OSError, pa.ArrowInvalid) as error:
    raise UserError(f"{path}: no Parquet file ({error})") from error


def _read(
  path: pathlib.Path, max_rows: int, columns=_COLUMNS
) -> Iterator[dict[str, np.ndarray]]:
  """The columns of a week, some rows at a time, checked."""
  file = _open(path)
  _check_columns(file, path, columns)
  first = 0
  for batch in file.iter_batches(max_rows, columns=list(columns)):
    rows = {}
    for name in columns:
      column = batch.column(name)
      if column.null_count:
        row = first + int(pc.index(pc.is_null(column), True).as_py())
        raise UserError(f"{path}: column {name}, row {row}: null; fill it")
      values = column.to_numpy(zero_copy_only=False)
      rows[name] = values.astype(np.int64)
      if name in LABELS and np.any((rows[name] != 0) & (rows[name] != 1)):
        row = first + int(np.argmax((rows[name] != 0) & (rows[name] != 1)))
        raise UserError(f"{path}: column {name}, row {row}: must be 0 or 1")
    first += batch.num_rows
    yield rows


def _read_metadata(path: pathlib.Path, columns) -> dict[str, np.ndarray]:
  file = _open(path)
  _check_columns(file, path, columns)
  table = file.read(list(columns))
  found = {}
  for name in columns:
    column = table[name].combine_chunks()
    if column.null_count:
      column = pc.fill_null(column, 0)
    found[name] = column.to_numpy().astype(np.int64)
  order = np.argsort(found[columns[0]], kind="stable")
  return {name: values[order] for name, values in found.items()}


def _check_columns(file: pq.ParquetFile, path: pathlib.Path, columns) -> None:
  for name in columns:
    if name not in file.schema_arrow.names:
      raise UserError(
        f"{path}: column {name!r} is missing; it holds "
        f"{', '.join(file.schema_arrow.names)}"
      )


def _places(keys, wanted, path: pathlib.Path) -> np.ndarray:
  """Where each wanted key stands among the sorted keys."""
  at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
  missing = wanted if not len(keys) else wanted[keys[at] != wanted]
  if len(missing):
    raise UserError(
      f"{path}: has no row for {missing[0]}, which the interactions name; "
      "take the metadata of the same release"
    )
  return at


def _labels(rows) -> dict[str, np.ndarray]:
  return {
    name: rows[name].astype(np.float32) for name in (*LABELS, "timespent")
  }
