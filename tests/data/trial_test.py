"""Trials of a table, from raw rows to batches, and what they must not hold."""

import json

import jax
import numpy as np
import pyarrow as pa
from absl.testing import absltest, parameterized

from recjax import method
from recjax.data.columns import pad_batch
from recjax.errors import UserError
from recjax.schema import Schema
from recjax.trial import Trial
from tests.data.table_case import TableTestCase

SCHEMA = {
  "features": {"age": {"kind": "dense"}},
  "trial": {
    "treatment": "arm",
    "control": "none",
    "response": "spend",
    "cost": "cost",
  },
  "split": {"by": "column", "column": "part"},
}


def with_trial(**changes):
  trial = SCHEMA["trial"] | changes
  return SCHEMA | {"trial": {k: v for k, v in trial.items() if v is not None}}


def columns(**changes):
  return {
    "part": ["train"] * 5 + ["valid", "test", "test"],
    "arm": ["none", "mail", "call", "none", "none", "mail", "call", "none"],
    "age": [1.0, 2, 3, 4, 5, 6, 7, 8],
    "spend": [0.0, 4, 2, 0, 1, 0, 3, 9],
    "cost": [0.0, 0.5, 2, 0, 0, 0.5, 3, 0],
    "household": ["b", "b", "a", "c", "c", "a", "d", "a"],
    "chance": [0.5, 0.2, 0.3, 0.5, 0.5, 0.2, 0.3, 0.5],
    **changes,
  }


