"""Plans against HiGHS: the linear relaxation and exact integer programs."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse
from absl.testing import absltest, parameterized

from recjax import allocation, allocation_repair
from recjax.allocation import allocate
from recjax.errors import UserError


def make_tables(kind, num_users, num_treatments, seed=0):
  """Random, growing (dearer is better), or few prices in common."""
  rng = np.random.default_rng(seed)
  shape = (num_users, num_treatments)
  response, cost = rng.random(shape), rng.random(shape)
  if kind == "growing":
    response, cost = response.cumsum(axis=1), cost.cumsum(axis=1)
  if kind == "levels":
    cost = np.broadcast_to(0.5 * np.arange(num_treatments), shape).copy()
    response = np.sqrt(cost) * rng.lognormal(size=(num_users, 1))
  cost[:, 0] = 0
  return response, cost


def best_plan(response, cost, budget, integral, extra=()):
  """Optimum by HiGHS; `extra` are further rows (coefficients, low, high)."""
  num_users, num_treatments = response.shape
  one_each = scipy.sparse.kron(
    scipy.sparse.eye(num_users), np.ones((1, num_treatments)), format="csr"
  )
  rows = [(cost, -np.inf, budget), *extra]
  result = scipy.optimize.milp(
    -response.ravel(),
    integrality=np.full(response.size, int(integral)),
    bounds=scipy.optimize.Bounds(0, 1),
    constraints=[
      scipy.optimize.LinearConstraint(one_each, 1, 1),
      *(
        scipy.optimize.LinearConstraint(
          scipy.sparse.csr_matrix(row.ravel()[None]), low, high
        )
        for row, low, high in rows
      ),
    ],
    options={"mip_rel_gap": 0},
  )
  return -result.fun


class AllocateTest(parameterized.TestCase):
  def check(self, plan, response, cost, budget):
    rows = np.arange(len(response))
    self.assertEqual(plan.choice.shape, rows.shape)
    self.assertEqual(plan.spend, cost[rows, plan.choice].sum())
    self.assertLessEqual(plan.spend, budget)
    np.testing.assert_allclose(
      plan.value, response[rows, plan.choice].sum(), rtol=1e-12
    )
    largest = (response.max(axis=1) - response.min(axis=1)).max()
    self.assertGreaterEqual(plan.value, plan.upper_bound - largest - 1e-9)
    self.assertLessEqual(plan.value, plan.upper_bound)

  @parameterized.product(
    kind=("random", "growing", "levels"), share=(0.01, 0.3, 0.9)
  )
  def test_bound_equals_the_linear_relaxation(self, kind, share):
    response, cost = make_tables(kind, 300, 5)
    budget = share * cost.max(axis=1).sum()
    plan = allocate(response, cost, budget)
    self.check(plan, response, cost, budget)
    expected = best_plan(response, cost, budget, integral=False)
    np.testing.assert_allclose(plan.upper_bound, expected, rtol=1e-9)

  @parameterized.parameters((1_000, 5e-4), (10_000, 1e-4))
  def test_random_plans_come_near_the_bound(self, num_users, tolerance):
    for seed in range(10):
      response, cost = make_tables("random", num_users, 6, seed)
      budget = (0.02 + 0.03 * seed) * cost.max(axis=1).sum()
      plan = allocate(response, cost, budget)
      self.check(plan, response, cost, budget)
      self.assertGreater(plan.value, (1 - tolerance) * plan.upper_bound)

  @parameterized.parameters(range(20))
  def test_small_adversarial_tables_against_exact_integer_programs(self, seed):
    rng = np.random.default_rng(seed)
    # Small whole numbers: ties, equal ratios, dominated and non-concave steps.
    response = rng.integers(-2, 6, (5, 4)).astype(float)
    cost = rng.integers(0, 4, (5, 4)).astype(float)
    cost[:, 0] = 0
    for budget in (0.0, 1.0, 3.0, 7.5, 100.0):
      plan = allocate(response, cost, budget)
      self.check(plan, response, cost, budget)
      exact = best_plan(response, cost, budget, integral=True)
      self.assertGreaterEqual(plan.upper_bound, exact - 1e-9)
      # More than is promised: a greedy plan need not be the best.
      np.testing.assert_allclose(plan.value, exact, atol=1e-9)

  def test_equal_users_share_the_budget(self):
    response = np.tile([0.0, 1.0], (1000, 1))
    cost = np.tile([0.0, 0.25], (1000, 1))
    plan = allocate(response, cost, 83.3)
    self.assertEqual(np.bincount(plan.choice).tolist(), [667, 333])
    np.testing.assert_allclose(plan.multiplier, 4)

  def test_no_budget_buys_what_is_free(self):
    response = np.array([[0.0, 5.0, 9.0], [1.0, 0.5, 2.0]])
    cost = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1e-300]])
    plan = allocate(response, cost, 0)
    self.assertEqual(plan.choice.tolist(), [1, 0])
    self.assertEqual((plan.value, plan.spend), (6, 0))

  @parameterized.parameters(np.inf, 1e300, 1e4)
  def test_a_huge_budget_buys_every_best_response_at_the_least_cost(self, much):
    response, cost = make_tables("random", 50, 4)
    response[:, 2] = response[:, 3]  # The cheaper of the two.
    plan = allocate(response, cost, much)
    np.testing.assert_array_equal(
      response.max(axis=1), response[range(50), plan.choice]
    )
    self.assertEqual(plan.multiplier, 0)
    self.assertAlmostEqual(plan.value, plan.upper_bound, places=9)
    tied = plan.choice >= 2
    cheaper = np.where(cost[:, 2] <= cost[:, 3], 2, 3)
    np.testing.assert_array_equal(plan.choice[tied], cheaper[tied])

  def test_many_budgets_are_plans_of_each(self):
    response, cost = make_tables("growing", 200, 4)
    budgets = np.array([0.0, 5.0, 50.0, 1e9])
    plans = allocate(response, cost, budgets)
    self.assertEqual(plans.choice.shape, (4, 200))
    self.assertTrue((np.diff(plans.multiplier) <= 0).all())
    self.assertTrue((np.diff(plans.upper_bound) >= 0).all())
    for i, budget in enumerate(budgets):
      plan = allocate(response, cost, budget)
      np.testing.assert_array_equal(plan.choice, plans.choice[i])
      self.assertEqual(plan[1:], tuple(x[i] for x in plans[1:]))

  def test_float32_tables_are_decided_in_float64(self):
    response, cost = make_tables("random", 400, 4)
    few = response.astype(np.float32), cost.astype(np.float32)
    plan = allocate(*few, 20.0)
    wide = allocate(*(x.astype(np.float64) for x in few), 20.0)
    np.testing.assert_array_equal(plan.choice, wide.choice)
    on_device = allocate(*map(jnp.asarray, few), 20.0)
    np.testing.assert_array_equal(plan.choice, on_device.choice)
    self.assertFalse(jax.config.jax_enable_x64)

  def test_a_mesh_finds_the_same_plan(self):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    response, cost = make_tables("random", 1001, 5)
    for budget in (3.0, 100.0):
      plan = allocate(response, cost, budget)
      sharded = allocate(response, cost, budget, mesh=mesh)
      np.testing.assert_array_equal(sharded.choice, plan.choice)
      np.testing.assert_allclose(sharded.upper_bound, plan.upper_bound)


class OptionsTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3)
  def test_least_return_of_the_whole_plan(self, seed):
    response, cost = make_tables("growing", 200, 4, seed)
    gain = response - response[:, :1]
    for min_roi in (0.5, 1.5, 3.0):
      for budget in (5.0, 1e9):
        plan = allocate(response, cost, budget, min_roi=min_roi)
        gained = gain[range(200), plan.choice].sum()
        self.assertLessEqual(plan.spend, budget)
        self.assertGreaterEqual(gained, min_roi * plan.spend - 1e-9)
        expected = best_plan(
          response, cost, budget, False, [(gain - min_roi * cost, 0, np.inf)]
        )
        np.testing.assert_allclose(plan.upper_bound, expected, rtol=1e-9)
        self.assertGreater(plan.value, expected - np.ptp(response, 1).max())

  def test_nothing_is_spent_below_its_value(self):
    response, cost = make_tables("growing", 200, 4)
    for unit_value in (0.2, 1.0, 5.0):
      for budget in (20.0, 1e9):
        plan = allocate(response, cost, budget, unit_value=unit_value)
        net = plan.value - plan.spend / unit_value
        expected = best_plan(response - cost / unit_value, cost, budget, False)
        bound = plan.upper_bound - plan.spend / unit_value
        np.testing.assert_allclose(bound, expected, rtol=1e-9)
        self.assertGreater(net, expected - np.ptp(response, 1).max())
    chosen = np.arange(200), plan.choice
    gain = (response - response[:, :1])[chosen]
    self.assertTrue((5.0 * gain >= cost[chosen] - 1e-12).all())

  @parameterized.parameters(None, 6.0, 30.0)
  def test_each_segment_keeps_its_budget_within_the_whole(self, budget):
    response, cost = make_tables("random", 300, 5)
    segment = np.random.default_rng(1).integers(0, 3, 300)
    own = np.array([0.0, 4.0, np.inf if budget else 50.0])
    plan = allocate(response, cost, budget, segment=segment, segment_budget=own)
    used = np.bincount(segment, cost[range(300), plan.choice], 3)
    self.assertTrue((used <= own).all())
    self.assertLessEqual(plan.spend, budget or 54.0)
    rows = [(cost * (segment == i)[:, None], -np.inf, own[i]) for i in range(3)]
    expected = best_plan(response, cost, budget or np.inf, False, rows)
    np.testing.assert_allclose(plan.upper_bound, expected, rtol=1e-9)
    self.assertGreater(plan.value, expected - 4 * np.ptp(response, 1).max())
    self.assertEqual(plan.multiplier.shape, (3,))

  def test_all_limits_at_once_keep_the_bound(self):
    response, cost = make_tables("growing", 150, 4)
    gain = response - response[:, :1]
    segment = np.arange(150) % 2
    plan = allocate(
      response,
      cost,
      np.array([10.0, 60.0]),
      segment=segment,
      segment_budget=np.array([5.0, 100.0]),
      min_roi=1.3,
      unit_value=1.25,
    )
    for i, budget in enumerate((10.0, 60.0)):
      rows = [
        (gain - 1.3 * cost, 0, np.inf),
        (cost * (segment == 0)[:, None], -np.inf, 5.0),
      ]
      expected = best_plan(response - cost / 1.25, cost, budget, False, rows)
      net = plan.value[i] - plan.spend[i] / 1.25
      bound = plan.upper_bound[i] - plan.spend[i] / 1.25
      self.assertGreaterEqual(bound, expected - 1e-9)
      self.assertGreater(net, expected - 3 * np.ptp(response, 1).max())

  def test_nobody_gets_what_is_not_allowed(self):
    response, cost = make_tables("random", 200, 4)
    allowed = np.random.default_rng(2).random(response.shape) < 0.5
    allowed[:, 0] = True
    plan = allocate(response, cost, 15.0, allowed=allowed)
    self.assertTrue(allowed[range(200), plan.choice].all())
    forbidden = np.where(allowed, response, -1e3)
    expected = best_plan(forbidden, cost, 15.0, False)
    np.testing.assert_allclose(plan.upper_bound, expected, rtol=1e-9)

  def test_segments_on_a_mesh(self):
    mesh = jax.make_mesh((8,), ("data",))
    response, cost = make_tables("random", 299, 4)
    limits = dict(
      segment=np.arange(299) % 3, segment_budget=np.array([1.0, 5.0, 80.0])
    )
    plan = allocate(response, cost, 30.0, **limits)
    sharded = allocate(response, cost, 30.0, mesh=mesh, **limits)
    np.testing.assert_array_equal(sharded.choice, plan.choice)

  def test_a_plan_just_above_its_budget_is_cut(self):
    response = np.array([[0.0, 0.0, 0.0], [1.0, 3.0, 2.0]])
    cost = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    limits = allocation_repair.Limits(budget=np.nextafter(3.0, 0.0))
    choice = allocation_repair.spend_rest(
      response, cost, np.ones(3, np.int32), limits, np.zeros(1)
    )
    self.assertEqual(choice.tolist(), [0, 1, 1])


class FindMultiplierTest(parameterized.TestCase):
  def test_is_the_price_of_the_plan(self):
    response, cost = make_tables("growing", 500, 4)
    find = jax.jit(jax.vmap(allocation.find_multiplier, (None, None, 0)))
    budgets = np.array([0.0, 20.0, 100.0, 1e6], np.float32)
    table = jnp.asarray(response, jnp.float32), jnp.asarray(cost, jnp.float32)
    found = find(*table, budgets)
    expected = allocate(response, cost, budgets[1:]).multiplier
    np.testing.assert_allclose(found[1:], expected, rtol=2e-2)
    for price, budget in zip(found, budgets, strict=True):
      choice = allocation.choose(*table, price)
      self.assertLessEqual(cost[range(500), choice].sum(), budget + 1e-3)

  def test_cost_falls_as_the_price_rises(self):
    response, cost = map(jnp.asarray, make_tables("random", 300, 5))
    spend = [
      float(cost[jnp.arange(300), allocation.choose(response, cost, x)].sum())
      for x in np.linspace(0, 5, 20)
    ]
    self.assertEqual(spend, sorted(spend, reverse=True))

  def test_no_gradient_flows_through_it(self):
    response, cost = map(jnp.asarray, make_tables("growing", 30, 4))
    grad = jax.grad(lambda x: allocation.find_multiplier(x, cost, 4.0))
    self.assertFalse(grad(response).any())

  def test_choose_breaks_ties_by_cost(self):
    response = jnp.asarray([[0.0, 2.0, 2.0], [1.0, 2.0, 3.0]])
    cost = jnp.asarray([[0.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    self.assertEqual(allocation.choose(response, cost, 1.0).tolist(), [2, 0])


class MistakesTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(budget=-1.0), "budget -1.0 is not at least 0"),
    (dict(budget=np.nan), "budget nan"),
    (dict(budget=None), "budget is None"),
    (dict(budget=[[1.0]]), "shape"),
    (dict(response=[[0.0, np.nan]]), r"response\[0, 1\] is nan"),
    (dict(response=[[0.0, np.inf]]), r"response\[0, 1\] is inf"),
    (dict(cost=[[0.0, -1.0]]), r"cost\[0, 1\] is -1.0.*clip"),
    (dict(cost=[[0.5, 1.0]]), r"cost\[0, 0\] is 0.5.*must be 0"),
    (dict(cost=[[0.0, 1.0, 2.0]]), "one shape"),
    (dict(response=np.zeros((0, 2)), cost=np.zeros((0, 2))), "at least one"),
    (dict(allowed=np.array([[False, True]])), "always get none"),
    (dict(segment=np.array([0])), "give both"),
    (
      dict(segment=np.array([1]), segment_budget=np.array([1.0])),
      "segment must be from 0 to 0",
    ),
    (
      dict(segment=np.array([0]), segment_budget=np.array([-1.0])),
      r"segment_budget\[0\] is -1.0",
    ),
    (dict(min_roi=-1.0), "min_roi must be above 0"),
    (dict(unit_value=0.0), "unit_value must be above 0"),
  )
  def test_is_one_clear_line(self, change, message):
    arguments = {
      "response": [[0.0, 1.0]],
      "cost": [[0.0, 1.0]],
      "budget": 1.0,
    } | change
    for name in ("response", "cost"):
      arguments[name] = np.asarray(arguments[name])
    with self.assertRaisesRegex(UserError, message):
      # Without the checks of shapes that only tests make.
      inspect.unwrap(allocate)(**arguments)


if __name__ == "__main__":
  absltest.main()
