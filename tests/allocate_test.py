"""From a trial of one's own to a spend plan, by the commands."""

import pathlib
import re
import tempfile

import command_case
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl.testing import absltest, parameterized

from recjax import plan as plan_lib

SCHEMA = {
  "features": {
    "age": {"kind": "dense"},
    "city": {"kind": "sparse"},
  },
  "trial": {
    "treatment": "arm",
    "control": "none",
    "response": "spend",
    "arm_cost": {"none": 0, "mail": 0.15, "call": 1.0},
  },
  "split": {"by": "column", "column": "part"},
}
COUNT = 600


def trial_rows():
  """A trial whose response depends on the treatment, age and city."""
  rng = np.random.default_rng(0)
  arm = rng.integers(3, size=COUNT)
  age, city = rng.normal(size=COUNT), rng.integers(3, size=COUNT)
  spend = 1 + city + arm * (1 + age) + rng.normal(size=COUNT)
  return {
    "part": np.repeat(["train", "valid", "test"], COUNT // 3),
    "arm": np.asarray(["none", "mail", "call"])[arm],
    "age": age,
    "city": [f"c{i}" for i in city],
    "spend": spend,
  }


class AllocateTest(command_case.CommandTestCase):
  finished = None

  def setUp(self):
    super().setUp()
    if AllocateTest.finished is None:
      keeper = tempfile.TemporaryDirectory()
      AllocateTest.keeper = keeper
      folder = pathlib.Path(keeper.name)
      self.directory, here = folder, self.directory
      self.workdir = folder / "run"
      outcome = self.train(
        *self.write_table(trial_rows(), SCHEMA),
        recipe="budget_allocation.py:tiny",
      )
      self.assertEqual(outcome.code, 0, outcome.stderr)
      self.assertIn("test/trial/eom@45", outcome.stdout)
      self.assertIn("valid/trial/eom", outcome.stdout)
      AllocateTest.finished, self.directory = folder, here
    self.workdir = AllocateTest.finished / "run"
    self.people = self.directory / "people.parquet"
    self.out = self.directory / "plans" / "plan.parquet"
    rng = np.random.default_rng(1)
    pq.write_table(
      pa.table(
        {
          "customer": [f"k{i}" for i in range(50)],
          "age": rng.normal(size=50),
          "city": [f"c{i}" for i in rng.integers(5, size=50)],
        }
      ),
      self.people,
    )

  def allocate(self, budget="9", **changes):
    options = {
      "workdir": self.workdir,
      "population": self.people,
      "budget": budget,
      "out": self.out,
      "bootstrap": 50,
    } | changes
    return self.run_command(
      "experiments.allocate", *(f"--{k}={v}" for k, v in options.items() if v)
    )

  def test_the_plan_of_a_population(self):
    outcome = self.allocate()
    self.assertEqual(outcome.code, 0, outcome.stderr)
    self.assertRegex(outcome.stdout, r"no plan has more than [\d.]+ by the")
    self.assertRegex(outcome.stdout, r"spend .* \(95 %: [\d.-]+ to [\d.-]+\)")
    plan = pq.read_table(self.out)
    self.assertEqual(
      plan.column_names,
      ["customer", "treatment", "expected_response", "expected_cost"],
    )
    self.assertEqual(plan["customer"].to_pylist(), [f"k{i}" for i in range(50)])
    costs = {"none": 0.0, "mail": 0.15, "call": 1.0}
    treatments = plan["treatment"].to_pylist()
    self.assertGreater(len(set(treatments)), 1)
    np.testing.assert_allclose(
      plan["expected_cost"].to_pylist(), [costs[t] for t in treatments]
    )
    self.assertLessEqual(sum(plan["expected_cost"].to_pylist()), 9.0)
    value = float(
      re.search(r"value expected by the model ([\d.]+)", outcome.stdout)[1]
    )
    total = sum(plan["expected_response"].to_pylist())
    self.assertAlmostEqual(value, total, delta=0.01)
    bound = float(re.search(r"more than ([\d.]+) by", outcome.stdout)[1])
    self.assertGreaterEqual(bound, value - 0.01)
    self.assertTrue(self.out.with_suffix(".png").read_bytes()[1:4] == b"PNG")
    again = self.allocate()
    self.assert_mistake(again, "plan.parquet: exists; give another --out")

  @parameterized.parameters(
    ({"budget": "-1"}, "--budget must be a finite number from 0, got -1"),
    ({"budget": "nan"}, "--budget must be a finite number"),
    ({"budget": "much"}, "budget"),
    ({"budget": ""}, "--budget missing"),
    ({"population": "no.parquet"}, "no.parquet"),
    ({"out": "plan.csv"}, "must end in .parquet"),
    ({"workdir": "nowhere"}, "nowhere: holds no run"),
  )
  def test_mistakes(self, changes, message):
    self.assert_mistake(self.allocate(**changes), message)
    self.assertFalse(self.out.exists())

  @parameterized.parameters(
    ({"age": [1.0]}, "no column 'city'"),
    ({"age": [float("nan")], "city": ["c1"]}, "age.*finite"),
    ({"age": ["old"], "city": ["c1"]}, "age"),
    ({"age": [1.0], "city": ["c1"], "treatment": ["x"]}, "rename it"),
    (pa.table({"age": [1.0], "city": ["c1"]})[:0], "no people"),
  )
  def test_mistakes_in_the_population(self, columns, message):
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, self.people)
    self.assert_mistake(self.allocate(), message)

  def test_a_ranker_has_no_plan(self):
    self.workdir = self.directory / "ranker"
    self.assertEqual(self.train(*self.write_table()).code, 0)
    outcome = self.allocate(workdir=self.workdir)
    self.assert_mistake(outcome, "predicts no treatments")
    with self.subTest("and a trial method no export"):
      outcome = self.run_command(
        "experiments.export",
        f"--workdir={AllocateTest.finished / 'run'}",
        f"--output={self.directory / 'export'}",
      )
      self.assert_mistake(outcome, "experiments.allocate")

  def test_a_trial_method_needs_a_trial(self):
    self.workdir = self.directory / "other"
    outcome = self.train(
      *self.write_table(), recipe="budget_allocation.py:tiny"
    )
    self.assert_mistake(outcome, "needs a randomised trial", num_notes=2)
    self.assert_no_workdir()


