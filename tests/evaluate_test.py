"""Evaluations count every example once and equal scikit-learn's numbers."""

import dataclasses
import functools

import jax
import numpy as np
import sklearn.metrics
from absl.testing import absltest, parameterized

from recjax import evaluate, parallel, train_state
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax.data.pipeline import open_dataset
from tests import run_case

TASKS = ("click", "secs")
ROWS = run_case.ROWS["test"]


class EvaluateTest(run_case.RunTestCase):
  def setUp(self):
    super().setUp()
    self.columns = open_dataset(run_case.data_config())
    self.method = method_lib.Method(
      name="toy",
      module=run_case.make_method(),
      config=run_case.Config(tasks=TASKS),
      schema=self.columns.schema,
    )
    rows = np.arange(ROWS)
    self.batch = self.columns.read("test", rows)

  def evaluate(self, batch_size=32, config=parallel.Config()):  # noqa: B008
    placement = parallel.place(config)
    step_config = train_state.StepConfig(
      self.method, method_lib.Stage(), optimizer_lib.Config(), num_steps=1
    )
    state = placement.init(
      functools.partial(train_state.init_state, config=step_config),
      jax.random.key(0),
    )
    predict = placement.compile_eval(
      functools.partial(evaluate.forward, method=self.method)
    )
    return evaluate.evaluate(
      predict,
      placement.eval_state(state),
      self.method,
      self.columns,
      "test",
      batch_size=batch_size,
      put_batch=placement.put_batch,
    )

  def test_metrics_equal_those_of_scikit_learn(self):
    evaluation = self.evaluate()
    click = evaluation.examples["click"]
    probs = 1 / (1 + np.exp(-click["score"].astype(np.float64)))
    labels = self.batch.labels["click"]
    np.testing.assert_array_equal(click["label"], labels)
    metrics = evaluation.metrics
    for name, value in (
      ("auc", sklearn.metrics.roc_auc_score(labels, click["score"])),
      ("logloss", sklearn.metrics.log_loss(labels, probs)),
      ("pcoc", probs.sum() / labels.sum()),
    ):
      self.assertAlmostEqual(metrics[f"test/click/{name}"], value, places=6)
    users, total, weight = self.batch.groups["group"], 0.0, 0
    for user in np.unique(users):
      own = users == user
      if 0 < labels[own].sum() < own.sum():
        total += own.sum() * sklearn.metrics.roc_auc_score(
          labels[own], click["score"][own]
        )
        weight += own.sum()
    self.assertAlmostEqual(metrics["test/click/gauc"], total / weight, places=6)
    np.testing.assert_array_equal(evaluation.examples["group"], users)

  def test_cold_and_warm_items_are_told_apart(self):
    schema = self.columns.schema
    roles = dataclasses.replace(schema.roles, popularity="item")
    schema = dataclasses.replace(schema, roles=roles)
    self.method = dataclasses.replace(self.method, schema=schema)
    evaluation = self.evaluate()
    metrics, click = evaluation.metrics, evaluation.examples["click"]
    rows = np.asarray(self.batch.ids["item"])
    # Row 1 is the bucket of items without a positive, row 3 of 5 to 9.
    for name, own in (
      ("cold", rows < 3),
      ("warm", rows >= 3),
      ("positives_1-4", rows == 2),
    ):
      self.assertEqual(metrics[f"test/click/{name}/examples"], own.sum())
      self.assertAlmostEqual(
        metrics[f"test/click/{name}/auc"],
        sklearn.metrics.roc_auc_score(click["label"][own], click["score"][own]),
        places=6,
      )
    self.assertNotIn("test/secs/cold/auc", metrics)
    names = evaluate.metric_names(self.method, "test")
    self.assertContainsSubset(names, metrics)
    self.assertIn("test/click/cold/auc", names)

  def test_a_real_label_is_measured_in_its_unit(self):
    evaluation = self.evaluate()
    secs = evaluation.examples["secs"]
    seen = np.asarray(self.batch.label_mask["secs"])
    self.assertTrue(0 < seen.sum() < ROWS)
    np.testing.assert_array_equal(np.isnan(secs["label"]), ~seen)
    labels = np.asarray(self.batch.labels["secs"])[seen]
    np.testing.assert_array_equal(secs["label"][seen], labels)
    # The network itself predicts the symlog of seconds.
    batch = jax.tree.map(jax.numpy.asarray, self.batch)
    params, tables = self.method.init(jax.random.key(0))
    outputs, *_ = self.method.apply(
      params, tables, self.method.read(tables, batch), batch, train=False
    )
    raw = np.asarray(outputs["secs"], np.float64)
    np.testing.assert_allclose(
      secs["score"], np.sign(raw) * np.expm1(np.abs(raw)), rtol=1e-4, atol=1e-6
    )
    metrics, scores = evaluation.metrics, secs["score"][seen]
    for name, value in (
      ("mae", sklearn.metrics.mean_absolute_error(labels, scores)),
      ("rmse", sklearn.metrics.root_mean_squared_error(labels, scores)),
    ):
      self.assertAlmostEqual(metrics[f"test/secs/{name}"], value, places=4)

  @parameterized.named_parameters(
    ("one_partial", 128, parallel.Config()),
    ("of_one_too_many", 70, parallel.Config()),
    ("of_all", 71, parallel.Config()),
    ("on_a_mesh", 32, parallel.Config(data=2, model=4)),
    ("with_pmap", 32, parallel.Config(mode="pmap", data=4)),
  )
  def test_batches_change_nothing(self, batch_size, config):
    expected, actual = self.evaluate(), self.evaluate(batch_size, config)
    for task in TASKS:
      for key in ("score", "label"):
        np.testing.assert_allclose(
          actual.examples[task][key],
          expected.examples[task][key],
          rtol=1e-5,
          atol=1e-6,
        )
    self.assertEqual(actual.metrics.keys(), expected.metrics.keys())
    for name, value in expected.metrics.items():
      self.assertAlmostEqual(actual.metrics[name], value, places=5, msg=name)
    jax.tree.map(
      np.testing.assert_array_equal, actual.counters, expected.counters
    )

  def test_counters_are_summed_over_batches(self):
    evaluation = self.evaluate()
    self.assertEqual(evaluation.counters["num_examples"], ROWS)
    self.assertEqual(evaluation.metrics["test/examples"], ROWS)
    self.assertIs(type(evaluation.metrics["test/examples"]), float)
    hits = np.bincount(self.batch.ids["user"], minlength=run_case.NUM_USERS)
    np.testing.assert_array_equal(evaluation.counters["memory"]["hits"], hits)

  def test_diagnostics_hold_reliability_and_usage(self):
    evaluation = self.evaluate()
    drawn = evaluate.diagnostics(evaluation, self.method)
    hits = np.bincount(self.batch.ids["user"], minlength=run_case.NUM_USERS)
    self.assertEqual(drawn["slot_usage"], {"memory": hits.tolist()})
    self.assertEqual(list(drawn["reliability"]), ["click"])
    curve = drawn["reliability"]["click"]
    click = evaluation.examples["click"]
    probs = 1 / (1 + np.exp(-click["score"].astype(np.float64)))
    # Bins of equal width.
    bins = len(curve["count"])
    place = np.minimum((probs * bins).astype(int), bins - 1)
    for key, weights in (
      ("count", np.ones(ROWS)),
      ("sum_probs", probs),
      ("sum_labels", click["label"]),
    ):
      np.testing.assert_allclose(
        curve[key], np.bincount(place, weights, bins), rtol=1e-6
      )

  def test_a_missing_binary_label_does_not_count(self):
    evaluation = self.evaluate()
    click = evaluation.examples["click"]
    click["label"][:9] = np.nan
    drawn = evaluate.diagnostics(evaluation, self.method)
    curve = drawn["reliability"]["click"]
    self.assertEqual(sum(curve["count"]), ROWS - 9)
    self.assertEqual(sum(curve["sum_labels"]), click["label"][9:].sum())


if __name__ == "__main__":
  absltest.main()
