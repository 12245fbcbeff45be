"""What the planted scenarios and tasks hold, and the control does not."""

import dataclasses
import functools
import tempfile

import numpy as np
from absl.testing import absltest, parameterized
from sklearn import metrics as sklearn_metrics

from recjax.data import pipeline, synthetic
from recjax.data.claims import scenario_tasks
from recjax.schema import SPLITS

CONFIG = synthetic.Config(
  "scenario_tasks", num_rows=60_000, num_users=256, num_items=256
)
CONTROL = dataclasses.replace(CONFIG, control=True)
TASKS = tuple(scenario_tasks.TASKS)
RARE = len(scenario_tasks.SCENARIOS) - 1


@functools.cache
def draw(config, size=40_000):
  """(block, logits) of one draw."""
  claim = scenario_tasks.make(config)
  return claim.draw(np.random.default_rng(0), size)


def correlation(config, task, other):
  _, logits = draw(config)
  return np.corrcoef(logits[task], logits[other])[0, 1]


class ScenarioTasksTest(parameterized.TestCase):
  def test_prepared_rows_and_schema(self):
    with tempfile.TemporaryDirectory() as directory:
      columns = pipeline.open_dataset(
        {
          "name": "synthetic",
          "cache_dir": directory,
          **dataclasses.asdict(dataclasses.replace(CONFIG, num_rows=5000)),
        }
      )
      batch = columns.read("train", np.arange(4000))
    self.assertEqual(columns.schema.num_scenarios, RARE + 2)
    np.testing.assert_array_equal(batch.scenario, batch.ids["scenario"])
    self.assertBetween(batch.scenario.min(), 1, 1)
    self.assertCountEqual(batch.labels, TASKS)
    self.assertIn("group", batch.groups)

  @parameterized.parameters(CONFIG, CONTROL)
  def test_label_rates_are_the_probabilities(self, config):
    logits, labels = synthetic._laws(config)
    for task in TASKS:
      logit, label = logits["train"][task], labels["train"][task]
      for rows in np.array_split(np.argsort(logit), 10):
        probs = 1 / (1 + np.exp(-logit[rows]))
        error = np.sqrt(np.sum(probs * (1 - probs))) / len(rows)
        self.assertLess(abs(label[rows].mean() - probs.mean()), 4 * error)
    rates = {task: labels["train"][task].mean() for task in TASKS}
    for task, rate in (("click", 0.35), ("like", 0.2), ("buy", 0.04)):
      self.assertAlmostEqual(rates[task], rate, delta=0.25 * rate)

  def test_tasks_help_and_conflict(self):
    self.assertGreater(correlation(CONFIG, "click", "like"), 0.95)
    self.assertLess(correlation(CONFIG, "click", "skip"), -0.9)
    self.assertBetween(correlation(CONFIG, "click", "buy"), 0.5, 0.95)
    for task in TASKS[1:]:
      self.assertGreater(correlation(CONTROL, "click", task), 0.99)

  def test_scenarios_shift_what_a_pair_is_worth(self):
    """The forms, found again by least squares on the noiseless logits."""
    for config, low, high in ((CONFIG, 0.0, 0.5), (CONTROL, 0.999, 1.001)):
      first, second, rare = (find_form(config, s) for s in (0, 1, RARE))
      self.assertBetween(cosine(first, second), low, high)
      # The rare one is made of the two large ones for a good part.
      self.assertBetween(cosine(first + second, rare), 0.7, 1.001)
      for form in (first, second, rare):
        np.testing.assert_allclose(
          np.linalg.norm(form),
          np.hypot(config.main_strength, config.rule_strength),
          rtol=0.35,
        )

  def test_scenarios_have_users_of_their_own(self):
    for config, most in ((CONFIG, 0.7), (CONTROL, 1.0)):
      block, _ = draw(config)
      counts = [
        np.bincount(
          block.ids["user_id"][block.ids["scenario"] == s + 1], minlength=257
        )
        for s in (0, 1)
      ]
      alike = cosine(*counts)
      self.assertLess(alike, most)
    self.assertGreater(alike, 0.9)

  def test_the_control_differs_in_users_and_labels_only(self):
    first, second = draw(CONFIG)[0], draw(CONTROL)[0]
    for name in ("item_id", "scenario"):
      np.testing.assert_array_equal(first.ids[name], second.ids[name])
    np.testing.assert_array_equal(first.dense, second.dense)
    shares = np.bincount(first.ids["scenario"])[1:] / 40_000
    np.testing.assert_allclose(shares, scenario_tasks.SCENARIOS, atol=0.01)

  def test_the_control_is_as_hard(self):
    first, second = (
      synthetic.best_scores(config)["test"] for config in (CONFIG, CONTROL)
    )
    for task in TASKS:
      self.assertAlmostEqual(
        first[f"{task}/auc"], second[f"{task}/auc"], delta=0.03
      )

  def test_nothing_beats_the_true_logit(self):
    logits, labels = synthetic._laws(CONFIG)
    best = synthetic.best_scores(CONFIG)
    rng = np.random.default_rng(0)
    for split in SPLITS[1:]:
      for task in TASKS:
        logit, label = logits[split][task], labels[split][task]
        auc = sklearn_metrics.roc_auc_score(label, logit)
        self.assertAlmostEqual(best[split][f"{task}/auc"], auc, places=10)
        noisy = logit + rng.normal(size=len(logit))
        self.assertLess(sklearn_metrics.roc_auc_score(label, noisy), auc)

  def test_the_rows_are_frozen(self):
    """Raise VERSION and measure every table anew if this must change."""
    logits = synthetic.true_logits(
      synthetic.Config("scenario_tasks", num_rows=1000)
    )
    for split, expected in FROZEN.items():
      actual = [logits[split][task][0] for task in TASKS]
      np.testing.assert_allclose(actual, expected, rtol=1e-5)


FROZEN = {
  "train": [-3.026968, -4.026968, 1.32031, -7.608361],
  "test": [-3.241399, -4.241399, 1.448169, -4.412852],
}


def find_form(config, scenario, task="click"):
  """The matrix whose form of both vectors is the task's logit."""
  block, logits = draw(config)
  rows = block.ids["scenario"] == scenario + 1
  x, y = (
    block.vectors[f"{thing}_code"][rows].astype(np.float64)
    for thing in ("user", "item")
  )
  outer = np.einsum("bi,bj->bij", x, y).reshape(len(x), -1)
  inputs = np.concatenate(
    [outer, block.dense[rows, :1], np.ones((len(x), 1))], axis=1
  )
  found, residual, *_ = np.linalg.lstsq(inputs, logits[task][rows])
  assert residual[0] < 1e-6  # Nothing else moves the logit.
  return found[:-2]


def cosine(first, second):
  return first @ second / np.linalg.norm(first) / np.linalg.norm(second)


if __name__ == "__main__":
  absltest.main()
