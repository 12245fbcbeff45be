"""Triton kernels of the search, of the lookup, and of its gradient.

Only Triton is imported here, so that its interpreter and its compiler take
these functions without JAX. For the keys that are sorted see
`top_k.triton_kernels`.
"""

import triton
import triton.language as tl

from pallas_kernels.top_k.triton_kernels import (
  flip_negative,
  key_index,
  key_score,
  make_keys,
  no_keys,
)


@triton.jit
def topk_kernel(
  row_scores,
  col_scores,
  pairs,
  num_rows,
  sums,
  slots,
  num_keys: tl.constexpr,
  top_k: tl.constexpr,
  padded_k: tl.constexpr,
  num_best: tl.constexpr,
  num_pairs: tl.constexpr,
  padded_pairs: tl.constexpr,
  block_rows: tl.constexpr,
  block_keys: tl.constexpr,
):
  """The largest sums of two score vectors.

  Args:
    row_scores: float32, [num_rows, num_keys].
    col_scores: float32, [num_rows, num_keys].
    pairs: int32, [2, padded_pairs]: the ranks whose sums are looked at.
    num_rows: Of any size.
    sums: float32, [num_rows, top_k].
    slots: int32, [num_rows, top_k].
    num_keys: Of any size.
    top_k: Sums to find.
    padded_k: The power of two from it on.
    num_best: Best scores that are kept of an axis; a power of two.
    num_pairs: Those of `pairs` that are real.
    padded_pairs: A power of two, at least `padded_k`.
    block_rows: Rows a program.
    block_keys: Scores sorted at once; a power of two, at least `num_best`.
  """
  rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
  has_row = rows < num_rows
  rows = rows.to(tl.int64)
  row_best = no_keys((block_rows, num_best), tl.int64)
  col_best = no_keys((block_rows, num_best), tl.int64)
  for start in range(0, num_keys, block_keys):
    key = start + tl.arange(0, block_keys)
    is_real = has_row[:, None] & (key < num_keys)[None, :]
    place = rows[:, None] * num_keys + key[None, :]
    scores = tl.load(row_scores + place, mask=is_real, other=0.0)
    row_best = _keep_best(row_best, scores, key, num_keys)
    scores = tl.load(col_scores + place, mask=is_real, other=0.0)
    col_best = _keep_best(col_best, scores, key, num_keys)
  best = _best_pairs(
    row_best, col_best, pairs, num_keys, padded_k, num_pairs, padded_pairs
  )
  rank = tl.arange(0, padded_k)[None, :]
  is_real = has_row[:, None] & (rank < top_k)
  place = rows[:, None] * top_k + rank
  tl.store(sums + place, key_score(best), mask=is_real)
  tl.store(slots + place, key_index(best), mask=is_real)


@triton.jit
def lookup_kernel(
  queries,
  keys,
  gain,
  pairs,
  num_rows,
  weights,
  slots,
  num_heads: tl.constexpr,
  num_keys: tl.constexpr,
  key_dim: tl.constexpr,
  has_gain: tl.constexpr,
  top_k: tl.constexpr,
  padded_k: tl.constexpr,
  num_best: tl.constexpr,
  num_pairs: tl.constexpr,
  padded_pairs: tl.constexpr,
  block_rows: tl.constexpr,
  block_keys: tl.constexpr,
  block_dim: tl.constexpr,
  padded_dim: tl.constexpr,
):
  """From queries to slots and weights; no score gets to the memory.

  Args:
    queries: float32, [num_rows, 2, num_heads, key_dim].
    keys: float32, [2, num_heads, num_keys, key_dim].
    gain: float32, [2, key_dim]; not read without `has_gain`.
    pairs: As `topk_kernel` has them, and what is not named here too.
    num_rows: Of any size.
    weights: float32, [num_rows, num_heads, top_k].
    slots: int32, of this shape.
    num_heads: The second axis of the grid.
    num_keys: Of any size.
    key_dim: Of any size.
    has_gain: Whether there is a LayerNorm.
    top_k: See `topk_kernel`, as for all that follow.
    block_dim: Part of `key_dim` that one product takes.
    padded_dim: The power of two from `key_dim` on.
  """
  head = tl.program_id(1)
  rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
  row_best = _best_of_axis(
    queries, keys, gain, rows, num_rows, head, 0, num_heads, num_keys, key_dim,
    has_gain, num_best, block_rows, block_keys, block_dim, padded_dim,
  )  # fmt: skip
  col_best = _best_of_axis(
    queries, keys, gain, rows, num_rows, head, 1, num_heads, num_keys, key_dim,
    has_gain, num_best, block_rows, block_keys, block_dim, padded_dim,
  )  # fmt: skip
  best = _best_pairs(
    row_best, col_best, pairs, num_keys, padded_k, num_pairs, padded_pairs
  )
  rank = tl.arange(0, padded_k)[None, :]
  is_real = rank < top_k
  scores = tl.where(is_real, key_score(best), float("-inf"))
  powers = tl.exp(scores - tl.max(scores, axis=1, keep_dims=True))
  powers = powers / tl.sum(powers, axis=1, keep_dims=True)
  is_real = (rows < num_rows)[:, None] & is_real
  place = (rows.to(tl.int64)[:, None] * num_heads + head) * top_k + rank
  tl.store(weights + place, powers, mask=is_real)
  tl.store(slots + place, key_index(best), mask=is_real)


