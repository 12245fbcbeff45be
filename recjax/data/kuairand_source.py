"""Reads the files of KuaiRand into arrays on disk: the log, users and videos.

`recjax.data.kuairand` says what the files are. Here they become columns: the
log streams from CSV or Parquet into one array a column on disk, is checked on
the way, and is then sorted by time in pieces of bounded size. Tables of users
and videos hold only what the log names and stay in memory.
"""

import contextlib
import csv
import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from recjax.data import columns, disk_columns
from recjax.errors import UserError

# Bits of `Events.outcome`, in the order of the labels.
OUTCOMES = {
  "click": "is_click",
  "like": "is_like",
  "follow": "is_follow",
  "comment": "is_comment",
  "forward": "is_forward",
  "hate": "is_hate",
  "long_view": "long_view",
  "profile_enter": "is_profile_enter",
}
KINDS = ("watch", "like", "long_watch")  # The stored lists of a user.
LAST_DAYS = (20220502, 20220504)  # Of the training and validation parts.

_LOG_COLUMNS = (
  "user_id",
  "video_id",
  "date",
  "hourmin",
  "time_ms",
  *OUTCOMES.values(),
  "play_time_ms",
  "duration_ms",
  "tab",
)
_EVENT_TYPES = {
  "user": np.int64,
  "video": np.int64,
  "time": np.int64,
  "part": np.int8,
  "stored": np.bool_,
  "exposures": np.int32,
  "outcome": np.uint8,
  "tab": np.int16,
  "hour": np.int8,
  "day": np.int32,
  "play_ms": np.int64,
  "duration_ms": np.int64,
}
USER_RANGES = (
  "follow_user_num_range",
  "fans_user_num_range",
  "friend_user_num_range",
  "register_days_range",
)
USER_NUMBERS = (
  "follow_user_num",
  "fans_user_num",
  "friend_user_num",
  "register_days",
)
USER_CODES = (
  "is_lowactive_period",
  "is_live_streamer",
  "is_video_author",
  *(f"onehot_feat{i}" for i in range(18)),
)
VIDEO_CODES = (
  "author_id",
  "visible_status",
  "server_width",
  "server_height",
  "music_id",
  "music_type",
)
USER_TEXTS = ("user_active_degree", *USER_RANGES)
VIDEO_TEXTS = ("video_type", "upload_type", "upload_dt", "tag")


@dataclasses.dataclass(frozen=True)
class Sources:
  """The files of one variant; `history` only where lists are stored."""

  log: tuple[pathlib.Path, ...]
  users: tuple[pathlib.Path, ...]
  videos: tuple[pathlib.Path, ...]
  history: tuple[pathlib.Path, ...] = ()

  @property
  def all(self) -> list[pathlib.Path]:
    """Every file, in the order read."""
    return [*self.log, *self.users, *self.videos, *self.history]


@dataclasses.dataclass(frozen=True)
class History:
  """The stored lists of one kind: events with no time of their own.

  `time` is that of the user's last stored event, the latest that each of
  them can have had. Sorted by user, then oldest first. `exposures` is 1, and
  more for a user's first event: it stands for those that were cut off.
  """

  user: np.ndarray
  video: np.ndarray
  time: np.ndarray
  exposures: np.ndarray


def find_sources(root: str, variant: str) -> Sources:
  """The bundled files where `root` is empty, else the CSV files under it."""
  if not root:
    folder = pathlib.Path(columns.__file__).parent / "bundled/kuairand_pure"
    return Sources(
      log=(folder / "log_standard_4_25_to_5_08_pure.parquet",),
      users=(folder / "user_features_pure.parquet",),
      videos=(folder / "video_features_basic_pure.parquet",),
      history=(folder / "user_history_until_4_24.parquet",),
    )
  folder = pathlib.Path(root).expanduser()
  if not folder.is_dir():
    raise UserError(
      f"data.root: {folder} is no folder; give the KuaiRand folder that holds "
      "data/log_standard_*.csv, or leave it empty for the bundled log"
    )
  if (folder / "data").is_dir():
    folder = folder / "data"
  variant = variant or _find_variant(folder)
  groups = []
  for stem in ("log_standard_*", "user_features", "video_features_basic"):
    found = [
      *folder.glob(f"{stem}_{variant}.csv"),
      *folder.glob(f"{stem}_{variant}_part*.csv"),
    ]
    if not found:
      raise UserError(
        f"{folder}: no file {stem}_{variant}.csv (or ..._part1.csv); unpack "
        "the whole archive there, or correct data.root and data.variant"
      )
    groups.append(tuple(sorted(found, key=lambda p: (len(p.name), p.name))))
  return Sources(log=groups[0], users=groups[1], videos=groups[2])


