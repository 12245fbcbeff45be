"""KuaiRand: exposures of a short-video feed and what the users did.

Without `root` the adapter reads the slice of KuaiRand-Pure that ships with the
package (2022-04-25 to 2022-05-08, and each user's last events before). With
`root` it reads the public CSV files of KuaiRand-Pure, -1K or -27K from
`root` or `root/data`: `log_standard_*`, `user_features_*` and
`video_features_basic_*`, also in `_part1` pieces. The randomly exposed log
and the statistics files, which average over the test period, are not read.
The CSV path was written from the columns that the authors document, without
the real files at hand; the tests run it on files of that form.

Split by the `date` column: training up to 05-02, validation 05-03 and 05-04,
test from 05-05. In CSV data the training part begins with the log, 04-08, and
all histories and rates come from the log itself.

What a row sees of the past follows `recjax.data.causal`. Days begin at
midnight in China, and `date` may run ahead of `time_ms` by up to an hour, so
both the part and the time decide. Stored lists carry no times: their events
count as no older than the user's last stored event, `last_time_ms`.

What the stored lists hold was found by counting. The `history_len` sum to
1,208,280, which is every log row that the slice leaves out, and the watch list
always has min(50, history_len) entries: it holds exposures, clicked or not.
For every user with at most 50 exposures the like and long-watch lists are
subsequences of it. So log rows join the watch history whatever their outcome,
the like history if liked, the long-watch history if `long_view`; and aligning
the lists from the end tells which stored exposures were liked or watched long.
They are evidence for those two rates, while clicks and tabs before 04-25 are
unknown.

Features (all choices are ours): ids of user, video, author, music, tags and
every user and video column; smoothed causal rates of click, long view and like
as log odds for the keys in `kuairand_features.RATES`, a pair's prior being
what its two members predict together; counts; how often the row's video,
author, music and tags occur in the user's known events; the three histories
and the authors watched.
Counts and video age are capped, since what only grows with the calendar takes
values in the test part that training never saw. For that reason there is no
day of the week either: training in the slice has eight days.

With `sequences` the histories named there say more of their events: when each
was (`Batch.event_age`), and the video's author and first tag, the tab and the
duration bucket as sides. They take the place of the plain histories and of
`author_history`. Of a stored event the time is the latest possible one, so its
age is a lower bound, and tab and duration are unknown (row 0).

Source: Gao et al., KuaiRand, CIKM 2022, doi 10.1145/3511808.3557624.
"""

import dataclasses
import pathlib
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from etils import epath

from recjax.data import (
  kuairand_features,
  kuairand_feedback,
  kuairand_histories,
  kuairand_source,
)
from recjax.data.columns import Block, ColumnWriter
from recjax.data.kuairand_histories import SIDES
from recjax.data.vocabulary import save_values
from recjax.errors import UserError
from recjax.schema import (
  SPLITS,
  Feature,
  Label,
  Roles,
  Schema,
  Split,
  suggest,
)

VERSION = 3

_OUTCOMES = tuple(kuairand_source.OUTCOMES)
_USER_FEATURES = (
  *kuairand_source.USER_TEXTS,
  *kuairand_source.USER_CODES,
)
_VIDEO_FEATURES = (
  "author_id",
  "video_type",
  "upload_type",
  "visible_status",
  "server_width",
  "server_height",
  "music_id",
  "music_type",
)
_ROW_FEATURES = ("duration_bucket", "video_age_bucket", "hour", "tab")
_MISSING = -(2.0**62)


