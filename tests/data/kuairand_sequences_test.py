"""KuaiRand's histories with event times and sides, against a loop."""

import pathlib
import tempfile
from unittest import mock

import kuairand_test
import numpy as np
import pyarrow.parquet as pq
from absl.testing import absltest

from recjax.data import kuairand, kuairand_source, pipeline
from recjax.data.columns import Columns
from recjax.data.vocabulary import load_values
from recjax.errors import UserError
from recjax.schema import SPLITS

KINDS = ("long_watch", "watch", "like")
MAX_LEN = 7
_EDGES = (1, 7, 12, 18, 30, 60, 90, 120, 180, 240, 300)


def prepare(log, history, sequences=KINDS):
  """All that a data set with event times holds, by part, and its raw values."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / "out").mkdir()
    sources = kuairand_test.KuaiRandTest._parquet(
      mock.Mock(folder=folder), log, history
    )
    with mock.patch.object(
      kuairand_source, "find_sources", return_value=sources
    ):
      config = kuairand.Config(max_len=MAX_LEN, sequences=sequences)
      kuairand.prepare(config, folder / "out")
    columns = Columns(folder / "out")
    values = {
      vocab: [None, *load_values(folder / "out", vocab).to_pylist()]
      for vocab in {feature.vocab for feature in columns.schema.id_features}
    }
    batches = {
      split: columns.read(split, np.arange(columns.num_rows[split]))
      for split in SPLITS
    }
    return columns.schema, batches, values


class Loop:
  """The events that a row sees, looked for one by one."""

  def __init__(self, log, history):
    videos = pq.read_table(kuairand_test._BUNDLED.videos[0]).to_pylist()
    self.videos = {row["video_id"]: row for row in videos}
    parts = np.digitize(log["date"], kuairand_source.LAST_DAYS, right=True)
    columns = {name: column.tolist() for name, column in log.items()}
    self.rows = [
      dict(zip(columns, row, strict=True)) | {"part": int(part)}
      for row, part in zip(
        zip(*columns.values(), strict=True), parts, strict=True
      )
    ]
    self.stored = {row["user_id"]: row for row in history}

  def events(self, row, kind):
    """(video, author, first tag, tab, duration bucket, age) oldest first."""
    column = {"like": "is_like", "long_watch": "long_view"}.get(kind)
    found = []
    stored = self.stored.get(row["user_id"])
    if stored:
      found += [
        {"video_id": v, "time_ms": stored["last_time_ms"], "part": 0}
        for v in stored[f"{kind}_seq"]
      ]
    found += [
      other
      for other in self.rows
      if other["user_id"] == row["user_id"] and (not column or other[column])
    ]
    seen = [
      e
      for e in found
      if e["time_ms"] < row["time_ms"] and e["part"] <= (row["part"] == 2)
    ]
    seen.sort(key=lambda e: (e["part"], e["time_ms"]))
    return [self._describe(e, row) for e in seen[-MAX_LEN:]]

  def _describe(self, event, row):
    video = self.videos[event["video_id"]]
    duration = event.get("duration_ms")
    return (
      event["video_id"],
      video["author_id"],
      (video["tag"] or "").split(",")[0] or None,
      event.get("tab"),
      None
      if duration is None
      else sum(duration >= 1000 * edge for edge in _EDGES),
      np.float32((row["time_ms"] - event["time_ms"]) / 1000),
    )


class SequencesTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.log = kuairand_test._small_log()
    cls.history = kuairand_test._small_history()
    # A user whose stored list ends after the log has begun.
    cls.history[0]["last_time_ms"] = int(cls.log["time_ms"][90])
    cls.schema, cls.batches, cls.values = prepare(cls.log, cls.history)

  def test_the_schema_names_times_and_sides(self):
    names = [f.name for f in self.schema.sequences]
    self.assertEqual(names, [f"{kind}_history" for kind in KINDS])
    self.assertEqual(
      [f.name for f in self.schema.sides(self.schema.feature("like_history"))],
      ["like_author", "like_tag", "like_tab", "like_duration"],
    )

  def test_rows_see_the_events_of_a_loop(self):
    loop = Loop(self.log, self.history)
    vocabularies = ("video_id", "author_id", "tag", "tab", "duration_bucket")
    counts = dict.fromkeys(vocabularies, 0)
    for part, split in enumerate(SPLITS):
      batch = self.batches[split]
      rows = [row for row in loop.rows if row["part"] == part]
      for i, row in enumerate(rows):
        for kind in KINDS:
          expected = loop.events(row, kind)
          names = [f"{kind}_history"] + [
            f"{kind}_{side}" for side in ("author", "tag", "tab", "duration")
          ]
          mask = batch.id_mask[names[0]][i]
          age = batch.event_age[names[0]][i][mask]
          self.assertEqual(age.tolist(), [e[-1] for e in expected])
          self.assertTrue((age > 0).all())
          for place, (name, vocab) in enumerate(
            zip(names, vocabularies, strict=True)
          ):
            ids = batch.ids[name][i][mask]
            self.assertLen(ids, len(expected))
            for number, event in zip(ids, expected, strict=True):
              if event[place] is None:
                self.assertIsNone(self.values[vocab][number])
              elif number:
                # What training does not hold is row 0.
                self.assertEqual(self.values[vocab][number], event[place])
                counts[vocab] += 1
    for vocab, count in counts.items():
      self.assertGreater(count, 100, vocab)

  def test_later_events_change_nothing(self):
    """Rows up to a moment, when all from it on has other videos and tabs."""
    times = self.log["time_ms"]
    train = self.log["date"] <= kuairand_source.LAST_DAYS[0]
    moment = np.sort(times[train])[train.sum() // 2]
    changed = {name: column.copy() for name, column in self.log.items()}
    late = times >= moment
    for name in ("video_id", "tab", "is_like", "long_view"):
      changed[name][late] = changed[name][late][::-1]
    _, batches, values = prepare(changed, self.history)
    early = times[train] <= moment
    self.assertGreater(early.sum(), 20)
    self.assertGreater((times[train] == moment).sum(), 1)

    def raw(batch, values, feature):
      rows = batch.ids[feature.name][early]
      return [[values[feature.vocab][k] for k in row] for row in rows]

    for feature in self.schema.id_features:
      if feature.kind == "sequence":
        self.assertEqual(
          raw(batches["train"], values, feature),
          raw(self.batches["train"], self.values, feature),
          feature.name,
        )
    for name, ages in self.batches["train"].event_age.items():
      np.testing.assert_array_equal(
        batches["train"].event_age[name][early], ages[early]
      )

  def test_mistakes(self):
    with self.assertRaisesRegex(UserError, "history 'likes'.*mean 'like'"):
      kuairand.Config(sequences=("likes",))
    with self.assertRaisesRegex(UserError, "names a history twice"):
      kuairand.Config(sequences=("like", "like"))

  def test_a_list_of_a_config_file_is_a_tuple(self):
    options = pipeline._read_options(
      kuairand.Config, "kuairand", {"sequences": ["like"]}
    )
    self.assertEqual(options, kuairand.Config(sequences=("like",)))


if __name__ == "__main__":
  absltest.main()
