"""Area under the ROC curve, over all examples and inside groups.

The AUC is the Mann-Whitney statistic: the share of (positive, negative) pairs
in which the positive scores higher, a tie counting one half. Pairs are counted
in whole numbers after one sort, so the value does not depend on thresholds:

    2 * wins of a positive = (negatives scored lower)
                           + (negatives scored lower or equal)

Accuracy and limits. NumPy arrays: exact counts in int64, for any size; scores
of 32 bits or fewer are the fast case (float64 scores are ranked first). JAX
arrays: exact counts in 8-bit digits summed in uint32, at most 16,843,009
examples, and a value within 1e-6.

Sources: Mann and Whitney (1947) for the statistic; Zhou et al., Deep Interest
Network for Click-Through Rate Prediction, KDD 2018, section 6.2, for the
average over users. There the weight of a user is the number of impressions or
clicks; here it is the number of examples, and a user whose examples are all
of one class is left out because no pair exists.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Real

from recjax.metrics import arrays
from recjax.metrics.arrays import AnyArray

# Digits of 8 bits: 255 * MAX_DEVICE_EXAMPLES still fits in uint32.
MAX_DEVICE_EXAMPLES = (2**32 - 1) // 255
_NUM_DIGITS = 4


class GroupedAuc(NamedTuple):
  """What `grouped_auc_parts` returns.

  Attributes:
    value: Mean AUC of the two-class groups; NaN if there is none.
    num_groups: Groups with at least one counted example.
    num_one_class_groups: Those of them that are left out of the mean.
    num_one_class_examples: Counted examples in the groups left out.
  """

  value: Float[Array, ""] | float
  num_groups: Int[Array, ""] | int
  num_one_class_groups: Int[Array, ""] | int
  num_one_class_examples: Int[Array, ""] | int


def auc(
  scores: Float[AnyArray, " examples"],
  labels: Real[AnyArray, " examples"],
  *,
  mask: Bool[AnyArray, " examples"] | None = None,
) -> Float[Array, ""] | float:
  """Chance that a random positive scores above a random negative.

  Args:
    scores: Rank keys; any increasing transform gives the same value.
    labels: 0 or 1.
    mask: Examples that count. None means all.

  Returns:
    Value in [0, 1], 0.5 for constant scores; NaN if the counted examples are
    all of one class, or if one of their scores is NaN.

  Raises:
    ValueError: If a counted NumPy label is neither 0 nor 1, or if there are
      too many JAX examples for exact counts.

  Example:
    >>> import numpy as np
    >>> float(auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])))
    0.75
  """
  return grouped_auc_parts(scores, labels, None, mask=mask).value


def grouped_auc(
  scores: Float[AnyArray, " examples"],
  labels: Real[AnyArray, " examples"],
  group_id: Integer[AnyArray, " examples"],
  *,
  mask: Bool[AnyArray, " examples"] | None = None,
  weighting: Literal["examples", "uniform"] = "examples",
) -> Float[Array, ""] | float:
  """Mean AUC inside groups: only pairs within one group are compared.

  Printed as `gauc` where groups are users and weigh as many as their examples,
  and as `qauc` where groups are queries or requests of equal weight.

  Args:
    scores: Rank keys; any increasing transform gives the same value, even a
      different one for each group.
    labels: 0 or 1.
    group_id: Group of each example: any integers, in any order.
    mask: Examples that count. None means all.
    weighting: `examples` weighs a group by its counted examples, `uniform`
      weighs all groups alike.

  Returns:
    Value in [0, 1]; NaN if no group has both classes, or if a counted score
    is NaN. Groups of one class are left out: `grouped_auc_parts` counts them.

  Raises:
    ValueError: As `auc`, and if `weighting` is unknown.

  Example:
    >>> import numpy as np
    >>> scores = np.array([0.1, 0.2, 0.9, 0.8, 0.5])
    >>> labels = np.array([0, 1, 0, 1, 1])
    >>> user = np.array([7, 7, 3, 3, 5])
    >>> float(grouped_auc(scores, labels, user))  # Users 7 and 3; 5 left out.
    0.5
  """
  return grouped_auc_parts(
    scores, labels, group_id, mask=mask, weighting=weighting
  ).value


def grouped_auc_parts(
  scores: Float[AnyArray, " examples"],
  labels: Real[AnyArray, " examples"],
  group_id: Integer[AnyArray, " examples"] | None,
  *,
  mask: Bool[AnyArray, " examples"] | None = None,
  weighting: Literal["examples", "uniform"] = "examples",
) -> GroupedAuc:
  """`grouped_auc` with the counts of what was left out.

  Args:
    scores: As in `grouped_auc`.
    labels: 0 or 1.
    group_id: As in `grouped_auc`; None puts all examples into one group.
    mask: Examples that count. None means all.
    weighting: As in `grouped_auc`.

  Returns:
    The mean and the counts; numbers of groups are those with an example that
    counts.

  Raises:
    ValueError: As `grouped_auc`.
  """
  if weighting not in ("examples", "uniform"):
    raise ValueError(
      f"unknown weighting {weighting!r}; use 'examples' or 'uniform'"
    )
  xp = arrays.namespace(scores, labels, group_id, mask)
  count = _count_on_host if xp is np else _count_on_device
  wins, positives, negatives, has_nan = count(scores, labels, group_id, mask)
  examples = positives + negatives
  two_classes = (positives > 0) & (negatives > 0)
  weights = two_classes * (examples if weighting == "examples" else 1)
  weights = arrays.as_float(weights, xp)
  value = arrays.ratio(
    arrays.total(weights * xp.where(two_classes, wins, 0), xp),
    arrays.total(weights, xp),
    xp,
  )
  one_class = (examples > 0) & ~two_classes
  return GroupedAuc(
    value=xp.where(has_nan, xp.nan, value)[()],
    num_groups=_plain((examples > 0).sum(), xp),
    num_one_class_groups=_plain(one_class.sum(), xp),
    num_one_class_examples=_plain((one_class * examples).sum(), xp),
  )


def _plain(count, xp):
  return int(count) if xp is np else count


def _count_on_host(scores, labels, group_id, mask):
  """Share of pairs won, positives and negatives of each group, in NumPy."""
  if mask is not None:
    scores, labels = scores[mask], labels[mask]
    group_id = None if group_id is None else group_id[mask]
  positive = labels == 1
  if not np.all(positive | (labels == 0)):
    wrong = labels[~(positive | (labels == 0))][0]
    raise ValueError(
      f"labels must be 0 or 1, got {wrong}; mask the examples whose label is "
      "missing"
    )
  if not scores.size:
    nothing = np.zeros(0, np.int64)
    return nothing.astype(np.float64), nothing, nothing, False
  # One sort of one number an example: group, then score, then label. It is
  # several times faster than sorting the three columns.
  key = _score_key(scores).astype(np.uint64) << 1
  key |= positive
  if group_id is not None:
    key |= _dense_group(group_id) << 33
  key.sort()
  group_starts = arrays.starts_run(key >> 33, np)
  positive = (key & 1).astype(bool)
  twice_wins = positive * _lower_and_equal(
    ~positive, arrays.starts_run(key >> 1, np), group_starts, np
  )
  first = np.flatnonzero(group_starts)
  positives = np.add.reduceat(positive, first, dtype=np.int64)
  negatives = np.add.reduceat(~positive, first, dtype=np.int64)
  pairs = np.maximum(positives * negatives, 1)
  wins = np.add.reduceat(twice_wins, first) / (2.0 * pairs)
  return wins, positives, negatives, np.isnan(scores).any()


def _score_key(scores: np.ndarray) -> np.ndarray:
  """uint32 in the order of the scores, equal where they are equal."""
  if scores.dtype.itemsize > 4:
    return np.unique(scores, return_inverse=True)[1].astype(np.uint32)
  # Adding zero makes -0 and +0 the same bits.
  bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)
  # IEEE numbers order as sign and magnitude: flip all bits of a negative one,
  # the sign bit of the others.
  sign = np.uint32(1 << 31)
  return np.where(bits & sign, ~bits, bits | sign)


def _dense_group(group_id: np.ndarray) -> np.ndarray:
  """uint64 below 2**31, one number a group."""
  low, high = int(group_id.min()), int(group_id.max())
  if high - low < 2**31:
    # Modulo 2**64, hence right for signed and unsigned ids of any width.
    return group_id.astype(np.uint64) - np.uint64(low % 2**64)
  return np.unique(group_id, return_inverse=True)[1].astype(np.uint64)


def _lower_and_equal(negative, run_starts, group_starts, xp):
  """Negatives below plus negatives below or equal, for each sorted example.

  Args:
    negative: True for counted negatives, sorted by group, then score.
    run_starts: True at the first example of each (group, score).
    group_starts: True at the first example of each group.
    xp: NumPy or `jax.numpy`.
  """
  dtype = np.int64 if xp is np else np.int32
  upto = xp.cumsum(negative, dtype=dtype)
  before = upto - negative
  in_earlier_groups = arrays.running_max(xp.where(group_starts, before, 0), xp)
  below_run = arrays.running_max(xp.where(run_starts, before, 0), xp)
  run_ends = xp.concatenate([run_starts[1:], xp.ones_like(run_starts[:1])])
  upto_run = arrays.running_min_from_end(xp.where(run_ends, upto, upto[-1]), xp)
  return below_run + upto_run - 2 * in_earlier_groups


def _count_on_device(scores, labels, group_id, mask):
  """The same in JAX: fixed shapes, exact sums without 64-bit numbers."""
  size = scores.shape[0]
  if size > MAX_DEVICE_EXAMPLES:
    raise ValueError(
      f"{size} examples are more than the {MAX_DEVICE_EXAMPLES} that JAX "
      "arrays allow; pass NumPy arrays, or use BinnedMetrics"
    )
  if not size:
    nothing = jnp.zeros(1, jnp.int32)
    return nothing.astype(jnp.float32), nothing, nothing, False
  mask = arrays.as_mask(mask, scores, jnp)
  has_nan = jnp.any(jnp.isnan(scores) & mask)
  num_segments = size
  if group_id is None:
    group_id, num_segments = jnp.zeros(size, jnp.int32), 1
  elif isinstance(group_id, np.ndarray):
    # Ids of 64 bits would be cut to 32 on the way to the device.
    group_id = jnp.asarray(
      np.unique(group_id, return_inverse=True)[1], dtype=jnp.int32
    )
  labels = jnp.asarray(labels)
  group_id, scores, positive, negative = jax.lax.sort(
    (
      group_id,
      jnp.asarray(scores),
      (labels > 0) & mask,
      (labels <= 0) & mask,
    ),
    num_keys=2,
  )
  group_starts = arrays.starts_run(group_id, jnp)
  twice_wins = positive * _lower_and_equal(
    negative,
    group_starts | arrays.starts_run(scores, jnp),
    group_starts,
    jnp,
  )
  segment_ids = jnp.cumsum(group_starts, dtype=jnp.int32) - 1
  positives = arrays.segment_counts(positive, segment_ids, num_segments, jnp)
  negatives = arrays.segment_counts(negative, segment_ids, num_segments, jnp)
  wins = jnp.zeros(num_segments, jnp.float32)
  for digit in range(_NUM_DIGITS):
    digits = (twice_wins.astype(jnp.uint32) >> (8 * digit)) & 255
    sums = jax.ops.segment_sum(digits, segment_ids, num_segments)
    wins += sums.astype(jnp.float32) * 256.0**digit
  pairs = positives.astype(jnp.float32) * negatives.astype(jnp.float32)
  return wins / jnp.maximum(2 * pairs, 1), positives, negatives, has_nan
