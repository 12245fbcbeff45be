import json

import numpy as np
from absl.testing import absltest

from experiments import bench_mdl
from tests import command_case


class BenchMdlTest(command_case.CommandTestCase):
  def test_blocks_are_right(self):
    self.assertLess(bench_mdl.check_blocks(5, 40, 0), 1e-4)

  def test_a_batch_holds_every_scenario_of_a_large_one(self):
    schema = bench_mdl.make_schema(7, 2)
    batch = bench_mdl.make_batch(schema, 4000, 0)
    count = np.bincount(batch.scenario, minlength=8)
    self.assertEqual(count[0], 0)
    self.assertTrue(np.all(np.diff(count[1:]) < 0))
    np.testing.assert_allclose(count[1] / count[2], 2.0, rtol=0.2)

  def test_command_prints_a_line_a_case(self):
    outcome = self.run_command(
      "experiments.bench_mdl",
      "--scenarios=1,3",
      "--tasks=1,2",
      "--token_dim=16",
      "--num_tokens=2",
      "--num_layers=1",
      "--batch_size=16",
      "--repeats=2",
    )
    *_, last = outcome.stdout.splitlines()
    result = json.loads(last)
    cases = result["cases"]
    self.assertEqual(
      list(cases),
      ["mdl 1 scenarios", "mdl 3 scenarios", "mdl 2 tasks", "mmoe"],
    )
    self.assertLess(result["error"], 1e-4)
    # Another scenario is another set of weights, of which one is active.
    params = [cases[f"mdl {n} scenarios"]["params"] for n in (1, 3)]
    active = [cases[f"mdl {n} scenarios"]["active"] for n in (1, 3)]
    self.assertGreater(params[1], params[0])
    self.assertEqual(active[1], active[0])
    self.assertLessEqual(cases["mmoe"]["params"], params[0])

  def test_no_number_is_a_mistake(self):
    for value in ("--scenarios=0,3", "--tasks=x"):
      outcome = self.run_command("experiments.bench_mdl", value)
      self.assert_mistake(outcome, "at least 1, got .*write for")


if __name__ == "__main__":
  absltest.main()