@triton.jit
def _best_of_axis(
  queries, keys, gain, rows, num_rows, head, axis: tl.constexpr,
  num_heads: tl.constexpr, num_keys: tl.constexpr, key_dim: tl.constexpr,
  has_gain: tl.constexpr, num_best: tl.constexpr, block_rows: tl.constexpr,
  block_keys: tl.constexpr, block_dim: tl.constexpr, padded_dim: tl.constexpr,
):  # fmt: skip
  """The best sub-keys of one axis, as sorted keys."""
  starts = (rows.to(tl.int64) * 2 + axis) * num_heads + head
  starts = queries + starts * key_dim
  has_row = rows < num_rows
  keys += (axis * num_heads + head) * num_keys * key_dim
  mean, scale = _mean_and_scale(starts, has_row, key_dim, padded_dim, has_gain)
  best = no_keys((block_rows, num_best), tl.int64)
  for first in range(0, num_keys, block_keys):
    key = first + tl.arange(0, block_keys)
    scores = tl.zeros((block_rows, block_keys), tl.float32)
    for start in range(0, key_dim, block_dim):
      dim = start + tl.arange(0, block_dim)
      query = _load_queries(
        starts, gain + axis * key_dim, has_row, mean, scale, dim, key_dim,
        has_gain,
      )  # fmt: skip
      # As [block_dim, block_keys].
      is_real = (dim < key_dim)[:, None] & (key < num_keys)[None, :]
      place = key[None, :] * key_dim + dim[:, None]
      sub_keys = tl.load(keys + place, mask=is_real, other=0.0)
      scores = tl.dot(query, sub_keys, scores, input_precision="ieee")
    best = _keep_best(best, scores, key, num_keys)
  return best