@dataclasses.dataclass(frozen=True)
class Config:
  """Options of the adapter.

  Attributes:
    root: Folder of the public CSV files; empty for the bundled slice.
    variant: `pure`, `1k` or `27k`; empty to tell it from the file names.
    max_len: Events kept of a history.
    prior_strength: Observations that the prior of a single key's rate weighs.
    pair_strength: The same for a pair of keys.
    max_count: Counts of evidence are capped here.
    min_tab_rows: Tabs with fewer rows in the training part are read as unknown
      (row 0 of the vocabulary), so that scenarios are few and large. Of the
      bundled slice's 15 tabs 6 have more than 1,000 rows, and at least 600 in
      the training part.
    max_rows_in_memory: Log rows held in memory at a time, at least 1. The
      tables of users and videos are held whole.
    sequences: Histories, of `watch`, `like` and `long_watch`, whose events have
      times and sides; empty for plain lists of all three.
    feedback: `pinnacle` or `recent` adds who gave each video its feedback;
      see `recjax.data.kuairand_feedback`. Empty for none.
    feedback_len: Users kept of each list.
    pseudo_neighbors: Popular videos alike, by tags, whose users fill up short
      lists of `pinnacle_users`; see `recjax.data.pseudo_feedback`. 0 for none.
    protocol: `causal`, or `released` for the published evaluation of PROMO,
      which shows a positive row to itself.
  """

  root: str = ""
  variant: str = ""
  max_len: int = 50
  prior_strength: float = 20.0
  pair_strength: float = 5.0
  max_count: int = 50
  min_tab_rows: int = 1
  max_rows_in_memory: int = 1 << 22
  sequences: tuple[str, ...] = ()
  feedback: str = ""
  feedback_len: int = 10
  pseudo_neighbors: int = 0
  protocol: str = "causal"

  def __post_init__(self):
    kuairand_feedback.check(self)
    if self.variant not in ("", "pure", "1k", "27k"):
      raise UserError(
        f"data.variant: unknown variant {self.variant!r}; known: pure, 1k, 27k"
      )
    for name in ("max_len", "max_count", "min_tab_rows", "max_rows_in_memory"):
      if getattr(self, name) < 1:
        raise UserError(
          f"data.{name} must be at least 1, got {getattr(self, name)}"
        )
    for kind in self.sequences:
      if kind not in kuairand_source.KINDS:
        raise UserError(
          f"data.sequences: unknown history {kind!r}"
          + suggest(kind, kuairand_source.KINDS)
        )
    if len(set(self.sequences)) < len(self.sequences):
      raise UserError(
        f"data.sequences: {self.sequences} names a history twice; take one out"
      )
    for name in ("prior_strength", "pair_strength"):
      if not getattr(self, name) > 0:
        raise UserError(
          f"data.{name} must be above 0, got {getattr(self, name)}"
        )


def sources(config: Config) -> list[pathlib.Path]:
  """The files that `prepare` reads."""
  return kuairand_source.find_sources(config.root, config.variant).all


def estimate_bytes(config: Config) -> int:
  """Disk space that `prepare` needs, temporary columns included.

  A prepared row and the columns it is made from take about 1.5 KB, a row of
  the CSV log 70 bytes, one of the bundled log (stored lists counted) 5.
  """
  log_bytes = sum(path.stat().st_size for path in sources(config))
  return log_bytes * (22 if config.root else 200)


def prepare(config: Config, directory: epath.PathLike) -> None:
  """Writes the data set with `recjax.data.columns.ColumnWriter`.

  Raises:
    UserError: If a file is missing or broken, naming file, column and row.

  Example:
    >>> prepare(Config(), "/tmp/kuairand")                # doctest: +SKIP
  """
  found = kuairand_source.find_sources(config.root, config.variant)
  with tempfile.TemporaryDirectory(dir=directory, prefix="scratch") as folder:
    scratch = pathlib.Path(folder)
    data = kuairand_features.Data(found, scratch, config.max_rows_in_memory)
    schema = _schema(config)
    writer = ColumnWriter(directory, schema)
    vocabularies = _Vocabularies(data, config.min_tab_rows)
    sums = kuairand_features.sum_evidence(data)
    slices = kuairand_histories.write(
      data, vocabularies, writer, config.sequences
    )
    tags = _write_tags(data, vocabularies, writer)
    feedback = kuairand_feedback.write(data, vocabularies, writer, config)
    slices |= feedback.lists
    vocabularies.add(feedback.values)
    for rows in data.blocks(1 << 16):
      rows = rows[~data.events["stored"][rows]]
      dense = kuairand_features.dense_features(
        data, rows, {k: v[rows] for k, v in sums.items()}, config
      )
      dense = np.stack([dense[f.name] for f in schema.dense_features], axis=1)
      block = Block(
        dense=dense.astype(np.float32),
        ids=vocabularies.ids(rows) | feedback.ids(rows),
        lists=_lists(slices, tags, data.events["video"][rows], rows),
        vectors={},
        labels=_labels(data.events, rows),
        groups=_groups(data, rows),
        time=data.events["time"][rows] / 1000 if config.sequences else None,
      )
      _append(writer, data.events["part"][rows], block)
    writer.finish(dataclasses.replace(schema, vocab_sizes=vocabularies.sizes))
    for name, values in vocabularies.values.items():
      save_values(directory, name, values)
    # Mapped files must be let go of before their folder is removed.
    del data, vocabularies, sums, slices


