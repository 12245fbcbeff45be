"""Published tables are what the committed results say, byte for byte."""

import json
import pathlib
import re
import shutil
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from recjax import comparison, published, report
from recjax.errors import UserError
from recjax.writer import write_json
from tests import sweep_case

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"


class ReadmeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.copy = self.folder / "README.md"
    shutil.copy(ROOT / "README.md", self.copy)

  @parameterized.parameters("README.md", "experiments/results/README.md")
  def test_the_tables_are_up_to_date(self, page):
    shutil.copy(ROOT / page, self.copy)
    changed = report.update_tables(self.copy, RESULTS)
    self.assertFalse(
      changed, f"call: python -m experiments.report --update={page}"
    )
    self.assertEqual(self.copy.read_bytes(), (ROOT / page).read_bytes())

  @parameterized.parameters("README.md", "experiments/results/README.md")
  def test_every_table_of_models_is_written_so(self, page):
    text = (ROOT / page).read_text()
    text = re.sub(r"(?s)<!-- table.*?<!-- /table -->", "", text)
    self.assertNotIn("| Model | Seeds |", text)

  def test_a_table_edited_by_hand_is_seen_and_mended(self):
    text = self.copy.read_text()
    self.copy.write_text(re.sub(r"\| 0\.\d{4} ±", "| 0.9999 ±", text, count=1))
    self.assertTrue(report.update_tables(self.copy, RESULTS))
    self.assertEqual(self.copy.read_text(), text)

  def test_a_changed_result_is_seen(self):
    results = self.folder / "results"
    shutil.copytree(RESULTS, results)
    path = results / "kuairand_base" / "rankmixer-0.json"
    result = json.loads(path.read_text())
    result["metrics"]["test/click/auc"] += 0.01
    write_json(path, result)
    # Where a bootstrap is kept, it is of other runs now.
    try:
      self.assertTrue(report.update_tables(self.copy, results))
    except UserError as error:
      self.assertIn("of other runs", str(error))

  def test_results_are_small(self):
    for path in RESULTS.rglob("*.json"):
      self.assertLess(path.stat().st_size, 100_000, path)


class PublishedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.markdown = self.folder / "page.md"

  def publish(self, name, gains, control=None, seeds=(0, 1, 2)):
    """Runs and their folder of results, without the predictions."""
    folders = []
    for model, gain in gains.items():
      for seed in seeds:
        config = {"label": model, "seed": seed, "model": {"gain": gain}}
        folders.append(self.folder / "runs" / name / f"{model}-{seed}")
        folders[-1].mkdir(parents=True)
        sweep_case.write(config, folders[-1])
    results = self.folder / "results" / name
    results.mkdir(parents=True)
    for folder in folders:
      shutil.copy(folder / "result.json", results / f"{folder.name}.json")
    runs = report.load_runs(folders)
    metrics = ("test/click/auc", "test/click/logloss")
    plan = published.Comparison("a", metrics, control)
    published.write_comparison(results, runs, plan, num_samples=200)
    return results, runs

  def test_stored_bootstraps_stand_for_predictions(self):
    results, runs = self.publish("x", {"a": 0.1, "b": 2.0})
    self.assertFalse(list(results.glob("*.npz")))
    kept = published.read_comparison(results)
    again = comparison.compare(
      report.load_runs([results]), kept.metrics, "a", stored=kept.stored
    )
    expected = comparison.compare(runs, kept.metrics, "a", num_samples=200)
    for found, wanted in zip(again, expected, strict=True):
      self.assertEqual(found.verdict, wanted.verdict)
      np.testing.assert_allclose(found.bootstrap, wanted.bootstrap)
    # And in the report of the command.
    text = report.write_report(
      report.load_runs([results]), self.folder / "out", baseline="a"
    ).read_text()
    self.assertIn(" | yes |", text)

  def test_bootstraps_of_other_runs_are_refused(self):
    results, _ = self.publish("x", {"a": 0.1, "b": 2.0})
    path = results / "b-1.json"
    original = path.read_text()
    result = json.loads(original)
    result["metrics"]["test/click/auc"] -= 0.1
    write_json(path, result)
    message = "bootstrap of b in test/click/auc is of other runs"
    with self.assertRaisesRegex(UserError, message):
      report.published_tables(results)
    path.unlink()
    with self.assertRaisesRegex(UserError, r"seeds \[0, 1, 2\].*\[0, 2\]"):
      report.published_tables(results)
    path.write_text(original)
    report.published_tables(results)

  def test_what_a_run_does_not_define_is_no_other_run(self):
    results, _ = self.publish("x", {"a": 0.1, "b": 2.0})
    path = results / "b-1.json"
    result = json.loads(path.read_text())
    result["metrics"]["test/click/auc"] = float("nan")
    write_json(path, result)
    with self.assertRaisesRegex(UserError, "of other runs"):
      report.published_tables(results)
    path = results / "comparison.json"
    kept = json.loads(path.read_text())
    for one in kept["bootstrap"]:
      if one["metric"] == "test/click/auc":
        one["difference"] = float("nan")
    write_json(path, kept)
    report.published_tables(results)

  def test_a_planted_table_says_what_is_gone_in_its_control(self):
    self.publish("planted", {"a": 0.1, "b": 3.0}, control="control")
    self.publish("control", {"a": 0.1, "b": 0.1001})
    self.markdown.write_text("x\n<!-- table: planted -->\n<!-- /table -->\ny\n")
    self.assertTrue(
      report.update_tables(self.markdown, self.folder / "results")
    )
    text = self.markdown.read_text()
    self.assertRegex(text, r"\n\| b \| test/click/auc \| \+0\.\d+ \| \[.*\| ")
    self.assertIn("Gone: the 95 %", text)
    self.assertTrue(text.startswith("x\n<!-- table: planted -->\n\n| Model"))
    self.assertTrue(text.endswith("\n\n<!-- /table -->\ny\n"))
    self.assertFalse(
      report.update_tables(self.markdown, self.folder / "results")
    )

  def test_a_control_that_has_not_been_run_leaves_the_question_open(self):
    results, _ = self.publish("planted", {"a": 0.1, "b": 3.0}, control="later")
    (table,) = report.published_tables(results)
    self.assertIn("gone in the control is open: no later/.", table.notes[-1])
    self.publish("later", {"a": 0.1, "b": 0.1001})
    table, control = report.published_tables(results)
    self.assertNotIn("is open", " ".join(table.notes))
    self.assertIn("Verdict", control.columns)

  @parameterized.parameters(
    ("no marks\n", "holds no <!-- table: NAME --> line"),
    ("<!-- table: x -->\n", "table 'x' has no <!-- /table --> after it"),
    ("a\n<!-- /table -->\n", "line 2: <!-- /table --> is out of place"),
    ("<!-- table: x -->\n<!-- table: x -->\n", "line 2: <!-- table: x"),
    ("<!-- table: nix -->\n<!-- /table -->\n", "nix/comparison.json: no such"),
  )
  def test_marks_that_are_wrong_are_named(self, text, message):
    self.publish("x", {"a": 0.1, "b": 2.0}, seeds=(0,))
    self.markdown.write_text(text)
    with self.assertRaisesRegex(UserError, message):
      report.update_tables(self.markdown, self.folder / "results")
    self.assertEqual(self.markdown.read_text(), text)

  @parameterized.parameters(
    ("{", "is no comparison of results"),
    ("[]", "is no comparison of results"),
    ('{"baseline": 1, "metrics": [], "bootstrap": []}', "1 has the wrong type"),
    ('{"baseline": "a", "metrics": ["m"]}', "KeyError: 'bootstrap'"),
  )
  def test_a_damaged_comparison_is_named(self, text, message):
    (self.folder / "comparison.json").write_text(text)
    with self.assertRaisesRegex(UserError, message):
      published.read_comparison(self.folder)

  def test_a_missing_page_is_named(self):
    with self.assertRaisesRegex(UserError, "page.md: cannot be read"):
      report.update_tables(self.markdown, self.folder)


if __name__ == "__main__":
  absltest.main()
