"""Features of KuaiRand rows: causal rates, counts, overlaps, own columns.

`recjax.data.kuairand` says what they are and why. Everything works on blocks
of rows; the sums that rates are made of lie on disk, one array a key.
"""

import pathlib

import numpy as np

from recjax.data import causal, kuairand_source
from recjax.errors import UserError

_OUTCOMES = tuple(kuairand_source.OUTCOMES)
# Columns of the summed evidence: exposures whose like and long view is known,
# those two, exposures of the log, their clicks and watched shares (1/256).
_SEEN, _LONG, _LIKE, _LOGGED, _CLICK, _RATIO, _EXPOSURES = range(7)
_RATIO_UNIT = 256
# Key -> outcomes whose rate is a feature. Two names: a pair, whose prior
# follows from the rates of its members.
RATES = {
  ("user",): ("click", "long_view", "like"),
  ("video",): ("click", "long_view", "like"),
  ("author",): ("click", "long_view", "like"),
  ("music",): ("click", "long_view"),
  ("tag",): ("click", "long_view", "like"),
  ("tab",): ("click", "long_view", "like"),
  ("duration",): ("click", "long_view"),
  ("hour",): ("click", "long_view"),
  ("user", "tab"): ("click", "long_view", "like"),
  ("video", "tab"): ("click", "long_view"),
  ("author", "tab"): ("click", "long_view"),
  ("duration", "tab"): ("click", "long_view"),
  ("hour", "tab"): ("click", "long_view"),
  ("user", "video"): ("click", "long_view"),
  ("user", "author"): ("click", "long_view", "like"),
  ("user", "music"): ("long_view",),
  ("user", "tag"): ("click", "long_view"),
  ("user", "duration"): ("click", "long_view"),
}
_EVIDENCE = {
  "click": (_CLICK, _LOGGED, 0.4),
  "long_view": (_LONG, _SEEN, 0.3),
  "like": (_LIKE, _SEEN, 0.02),
}
_SEEN_COUNTS = (("user",), ("video",), ("author",), ("music",), ("user", "tag"))
# Not by user: a user's count of log rows says above all how late it is.
_LOG_COUNTS = (("video",), ("video", "tab"))
_OVERLAPS = {"watched": _SEEN, "liked": _LIKE, "long_watched": _LONG}
_OVERLAP_KEYS = ("video", "author", "music", "tag")
_RATIO_KEYS = (("user",), ("video",), ("author",))
# Seconds; views and long views depend on how long a video is.
_DURATION_EDGES = (1, 7, 12, 18, 30, 60, 90, 120, 180, 240, 300)
_MAX_AGE = 14  # Days; older videos count as so old.


class Data:
  """Events in time order and what belongs to their users and videos."""

  def __init__(self, found, scratch: pathlib.Path, max_rows: int):
    self.scratch, self.max_rows = scratch, max_rows
    self.events, users, videos, self.histories = kuairand_source.read_events(
      found, scratch, max_rows
    )
    self.user_ids, self.video_ids = users, videos
    self.num_events = len(self.events["time"])
    self.num_users, self.num_videos = len(users), len(videos)
    self.users = kuairand_source.read_users(found.users, users)
    self.videos = kuairand_source.read_videos(found.videos, videos)
    numbers = self.videos.numbers
    self.author = _codes(numbers["author_id"])
    # 0 stands for a video without music.
    self.music = _codes(
      np.where(numbers["music_id"] == 0, np.nan, numbers["music_id"])
    )
    self.tags, self.tag_names = _split_tags(self.videos)
    self.upload_day = _upload_days(self.videos)

  def blocks(self, size: int | None = None):
    """Numbers of consecutive events, at most `max_rows` at a time."""
    size = min(size or self.max_rows, self.max_rows)
    for start in range(0, self.num_events, size):
      yield np.arange(start, min(start + size, self.num_events))

  def row_codes(self, rows) -> dict[str, np.ndarray]:
    """Small integers that a row has by itself; tab is -1 where unknown."""
    events = self.events
    age = events["day"][rows] - self.upload_day[events["video"][rows]]
    return {
      "duration_bucket": np.digitize(
        events["duration_ms"][rows] / 1000, _DURATION_EDGES
      ),
      "video_age_bucket": np.clip(age, 0, _MAX_AGE),
      "hour": events["hour"][rows].astype(np.int64),
      "tab": events["tab"][rows].astype(np.int64),
    }