def _find_variant(folder: pathlib.Path) -> str:
  found = [
    v
    for v in ("pure", "1k", "27k")
    if any(folder.glob(f"log_standard_*_{v}.csv"))
    or any(folder.glob(f"log_standard_*_{v}_part*.csv"))
  ]
  if len(found) == 1:
    return found[0]
  problem = f"logs of {' and '.join(found)}" if found else "no KuaiRand log"
  raise UserError(
    f"{folder}: {problem} (log_standard_*_pure.csv, ..._1k.csv or "
    "..._27k.csv); "
    + ("set data.variant to one" if found else "correct data.root")
  )


def read_events(
  sources: Sources, scratch: pathlib.Path, max_rows: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, dict]:
  """The log and the stored watch events, sorted by time.

  Returns:
    Columns of the events (`user` and `video` are positions in the two id
    arrays that follow), the ids of users and of videos, and the stored
    `History` of each of `KINDS`.
  """
  (scratch / "raw").mkdir()
  users = videos = np.zeros(0, np.int64)
  histories = _read_histories(sources.history)
  files = disk_columns.ColumnFiles(scratch / "raw", _EVENT_TYPES)
  seen_parts = np.zeros(3, np.int64)
  with files:
    if sources.history:
      rows = _stored_events(histories)
      files.append(rows)
      users, videos = np.unique(rows["user"]), np.unique(rows["video"])
      for kind in ("like", "long_watch"):
        videos = np.union1d(videos, histories[kind].video)
    for path in sources.log:
      first_row = 1
      for batch in _batches(path, dict.fromkeys(_LOG_COLUMNS, pa.int64())):
        rows = _log_rows(path, first_row, batch)
        first_row += len(batch["user_id"])
        users = np.union1d(users, rows["user"])
        videos = np.union1d(videos, rows["video"])
        seen_parts += np.bincount(rows["part"], minlength=3)
        files.append(rows)
      if first_row == 1:
        raise UserError(f"{path}: holds no rows; unpack the archive again")
  events = files.mapped()
  for part, count in zip(
    ("training", "validation", "test"), seen_parts, strict=True
  ):
    if not count:
      raise UserError(
        f"{sources.log[0].parent}: no {part} rows in the log: column date must "
        f"reach up to {LAST_DAYS[0]} (training), {LAST_DAYS[1]} (validation) "
        "and beyond (test); are all log files there?"
      )
  for start in range(0, len(events["user"]), max_rows):
    rows = slice(start, start + max_rows)
    events["user"][rows] = np.searchsorted(users, events["user"][rows])
    events["video"][rows] = np.searchsorted(videos, events["video"][rows])
  histories = {
    kind: dataclasses.replace(
      stored,
      user=np.searchsorted(users, stored.user),
      video=np.searchsorted(videos, stored.video),
    )
    for kind, stored in histories.items()
  }
  return (
    disk_columns.sort_by_time(events, scratch, max_rows),
    users,
    videos,
    histories,
  )


def _log_rows(path, first_row: int, batch: dict) -> dict[str, np.ndarray]:
  """Checks one batch of the log and gives it the form of the events."""
  date = batch["date"]
  day = _days(date)
  _check_rows(
    path, first_row, "date", date, day < 0, "a day written as YYYYMMDD"
  )
  outcome = np.zeros(len(date), np.uint8)
  for bit, column in enumerate(OUTCOMES.values()):
    value = batch[column]
    wrong = (value != 0) & (value != 1)
    _check_rows(path, first_row, column, value, wrong, "0 or 1")
    outcome |= (value << bit).astype(np.uint8)
  limits = {
    "user_id": 2**40,
    "video_id": 2**40,
    "time_ms": 2**43,
    "hourmin": 2400,
    "tab": 2**15,
    "play_time_ms": 2**40,
    "duration_ms": 2**40,
  }
  for column, limit in limits.items():
    value = batch[column]
    wrong = (value < 0) | (value >= limit)
    allowed = f"an integer from 0 to {limit - 1}"
    _check_rows(path, first_row, column, value, wrong, allowed)
  return {
    "user": batch["user_id"],
    "video": batch["video_id"],
    "time": batch["time_ms"],
    "part": np.digitize(date, LAST_DAYS, right=True),
    "stored": np.zeros(len(date), bool),
    "exposures": np.ones(len(date), np.int32),
    "outcome": outcome,
    "tab": batch["tab"],
    "hour": batch["hourmin"] // 100,
    "day": day,
    "play_ms": batch["play_time_ms"],
    "duration_ms": batch["duration_ms"],
  }


