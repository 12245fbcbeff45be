"""Trees of several tasks against scikit-learn, and each task alone."""

import numpy as np
from absl.testing import absltest
from sklearn import metrics as sklearn_metrics

from experiments import trees
from tests import run_case

# The table is small.
TREES = {"min_data_in_leaf": 5, "num_leaves": 7, "learning_rate": 0.2}


class TreesTest(run_case.RunTestCase):
  def run_trees(self, tasks, workdir, **overrides):
    config = run_case.make_config(model__tasks=tasks, trees=TREES, **overrides)
    folder = self.directory / workdir
    result = trees.train_and_evaluate(config, str(folder))
    with np.load(folder / "predictions.npz") as arrays:
      return result, dict(arrays)

  def test_every_task_has_trees_of_its_own(self):
    result, rows = self.run_trees(["secs", "click"], "both")
    _, alone = self.run_trees(["click"], "alone")
    self.assertCountEqual(
      rows,
      ["secs/score", "secs/label", "click/score", "click/label", "group"],
    )
    np.testing.assert_array_equal(rows["click/score"], alone["click/score"])
    self.assertAlmostEqual(
      result["metrics"]["test/click/auc"],
      sklearn_metrics.roc_auc_score(rows["click/label"], rows["click/score"]),
    )

  def test_a_real_label_is_in_its_unit_and_missing_ones_are_left_out(self):
    result, rows = self.run_trees(["secs"], "real")
    seen = np.isfinite(rows["secs/label"])
    self.assertBetween(seen.sum(), 1, len(seen) - 1)
    error = (rows["secs/score"] - rows["secs/label"])[seen]
    self.assertAlmostEqual(
      result["metrics"]["test/secs/mae"], np.abs(error).mean(), places=5
    )
    # Far from the symlog, which is below 6 here.
    self.assertGreater(rows["secs/score"].mean(), 6.0)

  def test_means_over_scenarios_are_those_of_the_cells(self):
    data = {
      "name": "synthetic",
      "claim": "scenario_tasks",
      "num_rows": 50_000,
      "num_users": 400,
      "num_items": 64,
      "cache_dir": str(run_case.shared_directory() / "planted"),
    }
    result, rows = self.run_trees(["skip", "click"], "planted", data=data)
    found = result["metrics"]
    cells = {
      name: value
      for name, value in found.items()
      if name.startswith("test/") and "/scenario_" in name
    }
    self.assertContainsSubset(
      ["test/skip/scenario_1/auc", "test/click/scenario_1/auc"], cells
    )
    self.assertAlmostEqual(found["test/macro_auc"], np.mean([*cells.values()]))
    self.assertLen(rows["click/score"], 5000)
    self.assertGreater(found["test/skip/auc"], 0.55)


if __name__ == "__main__":
  absltest.main()