def tag_indicators(data: Data) -> np.ndarray:
  """Videos by tags: 1 where a video has the tag."""
  found = np.zeros((data.num_videos, len(data.tag_names)))
  video, place = np.nonzero(data.tags >= 0)
  found[video, data.tags[video, place]] = 1.0
  return found


def _codes(values: np.ndarray) -> np.ndarray:
  """Positions among the distinct values; -1 where missing."""
  known = ~np.isnan(values)
  codes = np.full(len(values), -1)
  codes[known] = np.unique(values[known], return_inverse=True)[1]
  return codes


def _split_tags(videos) -> tuple[np.ndarray, list[str]]:
  """Tag codes of each video, filled up with -1, and the tags by code."""
  lists = [
    list(dict.fromkeys(t for t in text.split(",") if t))
    for text in videos.names["tag"]
  ]
  known = sorted({t for tags in lists for t in tags})
  number = {tag: position for position, tag in enumerate(known)}
  table = np.full((len(lists), max(1, *map(len, lists))), -1)
  for row, tags in enumerate(lists):
    table[row, : len(tags)] = [number[t] for t in tags]
  return table[videos.texts["tag"]], known


def _upload_days(videos) -> np.ndarray:
  """Days since 1970; far in the past where unknown."""
  days = []
  for text in videos.names["upload_dt"]:
    try:
      days.append(np.datetime64(text[:10], "D").astype(np.int64) if text else 0)
    except ValueError as error:
      raise UserError(
        f"video_features_basic: column upload_dt: {text!r} is no day; write "
        "it as YYYY-MM-DD"
      ) from error
  return np.asarray(days, np.int64)[videos.texts["upload_dt"]]


def sum_evidence(data: Data) -> dict[tuple[str, ...], np.ndarray]:
  """For each key of `RATES`, and for none, what each row may know of it."""
  num = data.num_events
  values = mapped(data, "values", np.int32, (num, 7))
  members = {
    name: mapped(
      data,
      name,
      np.int32,
      (num, 1) if name != "tag" else (num, data.tags.shape[1]),
    )
    for name in (
      "user",
      "video",
      "author",
      "music",
      "tag",
      "tab",
      "duration",
      "hour",
    )
  }
  for rows in data.blocks():
    values[rows] = _evidence(data.events, rows)
    for name, codes in _members(data, rows).items():
      members[name][rows] = codes.reshape(len(rows), -1)
  sums = {}
  for key in ((), *RATES):
    columns = 7 if key == ("user",) else 6
    name = "sums_" + "_".join(key)
    sums[key] = causal.visible_sums(
      _key(data, key, members),
      data.events["time"],
      data.events["part"],
      values[:, :columns],
      max_rows=data.max_rows,
      out=mapped(data, name, np.int32, (num, columns)),
    )
  return sums


def mapped(data: Data, name: str, kind, shape) -> np.ndarray:
  """A new temporary array on disk."""
  return np.memmap(data.scratch / name, kind, "w+", 0, shape)


def _evidence(events, rows) -> np.ndarray:
  logged = ~events["stored"][rows]
  # A missing duration (0) counts as a second; loops beyond two as two.
  ratio = events["play_ms"][rows] / np.maximum(
    events["duration_ms"][rows], 1000
  )
  ratio = np.rint(np.minimum(ratio, 2) * _RATIO_UNIT)
  return np.stack(
    [
      np.ones(len(rows)),
      outcome(events, rows, "long_view"),
      outcome(events, rows, "like"),
      logged,
      outcome(events, rows, "click"),
      ratio,
      events["exposures"][rows],
    ],
    axis=1,
  )


def outcome(events, rows, name: str) -> np.ndarray:
  """0 or 1: whether the outcome called `name` happened."""
  return (events["outcome"][rows] >> _OUTCOMES.index(name)) & 1


def _members(data: Data, rows) -> dict[str, np.ndarray]:
  """What keys are made of; -1 where unknown, as the tab of stored events."""
  video = data.events["video"][rows]
  codes = data.row_codes(rows)
  stored = data.events["stored"][rows]
  return {
    "user": data.events["user"][rows],
    "video": video,
    "author": data.author[video],
    "music": data.music[video],
    "tag": data.tags[video],
    "tab": codes["tab"],
    "duration": np.where(stored, -1, codes["duration_bucket"]),
    "hour": np.where(stored, -1, codes["hour"]),
  }