class BootstrapTest(absltest.TestCase):
  def test_units_are_drawn_whole(self):
    rng = np.random.default_rng(0)
    cluster = rng.integers(40, size=300)
    unit, counts = plan_lib.bootstrap_weights(cluster, 500, rng)
    self.assertEqual(counts.shape, (500, len(np.unique(cluster))))
    np.testing.assert_array_equal(counts.sum(1), counts.shape[1])
    for number in np.unique(unit):
      self.assertLen(np.unique(cluster[unit == number]), 1)

  def test_the_interval_is_that_of_the_bootstrap_of_rows(self):
    rng = np.random.default_rng(1)
    trial = plan_lib.TrialRows(
      treatment=rng.integers(2, size=400),
      response=rng.normal(2, 1, 400),
      cost=np.zeros(400),
      propensity=np.full(400, 0.5),
      cluster=np.arange(400),
    )
    weights = plan_lib.bootstrap_weights(trial.cluster, 4000, rng)
    found = plan_lib._estimate(np.ones(400, int), trial, "response", weights)
    treated = trial.response[trial.treatment == 1]
    self.assertAlmostEqual(found.value, treated.mean(), places=6)
    half = 1.96 * treated.std() / np.sqrt(len(treated))
    self.assertAlmostEqual(found.high - found.low, 2 * half, delta=0.15 * half)


if __name__ == "__main__":
  absltest.main()
