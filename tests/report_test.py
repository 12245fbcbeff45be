import io
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import rich.console
from absl.testing import absltest, parameterized
from matplotlib import image
from scipy import stats
from sklearn.metrics import log_loss, roc_auc_score

from recjax import comparison, report, statistics, writer
from recjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
GAINS = {"msn": 0.9, "rankmixer": 0.6, "dcn": 0.55}
METRICS = ("test/click/auc", "test/click/logloss")


def _result(model, seed, auc=0.7, **changes):
  return {
    "model": model,
    "dataset": "kuairand",
    "seed": seed,
    "steps": 300,
    "metrics": {
      "test/click/auc": auc,
      "test/click/logloss": 0.6 - auc / 3,
      "test/click/pcoc": 1.01,
    },
    "params": {"dense": 120_000, "sparse": 4_000_000, "active": 123_456},
    "flops_per_example": 1_250_000,
    "examples_per_sec": 9_876.5,
  } | changes


def _write_run(root, model, seed):
  """A workdir with all parts; predictions follow a planted strength."""
  workdir = pathlib.Path(root) / f"{model}-{seed}"
  users = np.repeat(np.arange(200), 6)
  labels = np.random.default_rng(0).integers(0, 2, users.size)
  noise = np.random.default_rng([seed, *model.encode()])
  scores = GAINS[model] * labels + noise.normal(size=users.size)
  result = _result(model, seed, float(roc_auc_score(labels, scores)))
  loss = float(log_loss(labels, 1 / (1 + np.exp(-scores))))
  result["metrics"]["test/click/logloss"] = loss
  result["metrics"]["test/click/gauc"] = _grouped_auc(scores, labels, users)
  writer.write_json(workdir / "result.json", result)
  np.savez(
    workdir / "predictions.npz",
    **{"click/score": scores, "click/label": labels, "group": users},
  )
  writer.write_json(workdir / "config.json", {"commit": "abc1234"})
  slots = noise.zipf(2.0, 4096) - 1
  diagnostics = {
    "reliability": {
      "click": {
        "count": [0, 50, 30, 20],
        "sum_probs": [0, 10, 12, 14],
        "sum_labels": [0, 10 * GAINS[model], 13, 15],
      }
    }
  }
  if model == "msn":
    diagnostics["slot_usage"] = {"layer_0/memory": slots}
  writer.write_json(workdir / "diagnostics.json", diagnostics)
  lines = "".join(
    f'{{"step": {step}, "valid/click/auc":'
    f" {GAINS[model] - 2 / step + seed / 500},"
    f' "valid/click/logloss": {0.9 - GAINS[model] / 2 + 5 / step}}}\n'
    for step in range(50, 301, 50)
  )
  (workdir / "metrics.jsonl").write_text(lines)
  return workdir


def _grouped_auc(scores, labels, users):
  """Mean over the users of both classes, weighted by their rows."""
  total = weight = 0.0
  for user in np.unique(users):
    own = users == user
    if np.unique(labels[own]).size == 2:
      total += own.sum() * roc_auc_score(labels[own], scores[own])
      weight += own.sum()
  return float(total / weight)


class ReportTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    cls.root = pathlib.Path(folder.name)
    for model in GAINS:
      for seed in range(4):
        _write_run(cls.root / "runs", model, seed)
    cls.runs = report.load_runs([cls.root / "runs" / "*"])

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def _bare(self, *results):
    paths = []
    for i, result in enumerate(results):
      paths.append(self.folder / f"{i}.json")
      writer.write_json(paths[-1], result)
    return report.load_runs(paths)

  def test_row_holds_mean_spread_sizes_and_speed(self):
    runs = self._bare(
      _result("b", 0, 0.70), _result("b", 1, 0.74), _result("a", 0, 0.8)
    )
    table = comparison.comparison_table(runs, METRICS)
    self.assertEqual(
      table.columns,
      (
        "Model",
        "Seeds",
        *METRICS,
        "Params active/total",
        "FLOPs/example",
        "Examples/s",
      ),
    )
    self.assertEqual(
      table.rows,
      (
        ("a", "1", "0.8000", "0.3333") + ("123k / 4.12M", "1.25M", "9.88k"),
        ("b", "2", "0.7200 ± 0.0283", "0.3600 ± 0.0094")
        + ("123k / 4.12M", "1.25M", "9.88k"),
      ),
    )

  def test_what_a_model_does_not_have_is_shown_as_such(self):
    params = {"dense": None, "sparse": 0, "active": None}
    lean = _result("trees", 1, params=params, flops_per_example=None)
    del lean["metrics"]["test/click/logloss"]
    runs = self._bare(lean, _result("trees", 0, params=params), _result("a", 0))
    rows = comparison.comparison_table(
      runs, (*METRICS, "test/click/pcoc"), "a"
    ).rows
    self.assertEqual(rows[0][0], "a (baseline)")
    self.assertEqual(rows[1][4], "0.3667 (1 of 2 seeds)")
    self.assertEqual(rows[1][-3:-1], ("– / –", "–"))

  def test_metric_that_is_not_finite_is_shown(self):
    bad = _result("a", 0)
    bad["metrics"]["test/click/auc"] = float("nan")
    bad["metrics"]["test/click/logloss"] = float("inf")
    runs = self._bare(bad, _result("a", 1), _result("b", 0), _result("b", 1))
    rows = comparison.comparison_table(runs, METRICS, "b").rows
    self.assertEqual(rows[1][2:6], ("nan", "+nan", "inf", "+nan"))

  def test_differences_equal_scipy_and_the_bootstrap(self):
    found = comparison.compare(self.runs, METRICS, "rankmixer", num_samples=200)
    self.assertEqual(
      [(d.model, d.metric) for d in found],
      [(model, metric) for model in ("dcn", "msn") for metric in METRICS],
    )
    values = {
      model: [
        run.metrics["test/click/auc"] for run in self.runs if run.model == model
      ]
      for model in GAINS
    }
    scores = {}
    for model in GAINS:
      files = [
        np.load(self.root / "runs" / f"{model}-{seed}" / "predictions.npz")
        for seed in range(4)
      ]
      scores[model] = np.stack([file["click/score"] for file in files])
    labels, users = files[0]["click/label"], files[0]["group"]
    for d in (found[0], found[2]):
      expected = stats.ttest_rel(values[d.model], values["rankmixer"])
      self.assertAlmostEqual(d.t_test.p_value, expected.pvalue, places=10)
      bootstrap = statistics.clustered_bootstrap(
        scores[d.model], scores["rankmixer"], labels, users, num_samples=200
      )
      np.testing.assert_allclose(d.bootstrap, bootstrap, rtol=1e-9)
    corrected = statistics.holm(np.array([d.t_test.p_value for d in found]))
    np.testing.assert_array_equal([d.t_test_p for d in found], corrected)
    corrected = statistics.holm(np.array([d.bootstrap.p_value for d in found]))
    np.testing.assert_array_equal([d.bootstrap_p for d in found], corrected)

  def test_a_metric_without_a_bootstrap_is_no_test_of_that_family(self):
    metrics = ("test/click/auc", "test/click/pcoc")
    found = comparison.compare(self.runs, metrics, "rankmixer", num_samples=200)
    self.assertIn("made for test auc, gauc, logloss only", found[1].reason)
    pair = np.array([found[0].bootstrap.p_value, found[2].bootstrap.p_value])
    np.testing.assert_array_equal(
      [d.bootstrap_p for d in found],
      np.insert(statistics.holm(pair), [1, 2], np.nan),
    )

  @parameterized.parameters("gauc", "logloss")
  def test_bootstrap_of_means_equals_brute_force(self, name):
    runs = [run for run in self.runs if run.seed == 1 and run.model != "dcn"]
    (found,) = comparison.compare(
      runs, (f"test/click/{name}",), "rankmixer", num_samples=8
    )
    data = {run.model: np.load(run.predictions) for run in runs}
    labels, users = data["msn"]["click/label"], data["msn"]["group"]
    rng, differences = np.random.default_rng(0), []
    for _ in range(8):
      drawn = rng.integers(200, size=200)
      # Users drawn twice are two users.
      rows = np.concatenate([np.flatnonzero(users == u) for u in drawn])
      copies = np.repeat(np.arange(200), 6)
      values = []
      for model in ("msn", "rankmixer"):
        scores = data[model]["click/score"][rows]
        if name == "gauc":
          values.append(_grouped_auc(scores, labels[rows], copies))
        else:
          values.append(log_loss(labels[rows], 1 / (1 + np.exp(-scores))))
      differences.append(values[0] - values[1])
    np.testing.assert_allclose(
      (found.bootstrap.low, found.bootstrap.high),
      np.percentile(differences, [2.5, 97.5]),
      rtol=1e-9,
    )

  def test_only_a_planted_gain_is_marked(self):
    table = comparison.comparison_table(self.runs, METRICS, "rankmixer")
    marks = {row[0]: (row[3][-2:], row[5][-2:]) for row in table.rows}
    self.assertEqual(marks["rankmixer (baseline)"], ("–", "–"))
    self.assertEqual(marks["msn"][0], " *")
    self.assertNotIn("*", marks["dcn"][0])

  def test_verdict_needs_both_tests(self):
    some = statistics.Estimate(0.1, 0.05, 0.15, 0.01)

    def verdict(t_test_p, bootstrap_p):
      return comparison.Difference(
        "a", "m", (0,), some, t_test_p, some, bootstrap_p, ""
      ).verdict

    self.assertEqual(verdict(0.01, 0.01), "yes")
    self.assertEqual(verdict(0.01, 0.06), "no")
    self.assertEqual(verdict(0.06, 0.01), "no")
    self.assertEqual(verdict(0.01, np.nan), "open: t-test only")
    self.assertEqual(verdict(np.nan, 0.01), "open: needs two common seeds")

  def test_only_common_seeds_are_paired(self):
    runs = self._bare(
      _result("a", 0, 0.9),
      _result("a", 1, 0.71),
      _result("a", 2, 0.73),
      _result("b", 1, 0.70),
      _result("b", 2, 0.70),
      _result("b", 5, 0.1),
    )
    (found,) = comparison.compare(runs, METRICS[:1], "b")
    self.assertEqual(found.seeds, (1, 2))
    self.assertAlmostEqual(found.t_test.difference, 0.02)
    self.assertEqual(found.reason, "no predictions.npz of a, seed 1")

  def test_text_is_the_same_in_any_order(self):
    texts = []
    for name, order in (("x", 1), ("y", -1)):
      path = report.write_report(
        self.runs[::order], self.folder / name, baseline="rankmixer"
      )
      pictures = sorted((self.folder / name / "figures").iterdir())
      texts.append((path.read_bytes(), [p.read_bytes() for p in pictures]))
    self.assertEqual(texts[0], texts[1])

  def test_report_holds_all_parts(self):
    stream = io.StringIO()
    path = report.write_report(
      self.runs,
      self.folder / "out",
      baseline="rankmixer",
      title="Three models",
      console=rich.console.Console(file=stream, width=200),
    )
    text = path.read_text()
    for part in (
      "# Three models\n",
      "## kuairand\n",
      "| rankmixer (baseline) | 4 | ",
      "### Differences to rankmixer\n",
      "| msn | 0, 1, 2, 3 | 300 | abc1234 |",
      "### Missing\n\nNothing.\n",
    ):
      self.assertIn(part, text)
    self.assertIn("rankmixer (baseline)", stream.getvalue())
    for name in ("learning_curves", "reliability", "slot_usage"):
      file = f"figures/kuairand-{name}.png"
      self.assertIn(f"]({file})", text)
      picture = image.imread(path.parent / file)[..., :3]
      self.assertGreater(min(picture.shape[:2]), 300)
      # The line colour of the first model must be on it, away from the grey
      # of axes and text.
      colored = np.ptp(picture, axis=-1) > 0.3
      self.assertGreater(colored.sum(), 500)

  def test_missing_parts_are_named(self):
    runs = self._bare(_result("a", 0), _result("a", 1), _result("b|c", 0))
    text = report.write_report(runs, self.folder).read_text()
    for part in (
      "Not drawn: no metrics.jsonl holds a validation metric of the table.",
      "Not drawn: no diagnostics.json holds counts of predicted",
      "Not drawn: no diagnostics.json names a memory layer.",
      "- `config.json`: a (seed 0, 1); b|c (seed 0)",
      "- `predictions.npz`: a (seed 0, 1); b|c (seed 0)",
      "| b\\|c | 0 | 300 | missing |",
    ):
      self.assertIn(part, text)
    self.assertEmpty(list((self.folder / "figures").iterdir()))

  def test_each_dataset_has_its_section(self):
    runs = self._bare(_result("a", 0), _result("a", 0, dataset="movies"))
    text = report.write_report(runs, self.folder).read_text()
    self.assertLess(text.index("## kuairand"), text.index("## movies"))
    with self.assertRaisesRegex(UserError, "2: kuairand, movies"):
      comparison.comparison_table(runs, METRICS)

  def test_workdir_is_found_by_its_result_file_too(self):
    workdir = self.root / "runs" / "msn-0"
    (run,) = report.load_runs([workdir / "result.json"])
    self.assertEqual(run.missing, ())
    self.assertLen(run.lines, 6)

  @parameterized.parameters(
    ("none", "none: no such run"),
    ("none-*", "none-.*: nothing matches"),
    ("empty", "holds no result.json"),
    ("torn.json", "torn.json: not valid JSON"),
    ("list.json", "must hold a JSON object"),
    ("keys.json", "keys.json: 'seed' is missing"),
    ("type.json", "'steps' has the wrong type: '300'"),
    ("metric.json", "metric 'test/click/auc' is no number: 'good'"),
    ("params.json", "params: 'active' must be a number or null"),
  )
  def test_bad_run_is_named(self, name, message):
    (self.folder / "empty").mkdir()
    (self.folder / "torn.json").write_text('{"model": "a"')
    (self.folder / "list.json").write_text("[]")
    keys = _result("a", 0)
    del keys["seed"]
    writer.write_json(self.folder / "keys.json", keys)
    writer.write_json(self.folder / "type.json", _result("a", 0, steps="300"))
    metric = _result("a", 0, metrics={"test/click/auc": "good"})
    writer.write_json(self.folder / "metric.json", metric)
    params = _result("a", 0, params={"dense": 1, "sparse": 2})
    writer.write_json(self.folder / "params.json", params)
    with self.assertRaisesRegex(UserError, message):
      report.load_runs([self.folder / name])

  def test_bad_comparison_is_named(self):
    runs = self._bare(_result("a", 0))
    for arguments, message in (
      ((METRICS, "aa"), "baseline 'aa' on kuairand; did you mean 'a'"),
      ((["test/click/acu"],), "metric 'test/click/acu'; did you mean"),
      (([],), "no metrics"),
    ):
      with self.assertRaisesRegex(UserError, message):
        comparison.comparison_table(runs, *arguments)
    with self.assertRaisesRegex(UserError, "no runs"):
      report.load_runs([])
    with self.assertRaisesRegex(UserError, "no runs"):
      report.write_report([], self.folder)
    with self.assertRaisesRegex(UserError, "0.json and .*1.json: both are a"):
      self._bare(_result("a", 0), _result("a", 0))[0]

  def _two_runs(self):
    for model in ("msn", "dcn"):
      _write_run(self.folder, model, 0)
    return [self.folder / "msn-0", self.folder / "dcn-0"]

  def test_predictions_that_do_not_fit_are_named(self):
    paths = self._two_runs()
    file = paths[0] / "predictions.npz"
    good = dict(np.load(file))

    def compare(**changes):
      np.savez(file, **(good | changes))
      runs = report.load_runs(paths)
      return comparison.compare(runs, METRICS[:1], "dcn", num_samples=20)[0]

    self.assertEqual(compare().reason, "")
    other = compare(group=good["group"][::-1])
    self.assertIsNone(other.bootstrap)
    self.assertEqual(other.reason, "predictions are not of the same rows")
    with self.assertRaisesRegex(UserError, "auc of click is .* result.json"):
      compare(**{"click/score": good["click/score"][::-1]})
    with self.assertRaisesRegex(UserError, "vectors of one length"):
      compare(group=good["group"][1:])
    with self.assertRaisesRegex(UserError, "NaN"):
      compare(**{"click/score": np.full(good["group"].size, np.nan)})
    file.write_bytes(b"no archive")
    with self.assertRaisesRegex(UserError, "predictions.npz: not a NumPy"):
      comparison.compare(report.load_runs(paths), METRICS[:1], "dcn")

  def test_rows_without_an_outcome_are_left_out(self):
    paths = self._two_runs()
    for path in paths:
      data = dict(np.load(path / "predictions.npz"))
      data = {k: np.append(v, v[:3]).astype(float) for k, v in data.items()}
      data["click/label"][-3:] = np.nan
      np.savez(path / "predictions.npz", **data)
    runs = report.load_runs(paths)
    (found,) = comparison.compare(runs, METRICS[:1], "dcn", num_samples=20)
    self.assertEqual(found.reason, "")

  def test_bad_diagnostics_are_named(self):
    (path, _) = self._two_runs()
    for diagnostics in (
      {"slot_usage": {"memory": [1, -1]}},
      {"reliability": {"click": {"count": [1], "sum_probs": [1, 2]}}},
    ):
      writer.write_json(path / "diagnostics.json", diagnostics)
      with self.assertRaisesRegex(UserError, "msn-0/diagnostics.json: "):
        report.write_report(report.load_runs([path]), self.folder / "out")

  def _command(self, *arguments):
    return subprocess.run(
      [sys.executable, "-m", "experiments.report", *arguments],
      cwd=ROOT,
      env=os.environ | {"COLUMNS": "200"},
      capture_output=True,
      text=True,
      timeout=120,
    )

  def test_command_prints_table_and_path(self):
    done = self._command(
      f"--runs={self.root}/runs/msn-*,{self.root}/runs/dcn-0",
      f"--output={self.folder}",
      "--baseline=dcn",
      "--metrics=test/click/auc",
    )
    self.assertEqual((done.returncode, done.stderr), (0, ""))
    self.assertIn("dcn (baseline)", done.stdout)
    self.assertTrue(done.stdout.endswith(f"{self.folder}/report.md\n"))

  def test_command_ends_a_mistake_with_code_2_and_one_line(self):
    done = self._command(f"--runs={self.folder}/no", f"--output={self.folder}")
    self.assertEqual(done.returncode, 2)
    self.assertEqual(done.stdout, "")
    self.assertEqual(
      done.stderr,
      f"error: {self.folder}/no: no such run; give a workdir or a"
      " result.json\n",
    )


if __name__ == "__main__":
  absltest.main()