def _days(date: np.ndarray) -> np.ndarray:
  """Days since 1970 of YYYYMMDD; -1 where that is no date."""
  year, month, day = date // 10000, date // 100 % 100, date % 100
  ok = (year >= 1970) & (year < 2200) & (month >= 1) & (month <= 12)
  months = np.where(ok, (year - 1970) * 12 + month - 1, 0)
  months = months.astype("datetime64[M]")
  days = months.astype("datetime64[D]") + (day - 1)
  ok &= (day >= 1) & (days.astype("datetime64[M]") == months)
  return np.where(ok, days.astype(np.int64), -1)


def _check_rows(path, first_row, column, value, wrong, allowed):
  if wrong.any():
    at = int(np.argmax(wrong))
    raise UserError(
      f"{path}: column {column}, row {first_row + at}: {value[at]} must be "
      f"{allowed}; correct the file"
    )


def _read_histories(paths) -> dict[str, History]:
  """The stored lists of each kind; empty ones where nothing is stored."""
  empty = np.zeros(0, np.int64)
  histories = {kind: History(empty, empty, empty, empty) for kind in KINDS}
  for path in paths:
    table = pa.parquet.read_table(path).sort_by("user_id")
    user = table["user_id"].to_numpy().astype(np.int64)
    last = table["last_time_ms"].to_numpy().astype(np.int64)
    total = table["history_len"].to_numpy().astype(np.int64)
    for kind in KINDS:
      lists = table[f"{kind}_seq"].combine_chunks()
      length = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
      video = lists.flatten().to_numpy().astype(np.int64)
      exposures = np.ones(len(video), np.int64)
      if kind == "watch":
        held = np.flatnonzero(length)
        first = (np.cumsum(length) - length)[held]
        exposures[first] += (total - length)[held]
      histories[kind] = History(
        np.repeat(user, length), video, np.repeat(last, length), exposures
      )
  return histories


def _stored_events(histories: dict[str, History]) -> dict[str, np.ndarray]:
  """Stored watch events as rows whose clicks and tabs are unknown."""
  watch = histories["watch"]
  bits = {name: 1 << bit for bit, name in enumerate(OUTCOMES)}
  outcome = bits["like"] * match_subsequence(watch, histories["like"])
  outcome |= bits["long_view"] * match_subsequence(
    watch, histories["long_watch"]
  )
  size = len(watch.user)
  rows = {name: np.zeros(size, kind) for name, kind in _EVENT_TYPES.items()}
  rows["tab"] -= 1
  return rows | {
    "user": watch.user,
    "video": watch.video,
    "time": watch.time,
    "stored": np.ones(size, bool),
    "exposures": watch.exposures,
    "outcome": outcome.astype(np.uint8),
  }


def match_subsequence(whole: History, part: History) -> np.ndarray:
  """Which events of `whole` are those of `part`, by user from the end.

  Both lists end at the same moment and `part` is a subsequence of what the
  user watched, so walking back and taking every event that fits finds the
  most matches. Of a video watched twice in a row the later one is taken.
  """
  hit = np.zeros(len(whole.user), bool)
  if not len(part.user):
    return hit
  users = np.unique(whole.user)
  first = np.searchsorted(whole.user, users)
  at = np.searchsorted(whole.user, users, side="right") - 1
  wanted_first = np.searchsorted(part.user, users)
  wanted = np.searchsorted(part.user, users, side="right") - 1
  # One step back for all users at once: as many steps as the longest list.
  while len(live := np.flatnonzero((at >= first) & (wanted >= wanted_first))):
    found = whole.video[at[live]] == part.video[wanted[live]]
    hit[at[live[found]]] = True
    wanted[live[found]] -= 1
    at[live] -= 1
  return hit


@dataclasses.dataclass(frozen=True)
class Table:
  """Features of users or videos, one row for each id asked for.

  Attributes:
    numbers: Column -> value, NaN where missing.
    texts: Column -> position in `names`.
    names: Text column -> its distinct values, sorted; "" where missing.
  """

  numbers: dict[str, np.ndarray]
  texts: dict[str, np.ndarray]
  names: dict[str, list[str]]


