"""Who gets which treatment under a budget: a plan and its certificate.

The multiple-choice knapsack: each of N users gets one of T treatments, of
which treatment 0 is "none" and costs nothing,

    max sum_i response[i, choice_i]   s.t.   sum_i cost[i, choice_i] <= budget.

At a price of money (the multiplier) every user decides alone: the treatment
with the largest `response - multiplier * cost`. `allocate` finds the price at
which the users spend the budget, which also is the optimum of the linear
relaxation, then spends what is left by the best moves that still fit
(`recjax.allocation_repair`). The dual value at the price bounds every plan
from above, so each plan says how far from the best it can be at most.

The search keeps a bracket of prices and alternates halving it with the price at
which the plans of its two ends are worth the same (the next kink of the dual,
Kelley's cutting plane in one dimension): some twenty passes over the table in
place of sixty. It runs jitted in float64, on one device or sharded over a mesh.

| symbol | here |
| --- | --- |
| r_ij, c_ij | `response`, `cost` |
| B | `budget` |
| lambda | `multiplier` |
| z_ij | `choice`, as the number of the treatment |

Source: Sinha and Zoltners, The Multiple-Choice Knapsack Problem, Operations
Research 27 (1979); the dual as used for marketing by Zhou et al., Direct
Heterogeneous Causal Learning for Resource Allocation Problems in Marketing,
AAAI 2023 (arXiv 2211.15728). Search, repair, and how return and segments enter
the dual are our choice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Integer, Real

from recjax import allocation_inputs, allocation_repair

# The dual is at its optimum when no plan between the bracket's two is better
# than they are by more than this share of the value.
_TOLERANCE = 1e-13


class Allocation(NamedTuple):
  """A plan; with several budgets every entry has a leading axis of them.

  Attributes:
    choice: Treatment of each user; 0 is none.
    multiplier: Price of money: response that one more unit of budget buys. 0
      where the budget is not scarce. With segments a price for each.
    value: Sum of the chosen responses, that of "none" included.
    spend: Sum of the chosen costs as NumPy adds them in the users' order;
      never above the budget.
    upper_bound: No plan within the limits has more value: `upper_bound -
      value` is the most that this one can be short of the best. With
      `unit_value` both are net of what is spent (see `allocate`).
  """

  choice: Int[np.ndarray, "*budgets users"]
  multiplier: Float[np.ndarray, "..."] | float
  value: Float[np.ndarray, "*budgets"] | float
  spend: Float[np.ndarray, "*budgets"] | float
  upper_bound: Float[np.ndarray, "*budgets"] | float


def allocate(
  response: Real[Array | np.ndarray, "users treatments"],
  cost: Real[Array | np.ndarray, "users treatments"],
  budget: float | int | Real[Array | np.ndarray, " budgets"] | None,
  *,
  allowed: Bool[Array | np.ndarray, "users treatments"] | None = None,
  segment: Integer[Array | np.ndarray, " users"] | None = None,
  segment_budget: Real[Array | np.ndarray, " segments"] | None = None,
  min_roi: float | int | None = None,
  unit_value: float | int | None = None,
  mesh: Mesh | None = None,
) -> Allocation:
  """The plan of the most response that a budget pays for.

  The value is short of the best plan's by less than the dearest single step:
  at most the largest difference of two responses of one user (for each
  segment, and once for the total), whatever the tables hold. A budget of zero
  buys what costs nothing; one above all costs buys every best response.

  Args:
    response: Expected outcome of each user under each treatment, any finite
      numbers; differences to column 0 decide.
    cost: Expected cost, at least 0, in the unit of the budget. Column 0, none,
      costs 0.
    budget: What may be spent in all, at least 0; infinity sets no limit, nor
      does None, for use with `segment_budget`. A vector gives a plan for each.
    allowed: False where a user must not get a treatment. None, column 0, is
      always allowed.
    segment: Number of each user's segment, in [0, segments).
    segment_budget: What each segment may spend, within the whole budget.
    min_roi: Least response beyond "none" per unit of money, of the whole plan.
    unit_value: What one unit of response is worth in money. No step is taken
      that costs more than it brings: the plan is the best in `value - spend /
      unit_value`, and so is the meaning of its bound.
    mesh: Devices that share the users; None takes one.

  Returns:
    The plan, as NumPy arrays and floats.

  Raises:
    UserError: If shapes differ, a number is NaN, infinite or negative where it
      must not be, or treatment 0 has a cost.

  Example:
    >>> import numpy as np
    >>> response = np.array([[0.0, 3.0, 4.0], [0.0, 1.0, 4.0]])
    >>> cost = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    >>> plan = allocate(response, cost, budget=3.0)
    >>> plan.choice.tolist(), plan.value, plan.spend, plan.upper_bound
    ([1, 2], 7.0, 3.0, 7.0)
  """
  gain, costs = allocation_inputs.read_tables(response, cost, allowed)
  gain = gain - gain[0]
  limits = _read_limits(
    costs, budget, segment, segment_budget, min_roi, unit_value
  )
  with jax.enable_x64(True):
    search = _Search(gain, costs, limits[0].segment, mesh)
    plans = [_plan(search, each, np.asarray(response)) for each in limits]
  if budget is None or np.ndim(budget) == 0:
    return plans[0]
  return Allocation(*(np.stack(column) for column in zip(*plans, strict=True)))


def choose(
  response: Float[Array, "users treatments"],
  cost: Float[Array, "users treatments"],
  multiplier: Float[Array, ""] | float,
) -> Int[Array, " users"]:
  """What every user takes at a price; of equals the cheapest, then the first.

  Pure JAX in the precision of its arguments, for use inside of a model.

  Args:
    response: Expected outcome.
    cost: Expected cost.
    multiplier: Price of money, in response per cost; at least 0.

  Returns:
    The number of each user's treatment.
  """
  score = response - multiplier * cost
  is_best = score == score.max(axis=-1, keepdims=True)
  return jnp.argmin(jnp.where(is_best, cost, jnp.inf), axis=-1)


def find_multiplier(
  response: Float[Array, "users treatments"],
  cost: Float[Array, "users treatments"],
  budget: Float[Array, ""] | float,
  *,
  num_steps: int = 50,
) -> Float[Array, ""]:
  """Bisection for the least price at which the users spend no more than asked.

  Pure JAX of a fixed number of steps in the precision of its arguments, for
  the batches of a training step; `vmap` it over budgets. The result is taken
  as a constant: no gradient flows through it. Plans are for `allocate`.

  Args:
    response: Expected outcome.
    cost: Expected cost, above 0 but for column 0.
    budget: What these users may spend together.
    num_steps: Halvings of the bracket [0, largest response per cost].

  Returns:
    The price, from the bracket's upper end: `choose` at it keeps the budget.
    0 if the budget is not scarce.
  """
  response, cost, budget = jax.lax.stop_gradient(
    (response, cost, jnp.asarray(budget, response.dtype))
  )
  gain, extra = response - response[:, :1], cost - cost[:, :1]
  ratio = jnp.where(extra > 0, gain / jnp.where(extra > 0, extra, 1), 0)

  def is_within(price):
    chosen = choose(response, cost, price)[:, None]
    return jnp.take_along_axis(cost, chosen, axis=1).sum() <= budget

  def halve(_, bracket):
    low, high = bracket
    middle = (low + high) / 2
    within = is_within(middle)
    return jnp.where(within, low, middle), jnp.where(within, middle, high)

  zero = jnp.zeros((), response.dtype)
  high = jnp.maximum(2 * ratio.max(), zero)
  _, high = jax.lax.fori_loop(0, num_steps, halve, (zero, high))
  return jnp.where(is_within(zero), zero, high)


def _read_limits(
  cost, budget, segment, segment_budget, min_roi, unit_value
) -> list[allocation_repair.Limits]:
  """The arguments of `allocate` as limits, one a budget."""
  segment, segment_budget = allocation_inputs.read_segments(
    segment, segment_budget, cost.shape[1]
  )
  min_roi = allocation_inputs.read_positive("min_roi", min_roi, 0.0)
  floor = 1 / allocation_inputs.read_positive("unit_value", unit_value, np.inf)
  budgets = allocation_inputs.read_budgets(budget, segment_budget)
  # Infinity times a price of zero is no number: no limit is twice of all that
  # can be spent, which rounding does not reach.
  most = 2 * cost.max(axis=0)
  if segment is not None:
    highest = np.bincount(segment, most, len(segment_budget))
    segment_budget = np.minimum(segment_budget, highest)
  return [
    allocation_repair.Limits(
      budget=min(float(each), float(most.sum())),
      segment=segment,
      segment_budget=segment_budget,
      min_roi=min_roi,
      floor=floor,
    )
    for each in np.atleast_1d(budgets)
  ]


class _Search:
  """The tables on their devices, and the search for the prices."""

  def __init__(self, response, cost, segment, mesh):
    self.response, self.cost, self._mesh = response, cost, mesh
    self.num_users = response.shape[1]
    if segment is None:
      segment = np.zeros(0, np.int32)
    tables = [response, cost, segment]
    if mesh is not None:
      # A user without responses and costs fills up the last shard.
      pad = -self.num_users % mesh.size
      tables = [
        np.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, pad)] if x.size else 0)
        for x in tables
      ]
      specs = _specs(mesh, bool(segment.size))
      tables = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(tables, specs, strict=True)
      ]
    self._tables = [jnp.asarray(x) for x in tables]

  def __call__(self, limits: allocation_repair.Limits):
    """Choice, prices, and gain and spend at them, summed by segment."""
    segment_budget = limits.segment_budget
    if segment_budget is None:
      segment_budget = np.zeros(0)
    found = _search(
      self._tables,
      (
        jnp.asarray(limits.budget),
        jnp.asarray(segment_budget),
        jnp.asarray(limits.min_roi),
        jnp.asarray(limits.floor),
      ),
      mesh=self._mesh,
    )
    choice, *found = jax.device_get(found)
    return choice[: self.num_users], *found


def _plan(search: _Search, limits, response) -> Allocation:
  choice, price, base, gain, spent = search(limits)
  choice = allocation_repair.spend_rest(
    search.response, search.cost, choice, limits, price
  )
  rows = np.arange(search.num_users)
  value = float(response[rows, choice].sum(dtype=np.float64))
  none = float(response[:, 0].sum(dtype=np.float64))
  spend = float(search.cost[choice, rows].sum())
  bound = _upper_bound(limits, price, float(base), gain, spent)
  return Allocation(
    choice=choice,
    multiplier=float(price[0]) if limits.segment is None else price,
    value=value,
    spend=spend,
    # Rounding may leave the two sums of one plan apart by their last bits.
    upper_bound=max(value, none + bound + limits.floor * spend),
  )


def _upper_bound(limits, price, base: float, gain, spent) -> float:
  """Dual value, beyond "none" and net of the floor price.

  With multipliers `budget_price` of the budget, `returns` of the least return
  and one of each segment, a user's score is (1 + returns) times
  `gain - price * cost`. At `base`, the price that all segments share, either
  the budget or the least return binds; both choices are bounds.
  """
  surplus = float(np.sum(gain - price * spent))
  extra = 0.0
  if limits.segment_budget is not None:
    extra = float(np.sum((price - base) * limits.segment_budget))
  bounds = [surplus + (base - limits.floor) * limits.budget + extra]
  if base < limits.min_roi:
    returns = (base - limits.floor) / (limits.min_roi - base)
    bounds.append((1 + returns) * (surplus + extra))
  return min(bounds)


@functools.partial(jax.jit, static_argnames="mesh")
def _search(tables, limits, *, mesh: Mesh | None):
  if mesh is None:
    return _search_shard(tables, limits, axes=())
  axes = tuple(mesh.axis_names)
  return jax.shard_map(
    functools.partial(_search_shard, axes=axes),
    mesh=mesh,
    in_specs=(_specs(mesh, bool(tables[2].size)), P()),
    out_specs=(P(axes), P(), P(), P(), P()),
    # What is reduced over all devices is the same on each.
    check_vma=False,
  )(tables, limits)


def _specs(mesh: Mesh, has_segments: bool):
  axes = tuple(mesh.axis_names)
  return [P(None, axes), P(None, axes), P(axes) if has_segments else P()]


def _search_shard(tables, limits, *, axes):
  """The search by the users of one device; sums are over all."""
  response, cost, segment = tables
  budget, segment_budget, min_roi, floor = limits
  num_segments = segment_budget.shape[0]

  def of_user(price):
    return price[segment] if price.ndim else price

  def totals(price):
    """Gain and spend at a price, of all or of each segment."""
    found = _take_best(response, cost, of_user(price))[:2]
    if price.ndim:
      found = [jax.ops.segment_sum(x, segment, num_segments) for x in found]
    else:
      found = [jnp.sum(x) for x in found]
    return jax.lax.psum(tuple(found), axes) if axes else tuple(found)

  high = _highest_price(response, cost)
  high = jnp.maximum(jax.lax.pmax(high, axes) if axes else high, floor)
  if not num_segments:
    base, used = _bracket(
      totals,
      lambda gain, spend: (spend <= budget) & (gain >= min_roi * spend),
      floor,
      high,
    )
    gain, spend = totals(base)
    price, gain, spend = base[None], gain[None], spend[None]
  else:
    own, own_used = _bracket(
      totals,
      lambda gain, spend: spend <= segment_budget,
      jnp.broadcast_to(floor, num_segments),
      jnp.broadcast_to(high, num_segments),
    )

    def totals_above(price):
      # A segment that its own budget binds keeps the plan that it can pay.
      gain, spend = totals(jnp.maximum(price, own_used))
      return gain.sum(), spend.sum()

    base, used = _bracket(
      totals_above,
      lambda gain, spend: (spend <= budget) & (gain >= min_roi * spend),
      floor,
      high,
    )
    price, used = jnp.maximum(base, own), jnp.maximum(used, own_used)
    gain, spend = totals(price)
  choice = _take_best(response, cost, of_user(used))[2]
  return choice, price, base, gain, spend


def _bracket(totals, is_within, low, high):
  """The least price within the limits, and a price that keeps them.

  Args:
    totals: Price -> gain and spend, of its shape.
    is_within: Of gain and spend; true at `high`, and from some price on.
    low: Least price.
    high: A price at which nothing is spent.

  Returns:
    The price where the plans that are too dear and those that are not meet,
    and the lowest price tried at which the plan was not too dear. They are one
    but for the users who are indifferent at it.
  """

  def is_open(state):
    return ~state["done"].all()

  def narrow(state):
    low, high = state["low"], state["high"]
    gain_gap = state["low_gain"] - state["high_gain"]
    spend_gap = state["low_spend"] - state["high_spend"]
    kink = gain_gap / jnp.where(spend_gap > 0, spend_gap, 1)
    at_kink = (state["step"] % 2 == 0) & (spend_gap > 0)
    price = jnp.where(at_kink, jnp.clip(kink, low, high), (low + high) / 2)
    gain, spend = totals(price)
    within = is_within(gain, spend)
    # At the kink both ends are worth the same; if nothing is worth more, no
    # plan lies between them.
    worth = state["high_gain"] - price * state["high_spend"]
    scale = jnp.abs(gain) + price * spend
    flat = at_kink & (gain - price * spend - worth <= _TOLERANCE * scale)
    narrow_enough = (price <= low) | (price >= high)
    new = {
      "low": jnp.where(within, low, price),
      "high": jnp.where(within, price, high),
      "low_gain": jnp.where(within, state["low_gain"], gain),
      "high_gain": jnp.where(within, gain, state["high_gain"]),
      "low_spend": jnp.where(within, state["low_spend"], spend),
      "high_spend": jnp.where(within, spend, state["high_spend"]),
      "price": price,
      "done": flat | (narrow_enough & ~at_kink),
    }
    kept = {
      name: jnp.where(state["done"], state[name], value)
      for name, value in new.items()
    }
    return kept | {"step": state["step"] + 1}

  low_gain, low_spend = totals(low)
  high_gain, high_spend = totals(high)
  free = is_within(low_gain, low_spend)
  state = jax.lax.while_loop(
    is_open,
    narrow,
    {
      "low": low,
      "high": jnp.where(free, low, high),
      "low_gain": low_gain,
      "high_gain": high_gain,
      "low_spend": low_spend,
      "high_spend": high_spend,
      "price": low,
      "done": free,
      "step": jnp.zeros((), jnp.int32),
    },
  )
  return state["price"], state["high"]


def _take_best(response, cost, price):
  """Gain, cost and number of each user's best treatment at a price."""
  score, gain, spent = response[0], response[0], cost[0]
  choice = jnp.zeros(score.shape, jnp.int32)
  # A loop over a few columns, each a plain vector of users: it fuses into one
  # pass over the tables.
  for j in range(1, response.shape[0]):
    other = response[j] - price * cost[j]
    better = (other > score) | ((other == score) & (cost[j] < spent))
    score = jnp.where(better, other, score)
    gain = jnp.where(better, response[j], gain)
    spent = jnp.where(better, cost[j], spent)
    choice = jnp.where(better, j, choice)
  return gain, spent, choice


def _highest_price(response, cost):
  """A price at which nobody takes what costs anything."""
  ratio = jnp.where(cost > 0, response / jnp.where(cost > 0, cost, 1), 0)
  return jnp.clip(2 * ratio.max(initial=0.0), 0, 1e300)