def _schema(config: Config) -> Schema:
  def history(name, vocabulary, **more):
    return Feature(
      name, "sequence", vocabulary=vocabulary, max_len=config.max_len, **more
    )

  histories = [
    *(history(f"{k}_history", "video_id") for k in kuairand_source.KINDS),
    history("author_history", "author_id"),
  ]
  if config.sequences:
    histories = [
      history(
        f"{kind}_history",
        "video_id",
        time=f"{kind}_time",
        side={f"{kind}_{side}": vocab for side, vocab in SIDES.items()},
      )
      for kind in config.sequences
    ]
  single = ("user_id", "video_id", *_USER_FEATURES)
  single = (*single, *_VIDEO_FEATURES, *_ROW_FEATURES)
  return Schema(
    features=(
      *(Feature(name, "sparse") for name in single),
      Feature("tag", "sparse", multi=True),
      *histories,
      *kuairand_feedback.features(config),
      *(Feature(name, "dense") for name in kuairand_features.dense_names()),
    ),
    labels=(
      *(Label(name) for name in _OUTCOMES),
      Label("play_time", "real", unit="s"),
    ),
    roles=Roles(
      user="user_id",
      item="video_id",
      # Where it is an input it is in seconds, as those of the events are.
      time="time_s" if config.sequences else "time_ms",
      group="user_id",
      query="user_id x date",
      scenario="tab",
      popularity="item_positives" if config.feedback else None,
    ),
    split=Split(by="time", column="date"),
  )


