"""Metrics of a stream: sums that are updated by batch and merged by adding.

`BinnedMetrics` keeps histograms instead of scores, so its size does not depend
on the number of examples. It lives on the device: update it in a jitted
evaluation step, sum it over devices with `jax.lax.psum`, over hosts or files
with `merge`, and compute the metrics once at the end.

Log loss, normalized entropy, PCOC and calibration error are those of
`recjax.metrics.calibration` up to float32 rounding. The AUC treats scores that
share a bin as tied; `auc_error_bound` tells how much that can matter at most.
The shape (empty, update, merge, compute) is common to metric libraries.
"""

import typing

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Real

from recjax.metrics import arrays
from recjax.metrics.calibration import (
  ReliabilityCurve,
  bin_of,
  cross_entropy,
  ece_of_curve,
  entropy,
)

# Scores are logits; the few beyond this share the first or the last bin.
_MAX_LOGIT = 16.0


@typing.no_type_check  # Holds shardings and shape structs as well as arrays.
@struct.dataclass
class BinnedMetrics:
  """Sums over the examples seen so far; every field may simply be added.

  A float sum is kept in two parts, the sum and what its additions rounded
  away, so that thousands of updates lose nothing. Counts hold 2**31 examples.

  Attributes:
    positives: Positives by bin of the logit in [-16, 16].
    negatives: Negatives by bin of the logit.
    count: Examples by bin of the probability in [0, 1].
    label_sum: Positives by bin of the probability.
    prob_sum: Sum of probabilities by bin, and the lost part of it.
    loss_sum: Sum of cross entropies in nats, and the lost part of it.

  Example:
    >>> import jax.numpy as jnp
    >>> state = BinnedMetrics.empty()
    >>> state = state.update(jnp.array([-1.0, 0.5, 2.0]), jnp.array([0, 1, 1]))
    >>> float(state.compute()["auc"])
    1.0
  """

  positives: Int[Array, " num_score_bins"]
  negatives: Int[Array, " num_score_bins"]
  count: Int[Array, " num_bins"]
  label_sum: Int[Array, " num_bins"]
  prob_sum: Float[Array, "2 num_bins"]
  loss_sum: Float[Array, "2 1"]

  @classmethod
  def empty(cls, *, num_bins: int = 15, num_score_bins: int = 4096):
    """State before the first example.

    Args:
      num_bins: Bins of the reliability curve and the calibration error.
      num_score_bins: Bins of the AUC; the default is 128 a unit of logit.
    """
    return cls(
      positives=jnp.zeros(num_score_bins, jnp.int32),
      negatives=jnp.zeros(num_score_bins, jnp.int32),
      count=jnp.zeros(num_bins, jnp.int32),
      label_sum=jnp.zeros(num_bins, jnp.int32),
      prob_sum=jnp.zeros((2, num_bins), jnp.float32),
      loss_sum=jnp.zeros((2, 1), jnp.float32),
    )

  def update(
    self,
    logits: Float[Array, " batch"],
    labels: Real[Array, " batch"],
    *,
    mask: Bool[Array, " batch"] | None = None,
  ):
    """The state with a batch added; pure, and fit for `jax.jit`.

    Args:
      logits: Log odds of label 1. A counted NaN makes the metrics NaN.
      labels: 0 or 1.
      mask: Examples that count. None means all.
    """
    mask = arrays.as_mask(mask, logits, jnp)
    logits = jnp.where(mask, arrays.as_float(logits, jnp), 0)
    positive = (labels > 0) & mask
    losses = jnp.where(mask, cross_entropy(logits, positive, jnp), 0)
    probs = jnp.where(mask, jax.nn.sigmoid(logits), 0)
    num_bins, num_score_bins = self.count.shape[0], self.positives.shape[0]
    score_bins = bin_of(
      (logits + _MAX_LOGIT) / (2 * _MAX_LOGIT), num_score_bins, jnp
    )
    prob_bins = bin_of(probs, num_bins, jnp)
    prob_sum = arrays.segment_totals(probs, prob_bins, num_bins, jnp)
    loss_sum = arrays.total(losses, jnp)[None]
    count = arrays.segment_counts
    return self.merge(
      BinnedMetrics(
        positives=count(positive, score_bins, num_score_bins, jnp),
        negatives=count(mask & ~positive, score_bins, num_score_bins, jnp),
        count=count(mask, prob_bins, num_bins, jnp),
        label_sum=count(positive, prob_bins, num_bins, jnp),
        prob_sum=jnp.stack([prob_sum, jnp.zeros_like(prob_sum)]),
        loss_sum=jnp.stack([loss_sum, jnp.zeros_like(loss_sum)]),
      )
    )

  def merge(self, other):
    """State of the examples of both."""
    return BinnedMetrics(
      positives=self.positives + other.positives,
      negatives=self.negatives + other.negatives,
      count=self.count + other.count,
      label_sum=self.label_sum + other.label_sum,
      prob_sum=_add_in_two_parts(self.prob_sum, other.prob_sum),
      loss_sum=_add_in_two_parts(self.loss_sum, other.loss_sum),
    )

  def compute(self) -> dict[str, Float[Array, ""]]:
    """Metrics of all examples seen; NaN where they define none.

    Returns:
      `auc`, `auc_error_bound` (the exact AUC is at most so far away),
      `logloss`, `ne`, `pcoc` and `ece`.
    """
    examples = self.count.sum()
    loss = arrays.ratio(self.loss_sum.sum(), examples, jnp)
    label_sum = self.label_sum.sum()
    base_entropy = entropy(arrays.ratio(label_sum, examples, jnp), jnp)
    value, error_bound = self._auc()
    return {
      # A NaN score has no bin of its own, but it shows in the log loss.
      "auc": jnp.where(jnp.isnan(loss), jnp.nan, value),
      "auc_error_bound": error_bound,
      "logloss": loss,
      "ne": arrays.ratio(loss, base_entropy, jnp),
      "pcoc": arrays.ratio(self.prob_sum.sum(), label_sum, jnp),
      "ece": ece_of_curve(self.reliability_curve()),
    }

  def reliability_curve(self) -> ReliabilityCurve:
    """Count, predicted and observed positives of the probability bins."""
    return ReliabilityCurve(
      count=self.count,
      prob_sum=self.prob_sum.sum(axis=0),
      label_sum=self.label_sum,
    )

  def _auc(self):
    """AUC with ties inside bins, and half the share of tied pairs."""
    upto = jnp.cumsum(self.negatives)
    num_positives, num_negatives = self.positives.sum(), upto[-1]
    share = self.positives / jnp.maximum(num_positives, 1)
    # The sums of two counts may pass 2**31; those of two shares do not.
    scale = 2.0 * jnp.maximum(num_negatives, 1)
    below = (upto - self.negatives) / scale
    below_or_equal = upto / scale
    defined = (num_positives > 0) & (num_negatives > 0)
    value = arrays.total(share * (below + below_or_equal), jnp)
    error_bound = arrays.total(share * (below_or_equal - below), jnp)
    return (
      jnp.where(defined, value, jnp.nan),
      jnp.where(defined, error_bound, jnp.nan),
    )


def _add_in_two_parts(left, right):
  """Sum of two (sum, lost part) pairs; Knuth's two-sum finds what is lost."""
  a, b = left[0], right[0]
  upper = a + b
  from_b = upper - a
  lost = (a - (upper - from_b)) + (b - from_b)
  return jnp.stack([upper, left[1] + right[1] + lost])
