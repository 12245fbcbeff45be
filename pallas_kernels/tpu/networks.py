"""The best k of each row by a sorting network, on a TPU.

1,024 rows lie side by side in the 8 x 128 places of a vector register and the
entries of a row in one register after the other, so that to compare two entries
of all rows is to compare two registers: nothing ever moves between lanes, which
is what a TPU is slow at. k entries at a time are sorted (Batcher, Sorting
Networks and their Applications, 1968), and of them and the best so far the
better k are kept in order.

A search for the threshold bit by bit needs 32 passes over the integer image of
a row, about 3 operations an entry each, and then k passes more to bring the
survivors together, for a register cannot be scattered; the network takes about
60 operations an entry at k = 32, and its result is sorted.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

ROWS = 1024
LANES = 128
SUBLANES = 8
# A larger network is a program of many ten thousand operations.
MAX_K = 64
_INT32 = jnp.iinfo(jnp.int32)
# Behind every entry of a row, an entry of the least image too.
_NO_INDEX = _INT32.max


class Entry(NamedTuple):
  """One entry of 1,024 rows: integer images of the scores, and indices."""

  key: Int[Array, "8 128"]
  index: Int[Array, "8 128"]


def num_kept(k: int) -> int:
  """Entries that a network for the best `k` keeps: the next power of two."""
  if k > MAX_K:
    raise NotImplementedError(
      f"pallas_tpu keeps at most {MAX_K} entries of a row, got k = {k}"
    )
  return max(2, pl.next_power_of_2(k))


def scratch_shapes(kept: int) -> list:
  """Of `keep_best`: images and indices of the best so far."""
  shape = (kept, SUBLANES, LANES)
  return [pltpu.VMEM(shape, jnp.int32), pltpu.VMEM(shape, jnp.int32)]


def clear(best: list) -> None:
  """Nothing kept yet."""
  keys_ref, indices_ref = best
  keys_ref[...] = jnp.full(keys_ref.shape, _INT32.min, jnp.int32)
  indices_ref[...] = jnp.full(indices_ref.shape, _NO_INDEX, jnp.int32)


def keep_best(
  best: list,
  read: Callable[[Int[Array, ""]], Entry],
  num_blocks: int,
  *,
  is_stable: bool,
) -> None:
  """Merges entries into the best so far, which stay in descending order.

  Args:
    best: References of `scratch_shapes`, after `clear` or an earlier call.
    read: Place -> entry; called for `num_blocks` times as many as are kept.
    num_blocks: How many times as many.
    is_stable: True: of equal keys the lower index goes first.
  """
  keys_ref, indices_ref = best
  kept = keys_ref.shape[0]

  def better(a: Entry, b: Entry):
    is_better = b.key > a.key
    if is_stable:
      is_better |= (b.key == a.key) & (b.index < a.index)
    first = [jnp.where(is_better, y, x) for x, y in zip(a, b, strict=True)]
    second = [jnp.where(is_better, x, y) for x, y in zip(a, b, strict=True)]
    return Entry(*first), Entry(*second)

  @pl.loop(0, num_blocks)
  def _(block):
    entries = [read(block * kept + i) for i in range(kept)]
    for i, j in sorting_pairs(kept):
      entries[i], entries[j] = better(entries[i], entries[j])
    merged = []
    for i in range(kept):
      old = Entry(keys_ref[i], indices_ref[i])
      merged.append(better(old, entries[kept - 1 - i])[0])
    for i, j in merging_pairs(kept):
      merged[i], merged[j] = better(merged[i], merged[j])
    for i, entry in enumerate(merged):
      keys_ref[i] = entry.key
      indices_ref[i] = entry.index


def sorting_pairs(size: int) -> list[tuple[int, int]]:
  """Comparators of Batcher's odd-even merge sort, in their order.

  `(i, j)` puts the better of both at i. `size` is a power of two.
  """
  pairs = []

  def merge(low, count, step):
    double = 2 * step
    if double < count:
      merge(low, count, double)
      merge(low + step, count, double)
      first = range(low + step, low + count - step, double)
      pairs.extend((i, i + step) for i in first)
    else:
      pairs.append((low, low + step))

  def sort(low, count):
    if count > 1:
      half = count // 2
      sort(low, half)
      sort(low + half, half)
      merge(low, count, 1)

  sort(0, size)
  return pairs


def merging_pairs(size: int) -> list[tuple[int, int]]:
  """Comparators that sort a list which rises once and falls once."""
  pairs = []
  distance = size // 2
  while distance:
    pairs += [(i, i + distance) for i in range(size) if not i & distance]
    distance //= 2
  return pairs


def to_key(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
  """Integers in the total order of float32: -NaN < -inf < ... < NaN."""
  return _flip(jax.lax.bitcast_convert_type(x, jnp.int32))


def to_float(keys: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
  """The floats that `to_key` was called with."""
  return jax.lax.bitcast_convert_type(_flip(keys), jnp.float32)


def _flip(bits):
  return bits ^ ((bits >> 31) & _INT32.max)
