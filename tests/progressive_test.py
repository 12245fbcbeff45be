"""A day is evaluated with what was learned on the days before, and no more."""

import functools
import json
import os
from unittest import mock

import chex
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl.testing import absltest, parameterized

from recjax import progressive, train
from recjax.data.days import Day
from recjax.data.pipeline import open_dataset
from recjax.errors import UserError
from recjax.schema import SPLITS
from recjax.stage import Stage
from tests import run_case

NUM_ROWS, NUM_DAYS = 130, 4
SCHEMA = run_case.SCHEMA | {
  "roles": {"user": "user", "item": "item", "group": "user", "time": "ts"},
  "split": {"by": "time", "column": "ts", "valid": 0.2, "test": 0.3},
}


@functools.cache
def data_config(flipped_from=NUM_ROWS):
  """A table sorted by time; labels are other ones from a row on."""
  rng, folder = np.random.default_rng(0), run_case.shared_directory()
  user, item = rng.integers(0, 9, NUM_ROWS), rng.integers(0, 7, NUM_ROWS)
  click = ((user + item) % 3 == 0).astype(np.int32)
  click[flipped_from:] = 1 - click[flipped_from:]
  columns = {
    "ts": np.arange(NUM_ROWS),
    "user": user,
    "item": item,
    "genres": [[int(i)] * (i % 3) for i in item],
    "price": rng.normal(size=NUM_ROWS),
    "click": click,
    "secs": rng.exponential(9, NUM_ROWS),
  }
  path = folder / f"days_{flipped_from}.parquet"
  pq.write_table(pa.table(columns), path)
  (folder / "days.json").write_text(json.dumps(SCHEMA))
  return {
    "name": "table",
    "path": str(path),
    "schema": str(folder / "days.json"),
    "cache_dir": str(folder / "cache"),
  }


def make_config(flipped_from=NUM_ROWS, **words):
  return run_case.make_config(data=data_config(flipped_from), **words)


def day_folder(day):
  return f"day_{day:03}_of_{NUM_DAYS}"


class DayTest(parameterized.TestCase):
  def all_rows(self, columns):
    parts = [columns.read(s, np.arange(columns.num_rows[s])) for s in SPLITS]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

  def test_days_are_the_rows_one_after_another(self):
    columns = open_dataset(data_config())
    rows, start = self.all_rows(columns), 0
    for day in range(NUM_DAYS - 1):
      view = Day(columns, day, NUM_DAYS)
      self.assertEqual(view.num_rows["valid"], view.num_rows["test"])
      for split in ("train", "test"):
        num = view.num_rows[split]
        first = start if split == "train" else start + view.num_rows["train"]
        # Not in their order, and across parts where a day holds several.
        indices = np.random.default_rng(day).permutation(num)
        chex.assert_trees_all_equal(
          view.read(split, indices),
          jax.tree.map(lambda x, at=first + indices: x[at], rows),
        )
        self.assertEqual(view.lengths(split, indices).shape, (num, 0))
      start += view.num_rows["train"]
    self.assertEqual(start + view.num_rows["test"], NUM_ROWS)
    with self.assertRaises(IndexError):
      view.read("train", np.array([view.num_rows["train"]]))

  @parameterized.parameters(1, NUM_ROWS + 1)
  def test_too_few_or_many_days(self, num_days):
    with self.assertRaisesRegex(UserError, "num_days must be from 2 to 130"):
      Day(open_dataset(data_config()), 0, num_days)

  def test_days_need_time(self):
    with self.assertRaisesRegex(UserError, "split by column"):
      Day(open_dataset(run_case.data_config()), 0, 2)


class ProgressiveTest(run_case.RunTestCase):
  def run_days(self, config, workdir="run"):
    return progressive.train_by_days(
      config, str(self.directory / workdir), NUM_DAYS
    )

  def scores(self, day, workdir="run"):
    """The predictions of a day, which the run of the day before made."""
    path = self.directory / workdir / day_folder(day - 1) / "predictions.npz"
    with np.load(path) as arrays:
      return arrays["click/score"]

  def test_a_day_is_predicted_from_the_days_before_it_alone(self):
    sizes = np.diff(np.linspace(0, NUM_ROWS, NUM_DAYS + 1).round())
    first_of_2 = int(sizes[:2].sum())
    self.run_days(make_config())
    self.run_days(make_config(flipped_from=first_of_2), "flipped")
    for day in (1, 2):
      np.testing.assert_array_equal(
        self.scores(day), self.scores(day, "flipped")
      )
    # The labels of day 2 are trained on before day 3, and matter.
    self.assertGreater(
      np.abs(self.scores(3) - self.scores(3, "flipped")).max(), 1e-3
    )

  def test_a_day_goes_on_where_the_one_before_ended(self):
    config = make_config(optimizer__ema_decay=0.5)
    summary = self.run_days(config)
    steps = [
      json.loads(
        (self.directory / "run" / day_folder(d) / "result.json").read_text()
      )["steps"]
      for d in range(NUM_DAYS - 1)
    ]
    # 32, 33 and 33 rows in batches of 16.
    self.assertEqual(steps, [2, 5, 8])
    self.assertEqual([d["day"] for d in summary["days"]], [1, 2, 3])
    values = [d["metrics"]["click/auc"] for d in summary["days"]]
    weights = [d["num_rows"] for d in summary["days"]]
    self.assertAlmostEqual(
      summary["metrics"]["click/auc"], np.average(values, weights=weights)
    )
    workdir = self.directory / "run"
    kept = [
      d
      for d in range(NUM_DAYS - 1)
      if (workdir / day_folder(d) / "checkpoints").exists()
    ]
    self.assertEqual(kept, [NUM_DAYS - 2])

  @parameterized.parameters(1, 3, 6)
  def test_a_run_that_was_stopped_ends_as_if_it_had_not(self, step):
    config = make_config(optimizer__ema_decay=0.5)
    expected = self.run_days(config, "undisturbed")
    update = train.Progress.update

    def update_and_stop(progress, now, **kwargs):
      update(progress, now, **kwargs)
      if now == step:
        os.kill(os.getpid(), 15)

    with mock.patch.object(train.Progress, "update", update_and_stop):
      self.assertIsNone(self.run_days(config))
    self.assertEqual(self.run_days(config), expected)
    for day in range(1, NUM_DAYS):
      np.testing.assert_array_equal(
        self.scores(day), self.scores(day, "undisturbed")
      )
    self.assertEqual(self.run_days(config), expected)

  def test_later_days_repeat_the_last_stage_alone(self):
    stages = (
      Stage("first", trainable=("hidden.*", "embedding")),
      Stage("second", trainable=("heads.*",)),
    )
    self.use_method(run_case.make_method(STAGES=stages))
    config = make_config()
    config["model"] = {}
    self.run_days(config)
    states = []
    for day in range(NUM_DAYS - 1):
      lines = self.lines(f"run/{day_folder(day)}")
      states.append(lines[-1]["step"])
    # Two stages of one step each, and then one of all steps a day.
    self.assertEqual(states, [2, 5, 8])
    last = self.directory / "run" / day_folder(NUM_DAYS - 2)
    result = json.loads((last / "result.json").read_text())
    self.assertEqual(result["best_step"], 8)

  def test_a_trial_has_no_days(self):
    config = make_config() | {"model_name": "two_stage", "model": {}}
    with self.assertRaisesRegex(UserError, "two_stage learns from a trial"):
      self.run_days(config)


if __name__ == "__main__":
  absltest.main()
