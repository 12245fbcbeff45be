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

import functools
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
# Entries that are sorted in registers, of which there are 64: two an entry, and
# those to compare. Longer lists are merged through VMEM.
_RUN = 8
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
  """Images and indices of so many entries, as `keep_best` takes them."""
  shape = (kept, SUBLANES, LANES)
  return [pltpu.VMEM(shape, jnp.int32), pltpu.VMEM(shape, jnp.int32)]


def clear(best: list) -> None:
  """Nothing kept yet."""
  keys_ref, indices_ref = best
  keys_ref[...] = jnp.full(keys_ref.shape, _INT32.min, jnp.int32)
  indices_ref[...] = jnp.full(indices_ref.shape, _NO_INDEX, jnp.int32)


def keep_best(
  best: list,
  fresh: list,
  read: Callable[[Int[Array, ""]], Entry],
  num_blocks: int,
  *,
  is_stable: bool,
) -> None:
  """Merges entries into the best so far, which stay in descending order.

  Args:
    best: References of `scratch_shapes`, after `clear` or an earlier call.
    fresh: References of the same shapes to work in.
    read: Place -> entry; called for `num_blocks` times as many as are kept.
    num_blocks: How many times as many.
    is_stable: True: of equal keys the lower index goes first.
  """
  kept = best[0].shape[0]
  run = min(kept, _RUN)
  # Two runs at a time fill the pipelines; all of them were no loop any more,
  # and a compiler would keep in registers what comes by VMEM here.
  unroll = 2 if kept > 2 * run else 1
  better = functools.partial(_better, is_stable=is_stable)

  def merge_runs(refs):
    @pl.loop(0, kept // run, unroll=unroll)
    def _(r):
      entries = [_get(refs, r * run + i) for i in range(run)]
      _store(refs, r * run, _compare(entries, merging_pairs(run), better))

  @pl.loop(0, num_blocks)
  def _(block):
    @pl.loop(0, kept // run, unroll=unroll)
    def _(r):
      entries = [read(block * kept + r * run + i) for i in range(run)]
      _store(fresh, r * run, _compare(entries, sorting_pairs(run), better))

    size = run
    while size < kept:
      pairs = mirrored_pairs(size, kept) + distant_pairs(size, run, kept)
      for group in groups_of(pairs, kept):
        entries = [_get(fresh, i) for i in group.places]
        for i, entry in zip(
          group.places, _compare(entries, group.pairs, better), strict=True
        ):
          _put(fresh, i, entry)
      merge_runs(fresh)
      size *= 2
    # The better of the best so far and of these backwards rise and fall once.
    for group in groups_of(distant_pairs(kept, run, kept), kept):
      entries = [
        better(_get(best, i), _get(fresh, kept - 1 - i))[0]
        for i in group.places
      ]
      for i, entry in zip(
        group.places, _compare(entries, group.pairs, better), strict=True
      ):
        _put(best, i, entry)
    merge_runs(best)


def _better(a: Entry, b: Entry, *, is_stable: bool) -> tuple[Entry, Entry]:
  """Both, the better one first."""
  is_better = b.key > a.key
  if is_stable:
    is_better |= (b.key == a.key) & (b.index < a.index)
  first = [jnp.where(is_better, y, x) for x, y in zip(a, b, strict=True)]
  second = [jnp.where(is_better, x, y) for x, y in zip(a, b, strict=True)]
  return Entry(*first), Entry(*second)


def _compare(
  entries: list[Entry], pairs: list[tuple[int, int]], better
) -> list[Entry]:
  """Puts the better entry of each pair first."""
  entries = list(entries)
  for i, j in pairs:
    entries[i], entries[j] = better(entries[i], entries[j])
  return entries


def _get(refs: list, place) -> Entry:
  keys_ref, indices_ref = refs
  return Entry(keys_ref[place], indices_ref[place])


def _put(refs: list, place, entry: Entry) -> None:
  for ref, x in zip(refs, entry, strict=True):
    ref[place] = x


def _store(refs: list, start, entries: list[Entry]) -> None:
  for i, entry in enumerate(entries):
    _put(refs, start + i, entry)


class Group(NamedTuple):
  """Comparators among few places; `pairs` are numbers of `places`."""

  places: list[int]
  pairs: list[tuple[int, int]]


def groups_of(pairs: list[tuple[int, int]], total: int) -> list[Group]:
  """Cuts comparators of `total` places into groups that share no place."""
  group_of = list(range(total))
  for i, j in pairs:
    old, new = group_of[j], group_of[i]
    group_of = [new if g == old else g for g in group_of]
  groups = []
  for g in dict.fromkeys(group_of):
    places = [i for i in range(total) if group_of[i] == g]
    own = [
      (places.index(i), places.index(j)) for i, j in pairs if group_of[i] == g
    ]
    groups.append(Group(places, own))
  return groups


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


def mirrored_pairs(size: int, total: int) -> list[tuple[int, int]]:
  """Comparators of each sorted list of `size` with the next one backwards.

  Then the first has the better half of both, and each of them rises once and
  falls once.
  """
  return [
    (first + i, first + 2 * size - 1 - i)
    for first in range(0, total, 2 * size)
    for i in range(size)
  ]


def merging_pairs(size: int) -> list[tuple[int, int]]:
  """Comparators that sort a list which rises once and falls once."""
  return distant_pairs(size, 1, size)


def distant_pairs(size: int, least: int, total: int) -> list[tuple[int, int]]:
  """Comparators of a merge of each list of `size`, at least so far apart."""
  pairs = []
  distance = size // 2
  while distance >= least:
    pairs += [(i, i + distance) for i in range(total) if not i & distance]
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
