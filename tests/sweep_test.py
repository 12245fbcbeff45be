"""What a sweep tries, in which order, and what comes out of it."""

import dataclasses
import functools
import json
import math
import pathlib
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from recjax import comparison, report, sweep, tuning, workers
from recjax.errors import UserError
from recjax.sweep import Interval, Model, Sweep
from tests import sweep_case

STUB = "tests.sweep_case:train"
GAINS = {"model.gain": (1.0, 3.0, 2.0)}


def model(label="a", space=None, trainer=STUB, **values):
  """A row whose trainer only pretends."""
  words = {"tasks": ["click"], "gain": 1.0, "end": "done", "secs": 0, **values}
  config = {"model_name": "stub", "model": words, "train": {"num_epochs": 2}}
  return Model(label, config, GAINS if space is None else space, trainer)


def real(label="b", space=None, **values):
  """A row that the library trains."""
  config = {
    "model_name": "dlrm_mlp",
    "model": {"tasks": ["click"], "embed_dim": 4, **values},
    "data": {"name": "kuairand"},
    "optimizer": {"sparse": {}},
  }
  return Model(label, config, space or {})


def plan(*models, **values):
  """A grid of 3 trials and 2 seeds."""
  models = models or (model("a"), model("b"))
  values = {"num_trials": 3, "seeds": (0, 1), "tuning_seed": 9, **values}
  return Sweep(models, values.pop("baseline", models[0].label), **values)


