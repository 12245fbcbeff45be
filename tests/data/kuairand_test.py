"""Tests of the KuaiRand adapter on small logs cut from the bundled slice."""

import pathlib
import tempfile
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from absl.testing import absltest, parameterized

from recjax.data import kuairand, kuairand_source
from recjax.data.columns import Columns
from recjax.data.vocabulary import load_values
from recjax.errors import UserError
from recjax.schema import SPLITS

_BUNDLED = kuairand_source.find_sources("", "")
_NUM_VIDEOS = 40  # Few, so that users meet the same videos again.
_OUTCOMES = tuple(kuairand_source.OUTCOMES.values())


def _table(columns):
  return pa.table({name: pa.array(column) for name, column in columns.items()})


def _small_log():
  """Rows of a few users, with many equal times, in time order."""
  log = pa.parquet.read_table(_BUNDLED.log[0])
  log = {name: log[name].to_numpy().copy() for name in log.column_names}
  chosen = log["user_id"] % 600 == 3
  log = {name: column[chosen] for name, column in log.items()}
  log["video_id"] %= _NUM_VIDEOS
  log["time_ms"] -= log["time_ms"] % 1_800_000
  order = np.argsort(log["time_ms"], kind="stable")
  return {name: column[order] for name, column in log.items()}


def _small_history():
  history = pa.parquet.read_table(_BUNDLED.history[0]).to_pylist()
  history = [row for row in history if row["user_id"] % 600 == 3]
  for row in history:
    for name in ("watch_seq", "like_seq", "long_watch_seq"):
      row[name] = [video % _NUM_VIDEOS for video in row[name]]
  return history


def _prepare(sources, **options):
  """Prepares a data set and reads all of it back."""
  with tempfile.TemporaryDirectory() as folder:
    with mock.patch.object(
      kuairand_source, "find_sources", return_value=sources
    ):
      kuairand.prepare(kuairand.Config(**options), folder)
    columns = Columns(folder)
    names = [f.name for f in columns.schema.dense_features]
    result = {}
    for split in SPLITS:
      batch = columns.read(split, np.arange(columns.num_rows[split]))
      dense = dict(zip(names, columns.raw_dense(split).T, strict=True))
      result[split] = {
        "dense": dense,
        "ids": dict(batch.ids),
        "mask": dict(batch.id_mask),
        "labels": dict(batch.labels),
        "groups": dict(batch.groups),
      }
    left = sorted(p.suffix for p in pathlib.Path(folder).iterdir())
    assert set(left) == {".rows", ".i32", ".json", ""}, left
    names = {feature.vocab for feature in columns.schema.id_features}
    result["values"] = {n: load_values(folder, n).to_pylist() for n in names}
    return result


def _assert_same(test, one, other, kinds=("dense", "ids", "mask"), rows=None):
  rows = slice(None) if rows is None else rows
  for kind in kinds:
    test.assertEqual(one[kind].keys(), other[kind].keys())
    for name in one[kind]:
      np.testing.assert_array_equal(
        one[kind][name][rows], other[kind][name][rows], err_msg=name
      )


def _parts(log):
  return np.digitize(log["date"], kuairand_source.LAST_DAYS, right=True)


class KuaiRandTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def _parquet(self, log, history=None, name="log"):
    path = self.folder / f"{name}.parquet"
    pa.parquet.write_table(_table(log), path)
    paths = ()
    if history:
      paths = (self.folder / "history.parquet",)
      schema = pa.parquet.read_schema(_BUNDLED.history[0])
      pa.parquet.write_table(pa.Table.from_pylist(history, schema), paths[0])
    return kuairand_source.Sources(
      (path,), _BUNDLED.users, _BUNDLED.videos, paths
    )

  def _csv(self, log, variant="pure", parts=1):
    """Writes files named and ordered as the authors distribute them."""
    data = self.folder / "data"
    data.mkdir(exist_ok=True)
    early = log["date"] <= 20220428
    users = pa.parquet.read_table(_BUNDLED.users[0])
    videos = pa.parquet.read_table(_BUNDLED.videos[0])
    tables = {
      "log_standard_4_08_to_4_21": _table(
        {k: v[early] for k, v in log.items()}
      ),
      "log_standard_4_22_to_5_08": _table(
        {k: v[~early] for k, v in log.items()}
      ),
      "user_features": users,
      "video_features_basic": videos,
    }
    for stem, table in tables.items():
      pieces = 1 if stem == "user_features" else parts
      size = -(-table.num_rows // pieces)
      for piece in range(pieces):
        suffix = "" if pieces == 1 else f"_part{piece + 1}"
        pa.csv.write_csv(
          table.slice(piece * size, size),
          data / f"{stem}_{variant}{suffix}.csv",
        )
    return data

  @parameterized.parameters(("pure", 1), ("27k", 2))
  def test_csv_gives_the_features_of_parquet(self, variant, parts):
    log = _small_log()
    expected = _prepare(self._parquet(log))
    self._csv(log, variant, parts)
    found = kuairand_source.find_sources(str(self.folder), "")
    self.assertLen(found.log, 2 * parts)
    actual = _prepare(found)
    for split in SPLITS:
      _assert_same(
        self,
        actual[split],
        expected[split],
        ("dense", "ids", "mask", "labels", "groups"),
      )

  @parameterized.parameters(64, 257)
  def test_rows_in_memory_change_nothing(self, max_rows):
    sources = self._parquet(_small_log(), _small_history())
    expected = _prepare(sources)
    actual = _prepare(sources, max_rows_in_memory=max_rows)
    for split in SPLITS:
      _assert_same(self, actual[split], expected[split], expected[split])

  def test_rows_labels_and_groups_are_those_of_the_log(self):
    log = _small_log()
    data = _prepare(self._parquet(log, _small_history()))
    for number, split in enumerate(SPLITS):
      rows = _parts(log) == number
      labels = data[split]["labels"]
      for name, column in kuairand_source.OUTCOMES.items():
        np.testing.assert_array_equal(labels[name], log[column][rows])
      np.testing.assert_allclose(
        labels["play_time"], log["play_time_ms"][rows] / 1000, rtol=1e-6
      )
      groups = data[split]["groups"]
      for given, true in (
        (groups["group"], log["user_id"][rows].astype(np.int64)),
        (groups["query"], log["user_id"][rows] * 10**9 + log["date"][rows]),
      ):
        self.assertLen(set(given), len(set(true)))
        pairs = set(zip(given.tolist(), true.tolist(), strict=True))
        self.assertLen(pairs, len(set(true)))

  def test_outcomes_of_a_moment_reach_only_later_training_rows(self):
    log = _small_log()
    before = _prepare(self._parquet(log, _small_history()))
    train = np.flatnonzero(_parts(log) == 0)
    moment = log["time_ms"][train[len(train) // 2]]
    changed = _flip(log, log["time_ms"] >= moment)
    after = _prepare(self._parquet(changed, _small_history()))
    unaffected = log["time_ms"][train] <= moment
    self.assertGreater((log["time_ms"][train] == moment).sum(), 1)
    _assert_same(self, before["train"], after["train"], rows=unaffected)
    for name in ("click_rate_tab", "long_view_rate_user", "like_rate_video"):
      self.assertFalse(
        np.array_equal(
          before["train"]["dense"][name], after["train"]["dense"][name]
        )
      )

  def test_outcomes_of_validation_reach_only_the_test_part(self):
    log = _small_log()
    before = _prepare(self._parquet(log, _small_history()))
    changed = _flip(log, _parts(log) == 1)
    after = _prepare(self._parquet(changed, _small_history()))
    for split in ("train", "valid"):
      _assert_same(self, before[split], after[split])
    name = "click_rate_user"
    self.assertFalse(
      np.array_equal(
        before["test"]["dense"][name], after["test"]["dense"][name]
      )
    )

  def test_outcomes_of_the_test_part_reach_nothing(self):
    log = _small_log()
    before = _prepare(self._parquet(log, _small_history()))
    changed = _flip(log, _parts(log) == 2)
    after = _prepare(self._parquet(changed, _small_history()))
    for split in SPLITS:
      _assert_same(self, before[split], after[split])

  def test_features_equal_a_loop_over_all_earlier_events(self):
    log, history = _small_log(), _small_history()
    # A user whose stored list ends after the log has begun.
    history[0]["last_time_ms"] = int(log["time_ms"][len(log["user_id"]) // 9])
    data = _prepare(self._parquet(log, history), max_len=7)
    oracle = _Oracle(log, history)
    for number, split in enumerate(SPLITS):
      rows = np.flatnonzero(_parts(log) == number)
      for position, row in enumerate(rows):
        for name, value in oracle.dense(row).items():
          self.assertAlmostEqual(
            float(data[split]["dense"][name][position]),
            value,
            places=4,
            msg=f"{split} {position} {name}",
          )
        for name, expected in oracle.histories(row, 7).items():
          mask = data[split]["mask"][name][position]
          ids = data[split]["ids"][name][position]
          self.assertEqual(ids[mask].tolist(), expected, f"{split} {name}")

  def test_vocabularies_name_the_raw_values(self):
    log = _small_log()
    data = _prepare(self._parquet(log))
    values, test = data["values"], data["test"]
    users = pa.parquet.read_table(_BUNDLED.users[0]).to_pylist()
    users = {row["user_id"]: row for row in users}
    videos = pa.parquet.read_table(_BUNDLED.videos[0]).to_pylist()
    videos = {row["video_id"]: row for row in videos}
    rows = np.flatnonzero(log["date"] > kuairand_source.LAST_DAYS[1])
    self.assertLen(test["ids"]["user_id"], len(rows))
    counts = dict.fromkeys(test["ids"], 0)
    for place, row in enumerate(rows):
      user, video = int(log["user_id"][row]), int(log["video_id"][row])
      raw = users.get(user, {}) | videos.get(video, {})
      raw |= {"user_id": user, "video_id": video, "tab": int(log["tab"][row])}
      raw["hour"] = int(log["hourmin"][row]) // 100
      for name, ids in test["ids"].items():
        if name in raw and ids.ndim == 1 and ids[place]:
          found = values[name][ids[place] - 1]
          self.assertEqual(found, raw[name], name)
          counts[name] += 1
      tags = test["ids"]["tag"][place][test["mask"]["tag"][place]]
      known = [values["tag"][i - 1] for i in tags if i]
      self.assertLessEqual(set(known), set((raw.get("tag") or "").split(",")))
      counts["tag"] += len(known)
    for name in ("user_id", "video_id", "author_id", "video_type", "tag"):
      self.assertGreater(counts[name], 5, name)

  def test_values_unseen_in_training_get_row_zero(self):
    log = _small_log()
    log["video_id"][_parts(log) == 2] += 1000
    data = _prepare(self._parquet(log))
    self.assertTrue((data["test"]["ids"]["video_id"] == 0).all())
    self.assertTrue((data["train"]["ids"]["video_id"] > 0).all())
    self.assertTrue((data["train"]["ids"]["user_id"] > 0).all())

  def test_mistakes_are_told_in_one_line(self):
    with self.assertRaisesRegex(UserError, "data.root.*no folder"):
      kuairand.sources(kuairand.Config(root=str(self.folder / "none")))
    with self.assertRaisesRegex(UserError, "no KuaiRand log"):
      kuairand.sources(kuairand.Config(root=str(self.folder)))
    with self.assertRaisesRegex(UserError, "data.variant: unknown.*'2k'"):
      kuairand.Config(variant="2k")
    with self.assertRaisesRegex(UserError, "data.max_len must be at least 1"):
      kuairand.Config(max_len=0)

  def _edit(self, stem, edit):
    """Changes the text of one CSV file and prepares."""
    data = self._csv(_small_log())
    path = data / f"{stem}_pure.csv"
    path.write_text(edit(path.read_text()))
    _prepare(kuairand_source.find_sources(str(self.folder), "pure"))

  def test_broken_files_are_named_with_column_and_row(self):
    log = "log_standard_4_22_to_5_08"
    with self.assertRaisesRegex(
      UserError, f"{log}_pure.csv: the file is empty"
    ):
      self._edit(log, lambda text: "")
    with self.assertRaisesRegex(UserError, f"{log}_pure.csv: holds no rows"):
      self._edit(log, lambda text: text.split("\n")[0] + "\n")
    with self.assertRaisesRegex(UserError, "column 'is_like' is missing"):
      self._edit(log, lambda text: text.replace("is_like", "liked"))
    with self.assertRaisesRegex(UserError, "basic.*'author_id' is missing"):
      self._edit(
        "video_features_basic", lambda text: text.replace("author_id", "a")
      )
    with self.assertRaisesRegex(UserError, "column date, row 1: 20220432"):
      self._edit(log, lambda text: text.replace("20220429", "20220432", 1))
    with self.assertRaisesRegex(UserError, "_pure.csv: cannot be read.*Row #2"):
      self._edit(log, lambda text: text.replace("20220429", "soon", 1))
    with self.assertRaisesRegex(UserError, "column date, row 1: .*missing"):
      self._edit(log, lambda text: text.replace("20220429", "", 1))
    with self.assertRaisesRegex(UserError, "no validation rows in the log"):
      self._edit(log, lambda text: text.replace(",2022050", ",2022040"))

  def test_an_outcome_must_be_zero_or_one(self):
    log = _small_log()
    log["is_like"][5] = 2
    with self.assertRaisesRegex(UserError, "column is_like, row 6: 2 must be"):
      _prepare(self._parquet(log))


def _flip(log, rows):
  """The log with every outcome of some rows changed."""
  changed = {name: column.copy() for name, column in log.items()}
  for name in _OUTCOMES:
    changed[name][rows] = 1 - changed[name][rows]
  changed["play_time_ms"][rows] += 5000
  return changed


class _Oracle:
  """The protocol as a loop over events, one row at a time."""

  def __init__(self, log, history):
    videos = pa.parquet.read_table(_BUNDLED.videos[0]).to_pylist()
    self.videos = {row["video_id"]: row for row in videos}
    self.rows = [
      dict(zip(log, values, strict=True))
      for values in zip(*(c.tolist() for c in log.values()), strict=True)
    ]
    for row, part in zip(self.rows, _parts(log), strict=True):
      row["part"], row["stored"] = int(part), False
    self.stored = {row["user_id"]: row for row in history}
    self.events = [*self.rows]
    for row in history:
      self.events += self._stored_events(row)
    ids = {r["video_id"] for r in self.rows if r["part"] == 0}
    for row in history:
      ids.update(row["watch_seq"], row["like_seq"], row["long_watch_seq"])
    authors = sorted({self.videos[v]["author_id"] for v in ids})
    self.video_row = {v: n + 1 for n, v in enumerate(sorted(ids))}
    self.author_row = {a: n + 1 for n, a in enumerate(authors)}

  def _stored_events(self, row):
    events = [
      {
        "user_id": row["user_id"],
        "video_id": video,
        "time_ms": row["last_time_ms"],
        "part": 0,
        "stored": True,
        "is_like": 0,
        "long_view": 0,
      }
      for video in row["watch_seq"]
    ]
    for name, column in (
      ("like_seq", "is_like"),
      ("long_watch_seq", "long_view"),
    ):
      left = list(row[name])
      for event in reversed(events):
        if left and left[-1] == event["video_id"]:
          event[column] = 1
          left.pop()
    return events

  def _visible(self, row, events):
    allowed = (0, 1) if row["part"] == 2 else (0,)
    return [
      e
      for e in events
      if e["part"] in allowed and e["time_ms"] < row["time_ms"]
    ]

  def _key(self, event, name):
    video = self.videos[event["video_id"]]
    return {
      "user": event["user_id"],
      "video": event["video_id"],
      "author": video["author_id"],
      "music": video["music_id"] or None,
      "tab": event.get("tab"),
    }[name]

  def _tags(self, event):
    return set((self.videos[event["video_id"]]["tag"] or "").split(",")) - {""}

  def dense(self, row):
    row = self.rows[row]
    seen = self._visible(row, self.events)
    logged = [e for e in seen if not e["stored"]]

    def same(events, *names):
      return [
        e
        for e in events
        if all(
          self._key(row, n) is not None and self._key(e, n) == self._key(row, n)
          for n in names
        )
      ]

    def rate(events, column, prior, strength):
      total = sum(e[column] for e in events)
      return (total + strength * prior) / (len(events) + strength)

    def odds(p):
      return np.log(p / (1 - p))

    mine = same(seen, "user")
    everyone = rate(logged, "is_click", 0.4, 100)
    user = rate(same(logged, "user"), "is_click", everyone, 20)
    tab = rate(same(logged, "tab"), "is_click", everyone, 20)
    both = 1 / (1 + np.exp(-(odds(user) + odds(tab) - odds(everyone))))
    like = rate(seen, "is_like", 0.02, 100)
    with_tag = [e for t in self._tags(row) for e in seen if t in self._tags(e)]
    my_tag = [e for t in self._tags(row) for e in mine if t in self._tags(e)]
    length = len(mine)
    stored = self.stored.get(row["user_id"])
    if stored and stored["last_time_ms"] < row["time_ms"]:
      length += stored["history_len"] - len(stored["watch_seq"])

    def count(events):
      return np.log1p(min(len(events), 50))

    def happened(events, column):
      return [e for e in events if e[column]]

    return {
      "click_rate_user": odds(user),
      "click_rate_user_tab": odds(
        rate(same(logged, "user", "tab"), "is_click", both, 5)
      ),
      "like_rate_tag": odds(rate(with_tag, "is_like", like, 20)),
      "count_music": count(same(seen, "music")),
      "count_video": count(same(seen, "video")),
      "log_count_video": count(same(logged, "video")),
      "watched_same_video": count(same(mine, "video")),
      "watched_same_tag": count(my_tag),
      "liked_same_author": count(happened(same(mine, "author"), "is_like")),
      "long_watched_same_music": count(
        happened(same(mine, "music"), "long_view")
      ),
      "history_length": np.log1p(length),
    }

  def histories(self, row, max_len):
    row = self.rows[row]
    result = {}
    lists = {
      "watch": lambda e: True,
      "like": lambda e: e["is_like"],
      "long_watch": lambda e: e["long_view"],
    }
    for kind, belongs in lists.items():
      stored = self.stored.get(row["user_id"])
      events = [
        e for e in self.rows if e["user_id"] == row["user_id"] and belongs(e)
      ]
      if stored:
        events = [
          {"video_id": v, "time_ms": stored["last_time_ms"], "part": 0}
          for v in stored[f"{kind}_seq"]
        ] + events
      events = self._visible(row, events)
      events.sort(key=lambda e: (e["part"], e["time_ms"]))
      videos = [e["video_id"] for e in events[-max_len:]]
      result[f"{kind}_history"] = [self.video_row.get(v, 0) for v in videos]
      if kind == "watch":
        authors = [self.videos[v]["author_id"] for v in videos]
        result["author_history"] = [self.author_row.get(a, 0) for a in authors]
    return result


if __name__ == "__main__":
  absltest.main()
