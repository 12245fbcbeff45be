"""What predictions for a randomised trial are worth: decisions, not errors.

At each of six budgets the predictions make a policy, `argmax_j response -
multiplier cost` with the multiplier at which the policy spends the budget, and
the trial says what it earns: EOM, the expected outcome, from the people whose
own treatment is the one that the policy names (`recjax.metrics.cost_curve`,
self-normalised). The spending is observed like the earning, so that a wrong
prediction of the cost costs something.

Budgets are shares of the way from the mean cost of the cheapest treatment to
that of the dearest, as observed; names carry them in percent (`eom@45`).
"""

import numpy as np
from jaxtyping import Float

from recjax.batch import TrialRows
from recjax.metrics import cost_curve, uplift

SHARES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
_NAMES = tuple(f"@{round(100 * share)}" for share in SHARES)
# What `resample` gives: all that a bootstrap over people can say.
RESAMPLED = ("eom", *(f"eom{name}" for name in _NAMES), "cost_curve_area")


def summarize(
  response: Float[np.ndarray, "people treatments"],
  cost: Float[np.ndarray, "people treatments"],
  trial: TrialRows,
  *,
  truth: dict[str, Float[np.ndarray, "people treatments"]] | None = None,
) -> dict[str, float]:
  """Metrics of one part of a trial.

  Args:
    response: Predicted response.
    cost: Predicted cost.
    trial: What was drawn and seen.
    truth: `response` and `cost` of every treatment, where the data is planted.

  Returns:
    `eom@P` at each budget and their mean `eom`, in units of the response;
    `cost_curve_area`, and `aucc` where there is one treatment beside none;
    `response_rmse` and `cost_rmse` of what was seen; and, with a truth,
    `regret@P` and `regret`: what the best plan of the budget earns beyond this
    policy, over what it earns beyond giving nothing.

  Example:
    >>> n = np.arange(4)
    >>> response = np.array([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [0.0, 0.0]])
    >>> cost = np.array([[0.0, 1.0]] * 4)
    >>> trial = TrialRows(n % 2, 1.0 * n, 1.0 * (n % 2), n * 0 + 0.5, n)
    >>> sorted(summarize(response, cost, trial))[:4]
    ['aucc', 'cost_curve_area', 'cost_rmse', 'eom']
  """
  response, cost = np.float64(response), np.float64(cost)
  weight = 1.0 / np.float64(trial.propensity)
  budgets = trial_budgets(trial, response.shape[1])
  seen = (trial.treatment, trial.response, trial.cost, trial.propensity)
  curve = cost_curve.cost_curve(response, cost, *seen)
  earned = cost_curve.value_at_budget(curve, budgets)
  values = {"eom": float(earned.mean())}
  values |= {f"eom{n}": float(v) for n, v in zip(_NAMES, earned, strict=True)}
  values["cost_curve_area"] = cost_curve.cost_curve_area(curve)
  if response.shape[1] == 2:
    added = np.diff(response, axis=1)[:, 0], np.diff(cost, axis=1)[:, 0]
    scores = added[0] / np.maximum(added[1], 1e-12)
    values["aucc"] = uplift.aucc(
      scores, *seen[:3], propensity=np.float64(trial.propensity)
    )
  for label, table, seen in (
    ("response", response, trial.response),
    ("cost", cost, trial.cost),
  ):
    own = np.take_along_axis(table, trial.treatment[:, None], axis=1)[:, 0]
    error = np.sum(weight * (own - seen) ** 2) / np.sum(weight)
    values[f"{label}_rmse"] = float(np.sqrt(error))
  if truth is not None:
    missed = regret(response, cost, truth["response"], truth["cost"])
    names = [f"regret{name}" for name in _NAMES]
    values |= dict(zip(names, map(float, missed), strict=True))
    values["regret"] = float(missed.mean())
  return values


def resample(
  response: Float[np.ndarray, "people treatments"],
  cost: Float[np.ndarray, "people treatments"],
  trial: TrialRows,
  *,
  num_samples: int,
  seed: int | list[int] = 0,
) -> dict[str, Float[np.ndarray, " num_samples"]]:
  """The metrics of `RESAMPLED` with the units of the trial drawn anew.

  Units are drawn with their people; budgets are those of the trial itself.
  One seed gives the same draws to all predictions.

  Args:
    response: Predicted response.
    cost: Predicted cost.
    trial: What was drawn and seen; `cluster` names the units.
    num_samples: Draws.
    seed: Of the draws.

  Returns:
    Name -> its value in each draw.
  """
  path = cost_curve.PricePath(np.float64(response), np.float64(cost))
  budgets = trial_budgets(trial, response.shape[1])
  weight = 1.0 / np.float64(trial.propensity)
  seen = trial.treatment, np.float64(trial.response), np.float64(trial.cost)
  units, unit = np.unique(trial.cluster, return_inverse=True)
  rng = np.random.default_rng(seed)
  rows = []
  for _ in range(num_samples):
    drawn = rng.integers(len(units), size=len(units))
    times = np.bincount(drawn, minlength=len(units))[unit]
    curve = path.curve(*seen, times * weight)
    # Before anybody counts there is no value.
    known = np.isfinite(curve.value)
    curve = cost_curve.CostCurve(*(points[known] for points in curve))
    earned = cost_curve.value_at_budget(curve, budgets)
    rows.append([earned.mean(), *earned, cost_curve.cost_curve_area(curve)])
  return dict(zip(RESAMPLED, np.array(rows).T, strict=True))


def metric_names(has_truth: bool = False) -> list[str]:
  """Names that `summarize` gives."""
  kinds = ["eom", "regret"] if has_truth else ["eom"]
  names = [f"{kind}{suffix}" for kind in kinds for suffix in ("", *_NAMES)]
  return [*names, "cost_curve_area", "aucc", "response_rmse", "cost_rmse"]


def trial_budgets(
  trial: TrialRows, num_treatments: int
) -> Float[np.ndarray, " budgets"]:
  """Per-head budgets of `SHARES` between the treatments' observed costs."""
  weight = 1.0 / np.float64(trial.propensity)
  total = np.bincount(trial.treatment, weight, num_treatments)
  spent = np.bincount(trial.treatment, weight * trial.cost, num_treatments)
  means = spent[total > 0] / total[total > 0]
  return means.min() + np.asarray(SHARES) * (means.max() - means.min())


def regret(
  response: Float[np.ndarray, "people treatments"],
  cost: Float[np.ndarray, "people treatments"],
  true_response: Float[np.ndarray, "people treatments"],
  true_cost: Float[np.ndarray, "people treatments"],
) -> Float[np.ndarray, " budgets"]:
  """Share of the attainable gain that policies of these predictions miss.

  One entry a budget of `SHARES`. Both policies spend it by the true costs, to
  the last price before they would spend more.
  """
  means = true_cost.mean(axis=0)
  budgets = means.min() + np.asarray(SHARES) * (means.max() - means.min())

  def value(response, cost):
    path = cost_curve.PricePath(response, cost)
    curve = path.known_curve(true_response, true_cost)
    reached = np.maximum.accumulate(curve.spend)
    # One part in a billion: sums of the same costs differ in their last bits.
    end = np.searchsorted(reached, budgets * (1 + 1e-9), side="right")
    return curve.value[np.maximum(end - 1, 0)]

  best = value(true_response, true_cost)
  none = true_response[:, 0].mean()
  return (best - value(response, cost)) / (best - none)