class _Vocabularies:
  """Rows of the embedding tables: 0, then the training part's values."""

  def __init__(self, data: kuairand_features.Data, min_tab_rows: int):
    self._data = data
    users = np.zeros(data.num_users, bool)
    videos = np.zeros(data.num_videos, bool)
    seen = {name: np.zeros(1 << 15, np.int64) for name in _ROW_FEATURES}
    for rows in data.blocks():
      rows = rows[
        (data.events["part"][rows] == 0) & ~data.events["stored"][rows]
      ]
      users[data.events["user"][rows]] = True
      videos[data.events["video"][rows]] = True
      for name, codes in data.row_codes(rows).items():
        seen[name] += np.bincount(codes, minlength=1 << 15)
    in_history = videos.copy()
    for stored in data.histories.values():
      in_history[stored.video] = True
    self.sizes, self.values = {}, {}
    self._row = {
      name: self._number(
        name,
        np.arange(1 << 15),
        count >= (min_tab_rows if name == "tab" else 1),
      )
      for name, count in seen.items()
    }
    self._user = {"user_id": self._number("user_id", data.user_ids, users)}
    author = _column(data.videos, "author_id")
    self._video = {
      "video_id": self._number("video_id", data.video_ids, in_history),
      "author_id": self._number("author_id", author, in_history),
    }
    for name in _USER_FEATURES:
      self._user[name] = self._number(
        name, _column(data.users, name), users, data.users.names.get(name)
      )
    for name in _VIDEO_FEATURES[1:]:
      self._video[name] = self._number(
        name, _column(data.videos, name), videos, data.videos.names.get(name)
      )
    self.tag = self._number("tag", data.tags, videos, data.tag_names)

  def _number(self, name: str, values, seen, texts=None) -> np.ndarray:
    """Vocabulary row of each value, given which entries training holds.

    `texts` are what the values stand for, if they are codes of texts.
    """
    known = np.unique(values[seen])
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    self.sizes[name] = len(known) + 1
    if texts is None:
      stood_for = pa.array(known.astype(np.int64), mask=known == _MISSING)
    else:
      texts = pa.array([*texts, None], pa.large_string())
      stood_for = texts.take(pa.array(known % len(texts)))
      stood_for = pc.if_else(pc.equal(stood_for, ""), None, stood_for)
    self.values[name] = stood_for
    return np.where(known[at] == values, at + 1, 0).astype(np.int32)

  def ids(self, rows) -> dict[str, np.ndarray]:
    """Vocabulary rows of the single-valued features."""
    events = self._data.events
    user, video = events["user"][rows], events["video"][rows]
    codes = self._data.row_codes(rows)
    return (
      {name: table[user] for name, table in self._user.items()}
      | {name: table[video] for name, table in self._video.items()}
      | {name: table[codes[name]] for name, table in self._row.items()}
    )

  def add(self, values: dict[str, pa.Array]):
    """Takes in vocabularies that were numbered elsewhere."""
    self.values |= values
    self.sizes |= {name: len(held) + 1 for name, held in values.items()}

  def user_rows(self, user) -> np.ndarray:
    """Rows of users."""
    return self._user["user_id"][user]

  def video_rows(self, video) -> np.ndarray:
    """Rows of videos."""
    return self._video["video_id"][video]

  def event_rows(self, events) -> dict[str, np.ndarray]:
    """Rows of events' videos and of all their sides; 0: unknown."""
    video = events["video"]
    first_tag = np.where(self._data.tags[:, 0] >= 0, self.tag[:, 0], 0)
    rows = {
      "video": self._video["video_id"][video],
      "author": self._video["author_id"][video],
      "tag": first_tag[video].astype(np.int32),
    }
    for side in ("tab", "duration"):
      row = self._row[SIDES[side]][events[side]]
      rows[side] = np.where(events[side] >= 0, row, 0).astype(np.int32)
    return rows


def _column(table, name: str) -> np.ndarray:
  if name in table.texts:
    return table.texts[name]
  return np.nan_to_num(table.numbers[name], nan=_MISSING)


def _write_tags(
  data: kuairand_features.Data,
  vocabularies: _Vocabularies,
  writer: ColumnWriter,
):
  """Writes each video's tags; returns the start and length by video."""
  held = data.tags >= 0
  first = writer.append_values("tag", vocabularies.tag[held])
  length = held.sum(axis=1)
  return first + np.cumsum(length) - length, length.astype(np.int32)


def _lists(slices, tags, video, rows):
  lists = {
    name: (starts[rows], lengths[rows])
    for name, (starts, lengths) in slices.items()
  }
  return lists | {"tag": (tags[0][video], tags[1][video])}


def _labels(events, rows) -> dict[str, np.ndarray]:
  labels = {
    name: kuairand_features.outcome(events, rows, name).astype(np.float32)
    for name in _OUTCOMES
  }
  play_time = (events["play_ms"][rows] / 1000).astype(np.float32)
  return labels | {"play_time": play_time}


def _groups(data: kuairand_features.Data, rows) -> dict[str, np.ndarray]:
  user = data.events["user"][rows]
  day = data.events["day"][rows].astype(np.int64)
  first_day = int(data.events["day"][data.num_events - 1]) - 127
  query = user * 128 + np.clip(day - first_day, 0, 127)
  return {"group": user.astype(np.int32), "query": query.astype(np.int32)}


def _append(writer: ColumnWriter, part, block: Block):
  for number, split in enumerate(SPLITS):
    chosen = part == number
    if chosen.any():
      writer.append(split, block.take(chosen))
