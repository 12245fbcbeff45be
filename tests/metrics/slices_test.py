import numpy as np
import sklearn.metrics
from absl.testing import absltest

from recjax.metrics import slices, summary


def draw(seed=0, num=6000):
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=num).astype(np.float32)
  labels = (rng.random(num) < 1 / (1 + np.exp(-scores))).astype(np.float32)
  scenario = rng.choice([0, 2, 3], p=[0.5, 0.45, 0.05], size=num)
  users = rng.integers(400, size=num)
  return scores, labels, scenario, users, rng.random(num) < 0.9


class SlicesTest(absltest.TestCase):
  def test_parts_of_the_examples(self):
    scores, labels, scenario, _, mask = draw()
    values = slices.summarize_by_slice(
      scores,
      labels,
      {"two": scenario == 2, "none": scenario == 1, "ones": labels == 1},
      mask=mask,
    )
    rows = mask & (scenario == 2)
    self.assertEqual(values["two/examples"], rows.sum())
    self.assertAlmostEqual(
      values["two/auc"],
      sklearn.metrics.roc_auc_score(labels[rows], scores[rows]),
      places=9,
    )
    self.assertAlmostEqual(
      values["two/logloss"],
      sklearn.metrics.log_loss(labels[rows], 1 / (1 + np.exp(-scores[rows]))),
      places=6,
    )
    self.assertEqual(values["none/examples"], 0)
    self.assertTrue(np.isnan(values["none/auc"]))
    self.assertTrue(np.isnan(values["none/logloss"]))
    self.assertTrue(np.isnan(values["ones/auc"]))
    self.assertGreater(values["ones/logloss"], 0)

  def test_a_cell_equals_the_metrics_of_its_rows(self):
    scores, labels, scenario, users, mask = draw()
    cells = slices.summarize_by_scenario(
      scores, labels, scenario, mask=mask, groups={"group": users}
    )
    self.assertEqual([cell.scenario for cell in cells], [0, 2, 3])
    for cell in cells:
      rows = mask & (scenario == cell.scenario)
      own = [labels[rows & (users == user)] for user in np.unique(users[rows])]
      both = sum(0 < part.sum() < len(part) for part in own)
      self.assertEqual(cell.num_examples, rows.sum())
      self.assertEqual(cell.num_positives, labels[rows].sum())
      self.assertEqual(cell.num_groups, len(own))
      self.assertEqual(cell.num_two_class_groups, both)
      self.assertEqual(cell.is_counted, both >= 200)
      expected = summary.summarize(
        scores[rows], labels[rows], groups={"group": users[rows]}
      )
      self.assertEqual(cell.metrics, expected)
      self.assertAlmostEqual(
        cell.metrics["auc"],
        sklearn.metrics.roc_auc_score(labels[rows], scores[rows]),
        places=9,
      )
    self.assertEqual([cell.is_counted for cell in cells], [True, True, False])

  def test_means_leave_small_cells_out(self):
    scores, labels, scenario, users, mask = draw()
    cells = slices.summarize_by_scenario(
      scores, labels, scenario, mask=mask, groups={"group": users}
    )
    means = slices.means(cells)
    first, second, _ = (cell.metrics["gauc"] for cell in cells)
    sizes = [cell.num_examples for cell in cells[:2]]
    self.assertAlmostEqual(means["macro_gauc"], (first + second) / 2)
    self.assertAlmostEqual(
      means["micro_gauc"], np.average([first, second], weights=sizes)
    )
    self.assertEqual((means["cells"], means["small_cells"]), (2, 1))
    self.assertNotIn("macro_qauc", means)

  def test_real_labels_count_users_and_examples(self):
    scores, labels, scenario, users, mask = draw()
    for groups, counted in (({"group": users}, 2), ({}, 3)):
      cells = slices.summarize_by_scenario(
        scores, labels, scenario, mask=mask, groups=groups, is_real=True
      )
      self.assertEqual(sum(cell.is_counted for cell in cells), counted)
      means = slices.means(cells, is_real=True)
      values = [c.metrics["mae"] for c in cells if c.is_counted]
      self.assertAlmostEqual(means["macro_mae"], np.mean(values))

  def test_no_cell_large_enough_is_nan(self):
    scores, labels, scenario, users, _ = draw(num=50)
    cells = slices.summarize_by_scenario(
      scores, labels, scenario, groups={"group": users}
    )
    means = slices.means(cells)
    self.assertTrue(np.isnan(means["macro_auc"]))
    self.assertEqual(means["cells"], 0)


if __name__ == "__main__":
  absltest.main()
