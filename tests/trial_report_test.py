"""Tables of trial methods: bootstraps of cross-fitted runs."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest

from recjax import comparison, report, writer
from recjax.data import synthetic_trial
from recjax.errors import UserError
from recjax.metrics import trial as trial_metrics

METRICS = ("test/trial/eom", "test/trial/eom@45", "test/trial/regret")


def _write_run(root, model, seed, noise, data_seed):
  """The workdir of a model whose predictions are the truth and noise."""
  config = synthetic_trial.Config(
    "well_specified", seed=data_seed, num_rows=3000
  )
  _, trial, truth = synthetic_trial.draw(config, "test")
  rng = np.random.default_rng([data_seed, *model.encode()])
  response = truth["response"]
  response = response + noise * rng.normal(size=response.shape)
  values = trial_metrics.summarize(response, truth["cost"], trial, truth=truth)
  workdir = root / f"{model}-{seed}"
  result = {
    "model": model,
    "dataset": "synthetic_trial",
    "seed": seed,
    "steps": 1,
    "metrics": {f"test/trial/{k}": v for k, v in values.items()},
    "params": {"dense": 1, "sparse": 0, "active": 1},
    "flops_per_example": 1,
    "examples_per_sec": 1.0,
  }
  writer.write_json(workdir / "result.json", result)
  seen = {"seen_response": trial.response, "seen_cost": trial.cost}
  seen |= {n: getattr(trial, n) for n in ("treatment", "propensity", "cluster")}
  arrays = {"response": response, "cost": truth["cost"], **seen}
  np.savez(
    workdir / "predictions.npz",
    **{f"trial/{name}": value for name, value in arrays.items()},
  )
  return workdir


class TrialReportTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

  def write(self, data_seeds):
    return [
      _write_run(self.root, model, seed, noise, data_seed)
      for seed, data_seed in enumerate(data_seeds)
      for model, noise in (("good", 0.1), ("poor", 2.0))
    ]

  def compare(self, folders):
    found = comparison.compare(
      report.load_runs(folders), METRICS, "poor", num_samples=200
    )
    return {d.metric: d for d in found}

  def test_folds_are_drawn_each_by_itself_and_pooled(self):
    one = self.compare(self.write([0]))["test/trial/eom"].bootstrap
    folds = self.compare(self.write([0, 1, 2, 3]))
    four = folds["test/trial/eom"].bootstrap
    self.assertGreater(four.low, 0.0)
    # The mean over four times as many people varies half as much.
    width = (four.high - four.low) / (one.high - one.low)
    self.assertBetween(width, 0.35, 0.7)
    self.assertIsNotNone(folds["test/trial/eom@45"].bootstrap)
    regret = folds["test/trial/regret"]
    self.assertIsNone(regret.bootstrap)
    self.assertIn("made for test eom", regret.reason)

  def test_seeds_on_the_same_people_are_drawn_alike(self):
    one = self.compare(self.write([0]))["test/trial/eom"].bootstrap
    same = self.compare(self.write([0, 0, 0, 0]))["test/trial/eom"].bootstrap
    np.testing.assert_allclose(same, one)

  def test_other_people_and_other_predictions_are_told(self):
    folders = self.write([0])
    _write_run(self.root, "good", 0, 0.1, data_seed=9)
    found = self.compare(folders)["test/trial/eom"]
    self.assertEqual(found.reason, "predictions are not of the same rows")
    file = folders[1] / "predictions.npz"
    arrays = dict(np.load(file))
    np.savez(file, **arrays | {"trial/response": -arrays["trial/response"]})
    with self.assertRaisesRegex(UserError, "eom of trial is .* result.json"):
      self.compare(folders)


if __name__ == "__main__":
  absltest.main()