class PlanTest(parameterized.TestCase):
  def test_a_grid_holds_every_combination(self):
    space = {"model.gain": (1.0, 2.0), "model.secs": (0, 1, 2)}
    some = plan(model(space=space), num_trials=6)
    words = sweep.trial_words(some, some.models[0])
    found = {(w["model.gain"], w["model.secs"]) for w in words}
    self.assertEqual(found, {(g, s) for g in (1.0, 2.0) for s in (0, 1, 2)})
    self.assertLen(words, 6)

  def test_random_trials_differ_and_are_the_same_for_every_model(self):
    space = {"model.gain": (1.0, 2.0, 3.0), "model.secs": (0, 1, 2)}
    some = plan(
      model("a", space), model("b", space), search="random", num_trials=5
    )
    first, second = (sweep.trial_words(some, m) for m in some.models)
    self.assertEqual(first, second)
    self.assertLen({tuple(w.values()) for w in first}, 5)
    other = dataclasses.replace(some, tuning_seed=1)
    self.assertNotEqual(first, sweep.trial_words(other, some.models[0]))

  def test_intervals_are_drawn_on_their_scale(self):
    rates = Interval(1e-4, 1e-2)
    space = {"model.gain": rates, "model.secs": (1, 2)}
    draws = []
    for seed in range(100):
      some = plan(
        model(space=space), search="random", num_trials=6, tuning_seed=seed
      )
      draws += sweep.trial_words(some, some.models[0])
    rates = np.array([words["model.gain"] for words in draws])
    self.assertBetween(rates.min(), 1e-4, 1.2e-4)
    self.assertBetween(rates.max(), 0.8e-2, 1e-2)
    # Half of them below the geometric mean, three standard errors wide.
    self.assertBetween(np.mean(rates < 1e-3), 0.44, 0.56)
    self.assertEqual({words["model.secs"] for words in draws}, {1, 2})

  def test_words_change_a_copy(self):
    config = {"model": {"gain": 1.0}, "seed": 0}
    changed = sweep.with_words(config, {"model.gain": 2.0, "seed": 3})
    self.assertEqual(changed, {"model": {"gain": 2.0}, "seed": 3})
    self.assertEqual(config, {"model": {"gain": 1.0}, "seed": 0})

  def test_checkpoints_are_picked_by_the_metric_of_the_sweep(self):
    some = plan(metric="valid/click/logloss")
    config = sweep.run_config(some, some.models[0], {"model.gain": 2.0}, 7)
    self.assertEqual(
      (config["label"], config["seed"], config["train"]["monitor"]),
      ("a", 7, "valid/click/logloss"),
    )
    self.assertEqual(config["model"]["gain"], 2.0)

  def test_words_may_take_the_seed_too(self):
    some = plan(seed_words=("train.num_epochs",))
    config = sweep.run_config(some, some.models[0], {"model.gain": 2.0}, 7)
    self.assertEqual((config["seed"], config["train"]["num_epochs"]), (7, 7))
    config = sweep.run_config(plan(), some.models[0], {}, 7)
    self.assertEqual(config["train"]["num_epochs"], 2)
    with self.assertRaisesRegex(UserError, "model.gain is set by the sweep"):
      plan(seed_words=("model.gain",))

  @parameterized.parameters(
    "test/macro_auc",
    "test/click/macro_gauc",
    "test/click/scenario_5/auc",
  )
  def test_metrics_by_scenario_are_known(self, metric):
    plan(table_metrics=(metric,))
    with self.assertRaisesRegex(UserError, "unknown metric"):
      plan(table_metrics=(metric.replace("auc", "acu"),))

  def test_failed_trials_come_last_and_a_loss_is_better_when_small(self):
    scores = [[0.5], [None], [0.7], [math.nan], [0.5]]
    self.assertEqual(sweep.rank(scores, "valid/click/auc"), [2, 0, 4, 1, 3])
    self.assertEqual(sweep.rank(scores, "valid/click/logloss"), [0, 4, 2, 1, 3])
    # A good value of a short training is none of a whole one.
    scores = [[0.9], [0.6, 0.7], [0.6, 0.8]]
    self.assertEqual(sweep.rank(scores, "valid/click/auc"), [2, 1, 0])

  @parameterized.named_parameters(
    ("no_models", lambda: Sweep((), "a"), "models is empty"),
    ("label", lambda: plan(model("a b")), "label 'a b' must be of letters"),
    ("twice", lambda: plan(model(), model()), "two models .* 'a'; rename"),
    ("baseline", lambda: plan(baseline="aa"), "'aa' is no label.*mean 'a'"),
    ("seeds", lambda: plan(seeds=()), "seeds is empty"),
    ("seed_twice", lambda: plan(seeds=(1, 1)), "seeds holds a value twice"),
    ("columns", lambda: plan(table_metrics=()), "table_metrics is empty"),
    (
      "metric",
      lambda: plan(metric="valid/click/acu"),
      "metric 'valid/click/acu' of a; did you mean 'valid/click/auc'",
    ),
    ("split", lambda: plan(metric="test/click/auc"), "metric 'test/click/auc'"),
    (
      "column",
      lambda: plan(table_metrics=("test/clik/auc",)),
      "unknown metric 'test/clik/auc'.*mean 'test/click/auc'",
    ),
    (
      "setting",
      lambda: Sweep(
        (real(space={"model.embed_dim": (4, 8), "model.mlp_dims": ((4,), 8)}),),
        "b",
        num_trials=4,
      ),
      "b: config.model.mlp_dims must be a list, got 8",
    ),
    ("search", lambda: plan(search="gird"), "search 'gird'.*mean 'grid'"),
    ("trials", lambda: plan(num_trials=7), "num_trials must be from 0 to 6"),
    ("grid", lambda: plan(num_trials=2), "3 values has 3 trials, but .* is 2"),
    ("space", lambda: plan(num_trials=0), "3 trials, but num_trials is 0"),
    (
      "too_few",
      lambda: plan(search="random", num_trials=4),
      "4 trials cannot be drawn from 3 settings",
    ),
    (
      "unequal",
      lambda: plan(model(), model("b", {"model.gain": (1.0, 2.0)})),
      "space of b has 2 values, that of a 3 values; they must be equal",
    ),
    (
      "unequal_none",
      lambda: plan(model(), model("b", {})),
      "space of b has no words, that of a 3 values",
    ),
    (
      "empty",
      lambda: plan(model(space={"model.gain": ()})),
      r"a: model.gain must have a list of values, got \(\)",
    ),
    (
      "interval",
      lambda: plan(model(space={"model.gain": Interval(1.0, 2.0)})),
      "model.gain is an interval, which a grid cannot try",
    ),
    ("low", lambda: Interval(0.0, 1.0), "above 0 where log=True"),
    ("high", lambda: Interval(2.0, 1.0), "low < high"),
    ("rungs", lambda: plan(rungs=({"train.num_epochs": 1},)), "must be empty"),
    (
      "word",
      lambda: plan(model(space={"model.gian": (1.0, 2.0, 3.0)})),
      "a: unknown word config.model.gian; did you mean 'gain'",
    ),
    (
      "type",
      lambda: plan(model(space={"model.gain": (1.0, 2.0, "x")})),
      "a: model.gain must be of type float, got 'x'",
    ),
    (
      "reserved",
      lambda: plan(model(space={"seed": (1, 2, 3)})),
      "seed is set by the sweep",
    ),
    (
      "real_word",
      lambda: plan(real(space={"model.embed_dm": (1, 2, 3)})),
      "b: unknown key .*embed_dm; did you mean 'embed_dim'",
    ),
    (
      "real_block",
      lambda: plan(real(space={"optimiser.x": (1, 2, 3)})),
      "b: unknown block config.optimiser .*did you mean 'optimizer'",
    ),
    (
      "real_value",
      lambda: plan(real(space={"model.embed_dim": (4, 8, -1)})),
      "b: model.embed_dim must be at least 1, got -1",
    ),
    (
      "real_override",
      lambda: plan(real(ffn="smoe"), num_trials=0),
      "b: unknown key .*ffn",
    ),
  )
  def test_mistakes_are_told_before_anything_runs(self, make, message):
    with self.assertRaisesRegex(UserError, message) as caught:
      make()
    self.assertNotIn("\n", str(caught.exception))


class RunSweepTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.told = []
    self.jobs = []

  def run_sweep(self, some, name="sweep", limit=None):
    """Runs it in this process; `limit` jobs, then an interruption."""

    workdir = self.folder / name
    return tuning.run_sweep(
      some,
      workdir,
      workdir / "results",
      execute=functools.partial(self.execute, limit=limit),
      tell=self.told.append,
    )

  def execute(self, jobs, limit=None):
    for job in jobs:
      if len(self.jobs) == limit:
        raise KeyboardInterrupt
      self.jobs.append(job)
      diverged = None
      try:
        sweep_case.train(job.config, job.workdir)
      except UserError as error:
        diverged = str(error)
      yield workers.Outcome(job, diverged, 90.0)

  def files(self, name="sweep"):
    folder = self.folder / name / "results"
    return {p.name: p.read_bytes() for p in folder.iterdir()}

  def read(self, path, name="sweep"):
    return json.loads((self.folder / name / path).read_text())

  def test_the_best_trial_runs_with_the_final_seeds(self):
    other = {"model.gain": (0.5, 0.2, 0.1)}
    self.run_sweep(plan(model("a"), model("b", other)))
    trials, final = self.jobs[:6], self.jobs[6:]
    self.assertEqual({job.config["seed"] for job in trials}, {9})
    self.assertEqual(
      [(j.config["label"], j.config["seed"], j.config["model"]["gain"])
       for j in final],
      [("a", 0, 3.0), ("a", 1, 3.0), ("b", 0, 0.5), ("b", 1, 0.5)],
    )  # fmt: skip
    self.assertIn("a, trial 2 of 3: valid/click/auc 0.30000", self.told[1])
    self.assertRegex(self.told[1], r"^\[2/10\] .* in 90 s, about 12 min left$")
    self.assertIn("a: chosen model.gain 3.0", self.told)
    self.assertRegex(self.told[-1], r"^\[10/10\] b, seed 1: .* in 90 s$")

  def test_results_are_small_and_say_how_they_came_about(self):
    self.run_sweep(plan())
    results = self.folder / "sweep" / "results"
    names = {f"{m}-{s}.json" for m in "ab" for s in (0, 1)}
    self.assertEqual(
      {p.name for p in results.iterdir()},
      names | {"comparison.json", "sweep.json"},
    )
    full = self.read("runs/a-0/result.json")
    self.assertEqual(
      self.read("results/a-0.json"), full | {"examples_per_sec": None}
    )
    about = self.read("results/sweep.json")
    self.assertEqual(about["commits"], ["abc"])
    self.assertEqual(about["models"]["a"]["chosen"], {"model.gain": 3.0})
    self.assertEqual(
      about["models"]["a"]["trials"],
      [
        {"words": {"model.gain": g}, "scores": [g / 10], "failed": None}
        for g in (1.0, 3.0, 2.0)
      ],
    )
    self.assertEqual((about["tuning_seed"], about["seeds"]), (9, [0, 1]))

  def test_the_published_table_is_that_of_the_runs(self):
    strong = {"model.gain": (2.0, 2.1, 2.2)}
    some = plan(
      model("a", {"model.gain": (0.1, 0.2, 0.3)}),
      model("bb", strong),
      seeds=(0, 1, 2, 3),
      baseline="a",
    )
    self.run_sweep(some)
    (table,) = report.published_tables(self.folder / "sweep" / "results")
    runs = report.load_runs([self.folder / "sweep" / "runs" / "*"])
    runs = [dataclasses.replace(run, examples_per_sec=None) for run in runs]
    expected = comparison.comparison_table(runs, some.table_metrics, "a")
    self.assertEqual(table.rows, expected.rows)
    # The bootstrap is kept: nothing is left without one.
    marks = table.rows[1][3:8:2]
    self.assertTrue(all(mark.endswith(" *") for mark in marks), marks)

  def test_no_trials_go_straight_to_the_seeds(self):
    self.run_sweep(plan(model(space={}, gain=0.5), num_trials=0))
    self.assertEqual([job.config["seed"] for job in self.jobs], [0, 1])
    self.assertEqual(
      self.read("results/sweep.json")["models"]["a"]["trials"], []
    )

  def test_halving_gives_the_better_half_the_whole_length(self):
    space = {"model.gain": (5.0, 1.0, 3.0, 2.0, 4.0)}
    short = {"train.num_epochs": 1}
    self.run_sweep(
      plan(model(space=space), num_trials=5, rungs=(short, {}), seeds=(0,))
    )
    trials = [
      (job.config["train"]["num_epochs"], job.config["model"]["gain"])
      for job in self.jobs
    ]
    self.assertEqual(trials[:5], [(1, g) for g in (5.0, 1.0, 3.0, 2.0, 4.0)])
    self.assertEqual(trials[5:], [(2, 5.0), (2, 4.0), (2, 3.0), (2, 5.0)])
    found = self.read("results/sweep.json")["models"]["a"]["trials"]
    self.assertEqual([len(t["scores"]) for t in found], [2, 1, 2, 1, 2])
    self.assertIn("[9/9]", self.told[-1])

  def test_a_diverged_trial_is_kept_as_failed_and_not_chosen(self):
    space = {"model.end": ("diverged", "done", "nan")}
    some = plan(model(space=space))
    self.run_sweep(some)
    about = self.read("results/sweep.json")["models"]["a"]
    self.assertEqual(about["chosen"], {"model.end": "done"})
    scores = [trial["scores"] for trial in about["trials"]]
    self.assertEqual(scores, [[None], [0.1], [None]])
    self.assertIn("not finite at step 7", about["trials"][0]["failed"])
    self.assertEqual(
      about["trials"][2]["failed"], "valid/click/auc is not defined"
    )
    self.assertIn("a, trial 1 of 3: failed: the loss", self.told[0])
    count = len(self.jobs)
    self.run_sweep(some)  # And is not tried again.
    self.assertLen(self.jobs, count)

  def test_nothing_is_chosen_where_everything_failed(self):
    ends = {"model.end": ("diverged",) * 2 + ("nan",)}
    with self.assertRaisesRegex(UserError, "^a: every trial failed .the loss"):
      self.run_sweep(plan(model(space=ends)))

  def test_a_diverged_seed_is_named_below_the_table(self):
    sometimes = model("b", {}, gain=0.3)
    original = sweep.run_config

    def run_config(some, row, words, seed):
      config = original(some, row, words, seed)
      if row.label == "b" and seed == 1:
        config["model"]["end"] = "diverged"
      return config

    with mock.patch.object(sweep, "run_config", run_config):
      found = self.run_sweep(plan(model("a", {}), sometimes, num_trials=0))
    self.assertEqual(found.diverged, ("b, seed 1",))
    (table,) = report.published_tables(self.folder / "sweep" / "results")
    self.assertEqual(table.notes[-1], "Diverged and left out: b, seed 1.")
    self.assertEqual([row[1] for row in table.rows], ["2", "1"])

  def test_results_of_a_seed_that_diverges_now_are_removed(self):
    results = self.folder / "shared"
    run = functools.partial(tuning.run_sweep, results=results, tell=print)
    run(
      plan(model("a", {}), num_trials=0),
      self.folder / "first",
      execute=self.execute,
    )
    self.assertTrue((results / "a-1.json").exists())
    original = sweep.run_config

    def run_config(some, row, words, seed):
      config = original(some, row, words, seed)
      config["model"]["end"] = "diverged" if seed == 1 else "done"
      return config

    with mock.patch.object(sweep, "run_config", run_config):
      run(
        plan(model("a", {}), num_trials=0),
        self.folder / "second",
        execute=self.execute,
      )
    self.assertFalse((results / "a-1.json").exists())
    (table,) = report.published_tables(results)
    self.assertEqual([row[1] for row in table.rows], ["1"])

  def test_a_stopped_sweep_ends_as_one_never_stopped(self):
    some = plan()
    self.run_sweep(some, "whole")
    self.jobs = []
    for limit in (2, 7):
      with self.assertRaises(KeyboardInterrupt):
        self.run_sweep(some, limit=limit)
    self.run_sweep(some)
    # Nothing is done twice.
    self.assertLen({job.workdir for job in self.jobs}, len(self.jobs))
    self.assertEqual(self.files(), self.files("whole"))
    self.assertIn("[2/10] 2 runs kept, done before", self.told)

  def test_another_sweep_needs_another_folder(self):
    self.run_sweep(plan())
    for other, message in (
      (plan(tuning_seed=8), "tuning_seed was 9, is 8"),
      (plan(model("a"), model("b", gain=2.0)), "b has another config"),
      (
        plan(*(model(m, {"model.gain": (1.0, 3.0, 4.0)}) for m in "ab")),
        "a has another space; b has another space",
      ),
    ):
      with self.assertRaisesRegex(UserError, message):
        self.run_sweep(other)
    # The same words in another order are other trials.
    words = {"model.gain": (1.0, 2.0), "model.secs": (0, 1)}
    self.run_sweep(plan(model("a", words), num_trials=4), "ordered")
    words = dict(reversed(words.items()))
    with self.assertRaisesRegex(UserError, "a has another space"):
      self.run_sweep(plan(model("a", words), num_trials=4), "ordered")
    self.jobs = self.jobs[:10]
    # But rows may be added, and the table be another one.
    count = len(self.jobs)
    self.run_sweep(
      plan(model("a"), model("b"), model("c"), baseline="c", seeds=(0, 1, 2))
    )
    self.assertLen(self.jobs, count + 3 + 3 + 2)

  def test_a_folder_in_use_is_left_alone(self):
    some = plan()
    with tuning._claim(self.folder / "sweep", some):
      with self.assertRaisesRegex(UserError, "another sweep is at work"):
        self.run_sweep(some)

  def test_results_of_others_are_not_mixed_in(self):
    results = self.folder / "sweep" / "results"
    results.mkdir(parents=True)
    (results / "old-0.json").write_text("{}")
    with self.assertRaisesRegex(UserError, "old-0.json: is not of this sweep"):
      self.run_sweep(plan())
    self.assertEmpty(self.jobs)


if __name__ == "__main__":
  absltest.main()
