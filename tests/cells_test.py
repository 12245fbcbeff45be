"""What a report says of scenarios and tasks."""

import dataclasses
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest

from recjax import cells, comparison
from recjax.errors import UserError
from recjax.metrics import slices


def make_run(model, seed=0, gauc=0.6, **diagnostics):
  def cell(scenario, counted, gauc):
    return dataclasses.asdict(
      slices.Cell(
        scenario, 1200, 300, 90, 80, {"auc": 0.7, "gauc": gauc}, counted
      )
    )

  found = {"cells": {"click": [cell(1, True, gauc), cell(2, False, 0.5)]}}
  return comparison.Run(
    path=pathlib.Path(f"{model}-{seed}"),
    model=model,
    dataset="toy",
    seed=seed,
    steps=1,
    metrics={},
    params={},
    flops_per_example=None,
    examples_per_sec=None,
    config={"model": {"tasks": ["click", "like"]}},
    lines=[],
    diagnostics=found | diagnostics,
    predictions=None,
    missing=(),
  )


class CellsTest(absltest.TestCase):
  def test_small_cells_stand_apart_and_seeds_are_averaged(self):
    runs = [make_run("mdl", 0, 0.6), make_run("mdl", 1, 0.7), make_run("mmoe")]
    first, second = cells.cell_tables(runs)
    self.assertEqual(
      (first.title, second.title), ("click", "click, small cells")
    )
    self.assertEqual(
      first.rows[0],
      ("1", "mdl", "1,200", "300", "80", "0.7000", "0.6500"),
    )
    self.assertEqual(
      [row[:2] for row in second.rows], [("2", "mdl"), ("2", "mmoe")]
    )

  def test_attention_is_drawn_with_the_names_of_tokens(self):
    weights = np.full((2, 4), 0.25).tolist()
    attention = {
      "attention_0/tasks": {"tokens": [0, 1], "weights": weights},
      "attention_0/specific": {"tokens": [0, 2], "weights": weights},
    }
    run = make_run("mdl", attention=attention)
    names = cells._attention(run)[1]
    self.assertEqual(names["attention_0/tasks"], ["click", "like"])
    self.assertEqual(
      names["attention_0/specific"], ["specific 1", "specific 3"]
    )
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      (folder / "figures").mkdir()
      parts = cells.sections([run], folder, "toy")
      self.assertTrue((folder / "figures/toy-mdl-attention.png").exists())
    self.assertIn("![Attention of mdl](figures/toy-mdl-attention.png)", parts)

  def test_runs_without_either_add_nothing(self):
    run = dataclasses.replace(make_run("mdl"), diagnostics=None)
    self.assertEqual(cells.sections([run], pathlib.Path("x"), "toy"), [])

  def test_malformed_diagnostics_are_a_mistake(self):
    run = make_run("mdl", cells={"click": [{"scenario": 1}]})
    with self.assertRaisesRegex(UserError, "lacks 'is_counted'"):
      cells.cell_tables([run])
    run = make_run("mdl", attention={"attention_0/tasks": {"tokens": [0]}})
    with self.assertRaisesRegex(UserError, "'attention_0/tasks' is malformed"):
      cells._attention(run)


if __name__ == "__main__":
  absltest.main()
