"""What the demo shows beside its own runs."""

import command_case
from absl.testing import absltest

# In place of the minutes of training: the published runs of the same seed.
PRETEND = """
import json, pathlib, shutil
def pretend(config, workdir):
  name = f"{config['model_name']}-{config['seed']}.json"
  pathlib.Path(workdir).mkdir(parents=True)
  shutil.copy(
    pathlib.Path("experiments/results/kuairand_recipes") / name,
    pathlib.Path(workdir) / "result.json",
  )
  return {}
recjax.train.train_and_evaluate = pretend
"""


class DemoTest(command_case.CommandTestCase):
  def demo(self, *options):
    outcome = self.run_command(
      "experiments.demo",
      f"--workdir={self.workdir}",
      *options,
      setup=PRETEND,
    )
    self.assertEqual(outcome.code, 0, outcome.stderr)
    return outcome.stdout, (self.workdir / "report.md").read_text()

  def test_stored_rows_are_marked_and_explained(self):
    printed, text = self.demo()
    for row in (
      "rankmixer (baseline) | 1 |",
      "msn | 1 |",
      "dlrm_mlp (stored) | 5 |",
      "lightgbm (stored) | 5 |",
    ):
      self.assertIn(f"| {row}", text)
    note = "(stored): not trained here, but read from experiments/results"
    self.assertIn(note, text)
    for part in ("dlrm_mlp (stored)", "lightgbm (stored)", "not trained here"):
      self.assertIn(part, printed)

  def test_none_beside_runs_of_another_size(self):
    printed, text = self.demo("--size=tiny")
    self.assertIn("| msn | 1 |", text)
    self.assertNotIn("(stored)", printed + text)


if __name__ == "__main__":
  absltest.main()
