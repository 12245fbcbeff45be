"""What a policy earns on a randomised trial as its budget grows.

For any number of treatments: with two it is the cost curve, with more the
multi-armed one. The policy takes at each price of money what a model's
predictions make the best; the trial says what that brought and cost, on the
people whose own treatment it names, each weighted by one over the chance of
that. Arrays are NumPy, sums are float64; arguments as in
`recjax.metrics.uplift`. People of equal return per cost enter together, and the
curve is straight across them: it does not depend on the order of the rows.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer, Real


class CostCurve(NamedTuple):
  """Points of a policy's outcome as its budget grows.

  Attributes:
    spend: Mean cost a person, of the policy; from that of treating none.
    value: Mean response a person.
    multiplier: Price of money down to which the point's policy pays.
  """

  spend: Float[np.ndarray, " points"]
  value: Float[np.ndarray, " points"]
  multiplier: Float[np.ndarray, " points"]


def cost_curve(
  predicted_response: Float[np.ndarray, "people treatments"],
  predicted_cost: Float[np.ndarray, "people treatments"],
  treatment: Integer[np.ndarray, " people"],
  response: Real[np.ndarray, " people"],
  cost: Real[np.ndarray, " people"],
  propensity: Float[np.ndarray, " people"],
  *,
  spend: str = "observed",
  normalize: bool = True,
) -> CostCurve:
  """What allocations by a model's predictions bring and cost in the trial.

  At a price of money everybody takes the best `response - price * cost` by the
  predictions. The curve has every policy that such a price gives, from the one
  where nobody is treated at any cost to the one where money is free.

  Args:
    predicted_response: Expected response of each person under each treatment.
    predicted_cost: Expected cost, at least 0; of treatment 0 it is taken off.
    treatment: The treatment that each person got.
    response: Outcome seen.
    cost: Cost seen.
    propensity: Chance, in (0, 1], of the treatment that the person got.
    spend: `observed`: the cost axis too is what the trial saw, as `eom` counts
      it; `predicted`: what the model thinks that it spends.
    normalize: As in `uplift.eom`.

  Returns:
    The curve; `value` is the mean response with that of treatment 0 in it.

  Raises:
    ValueError: If a propensity is not in (0, 1], or `spend` is unknown.

  Source:
    Sverdrup et al., Qini Curves for Multi-Armed Treatment Rules, 2023 (arXiv
    2306.11979), for the curve; our estimate weighs by the propensity and takes
    costs as they were seen.
  """
  if spend not in ("observed", "predicted"):
    raise ValueError(f"unknown spend {spend!r}; use 'observed' or 'predicted'")
  check_propensity(propensity)
  path = PricePath(predicted_response, predicted_cost)
  weight = 1 / propensity.astype(np.float64)
  curve = path.curve(treatment, response, cost, weight, normalize=normalize)
  if spend == "predicted":
    curve = curve._replace(spend=path.predicted_spend())
  return curve


class PricePath:
  """What everybody takes as the price of money falls, sorted once.

  For several curves of one model's predictions, as a bootstrap needs them; one
  is `cost_curve`, which says what the arguments are.
  """

  def __init__(
    self,
    predicted_response: Float[np.ndarray, "people treatments"],
    predicted_cost: Float[np.ndarray, "people treatments"],
  ):
    gain = predicted_response - predicted_response[:, :1]
    extra = np.maximum(predicted_cost - predicted_cost[:, :1], 0).astype(float)
    self._start, steps = _steps(gain.astype(float), extra)
    order = np.argsort(-steps[3], kind="stable")
    self._before, self._after, self._person, ratio = (x[order] for x in steps)
    is_last = np.append(ratio[1:] != ratio[:-1], True)[: len(ratio)]
    self._ends = np.flatnonzero(is_last)
    self._multiplier = np.append(np.inf, ratio[self._ends])
    self._extra = extra

  def curve(
    self,
    treatment: Integer[np.ndarray, " people"],
    response: Real[np.ndarray, " people"],
    cost: Real[np.ndarray, " people"],
    weight: Float[np.ndarray, " people"],
    *,
    normalize: bool = True,
  ) -> CostCurve:
    """The curve by a trial whose people count by `weight`."""
    own, starts = treatment[self._person], treatment == self._start
    # Whether a step makes the policy name what the person got, or no more.
    match = (own == self._after).astype(np.int8) - (own == self._before)

    def along(seen):
      return self._along(seen[starts].sum(), seen[self._person] * match)

    count = along(weight) if normalize else len(treatment)
    with np.errstate(invalid="ignore", divide="ignore"):
      value = along(weight * response) / count
      spent = along(weight * cost) / count
    return CostCurve(spent, value, self._multiplier)

  def known_curve(
    self,
    response: Real[np.ndarray, "people treatments"],
    cost: Real[np.ndarray, "people treatments"],
  ) -> CostCurve:
    """The curve where the outcome of every treatment is known."""
    value, spent = self._mean(response), self._mean(cost)
    return CostCurve(spent, value, self._multiplier)

  def predicted_spend(self) -> Float[np.ndarray, " points"]:
    """Mean cost a person at each point, as predicted."""
    return self._mean(self._extra)

  def _mean(self, table):
    person, people = self._person, np.arange(len(table))
    change = table[person, self._after] - table[person, self._before]
    return self._along(table[people, self._start].sum(), change) / len(table)

  def _along(self, first, change):
    """A sum at the start and after each price, from its changes by step."""
    return first + np.append(0.0, np.cumsum(change)[self._ends])


def value_at_budget(
  curve: CostCurve, budget: Float[np.ndarray, " budgets"]
) -> Float[np.ndarray, " budgets"]:
  """Mean response a person at budgets a person (`eom` at a budget).

  Args:
    curve: Of the policy.
    budget: Mean cost a person.

  Returns:
    The value where the curve has first spent the budget, straight between its
    points; that of its start below the start's spend, that of its end above.

  Example:
    >>> curve = CostCurve(np.array([0.0, 2.0]), np.array([1.0, 5.0]),
    ...                   np.array([np.inf, 2.0]))
    >>> value_at_budget(curve, np.array([0.5, 9.0])).tolist()
    [2.0, 5.0]
  """
  # An estimated spend may fall: what counts is when it first is reached.
  reached = np.maximum.accumulate(curve.spend)
  forward = np.append(True, reached[1:] > reached[:-1])
  value = np.interp(budget, reached[forward], curve.value[forward])
  return np.where(budget >= reached[-1], curve.value[-1], value)


def cost_curve_area(curve: CostCurve) -> float:
  """Area under a cost curve whose two axes are scaled to run from 0 to 1.

  A policy that spends its money at random has 0.5. The end of the curve is the
  model's own: where money is free it may leave treatments out, so compare the
  areas of models that end alike, or `value_at_budget`.
  """
  return scaled_area(curve.spend - curve.spend[0], curve.value - curve.value[0])


def scaled_area(
  x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]
) -> float:
  """Area under a curve from (0, 0), over its last point; NaN if that is 0."""
  if x[-1] == 0 or y[-1] == 0:
    return float("nan")
  return float(np.trapezoid(y / y[-1], x / x[-1]))


def check_propensity(propensity: Float[np.ndarray, " people"]) -> None:
  """Raises unless every chance is in (0, 1] and somebody is there."""
  if not len(propensity):
    raise ValueError("nobody is there: the arrays are empty")
  if not ((propensity > 0) & (propensity <= 1)).all():
    raise ValueError(
      "propensity must be in (0, 1]; leave padded rows out, got "
      f"{propensity[~((propensity > 0) & (propensity <= 1))][0]}"
    )


def _steps(gain, extra):
  """Each person's way from treatment 0 up, as the price of money falls.

  Returns:
    The treatment that each takes at any price (what costs nothing), and for
    all steps from there: treatment before, after, person, and gain per cost.
    These are the corners of the upper hull of gain over cost.
  """
  people = np.arange(len(gain))
  now = np.where(extra == 0, gain, -np.inf).argmax(axis=1)
  start, steps = now.copy(), []
  while True:
    more = gain - gain[people, now][:, None]
    cost = extra - extra[people, now][:, None]
    useful = (more > 0) & (cost > 0)
    ratio = np.where(useful, more / np.where(useful, cost, 1), -np.inf)
    best = ratio.max(axis=1)
    moving = np.flatnonzero(best > 0)
    if not moving.size:
      break
    # Of equal ratios the dearest: the steps between lie on the same line.
    on_line = ratio[moving] == best[moving][:, None]
    after = np.where(on_line, cost[moving], -np.inf).argmax(axis=1)
    steps.append((now[moving], after, moving, best[moving]))
    now[moving] = after
  if not steps:
    nothing = np.zeros(0, np.int64)
    return start, (nothing, nothing, nothing, np.zeros(0))
  return start, tuple(map(np.concatenate, zip(*steps, strict=True)))
