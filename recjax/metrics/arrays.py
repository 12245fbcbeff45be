"""What metrics need to run on NumPy and on JAX arrays alike.

NumPy arrays are the precise road (float64, host). On a device float32 is enough
where no sum runs through many rows one by one: see `segment_totals`.
"""

import math
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

AnyArray = Array | np.ndarray


def namespace(*arrays) -> ModuleType:
  """`jax.numpy` if any of the arrays lives in JAX, else `numpy`."""
  return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def as_float(x: AnyArray, xp: ModuleType):
  """float64 in NumPy, float32 in JAX."""
  return xp.asarray(x, dtype=np.float64 if xp is np else np.float32)


def as_mask(mask: AnyArray | None, like: AnyArray, xp: ModuleType):
  """The mask itself, or all True."""
  if mask is None:
    return xp.ones(like.shape, bool)
  return xp.asarray(mask)


def total(x: AnyArray, xp: ModuleType):
  """Sum of a float vector, in float64 on the host.

  XLA adds a whole vector as a tree, so float32 is near exact there too.
  """
  return np.sum(x, dtype=np.float64) if xp is np else jnp.sum(x)


def mean(values: AnyArray, mask: AnyArray | None, xp: ModuleType):
  """Mean of the values that count; NaN if there is none."""
  mask = as_mask(mask, values, xp)
  return ratio(total(xp.where(mask, values, 0), xp), mask.sum(), xp)


def ratio(numerator, denominator, xp: ModuleType):
  """Quotient of two scalars; NaN, without a warning, over zero."""
  safe = xp.where(denominator == 0, 1, denominator)
  value = xp.where(denominator == 0, xp.nan, numerator / safe)
  return value[()]  # A scalar rather than an array of no dimensions.


def segment_totals(
  values: AnyArray, segment_ids: AnyArray, num_segments: int, xp: ModuleType
):
  """Sums of float values by segment; few segments and many values are fine."""
  if xp is np:
    return np.bincount(segment_ids, weights=values, minlength=num_segments)
  # Several partial sums a segment, each of about sqrt(n) values.
  size = values.shape[0]
  lanes = max(1, min(math.isqrt(size), size // num_segments))
  lane = jnp.arange(size, dtype=jnp.int32) % lanes
  parts = jax.ops.segment_sum(
    values, lane * num_segments + segment_ids, lanes * num_segments
  )
  return parts.reshape(lanes, num_segments).sum(axis=0)


def segment_counts(
  flags: AnyArray, segment_ids: AnyArray, num_segments: int, xp: ModuleType
):
  """Number of True flags by segment."""
  if xp is np:
    return np.bincount(segment_ids[flags], minlength=num_segments)
  return jax.ops.segment_sum(flags.astype(jnp.int32), segment_ids, num_segments)


def running_max(x: AnyArray, xp: ModuleType):
  """Largest value up to each position."""
  return np.maximum.accumulate(x) if xp is np else jax.lax.cummax(x)


def running_min_from_end(x: AnyArray, xp: ModuleType):
  """Smallest value from each position on."""
  if xp is np:
    return np.minimum.accumulate(x[::-1])[::-1]
  return jax.lax.cummin(x, reverse=True)


def starts_run(x: AnyArray, xp: ModuleType):
  """True at the first position of every run of equal values."""
  return xp.concatenate([xp.ones_like(x[:1], dtype=bool), x[1:] != x[:-1]])
