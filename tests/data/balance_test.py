"""The check of randomisation: quiet where it should be, loud where not."""

import numpy as np
import scipy.stats
from absl.testing import absltest, parameterized

from recjax.data import balance
from tests.data.table_case import TableTestCase

SCHEMA = {
  "features": {
    "age": {"kind": "dense"},
    "income": {"kind": "dense"},
    "city": {"kind": "sparse"},
  },
  "trial": {
    "treatment": "arm",
    "control": "none",
    "response": "spend",
    "arm_cost": {"none": 0, "mail": 1, "call": 2},
  },
}


def make(seed, size=3000):
  rng = np.random.default_rng(seed)
  return {
    "age": rng.normal(size=size),
    "income": rng.lognormal(size=size),
    "city": rng.choice(["a", "b", "c"], size),
    "arm": rng.choice(["none", "mail", "call"], size),
    "spend": rng.random(size),
  }


class BalanceTest(TableTestCase):
  def check(self, data, **trial):
    return balance.check(
      self.open(data, SCHEMA | {"trial": SCHEMA["trial"] | trial})
    )

  def test_random_arms_raise_no_alarm(self):
    for seed in range(4):
      found = self.check(make(seed))
      self.assertEqual(found.num_tests, 5)
      self.assertGreater(found.p_value, balance.ALARM)

  def test_a_shifted_column_is_named(self):
    data = make(0)
    data["age"] = data["age"] + 0.4 * (data["arm"] == "call")
    with self.assertLogs(level="WARNING") as logs:
      found = self.check(data)
    self.assertIn("age differs between treatment 'call'", logs.output[0])
    self.assertEqual((found.feature, found.treatment), ("age", "call"))
    self.assertAlmostEqual(found.difference, 0.4, delta=0.1)

  def test_a_value_that_an_arm_prefers_is_named(self):
    data = make(1)
    swap = (data["arm"] == "mail") & (np.arange(3000) % 3 == 0)
    data["city"] = np.where(swap, "b", data["city"])
    found = self.check(data)
    self.assertRegex(found.feature, "city")
    self.assertLess(found.p_value, balance.ALARM)

  def test_a_known_propensity_explains_the_difference(self):
    rng = np.random.default_rng(0)
    data = make(2)
    mail = 1 / (1 + np.exp(-data["age"]))
    drawn = rng.random(3000) < mail
    data["arm"] = np.where(drawn, "mail", "none")
    data["chance"] = np.where(drawn, mail, 1 - mail)
    trial = dict(arm_cost={"none": 0, "mail": 1})
    self.assertLess(self.check(data, **trial).p_value, 1e-6)
    found = self.check(data, propensity="chance", **trial)
    self.assertGreater(found.p_value, balance.ALARM)

  def test_clusters_drawn_together_are_counted_once(self):
    rng = np.random.default_rng(3)
    data, shop = make(3), rng.integers(0, 30, 3000)
    data["shop"] = shop
    data["arm"] = np.array(["none", "mail", "call"])[np.arange(30) % 3][shop]
    data["age"] = rng.normal(size=30)[shop] + 0.1 * data["age"]
    self.assertLess(self.check(data).p_value, 1e-6)
    self.assertGreater(self.check(data, cluster="shop").p_value, 1e-3)


class CompareTest(parameterized.TestCase):
  def test_two_arms_are_welchs_test_of_many_rows(self):
    rng = np.random.default_rng(0)
    values = rng.normal(size=4000)
    arm = rng.integers(0, 2, 4000)
    _, p_value = balance.compare(values, arm, np.ones(4000), np.arange(4000), 2)
    expected = scipy.stats.ttest_ind(
      values[arm == 1], values[arm == 0], equal_var=False
    ).pvalue
    np.testing.assert_allclose(p_value, expected, rtol=1e-2)

  def test_p_values_of_random_arms_are_uniform(self):
    rng = np.random.default_rng(1)
    p_values = [
      balance.compare(
        rng.lognormal(size=600),
        rng.integers(0, 3, 600),
        np.ones(600),
        np.arange(600),
        3,
      )[1]
      for _ in range(300)
    ]
    self.assertGreater(scipy.stats.kstest(p_values, "uniform").pvalue, 0.01)

  def test_a_constant_tells_nothing(self):
    ones = np.ones(10)
    _, p_value = balance.compare(
      ones, np.arange(10) % 2, ones, np.arange(10), 2
    )
    self.assertEqual(p_value, 1)


if __name__ == "__main__":
  absltest.main()
