"""The planted trials: their law, their randomisation and their files."""

import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from recjax.data import synthetic_trial
from recjax.data.columns import Columns
from recjax.errors import UserError


class SyntheticTrialTest(parameterized.TestCase):
  def test_the_prepared_trial_is_the_drawn_one(self):
    scratch = tempfile.TemporaryDirectory()
    self.addCleanup(scratch.cleanup)
    directory = scratch.name
    config = synthetic_trial.Config("misspecified", num_rows=400, seed=3)
    synthetic_trial.prepare(config, directory)
    columns = Columns(directory)
    self.assertEqual(columns.num_rows, {"train": 240, "valid": 80, "test": 80})
    _, trial, truth = synthetic_trial.draw(config, "valid")
    batch = columns.read("valid", np.arange(80))
    np.testing.assert_array_equal(batch.trial.response, trial.response)
    np.testing.assert_array_equal(batch.trial.treatment, trial.treatment)
    with np.load(f"{directory}/truth_valid.npz") as stored:
      np.testing.assert_array_equal(stored["cost"], truth["cost"])
    _, train, _ = synthetic_trial.draw(config, "train")
    schema = columns.schema.trial
    self.assertEqual(schema.treatments[0], "none")
    np.testing.assert_allclose(schema.response_std, train.response.std())

  @parameterized.parameters(*synthetic_trial.WORLDS)
  def test_what_is_seen_has_the_true_expectation(self, world):
    config = synthetic_trial.Config(world, num_rows=100_000)
    _, trial, truth = synthetic_trial.draw(config, "train")
    rows = np.arange(len(trial.treatment))
    for name in ("response", "cost"):
      expected = truth[name][rows, trial.treatment]
      error = getattr(trial, name) - expected
      limit = 4 * error.std() / np.sqrt(len(rows))
      self.assertLess(abs(error.mean()), limit, name)
    shares = np.bincount(trial.treatment) / len(rows)
    np.testing.assert_allclose(shares, 0.25, atol=0.01)

  def test_a_linear_model_is_right_in_one_world_only(self):
    errors = {}
    for world in synthetic_trial.WORLDS:
      config = synthetic_trial.Config(world, num_rows=20_000)
      x, _, truth = synthetic_trial.draw(config, "train")
      x = np.column_stack([np.ones(len(x)), x])
      weights = np.linalg.lstsq(x, truth["response"], rcond=None)[0]
      errors[world] = np.abs(x @ weights - truth["response"]).max()
    self.assertLess(errors["well_specified"], 1e-9)
    self.assertGreater(errors["misspecified"], 1.0)

  def test_none_costs_nothing_and_levels_cost_more(self):
    x = np.random.default_rng(0).normal(size=(50, 6))
    _, cost = synthetic_trial.true_tables("well_specified", x)
    np.testing.assert_array_equal(cost[:, 0], 0)
    self.assertGreater(np.diff(cost, axis=1).min(), 0)

  @parameterized.parameters(
    ({"world": "flat"}, "unknown world 'flat'"),
    ({"world": "misspecified", "num_rows": 10}, "at least 100"),
    ({"world": "misspecified", "num_features": 4}, "at least 5"),
    ({"world": "misspecified", "noise": 0.0}, "noise"),
  )
  def test_mistakes(self, options, message):
    with self.assertRaisesRegex(UserError, message):
      synthetic_trial.Config(**options)


if __name__ == "__main__":
  absltest.main()