def read_users(paths, ids: np.ndarray) -> Table:
  """The user features, one row for each of the sorted `ids`."""
  return _read_table(
    paths, "user_id", (*USER_CODES, *USER_NUMBERS), USER_TEXTS, ids
  )


def read_videos(paths, ids: np.ndarray) -> Table:
  """The video features, one row for each of the sorted `ids`."""
  return _read_table(paths, "video_id", VIDEO_CODES, VIDEO_TEXTS, ids)


def _read_table(paths, id_column, numbers, texts, ids) -> Table:
  values = {name: np.full(len(ids), np.nan) for name in numbers}
  codes = {name: np.zeros(len(ids), np.int32) for name in texts}
  names = {name: {"": 0} for name in texts}
  types = dict.fromkeys(numbers, pa.float64())
  types |= dict.fromkeys(texts, pa.string())
  for path in paths:
    for batch in _batches(path, {id_column: pa.int64(), **types}, types):
      at = np.minimum(np.searchsorted(ids, batch[id_column]), len(ids) - 1)
      known = ids[at] == batch[id_column]
      at = at[known]
      for name in numbers:
        values[name][at] = batch[name][known]
      for name in texts:
        number = names[name]
        numbered = [
          number.setdefault(text, len(number))
          for text in batch[name].dictionary.to_pylist()
        ]
        index = batch[name].indices.to_numpy(zero_copy_only=False)
        codes[name][at] = np.asarray(numbered, np.int32)[index[known]]
  for name, number in names.items():
    ordered = sorted(number)
    rank = {text: position for position, text in enumerate(ordered)}
    codes[name] = np.asarray([rank[t] for t in number], np.int32)[codes[name]]
    names[name] = ordered
  return Table(values, codes, names)


def _batches(path, types, optional=()) -> Iterator[dict]:
  """The named columns, batch by batch, as NumPy arrays.

  Columns in `optional` may hold missing values (NaN or ""), others not. Texts
  stay Arrow dictionaries, since tables have few distinct ones.
  """
  _check_header(path, types)
  row = 1
  with _one_line(path):
    for batch in _record_batches(path, types):
      result = {}
      for name, kind in types.items():
        column = batch.column(name)
        if column.null_count:
          if name not in optional:
            at = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise UserError(
              f"{path}: column {name}, row {row + at}: the value is missing; "
              "correct the file"
            )
          column = column.fill_null("" if kind == pa.string() else np.nan)
        if kind == pa.string():
          result[name] = column.dictionary_encode()
        else:
          result[name] = column.to_numpy(zero_copy_only=False)
      row += batch.num_rows
      yield result


def _record_batches(path, types) -> Iterator[pa.RecordBatch]:
  if path.suffix == ".parquet":
    file = pa.parquet.ParquetFile(path)
    schema = pa.schema(list(types.items()))
    for batch in file.iter_batches(columns=list(types)):
      yield batch.select(list(types)).cast(schema)
    return
  # With one thread the messages of a failed conversion name the row.
  yield from pa.csv.open_csv(
    path,
    read_options=pa.csv.ReadOptions(use_threads=False, block_size=1 << 24),
    convert_options=pa.csv.ConvertOptions(
      include_columns=list(types), column_types=types
    ),
  )


def _check_header(path, types):
  if not path.is_file():
    raise UserError(f"{path}: no such file; give data.root or unpack it there")
  with _one_line(path):
    if path.suffix == ".parquet":
      names = pa.parquet.read_schema(path).names
    else:
      with open(path, encoding="utf-8", newline="") as file:
        names = next(csv.reader(file), [])
      if not names:
        raise UserError(f"{path}: the file is empty; unpack the archive again")
  missing = [name for name in types if name not in names]
  if missing:
    raise UserError(
      f"{path}: column {missing[0]!r} is missing; the header must hold "
      f"{', '.join(types)}"
    )


@contextlib.contextmanager
def _one_line(path):
  """Turns what pyarrow or the decoder says of a broken file into one line."""
  try:
    yield
  except (pa.ArrowException, UnicodeDecodeError) as error:
    text = " ".join(str(error).split())
    raise UserError(
      f"{path}: cannot be read ({text}); unpack the archive again"
    ) from error