@triton.jit
def _mean_and_scale(
  starts,
  has_row,
  key_dim: tl.constexpr,
  padded_dim: tl.constexpr,
  has_gain: tl.constexpr,
):
  """What a LayerNorm takes off each row and multiplies it with."""
  if has_gain:
    dim = tl.arange(0, padded_dim)[None, :]
    is_real = has_row[:, None] & (dim < key_dim)
    x = tl.load(starts[:, None] + dim, mask=is_real, other=0.0)
    mean = tl.sum(x, axis=1) / key_dim
    centred = tl.where(is_real, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / key_dim
    scale = 1.0 / tl.sqrt(variance + 1e-6)
  else:
    mean = tl.zeros(has_row.shape, tl.float32)
    scale = mean + 1.0
  return mean, scale


@triton.jit
def _load_queries(
  starts,
  gain,
  has_row,
  mean,
  scale,
  dim,
  key_dim: tl.constexpr,
  has_gain: tl.constexpr,
):
  """Some dimensions of the queries, after their LayerNorm if there is one."""
  is_real = has_row[:, None] & (dim < key_dim)[None, :]
  x = tl.load(starts[:, None] + dim[None, :], mask=is_real, other=0.0)
  if has_gain:
    gains = tl.load(gain + dim, mask=dim < key_dim, other=0.0)
    x = (x - mean[:, None]) * scale[:, None] * gains[None, :]
  return x


@triton.jit
def _keep_best(best, scores, key, num_keys: tl.constexpr):
  """The best of what was found before and of new scores, both [rows, .]."""
  image = flip_negative(scores.to(tl.int32, bitcast=True), tl.int32)
  new = make_keys(image, tl.broadcast_to(key[None, :], image.shape), tl.int64)
  new = tl.where((key < num_keys)[None, :], new, no_keys((1, 1), tl.int64))
  new = tl.topk(new, best.shape[1])
  if num_keys > scores.shape[1]:
    both = tl.reshape(tl.join(best, new), (best.shape[0], 2 * best.shape[1]))
    new = tl.topk(both, best.shape[1])
  return new


@triton.jit
def _best_pairs(
  row_best,
  col_best,
  pairs,
  num_keys: tl.constexpr,
  padded_k: tl.constexpr,
  num_pairs: tl.constexpr,
  padded_pairs: tl.constexpr,
):
  """The best sums, as keys of slots: of equal sums the lower slot first."""
  pair = tl.arange(0, padded_pairs)
  shape: tl.constexpr = (row_best.shape[0], padded_pairs)
  i = tl.broadcast_to(tl.load(pairs + pair)[None, :], shape)
  j = tl.broadcast_to(tl.load(pairs + padded_pairs + pair)[None, :], shape)
  row = tl.gather(row_best, i, axis=1)
  col = tl.gather(col_best, j, axis=1)
  sums = key_score(row) + key_score(col)
  image = flip_negative(sums.to(tl.int32, bitcast=True), tl.int32)
  slots = key_index(row) * num_keys + key_index(col)
  candidates = make_keys(image, slots, tl.int64)
  is_real = (pair < num_pairs)[None, :]
  candidates = tl.where(is_real, candidates, no_keys((1, 1), tl.int64))
  return tl.topk(candidates, padded_k)


@triton.jit
def queries_grad_kernel(
  queries,
  keys,
  gain,
  slots,
  score_grads,
  num_rows,
  query_grads,
  gain_grads,
  num_heads: tl.constexpr,
  num_keys: tl.constexpr,
  key_dim: tl.constexpr,
  has_gain: tl.constexpr,
  top_k: tl.constexpr,
  block_rows: tl.constexpr,
  padded_dim: tl.constexpr,
):
  """Gradients of the queries, and parts of that of the gain.

  The gradient of a query is a sum of the `top_k` sub-keys that it chose: these
  are read, and not the product of all keys with scores that are mostly zero.

  Args:
    queries: See `lookup_kernel`, as for what is not named here.
    slots: int32, [num_rows, num_heads, top_k].
    score_grads: float32, of this shape: gradients of the chosen sums.
    query_grads: float32, [num_rows, 2, num_heads, key_dim].
    gain_grads: float32, [programs, num_heads, 2, key_dim]: a sum over the rows
      of each program; left as it is without `has_gain`.
  """
  head = tl.program_id(1)
  rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
  has_row = rows < num_rows
  rows = rows.to(tl.int64)
  dim = tl.arange(0, padded_dim)
  is_real = has_row[:, None] & (dim < key_dim)[None, :]
  chosen = (rows * num_heads + head) * top_k
  for axis in tl.static_range(2):
    starts = ((rows * 2 + axis) * num_heads + head) * key_dim
    sub_keys = keys + (axis * num_heads + head) * num_keys * key_dim
    grads = tl.zeros((block_rows, padded_dim), tl.float32)
    for j in range(top_k):
      key = _key_of_axis(slots + chosen + j, has_row, axis, num_keys)
      values = sub_keys + key[:, None] * key_dim + dim[None, :]
      score_grad = tl.load(score_grads + chosen + j, mask=has_row, other=0.0)
      values = tl.load(values, mask=is_real, other=0.0)
      grads += score_grad[:, None] * values
    if has_gain:
      mean, scale = _mean_and_scale(
        queries + starts, has_row, key_dim, padded_dim, has_gain
      )
      x = queries + starts[:, None] + dim[None, :]
      x = tl.load(x, mask=is_real, other=0.0)
      x = tl.where(is_real, (x - mean[:, None]) * scale[:, None], 0.0)
      part = (tl.program_id(0) * num_heads + head) * 2 + axis
      part = gain_grads + part * key_dim + dim
      tl.store(part, tl.sum(grads * x, 0), mask=dim < key_dim)
      gains = tl.load(
        gain + axis * key_dim + dim, mask=dim < key_dim, other=0.0
      )
      grads *= gains[None, :]
      along = tl.sum(grads * x, axis=1, keep_dims=True) / key_dim
      grads -= tl.sum(grads, axis=1, keep_dims=True) / key_dim
      grads = (grads - x * along) * scale[:, None]
    query_grad = query_grads + starts[:, None] + dim[None, :]
    tl.store(query_grad, grads, mask=is_real)


@triton.jit
def keys_grad_kernel(
  queries,
  gain,
  slots,
  score_grads,
  num_rows,
  key_grads,
  num_heads: tl.constexpr,
  num_keys: tl.constexpr,
  key_dim: tl.constexpr,
  has_gain: tl.constexpr,
  top_k: tl.constexpr,
  block_rows: tl.constexpr,
  block_keys: tl.constexpr,
  padded_dim: tl.constexpr,
):
  """Parts of the gradient of the sub-keys, one for each share of the rows.

  The scores' gradient, all rows by all keys, is made piece by piece from the
  slots where the product with the queries takes it. Each program adds to what
  is its own, so that there are no atomics and always the same sums.

  Args:
    queries: See `queries_grad_kernel`, as for what is not named here.
    key_grads: float32, [shares, 2, num_heads, num_keys, key_dim], where
      shares is the second axis of the grid; the first one is of blocks of
      keys, the third of axes and heads.
    block_rows: Rows whose scores' gradient is made at once.
    block_keys: Keys a program.
  """
  key = tl.program_id(0) * block_keys + tl.arange(0, block_keys)
  axis = tl.program_id(2) // num_heads
  head = tl.program_id(2) % num_heads
  dim = tl.arange(0, padded_dim)
  grads = tl.zeros((block_keys, padded_dim), tl.float32)
  step = tl.num_programs(1) * block_rows
  for first in range(tl.program_id(1) * block_rows, num_rows, step):
    rows = first + tl.arange(0, block_rows)
    has_row = rows < num_rows
    rows = rows.to(tl.int64)
    chosen = (rows * num_heads + head) * top_k
    scores = tl.zeros((block_keys, block_rows), tl.float32)
    for j in range(top_k):
      hit = _key_of_axis(slots + chosen + j, has_row, axis, num_keys)
      score_grad = tl.load(score_grads + chosen + j, mask=has_row, other=0.0)
      scores += tl.where(key[:, None] == hit[None, :], score_grad[None, :], 0.0)
    starts = queries + ((rows * 2 + axis) * num_heads + head) * key_dim
    mean, scale = _mean_and_scale(
      starts, has_row, key_dim, padded_dim, has_gain
    )
    x = _load_queries(
      starts,
      gain + axis * key_dim,
      has_row,
      mean,
      scale,
      dim,
      key_dim,
      has_gain,
    )
    grads = tl.dot(scores, x, grads, input_precision="ieee")
  place = tl.program_id(1) * 2 * num_heads + tl.program_id(2)
  place = (place * num_keys + key)[:, None] * key_dim + dim[None, :]
  is_real = (key < num_keys)[:, None] & (dim < key_dim)[None, :]
  tl.store(key_grads + place, grads, mask=is_real)


@triton.jit
def _key_of_axis(slots, has_row, axis, num_keys: tl.constexpr):
  """Number of the sub-key that a slot has on an axis."""
  slot = tl.load(slots, mask=has_row, other=0)
  return tl.where(axis == 0, slot // num_keys, slot % num_keys)
