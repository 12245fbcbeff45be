"""Is a difference between two models more than chance?

Two questions, two answers. Would the difference show again with other seeds:
a paired t-test over the seeds. Would it show again with other users: a
bootstrap that draws users, not rows, since rows of one user are alike. Many
comparisons in one table find something by chance, which Holm's correction
takes back. All of it is plain NumPy in float64.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped


class Estimate(NamedTuple):
  """A difference with its 95 % interval and two-sided p-value."""

  difference: float
  low: float
  high: float
  p_value: float


def paired_t_test(
  a: Float[np.ndarray, " pairs"], b: Float[np.ndarray, " pairs"]
) -> Estimate:
  """Tests whether `a - b` has mean zero.

  Args:
    a: One value a pair, such as the AUC of one model under each seed.
    b: The values of the other model under the same seeds.

  Returns:
    Mean of `a - b`, Student's 95 % interval and two-sided p-value. With one
    pair interval and p-value are NaN; everything is, if a value is not
    finite. If all differences are equal there is
    no spread to test against: p is 1 where they are 0, else 0.

  Raises:
    ValueError: If there are no pairs.

  Example:
    >>> result = paired_t_test(np.array([3.0, 5.0]), np.array([1.0, 1.0]))
    >>> print(f"{result.difference} p={result.p_value:.4f}")
    3.0 p=0.2048

  Source:
    Student, The probable error of a mean, Biometrika 1908. p = 1 for
    differences that are all 0 is our choice; the statistic is 0 / 0 there.
  """
  if a.size == 0:
    raise ValueError("paired_t_test needs at least one pair, got none.")
  with np.errstate(invalid="ignore"):  # inf - inf is the NaN we want.
    differences = a.astype(np.float64) - b.astype(np.float64)
  if not np.isfinite(differences).all():
    return Estimate(math.nan, math.nan, math.nan, math.nan)
  mean = float(differences.mean())
  freedom = differences.size - 1
  if freedom == 0:
    return Estimate(mean, math.nan, math.nan, math.nan)
  error = float(differences.std(ddof=1)) / math.sqrt(differences.size)
  if error == 0:
    return Estimate(mean, mean, mean, float(mean == 0))
  half_width = error * _t_quantile(0.05, freedom)
  p_value = _t_tails(abs(mean) / error, freedom)
  return Estimate(mean, mean - half_width, mean + half_width, p_value)


def holm(p_values: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
  """Corrects p-values for the number of tests.

  Holding the result against 0.05 keeps the chance of even one false find
  under 5 %, whatever the dependence between the tests.

  Args:
    p_values: In [0, 1]; NaN stands for a test that was not made and does not
      count as one.

  Returns:
    Corrected values in [0, 1] in the same order; NaN stays NaN.

  Example:
    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]

  Source:
    Holm, A simple sequentially rejective multiple test procedure, 1979.
  """
  corrected = np.full(p_values.shape, np.nan)
  made = np.flatnonzero(~np.isnan(p_values))
  order = made[np.argsort(p_values[made], kind="stable")]
  scaled = p_values[order] * np.arange(order.size, 0, -1)
  corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
  return corrected


def clustered_bootstrap(
  scores_a: Float[np.ndarray, "*seeds examples"],
  scores_b: Float[np.ndarray, "*seeds examples"],
  labels: Shaped[np.ndarray, " examples"],
  cluster_id: Shaped[np.ndarray, " examples"],
  *,
  num_samples: int = 2000,
  seed: int = 0,
) -> Estimate:
  """Difference of AUC between two models, with users drawn anew.

  Args:
    scores_a: Rank keys of the first model; with leading axes (one entry a
      seed) the difference is the mean over them.
    scores_b: Rank keys of the second model for the same rows.
    labels: 0 or 1.
    cluster_id: User of each row, numbers or strings in any order.
    num_samples: Draws; the smallest p-value is `2 / (num_samples + 1)`.
    seed: Of the draws.

  Returns:
    AUC(a) - AUC(b) on all rows, the 2.5 % and 97.5 % percentiles over the
    draws, and twice the share of draws on the rarer side of zero (each side
    counted with one draw more, so that p is never 0).

  Raises:
    ValueError: As `bootstrap_auc`.

  Source:
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8
    (clusters) and 13 (percentiles).
  """
  scores = np.stack([scores_a, scores_b])
  value, samples = bootstrap_auc(
    scores, labels, cluster_id, num_samples=num_samples, seed=seed
  )
  return estimate_difference(value[0], value[1], samples[0], samples[1])


def bootstrap_auc(
  scores: Float[np.ndarray, "*models examples"],
  labels: Shaped[np.ndarray, " examples"],
  cluster_id: Shaped[np.ndarray, " examples"],
  *,
  num_samples: int = 2000,
  seed: int = 0,
) -> tuple[
  Float[np.ndarray, "*models"], Float[np.ndarray, "*models num_samples"]
]:
  """Exact AUC of each score vector, on all rows and on each draw of users.

  Draw `i` takes the same users in every call with the same `cluster_id`,
  `num_samples` and `seed`, so the samples of two calls are paired.

  Args:
    scores: Rank keys, one vector a model or seed.
    labels: 0 or 1.
    cluster_id: User of each row.
    num_samples: Draws of as many users as there are, with replacement.
    seed: Of the draws.

  Returns:
    AUC on all rows, and on each draw: NaN where a draw holds one class only.

  Raises:
    ValueError: If labels are other than 0 and 1 or all equal, or a score is
      NaN.
  """
  positive = labels == 1
  if not np.all(positive | (labels == 0)):
    raise ValueError("labels must be 0 or 1; leave unobserved rows out.")
  if positive.all() or not positive.any():
    raise ValueError("labels must hold both classes, got one.")
  if np.isnan(scores).any():
    raise ValueError("scores must not be NaN; see which examples gave it.")
  _, cluster = np.unique(cluster_id, return_inverse=True)
  num_clusters = int(cluster.max()) + 1
  flat = scores.reshape(-1, scores.shape[-1])
  aucs = [_weighted_auc(row, positive, cluster) for row in flat]
  once = np.ones(num_clusters)
  value = np.array([auc(once) for auc in aucs])
  samples = np.empty((len(aucs), num_samples))
  for i, weights in enumerate(_draws(num_clusters, num_samples, seed)):
    samples[:, i] = [auc(weights) for auc in aucs]
  shape = scores.shape[:-1]
  return value.reshape(shape), samples.reshape(*shape, num_samples)


def bootstrap_ratio(
  numerators: Float[np.ndarray, " clusters"],
  denominators: Float[np.ndarray, " clusters"],
  *,
  num_samples: int = 2000,
  seed: int = 0,
) -> tuple[float, Float[np.ndarray, " num_samples"]]:
  """A ratio of two sums over users, on all users and on each draw of them.

  A mean over rows is one, and so is a mean of the AUCs of users. Draw `i`
  takes the users that draw `i` of `bootstrap_auc` takes.

  Args:
    numerators: One entry a user, in ascending order of the users' ids.
    denominators: One entry a user.
    num_samples: Draws of as many users as there are, with replacement.
    seed: Of the draws.

  Returns:
    The ratio of all, and of each draw: NaN where its denominator is 0.

  Example:
    >>> loss, rows = np.array([3.0, 1.0]), np.array([2.0, 2.0])
    >>> value, samples = bootstrap_ratio(loss, rows, num_samples=9)
    >>> value, sorted(set(samples.tolist()))
    (1.0, [0.5, 1.0, 1.5])
  """
  sums = np.stack([numerators, denominators]).astype(np.float64)
  drawn = np.empty((2, num_samples))
  for i, weights in enumerate(_draws(sums.shape[1], num_samples, seed)):
    # Not `@`: see `_weighted_auc`.
    drawn[:, i] = np.einsum("rc,c->r", sums, weights)
  with np.errstate(divide="ignore", invalid="ignore"):
    samples = np.where(drawn[1] == 0, np.nan, drawn[0] / drawn[1])
    value = np.divide(*sums.sum(axis=1))
  return float(value), samples


def auc_of_clusters(
  scores: Float[np.ndarray, " examples"],
  labels: Shaped[np.ndarray, " examples"],
  cluster_id: Shaped[np.ndarray, " examples"],
) -> Float[np.ndarray, " clusters"]:
  """Exact AUC inside each user, in ascending order of the users' ids.

  Args:
    scores: Rank keys.
    labels: 0 or 1.
    cluster_id: User of each row.

  Returns:
    Values in [0, 1], a tie counting one half; NaN for users of one class.

  Example:
    >>> scores, user = np.array([0.1, 0.2, 0.9]), np.array([7, 7, 3])
    >>> auc_of_clusters(scores, np.array([0, 1, 1]), user).tolist()
    [nan, 1.0]
  """
  _, cluster = np.unique(cluster_id, return_inverse=True)
  _, rank = np.unique(scores, return_inverse=True)
  order = np.lexsort((rank, cluster))
  cluster, rank = cluster[order], rank[order]
  positive = (labels[order] == 1).astype(np.float64)
  starts = np.flatnonzero(_changes(cluster))
  runs = np.flatnonzero(_changes(cluster) | _changes(rank))
  # A tie counts one half: half of what is below, half of what is not above.
  upto = np.cumsum(1 - positive)
  in_run = np.add.reduceat(1 - positive, runs)
  middle = upto[np.append(runs[1:], cluster.size) - 1] - in_run / 2
  positives = np.add.reduceat(positive, starts)
  negatives = np.add.reduceat(1 - positive, starts)
  before = np.cumsum(negatives) - negatives
  wins = np.bincount(
    cluster[runs], np.add.reduceat(positive, runs) * middle, positives.size
  )
  pairs = positives * negatives
  wins -= positives * before
  return np.divide(
    wins, pairs, where=pairs > 0, out=np.full(pairs.size, np.nan)
  )


def estimate_difference(
  value_a: Float[np.ndarray, "*seeds"] | float,
  value_b: Float[np.ndarray, "*seeds"] | float,
  samples_a: Float[np.ndarray, "*seeds num_samples"],
  samples_b: Float[np.ndarray, "*seeds num_samples"],
) -> Estimate:
  """Difference, interval and p-value from paired bootstrap samples.

  Args:
    value_a: Value of the first model on all rows, one entry a seed.
    value_b: Value of the second model.
    samples_a: The same on each draw; draws with a NaN are left out.
    samples_b: The same of the second model, on the same draws.

  Returns:
    As `clustered_bootstrap`; interval and p-value are NaN without a draw.
  """
  difference = float(np.mean(value_a) - np.mean(value_b))
  samples = (samples_a - samples_b).reshape(-1, samples_a.shape[-1])
  samples = samples.mean(axis=0)
  samples = samples[~np.isnan(samples)]
  if samples.size == 0:
    return Estimate(difference, math.nan, math.nan, math.nan)
  low, high = np.percentile(samples, [2.5, 97.5])
  side = min(np.sum(samples <= 0), np.sum(samples >= 0))
  p_value = min(1.0, 2 * (1 + float(side)) / (1 + samples.size))
  return Estimate(difference, float(low), float(high), p_value)


def _draws(num_clusters, num_samples, seed) -> Iterator[np.ndarray]:
  """How often each draw takes each cluster."""
  rng = np.random.default_rng(seed)
  for _ in range(num_samples):
    drawn = rng.integers(num_clusters, size=num_clusters)
    yield np.bincount(drawn, minlength=num_clusters).astype(np.float64)


def _weighted_auc(scores, positive, cluster) -> Callable[[np.ndarray], float]:
  """Sorts once; the result maps cluster weights to an exact AUC."""
  _, rank = np.unique(scores, return_inverse=True)
  # Rows of equal score and cluster weigh alike and are counted together; what
  # remains of a cumulative sum over ranks is read at each positive entry.
  negatives = _count(rank[~positive], cluster[~positive])
  positives = _count(rank[positive], cluster[positive])
  starts = np.searchsorted(negatives.rank, positives.rank, side="left")
  ends = np.searchsorted(negatives.rank, positives.rank, side="right")
  # Written into again at each call: fresh arrays of this size cost more than
  # the sums. `mode` only because NumPy copies `out` without it.
  of_negatives = np.empty(negatives.rank.size)
  of_positives, lower, upper = np.empty((3, positives.rank.size))
  below = np.zeros(negatives.rank.size + 1)

  def auc(weights: np.ndarray) -> float:
    np.take(weights, negatives.cluster, out=of_negatives, mode="clip")
    np.multiply(of_negatives, negatives.count, out=of_negatives)
    np.cumsum(of_negatives, out=below[1:])
    np.take(weights, positives.cluster, out=of_positives, mode="clip")
    np.multiply(of_positives, positives.count, out=of_positives)
    np.take(below, starts, out=lower, mode="clip")
    np.take(below, ends, out=upper, mode="clip")
    pairs = of_positives.sum() * below[-1]
    if pairs == 0:
      return math.nan
    # A tie counts one half: half of what is below, half of what is not above.
    np.add(lower, upper, out=lower)
    # Not `@`: waking BLAS threads for a vector this short costs far more.
    return 0.5 * float(np.einsum("i,i->", of_positives, lower)) / pairs

  return auc


class _Entries(NamedTuple):
  rank: np.ndarray
  cluster: np.ndarray
  count: np.ndarray


def _count(rank, cluster) -> _Entries:
  """Distinct (rank, cluster) pairs in order, with their number of rows."""
  order = np.lexsort((cluster, rank))
  rank, cluster = rank[order], cluster[order]
  first = np.flatnonzero(_changes(rank) | _changes(cluster))
  count = np.diff(np.append(first, rank.size))
  return _Entries(rank[first], cluster[first], count.astype(np.float64))


def _changes(values) -> np.ndarray:
  """True where an entry differs from the one before, and at the first."""
  new = np.ones(values.size, bool)
  new[1:] = values[1:] != values[:-1]
  return new


def _t_tails(t: float, freedom: int) -> float:
  """Chance of a Student variable beyond `t >= 0` on either side."""
  return _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def _t_quantile(tails: float, freedom: int) -> float:
  """The `t` that leaves `tails` beyond it on both sides together."""
  low, high = 0.0, 1.0
  while _t_tails(high, freedom) > tails:
    low, high = high, 2 * high
  while high - low > 1e-12 * high:
    middle = (low + high) / 2
    if _t_tails(middle, freedom) > tails:
      low = middle
    else:
      high = middle
  return (low + high) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
  """Regularised incomplete beta function I_x(a, b) in float64.

  The power series of DLMF 8.17.8, whose terms are all positive; scipy would
  do, but is needed at run time for nothing else.
  """
  if x <= 0 or x >= 1:
    return float(x >= 1)
  if x > (a + 1) / (a + b + 2):  # Beyond the mean the other tail is short.
    return 1 - _incomplete_beta(1 - x, b, a)
  log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
  front = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a
  term = total = 1.0
  n = 0
  while term > 1e-17 * total:
    term *= x * (a + b + n) / (a + 1 + n)
    total += term
    n += 1
  return front * total