def _key(data: Data, key: tuple[str, ...], members) -> np.ndarray:
  """One number for each combination of the members, on disk."""
  width = max((members[name].shape[1] for name in key), default=1)
  combined = mapped(data, "key", np.int64, (data.num_events, width))
  sizes = {name: int(members[name].max()) + 1 for name in key}
  for rows in data.blocks():
    number = np.zeros((len(rows), width), np.int64)
    known = np.ones((len(rows), width), bool)
    for name in key:
      code = members[name][rows]
      known &= code >= 0
      number = number * sizes[name] + code
    combined[rows] = np.where(known, number, -1)
  return combined


def dense_names() -> list[str]:
  """Names of the dense features in their order."""
  rates = [
    f"{outcome}_rate_{'_'.join(key)}"
    for key, outcomes in RATES.items()
    for outcome in outcomes
  ]
  return [
    *rates,
    *(f"play_ratio_{'_'.join(key)}" for key in _RATIO_KEYS),
    *(f"count_{'_'.join(key)}" for key in _SEEN_COUNTS),
    *(f"log_count_{'_'.join(key)}" for key in _LOG_COUNTS),
    *(f"{verb}_same_{key}" for verb in _OVERLAPS for key in _OVERLAP_KEYS),
    "history_length",
    *kuairand_source.USER_NUMBERS,
    "duration",
    "video_age",
    "aspect_ratio",
  ]


def dense_features(data: Data, rows, sums, config) -> dict[str, np.ndarray]:
  """The dense features of some rows, by name.

  Args:
    data: The log.
    rows: Numbers of the rows.
    sums: What `sum_evidence` gave, these rows of it.
    config: The `recjax.data.kuairand.Config`.
  """
  dense = _rates(sums, config)
  overall = causal.smoothed_rate(
    sums[()][:, _RATIO], sums[()][:, _LOGGED], 0.5 * _RATIO_UNIT, 100.0
  )
  for key in _RATIO_KEYS:
    ratio = causal.smoothed_rate(
      sums[key][:, _RATIO],
      sums[key][:, _LOGGED],
      overall,
      config.prior_strength,
    )
    dense[f"play_ratio_{'_'.join(key)}"] = ratio / _RATIO_UNIT

  def count(key, column):
    return np.log1p(np.minimum(sums[key][:, column], config.max_count))

  for key in _SEEN_COUNTS:
    dense[f"count_{'_'.join(key)}"] = count(key, _SEEN)
  for key in _LOG_COUNTS:
    dense[f"log_count_{'_'.join(key)}"] = count(key, _LOGGED)
  for verb, column in _OVERLAPS.items():
    for key in _OVERLAP_KEYS:
      dense[f"{verb}_same_{key}"] = count(("user", key), column)
  dense["history_length"] = np.log1p(sums["user",][:, _EXPOSURES])
  user, video = data.events["user"][rows], data.events["video"][rows]
  for name in kuairand_source.USER_NUMBERS:
    number = np.nan_to_num(data.users.numbers[name], nan=0.0)
    dense[name] = np.log1p(np.maximum(number, 0))[user]
  dense["duration"] = np.log1p(data.events["duration_ms"][rows] / 1000)
  dense["video_age"] = np.log1p(data.row_codes(rows)["video_age_bucket"])
  dense["aspect_ratio"] = _aspect_ratio(data.videos)[video]
  return dense


def _rates(sums, config) -> dict[str, np.ndarray]:
  """Log odds of the smoothed rates, singles toward the overall rate."""
  odds = {}
  for outcome, (positive, known, guess) in _EVIDENCE.items():

    def rate(key, prior, strength, positive=positive, known=known):
      return causal.smoothed_rate(
        sums[key][:, positive], sums[key][:, known], prior, strength
      )

    # Only the first rows of all feel the guess: it weighs 100 events.
    overall = rate((), guess, 100.0)
    base = causal.log_odds(overall)
    for key in RATES:
      if len(key) == 1:
        prior, strength = overall, config.prior_strength
      else:
        # As if the members moved the odds independently.
        both = odds[outcome, key[:1]] + odds[outcome, key[1:]] - base
        prior, strength = 1 / (1 + np.exp(-both)), config.pair_strength
      odds[outcome, key] = causal.log_odds(rate(key, prior, strength))
  return {
    f"{outcome}_rate_{'_'.join(key)}": odds[outcome, key]
    for key, outcomes in RATES.items()
    for outcome in outcomes
  }


def _aspect_ratio(videos) -> np.ndarray:
  """Log of width over height; 0 where unknown."""
  width = videos.numbers["server_width"]
  height = videos.numbers["server_height"]
  known = (width > 0) & (height > 0)
  ratio = np.divide(width, height, out=np.ones(len(width)), where=known)
  return np.log(ratio)
