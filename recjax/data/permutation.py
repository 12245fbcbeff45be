"""Pseudo-random permutations that are never written out."""

import numpy as np
from jaxtyping import Int

_ROUNDS = 6


def permute(
  positions: Int[np.ndarray, " positions"],
  num_rows: int,
  *,
  seed: int,
  epoch: int,
) -> Int[np.ndarray, " positions"]:
  """Row numbers at some positions of a pseudo-random permutation.

  Needs no memory beyond its arguments: the permutation is never written out.
  Grain's own shuffle answers for one element a call; this one for a batch.

  Args:
    positions: In [0, num_rows).
    num_rows: Number of rows that are permuted.
    seed: At least 0; another seed is another permutation.
    epoch: At least 0; likewise.

  Returns:
    Int64 row numbers in [0, num_rows), different for different positions.

  Example:
    >>> sorted(permute(np.arange(5), 5, seed=1, epoch=0).tolist())
    [0, 1, 2, 3, 4]

  Source:
    Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002:
    generalised Feistel network on Z_a x Z_b with a * b >= num_rows, and
    cycle walking for the few values above. Round function and number of
    rounds (6) are our choice: this shuffles and keeps no secrets.
  """
  keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS)
  width = int(np.ceil(np.sqrt(num_rows)))
  height = -(-num_rows // width)
  rows = _feistel(positions, width, height, keys)
  while len(outside := np.flatnonzero(rows >= num_rows)):
    rows[outside] = _feistel(rows[outside], width, height, keys)
  return rows


def _feistel(numbers, width: int, height: int, keys):
  """A bijection on [0, width * height)."""
  left = numbers // width
  right = (numbers - left * width).astype(np.uint32)
  left = left.astype(np.uint32)
  for i, key in enumerate(keys):
    if i % 2:
      right = _shift(right, left, width, key)
    else:
      left = _shift(left, right, height, key)
  return left.astype(np.int64) * width + right


def _shift(moved, by, size: int, key):
  """`moved` plus a keyed hash of `by`, modulo `size`."""
  mixed = by ^ key
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
    mixed ^= mixed >> np.uint32(shift)
    mixed *= np.uint32(factor)
  mixed ^= mixed >> np.uint32(16)
  # Neither step divides: the high half of a product takes 32 random bits to
  # [0, size), and below zero the difference wraps to a large number.
  scaled = mixed.astype(np.uint64) * np.uint64(size) >> np.uint64(32)
  moved = moved + scaled.astype(np.uint32)
  return np.minimum(moved, moved - np.uint32(size))
