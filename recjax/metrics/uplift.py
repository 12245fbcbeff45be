"""What a policy or a ranking by uplift is worth, judged by a randomised trial.

Nobody is seen under two treatments, so a policy is judged on the people whose
own treatment it happens to name, each weighted by one over the chance of that:

* `eom`, the expected outcome of a policy;
  what it earns as its budget grows is in `recjax.metrics.cost_curve`;
* for one treatment and a score that ranks people: `aucc`; `qini_auc_score` and
  `uplift_auc_score`, equal to scikit-uplift's functions of these names; and
  `qini_score` and `auuc_score`, equal to causalml's. The four differ in what
  they divide by, so a value belongs with its name.
* `bootstrap`, an interval for any of them.

All arrays are NumPy, all sums float64. Shared arguments: `treatment` is the
number of the treatment that a person got (0 is none; 0 or 1 where a score ranks
people); `response` and `cost` are what was seen; `propensity` is the chance, in
(0, 1], of the treatment that the person got.

Ties: people of equal score enter together, and a curve is straight across
them. That is what their average over all orders tends to, and no metric depends
on the order of the rows. causalml lets the order decide, so it differs where
scores tie; scikit-uplift does not.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer, Real, Shaped

from recjax.metrics.cost_curve import check_propensity, scaled_area


class Interval(NamedTuple):
  """What `bootstrap` returns.

  Attributes:
    estimate: On all rows.
    low: Lower percentile of the draws.
    high: Upper percentile.
  """

  estimate: Float[np.ndarray, "..."] | float
  low: Float[np.ndarray, "..."] | float
  high: Float[np.ndarray, "..."] | float


def eom(
  choice: Integer[np.ndarray, " people"],
  treatment: Integer[np.ndarray, " people"],
  outcome: Real[np.ndarray, " people"],
  propensity: Float[np.ndarray, " people"],
  *,
  normalize: bool = True,
) -> float:
  """Mean outcome a person, had the policy chosen for all of them.

  `1/N sum_i outcome_i [treatment_i = choice_i] / propensity_i`; self-normalised
  it is divided by the sum of the weights in place of N, which is no longer
  unbiased but varies far less where a treatment is rare.

  Args:
    choice: The treatment that the policy names for each person.
    treatment: The treatment that the person got.
    outcome: Response or cost, in any unit.
    propensity: Chance of the treatment that the person got.
    normalize: Whether to divide by the sum of the weights (Hajek) or by the
      number of people (Horvitz and Thompson).

  Returns:
    The mean, in the outcome's unit; NaN if nobody matches.

  Raises:
    ValueError: If a propensity is not in (0, 1], or nobody is there.

  Example:
    >>> eom(np.array([1, 1, 0]), np.array([1, 0, 0]), np.array([4.0, 1.0, 2.0]),
    ...     np.array([0.5, 0.5, 0.5]))
    3.0

  Source:
    Zhao et al., Uplift Modeling with Multiple Treatments and General Response
    Types, 2017 (arXiv 1705.08492), for the metric; Hajek (1971).
  """
  check_propensity(propensity)
  weight = (treatment == choice) / propensity.astype(np.float64)
  if not weight.any():
    return float("nan")
  total = weight.sum() if normalize else len(weight)
  return float((weight * outcome).sum() / total)


def aucc(
  scores: Float[np.ndarray, " people"],
  treatment: Integer[np.ndarray, " people"],
  response: Real[np.ndarray, " people"],
  cost: Real[np.ndarray, " people"],
  *,
  propensity: Float[np.ndarray, " people"] | None = None,
) -> float:
  """Area under the cost curve of one treatment.

  For each share of the people with the highest scores, the difference of the
  mean between treated and not, times their number, for cost (x) and response
  (y); both axes are divided by their value for all.

  Args:
    scores: Predicted return: people are treated from the highest down.
    treatment: 0 or 1.
    response: Outcome seen.
    cost: Cost seen.
    propensity: Weighs each person by its inverse within the arm; None weighs
      all alike.

  Returns:
    The area: 0.5 for scores that say nothing; NaN if treating all changes
    neither axis, or an arm is empty.

  Source:
    Du et al., Improve User Retention with Causal Learning, 2019, section 4.
  """
  prefix = _prefixes(scores, treatment, propensity)
  x = np.append(0.0, prefix.lift(cost) * prefix.count)
  y = np.append(0.0, prefix.lift(response) * prefix.count)
  return scaled_area(x, y)


def qini_auc_score(
  scores: Float[np.ndarray, " people"],
  treatment: Integer[np.ndarray, " people"],
  response: Real[np.ndarray, " people"],
  *,
  propensity: Float[np.ndarray, " people"] | None = None,
  negative_effect: bool = True,
) -> float:
  """Qini coefficient by scikit-uplift's definition.

  Area between the Qini curve, `treated responses - control responses times the
  ratio of the arms`, and its chord, over the same area of a perfect ranking.

  Args:
    scores: Predicted uplift.
    treatment: 0 or 1.
    response: 0 or 1.
    propensity: As in `aucc`.
    negative_effect: Whether the perfect ranking may also put those last whom
      the treatment harms.

  Returns:
    1 for the perfect ranking, about 0 for a random one; NaN if undefined.

  Raises:
    ValueError: If treatment or response is not 0 or 1.

  Source:
    Radcliffe, Using control groups to target on predicted lift, 2007; as in
    scikit-uplift 0.5.1, `sklift.metrics.qini_auc_score`.
  """
  _check_binary("response", response)
  actual = _qini_curve(_prefixes(scores, treatment, propensity), response)
  if negative_effect:
    best = response * treatment - response * (1 - treatment)
    perfect = _qini_curve(
      _prefixes(best.astype(float), treatment, propensity), response
    )
  else:
    top = actual[1][-1]
    perfect = (np.array([0, top, len(scores)]), np.array([0, top, top]))
  return _over_perfect(actual, perfect)


def uplift_auc_score(
  scores: Float[np.ndarray, " people"],
  treatment: Integer[np.ndarray, " people"],
  response: Real[np.ndarray, " people"],
  *,
  propensity: Float[np.ndarray, " people"] | None = None,
) -> float:
  """Normalised AUUC by scikit-uplift's definition.

  Area between the uplift curve, `difference of the means times the number of
  people`, and its chord, over the same area of a perfect ranking.

  Args:
    scores: Predicted uplift.
    treatment: 0 or 1.
    response: 0 or 1.
    propensity: As in `aucc`.

  Returns:
    1 for the perfect ranking, about 0 for a random one; NaN if undefined.

  Raises:
    ValueError: If treatment or response is not 0 or 1.

  Source:
    Devriendt et al., Learning to rank for uplift modeling, 2020 (arXiv
    2002.05897); as in scikit-uplift 0.5.1, `sklift.metrics.uplift_auc_score`.
  """
  _check_binary("response", response)
  actual = _gain_curve(_prefixes(scores, treatment, propensity), response)
  won = np.sum((response == 1) & (treatment == 0))
  lost = np.sum((response == 0) & (treatment == 1))
  best = 2 * (response == treatment) + (response if won > lost else treatment)
  perfect = _gain_curve(
    _prefixes(best.astype(float), treatment, propensity), response
  )
  return _over_perfect(actual, perfect)


def auuc_score(
  scores: Float[np.ndarray, " people"],
  treatment: Integer[np.ndarray, " people"],
  response: Real[np.ndarray, " people"],
  *,
  propensity: Float[np.ndarray, " people"] | None = None,
  normalize: bool = True,
) -> float:
  """AUUC by causalml's definition.

  Mean, over the numbers of people from 0 to all, of the cumulative gain
  `difference of the means times the number of people`.

  Args:
    scores: Predicted uplift.
    treatment: 0 or 1.
    response: Any number.
    propensity: As in `aucc`.
    normalize: Whether to divide the gain by its size for all people.

  Returns:
    About 0.5 (-0.5 where the treatment harms) for a random ranking if
    normalised, else in the unit of the response times people.

  Raises:
    ValueError: If treatment is not 0 or 1.

  Source:
    Gutierrez and Gerardy, Causal Inference and Uplift Modeling, 2016, section
    4.1; as in causalml 0.18.0, `causalml.metrics.auuc_score`.
  """
  prefix = _prefixes(scores, treatment, propensity)
  lift = prefix.lift(response)
  # The mean of an arm that is still empty is taken on the line to the first
  # that is known, as causalml does.
  known = (prefix.num_treated > 0) & (prefix.num_control > 0)
  if not known.any():
    return float("nan")
  first = int(known.argmax())
  early = prefix.count < prefix.count[first]
  lift = np.where(early, lift[first] * prefix.count / prefix.count[first], lift)
  return _mean_height(prefix.count, lift * prefix.count, normalize)


def qini_score(
  scores: Float[np.ndarray, " people"],
  treatment: Integer[np.ndarray, " people"],
  response: Real[np.ndarray, " people"],
  *,
  propensity: Float[np.ndarray, " people"] | None = None,
  normalize: bool = True,
) -> float:
  """Qini score by causalml's definition.

  Mean height of the Qini curve above its chord, over the numbers of people
  from 0 to all.

  Args:
    scores: Predicted uplift.
    treatment: 0 or 1.
    response: Any number.
    propensity: As in `aucc`.
    normalize: Whether to divide the curve by its size for all people.

  Returns:
    About 0 for a random ranking.

  Raises:
    ValueError: If treatment is not 0 or 1.

  Source:
    Radcliffe, Using control groups to target on predicted lift, 2007; as in
    causalml 0.18.0, `causalml.metrics.qini_score`.
  """
  prefix = _prefixes(scores, treatment, propensity)
  known = prefix.num_control > 0
  if not known.any():
    return float("nan")
  count, height = prefix.count[known], _qini_curve(prefix, response)[1][1:]
  height = height[known]
  chord = 0.5 * (np.sign(height[-1]) if normalize else height[-1])
  return _mean_height(count, height, normalize) - float(chord)


def bootstrap(
  metric: Callable[[Int[np.ndarray, " rows"]], object],
  num_rows: int,
  *,
  cluster: Shaped[np.ndarray, " rows"] | None = None,
  num_samples: int = 1000,
  confidence: float = 0.95,
  seed: int = 0,
) -> Interval:
  """Percentile interval of a metric over people, or clusters, drawn anew.

  Args:
    metric: From row numbers, with repetitions, to a number or an array; the
      same draws for two policies give an interval of their difference.
    num_rows: Number of rows.
    cluster: What was drawn together in the trial is drawn together here; None
      draws rows.
    num_samples: Draws.
    confidence: In (0, 1).
    seed: Of the draws.

  Returns:
    The metric on all rows and its percentiles, of the metric's shape; draws
    that give NaN are left out.

  Raises:
    ValueError: If an argument is out of range.

  Example:
    >>> outcome = np.arange(10.0)
    >>> found = bootstrap(lambda rows: outcome[rows].mean(), 10)
    >>> float(found.estimate)
    4.5

  Source:
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8
    (clusters) and 13 (percentiles).
  """
  if num_rows < 1 or num_samples < 1 or not 0 < confidence < 1:
    raise ValueError(
      f"num_rows ({num_rows}) and num_samples ({num_samples}) must be at least "
      f"1 and confidence ({confidence}) between 0 and 1"
    )
  rng = np.random.default_rng(seed)
  rows = np.arange(num_rows)
  if cluster is not None:
    _, unit = np.unique(cluster, return_inverse=True)
    rows = np.argsort(unit, kind="stable")
    sizes = np.bincount(unit)
    first = np.cumsum(sizes) - sizes
  samples = []
  for _ in range(num_samples):
    if cluster is None:
      samples.append(metric(rng.integers(0, num_rows, num_rows)))
      continue
    drawn = rng.integers(0, len(sizes), len(sizes))
    length = sizes[drawn]
    offset = np.repeat(first[drawn] - np.cumsum(length) + length, length)
    samples.append(metric(rows[offset + np.arange(length.sum())]))
  tails = [50 * (1 - confidence), 50 * (1 + confidence)]
  low, high = np.nanpercentile(np.asarray(samples), tails, axis=0)
  return Interval(metric(np.arange(num_rows)), low, high)


class _Prefixes:
  """People with the highest scores, as many as enter at each score."""

  def __init__(self, scores, treatment, weight):
    self._order = np.argsort(-scores, kind="stable")
    ranked = scores[self._order]
    self._ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    self._treated = treatment[self._order] == 1
    self._weight = weight[self._order]
    self.count = self._ends + 1
    self.num_treated = np.cumsum(self._treated)[self._ends]
    self.num_control = self.count - self.num_treated

  def mean(self, outcome, treated: bool):
    """Weighted mean of an arm; 0 where nobody of it is there yet."""
    weight = self._weight * (self._treated == treated)
    total = np.cumsum(weight * outcome[self._order])[self._ends]
    weights = np.cumsum(weight)[self._ends]
    return total / np.where(weights > 0, weights, 1)

  def lift(self, outcome):
    """Mean of the treated minus mean of the others."""
    return self.mean(outcome, True) - self.mean(outcome, False)


def _prefixes(scores, treatment, propensity) -> _Prefixes:
  if not len(scores):
    raise ValueError("scores are empty")
  if np.isnan(scores).any():
    raise ValueError("scores must not be NaN")
  _check_binary("treatment", treatment)
  if propensity is None:
    return _Prefixes(scores, treatment, np.ones(len(scores)))
  check_propensity(propensity)
  return _Prefixes(scores, treatment, 1 / propensity.astype(np.float64))


def _qini_curve(prefix: _Prefixes, response):
  # An arm's mean times the treated so far; without weights the first term is
  # the number of their responses.
  height = prefix.lift(response) * prefix.num_treated
  return np.append(0, prefix.count), np.append(0.0, height)


def _gain_curve(prefix: _Prefixes, response):
  height = prefix.lift(response) * prefix.count
  return np.append(0, prefix.count), np.append(0.0, height)


def _over_perfect(actual, perfect) -> float:
  chord = np.trapezoid(perfect[1][[0, -1]], perfect[0][[0, -1]])
  best = np.trapezoid(perfect[1], perfect[0]) - chord
  if best == 0:
    return float("nan")
  return float((np.trapezoid(actual[1], actual[0]) - chord) / best)


def _mean_height(count, height, normalize: bool) -> float:
  """Mean over 0, 1, ... people of a curve that is straight across ties."""
  if normalize:
    if height[-1] == 0:
      return float("nan")
    height = height / abs(height[-1])
  everyone = np.arange(count[-1] + 1)
  curve = np.interp(everyone, np.append(0, count), np.append(0.0, height))
  return float(curve.mean())


def _check_binary(name: str, values):
  if not np.isin(values, (0, 1)).all():
    wrong = values[~np.isin(values, (0, 1))][0]
    raise ValueError(f"{name} must be 0 or 1, got {wrong}")
