"""Are predicted probabilities right? Log loss and what follows from it.

Arguments are those of all metrics (see `recjax.metrics`): `probs` in [0, 1] or
`logits` before the sigmoid, labels 0 or 1.

Sources: He et al., Practical Lessons from Predicting Clicks on Ads at
Facebook, ADKDD 2014, section 2, for normalized entropy; Guo et al., On
Calibration of Modern Neural Networks, ICML 2017, equation 3, for the expected
calibration error. Departures: a bin holds its lower edge and not its upper one
(the last holds both); bins of equal mass never part equal probabilities.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Real

from recjax.metrics import arrays
from recjax.metrics.arrays import AnyArray

BINNINGS = ("equal_width", "equal_mass")


def log_loss(
  probs: Float[AnyArray, " examples"],
  labels: Real[AnyArray, " examples"],
  *,
  mask: Bool[AnyArray, " examples"] | None = None,
) -> Float[Array, ""] | float:
  """Mean binary cross entropy of probabilities, in nats.

  Probabilities are kept off 0 and 1 by the rounding unit of their own dtype,
  as scikit-learn does; `log_loss_with_logits` needs no such limit.

  Args:
    probs: Predicted probability of label 1.
    labels: 0 or 1.
    mask: Examples that count. None means all.

  Returns:
    Value of at least 0; NaN without examples.

  Example:
    >>> import numpy as np
    >>> round(float(log_loss(np.array([0.9, 0.2]), np.array([1, 0]))), 4)
    0.1643
  """
  xp = arrays.namespace(probs, labels, mask)
  # JAX knows the rounding unit of bfloat16, NumPy does not.
  eps = float(jnp.finfo(probs.dtype).eps)
  probs = arrays.as_float(probs, xp)
  probs = xp.clip(probs, eps, 1 - eps)
  labels = arrays.as_float(labels, xp)
  losses = -labels * xp.log(probs) - (1 - labels) * xp.log1p(-probs)
  return arrays.mean(losses, mask, xp)


def log_loss_with_logits(
  logits: Float[AnyArray, " examples"],
  labels: Real[AnyArray, " examples"],
  *,
  mask: Bool[AnyArray, " examples"] | None = None,
) -> Float[Array, ""] | float:
  """Mean binary cross entropy of logits, in nats; never overflows.

  Args:
    logits: Log odds of label 1.
    labels: 0 or 1.
    mask: Examples that count. None means all.

  Returns:
    Value of at least 0; NaN without examples.

  Example:
    >>> import numpy as np
    >>> float(log_loss_with_logits(np.array([-1000.0]), np.array([1])))
    1000.0
  """
  xp = arrays.namespace(logits, labels, mask)
  return arrays.mean(cross_entropy(logits, labels, xp), mask, xp)


def base_rate_entropy(
  labels: Real[AnyArray, " examples"],
  *,
  mask: Bool[AnyArray, " examples"] | None = None,
) -> Float[Array, ""] | float:
  """Log loss of always predicting the share of positives, in nats.

  Args:
    labels: 0 or 1.
    mask: Examples that count. None means all.

  Returns:
    Value in [0, log 2]; NaN without examples.

  Example:
    >>> import numpy as np
    >>> round(float(base_rate_entropy(np.array([0, 1]))), 4)
    0.6931
  """
  xp = arrays.namespace(labels, mask)
  return entropy(arrays.mean(arrays.as_float(labels, xp), mask, xp), xp)


def normalized_entropy(
  probs: Float[AnyArray, " examples"],
  labels: Real[AnyArray, " examples"],
  *,
  mask: Bool[AnyArray, " examples"] | None = None,
) -> Float[Array, ""] | float:
  """Log loss over the entropy of the base rate.

  Args:
    probs: Predicted probability of label 1.
    labels: 0 or 1.
    mask: Examples that count. None means all.

  Returns:
    Value of at least 0: below 1 the predictions beat the base rate; NaN if
    the counted labels are all of one class.

  Example:
    >>> import numpy as np
    >>> float(normalized_entropy(np.array([0.5, 0.5]), np.array([0, 1])))
    1.0
  """
  xp = arrays.namespace(probs, labels, mask)
  return arrays.ratio(
    log_loss(probs, labels, mask=mask),
    base_rate_entropy(labels, mask=mask),
    xp,
  )


def pcoc(
  probs: Float[AnyArray, " examples"],
  labels: Real[AnyArray, " examples"],
  *,
  mask: Bool[AnyArray, " examples"] | None = None,
) -> Float[Array, ""] | float:
  """Predicted clicks over observed clicks: sum of probs / sum of labels.

  Args:
    probs: Predicted probability of label 1.
    labels: 0 or 1.
    mask: Examples that count. None means all.

  Returns:
    Value of at least 0: 1 is calibrated, above 1 promises too much; NaN
    without a positive.

  Example:
    >>> import numpy as np
    >>> float(pcoc(np.array([0.5, 0.25, 0.75]), np.array([0, 1, 0])))
    1.5
  """
  xp = arrays.namespace(probs, labels, mask)
  mask = arrays.as_mask(mask, probs, xp)
  return arrays.ratio(
    arrays.total(xp.where(mask, arrays.as_float(probs, xp), 0), xp),
    arrays.total(xp.where(mask, arrays.as_float(labels, xp), 0), xp),
    xp,
  )


def ece(
  probs: Float[AnyArray, " examples"],
  labels: Real[AnyArray, " examples"],
  *,
  mask: Bool[AnyArray, " examples"] | None = None,
  num_bins: int = 15,
  binning: Literal["equal_width", "equal_mass"] = "equal_width",
) -> Float[Array, ""] | float:
  """Expected calibration error: mean gap of prediction and outcome in bins.

  Args:
    probs: Predicted probability of label 1.
    labels: 0 or 1.
    mask: Examples that count. None means all.
    num_bins: Number of bins.
    binning: As in `reliability_curve`.

  Returns:
    Value in [0, 1]; NaN without examples or if a counted probability is NaN.

  Raises:
    ValueError: If `binning` is unknown or `num_bins` is below 1.

  Example:
    >>> import numpy as np
    >>> probs = np.array([0.25, 0.25, 0.75, 0.75])
    >>> float(ece(probs, np.array([0, 1, 1, 1]), num_bins=2))
    0.25
  """
  return ece_of_curve(
    reliability_curve(
      probs, labels, mask=mask, num_bins=num_bins, binning=binning
    )
  )


class ReliabilityCurve(NamedTuple):
  """Sums of each bin, from low probabilities to high ones.

  Plot `label_sum / count` over `prob_sum / count` where `count` is not 0.
  """

  count: Real[AnyArray, " num_bins"]
  prob_sum: Float[AnyArray, " num_bins"]
  label_sum: Real[AnyArray, " num_bins"]


def reliability_curve(
  probs: Float[AnyArray, " examples"],
  labels: Real[AnyArray, " examples"],
  *,
  mask: Bool[AnyArray, " examples"] | None = None,
  num_bins: int = 15,
  binning: Literal["equal_width", "equal_mass"] = "equal_width",
) -> ReliabilityCurve:
  """Count, predicted and observed positives of each bin of probabilities.

  Args:
    probs: Predicted probability of label 1.
    labels: 0 or 1.
    mask: Examples that count. None means all.
    num_bins: Number of bins.
    binning: `equal_width` cuts [0, 1] into equal parts, `equal_mass` cuts the
      sorted examples into equal parts (equal probabilities stay together).

  Returns:
    The sums of the bins. A counted NaN shows as NaN in a bin's `prob_sum`.

  Raises:
    ValueError: If `binning` is unknown or `num_bins` is below 1.

  Example:
    >>> import numpy as np
    >>> curve = reliability_curve(
    ...     np.array([0.1, 0.6, 0.8]), np.array([0, 0, 1]), num_bins=2
    ... )
    >>> curve.count.tolist(), curve.label_sum.tolist()
    ([1, 2], [0.0, 1.0])
  """
  if binning not in BINNINGS:
    raise ValueError(f"unknown binning {binning!r}; use one of {BINNINGS}")
  if num_bins < 1:
    raise ValueError(f"num_bins must be at least 1, got {num_bins}")
  xp = arrays.namespace(probs, labels, mask)
  mask = arrays.as_mask(mask, probs, xp)
  probs = xp.where(mask, arrays.as_float(probs, xp), 0)
  labels = xp.where(mask, arrays.as_float(labels, xp), 0)
  if binning == "equal_width":
    bins = bin_of(probs, num_bins, xp)
  else:
    bins = _mass_bin(probs, mask, num_bins, xp)
  return ReliabilityCurve(
    count=arrays.segment_counts(mask, bins, num_bins, xp),
    prob_sum=arrays.segment_totals(probs, bins, num_bins, xp),
    label_sum=arrays.segment_totals(labels, bins, num_bins, xp),
  )


def ece_of_curve(curve: ReliabilityCurve) -> Float[Array, ""] | float:
  """`ece` from the sums of the bins; they may be sums over many batches."""
  xp = arrays.namespace(*curve)
  gaps = xp.abs(curve.prob_sum - curve.label_sum)
  return arrays.ratio(arrays.total(gaps, xp), curve.count.sum(), xp)


def cross_entropy(logits, labels, xp):
  """Binary cross entropy of each example, from logits; exact at infinity."""
  logits = arrays.as_float(logits, xp)
  against = xp.where(xp.asarray(labels) > 0, -logits, logits)
  return xp.maximum(against, 0) + xp.log1p(xp.exp(-xp.abs(against)))


def entropy(rate, xp):
  """Entropy of a 0-or-1 outcome with this rate, in nats."""
  inside = (rate > 0) & (rate < 1)
  safe = xp.where(inside, rate, 0.5)
  value = -safe * xp.log(safe) - (1 - safe) * xp.log1p(-safe)
  # A rate of NaN stays NaN.
  return xp.where(inside, value, rate * 0)[()]


def bin_of(share, num_bins: int, xp):
  """Bin of each share of [0, 1]; NaN goes to the first, outliers to the ends.

  Args:
    share: Numbers, in [0, 1] unless at fault.
    num_bins: Number of equal bins.
    xp: NumPy or `jax.numpy`.
  """
  share = xp.where(xp.isnan(share), 0, xp.clip(share, 0, 1))
  return xp.minimum((share * num_bins).astype(np.int32), num_bins - 1)


def _mass_bin(probs, mask, num_bins: int, xp):
  """Bin by rank; equal probabilities take the bin of the first of them."""
  if not probs.shape[0]:
    return xp.zeros(0, np.int32)
  keys = xp.where(mask, probs, xp.inf)
  order = xp.argsort(keys)
  positions = xp.arange(probs.shape[0], dtype=np.int32)
  ranks = arrays.running_max(
    xp.where(arrays.starts_run(keys[order], xp), positions, 0), xp
  )
  # floor(bin * examples / num_bins), in parts that fit in 32 bits.
  examples = mask.sum()
  index = xp.arange(1, num_bins, dtype=np.int32)
  first_ranks = index * (examples // num_bins) + (
    index * (examples % num_bins) // num_bins
  )
  bins = xp.searchsorted(first_ranks, ranks, side="right").astype(np.int32)
  # Masked examples are past the end; they add nothing to the bin they take.
  if xp is np:
    unsorted = np.empty_like(bins)
    unsorted[order] = bins
    return unsorted
  return jnp.zeros_like(bins).at[order].set(bins)