class TrialTest(TableTestCase):
  def read(self, data, split, schema):
    prepared = self.open(data, schema)
    rows = np.arange(prepared.num_rows[split])
    return prepared.schema.trial, prepared.read(split, rows)

  def test_rows_and_what_the_training_part_holds(self):
    trial, batch = self.read(columns(), "train", SCHEMA)
    self.assertEqual(trial.treatments, ("none", "call", "mail"))
    self.assertEqual(trial.num_treatments, 3)
    self.assertEqual(trial.propensities, (3 / 5, 1 / 5, 1 / 5))
    self.assertFalse(trial.is_binary)
    spend, cost = [0, 4, 2, 0, 1], [0, 0.5, 2, 0, 0]
    np.testing.assert_allclose(trial.response_mean, np.mean(spend))
    np.testing.assert_allclose(trial.response_std, np.std(spend))
    np.testing.assert_allclose(trial.cost_std, np.std(cost))
    self.assertIsNone(trial.known_cost)
    rows = batch.trial
    self.assertEqual(rows.treatment.tolist(), [0, 2, 1, 0, 0])
    np.testing.assert_allclose(rows.response, spend)
    np.testing.assert_allclose(rows.cost, cost)
    np.testing.assert_allclose(rows.propensity, [0.6, 0.2, 0.2, 0.6, 0.6])
    self.assertLen(set(rows.cluster.tolist()), 5)
    self.assertEqual(batch.labels, {})
    np.testing.assert_allclose(batch.dense[0], -np.sqrt(2), rtol=1e-6)

  def test_shares_of_the_test_part_are_those_of_the_training_part(self):
    _, batch = self.read(columns(), "test", SCHEMA)
    self.assertEqual(batch.trial.treatment.tolist(), [1, 0])
    np.testing.assert_allclose(batch.trial.propensity, [0.2, 0.6])

  def test_propensity_and_cluster_columns(self):
    schema = with_trial(propensity="chance", cluster="household")
    _, batch = self.read(columns(), "train", schema)
    np.testing.assert_allclose(batch.trial.propensity, columns()["chance"][:5])
    cluster = batch.trial.cluster
    self.assertEqual(cluster[0], cluster[1])
    self.assertEqual(cluster[3], cluster[4])
    self.assertLen(set(cluster.tolist()), 3)

  def test_costs_by_arm_give_the_order(self):
    schema = with_trial(
      cost=None, arm_cost={"none": 0, "mail": 0.25, "call": 3}
    )
    trial, batch = self.read(columns(), "train", schema)
    self.assertEqual(trial.treatments, ("none", "mail", "call"))
    self.assertEqual(trial.known_cost, (0, 0.25, 3))
    np.testing.assert_allclose(batch.trial.cost, [0, 0.25, 3, 0, 0])

  def test_numbers_as_treatments(self):
    for kind in (pa.int8(), pa.float64(), pa.bool_()):
      arm = [0, 1, 1, 0, 0, 1, 1, 0]
      arm = pa.array([bool(x) if kind == pa.bool_() else x for x in arm], kind)
      trial, batch = self.read(columns(arm=arm), "train", with_trial(control=0))
      self.assertEqual(trial.treatments, ("0", "1"))
      self.assertEqual(batch.trial.treatment.tolist(), [0, 1, 1, 0, 0])

  def test_doses_are_in_the_order_of_their_numbers(self):
    arm = [2, 10, 0, 2, 2, 10, 0, 2]
    trial, _ = self.read(columns(arm=arm), "train", with_trial(control=2))
    self.assertEqual(trial.treatments, ("2", "0", "10"))

  def test_binary_responses_are_seen(self):
    schema = with_trial(response="bought")
    data = columns(bought=[0, 1, 1, 0, 0, 1, 0, 1])
    trial, _ = self.read(data, "train", schema)
    self.assertTrue(trial.is_binary)

  def test_csv_reads_the_same(self):
    _, expected = self.read(columns(), "train", SCHEMA)
    prepared = self.open(columns(), SCHEMA, name="log.csv")
    batch = prepared.read("train", np.arange(5))
    for name in ("treatment", "response", "cost", "propensity"):
      np.testing.assert_array_equal(
        getattr(batch.trial, name), getattr(expected.trial, name)
      )

  def test_labels_may_stand_beside_a_trial(self):
    schema = SCHEMA | {"labels": {"visit": "binary"}}
    data = columns(visit=[0, 1, 0, 1, None, 0, 1, 1])
    _, batch = self.read(data, "train", schema)
    self.assertEqual(batch.label_mask["visit"].tolist(), [1, 1, 1, 1, 0])
    self.assertEqual(batch.trial.treatment.tolist(), [0, 2, 1, 0, 0])

  def test_padding_and_empty_batches_have_the_same_form(self):
    prepared = self.open(columns(), SCHEMA)
    batch = pad_batch(prepared.read("valid", np.arange(1)), 3)
    empty = method.empty_batch(prepared.schema, (), 3)
    self.assertEqual(batch.trial.propensity[1:].tolist(), [0, 0])
    self.assertEqual(
      [(x.shape, x.dtype) for x in jax.tree.leaves(batch.trial)],
      [(x.shape, x.dtype) for x in jax.tree.leaves(empty.trial)],
    )

  def test_schemas_are_written_and_read_back(self):
    schema = with_trial(cost=None, arm_cost={"none": 0, "mail": 1, "call": 3})
    prepared = self.open(columns(), schema).schema
    written = json.loads(json.dumps(prepared.to_dict()))
    self.assertEqual(Schema.from_dict(written), prepared)
    self.assertIsInstance(prepared.trial, Trial)

  @parameterized.parameters(
    (dict(arm=[None] + columns()["arm"][1:]), "'arm', row 1: .*missing"),
    (
      dict(arm=columns()["arm"][:7] + ["fax"]),
      "'arm', row 8: treatment 'fax' is not in the training part",
    ),
    (dict(arm=["none"] * 8), "control 'none' alone"),
    (dict(arm=["mail"] * 8), "has the control 'none'; it has mail"),
    (dict(spend=[0.0] * 7 + [None]), "'spend', row 8: .*finite"),
    (dict(spend=[0.0] * 7 + [np.inf]), "'spend', row 8: inf"),
    (dict(cost=[0.0] * 7 + [-1]), "'cost', row 8: -1 is no cost"),
    (dict(chance=[0.5] * 7 + [0]), "'chance', row 8: 0 is no propensity"),
  )
  def test_wrong_rows_are_named(self, changes, message):
    schema = with_trial(propensity="chance" if "chance" in changes else None)
    with self.assertRaisesRegex(UserError, message):
      self.open(columns(**changes), schema)

  @parameterized.parameters(
    (dict(arm_cost={"none": 0}), 'either "cost".* or "arm_cost"'),
    (dict(cost=None), 'either "cost"'),
    (dict(response=None), '"response" is missing'),
    (dict(response="cost"), "different columns"),
    (dict(response="age"), "'age' is a feature too"),
    (dict(treatmnt="arm"), "did you mean 'treatment'"),
    (dict(treatment=3), "treatment must be the name of a column"),
    (dict(cost=None, arm_cost={"none": 1}), "control 'none' must be 0"),
    (dict(cost=None, arm_cost={"mail": 1}), "lacks the control 'none'"),
    (dict(cost=None, arm_cost={"none": 0, "mail": -1}), "of 'mail' must be"),
    (
      dict(cost=None, arm_cost={"none": 0, "mail": 1}),
      "'call' has no cost in arm_cost",
    ),
    (
      dict(cost=None, arm_cost={"none": 0, "mail": 1, "call": 1, "fax": 2}),
      "no row of the training part has the treatment 'fax'",
    ),
    (dict(treatments=["mail", "none"]), "must begin with the control"),
    (dict(treatments=["none", "mail"]), "'call' is not among the treatments"),
    (dict(response="sales"), "sales"),
  )
  def test_wrong_schemas_are_told(self, changes, message):
    with self.assertRaisesRegex(UserError, message):
      self.open(columns(), with_trial(**changes))


if __name__ == "__main__":
  absltest.main()
