"""The Triton kernel of `top_k`, and the sortable keys it works on.

A key holds the ordered image of a score in its high bits and the complement of
the column in the low ones: keys are distinct, and their order is that of the
definition, ties and NaN included. Scores of 16 bits in rows of up to 65,536
columns fit keys of 32 bits; all others take 64.

Only Triton is imported here, so that its interpreter and its compiler take
these functions without JAX.
"""

import triton
import triton.language as tl


@triton.jit
def top_k_kernel(
  scores,
  num_rows,
  values,
  columns,
  num_columns: tl.constexpr,
  top_k: tl.constexpr,
  padded_k: tl.constexpr,
  block_rows: tl.constexpr,
  num_groups: tl.constexpr,
  vector: tl.constexpr,
  num_steps: tl.constexpr,
  key_type: tl.constexpr,
):
  """The k largest of each row: best groups first, then best of their members.

  A row is cut into groups, of `vector` neighbours in each of `num_steps`
  blocks. What is among the k largest is in one of the k groups of largest
  maximum: were it not, k maxima would be above it. So a row is read once, the
  maxima stay in registers, and of the k groups alone the members are read
  again, from the cache, and sorted.

  Args:
    scores: Bits of the floats, [num_rows, num_columns], int32 or int16.
    num_rows: Of any size.
    values: Of the type of `scores`, [num_rows, top_k].
    columns: int32, [num_rows, top_k].
    num_columns: Of any size.
    top_k: From 1 to `num_columns`.
    padded_k: A power of two from `top_k` to `num_groups`.
    block_rows: Rows a program.
    num_groups: Groups a row; a power of two, as the next two.
    vector: Neighbours in a group.
    num_steps: Blocks of `num_groups * vector` columns.
    key_type: int64, or int32 for scores of 16 bits.
  """
  rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
  has_row = rows < num_rows
  rows = rows.to(tl.int64)
  neighbour = tl.arange(0, vector)
  block: tl.constexpr = num_groups * vector

  best = no_keys((block_rows, num_groups), key_type)
  for step in range(num_steps):
    column = tl.arange(0, num_groups)[:, None] * vector + neighbour[None, :]
    column = column[None, :, :] + step * block
    is_real = has_row[:, None, None] & (column < num_columns)
    place = rows[:, None, None] * num_columns + column
    keys = _load_keys(scores, place, is_real, column, key_type)
    best = tl.maximum(best, tl.max(keys, axis=2))
  best = tl.topk(best, padded_k)

  if vector * num_steps > 1:
    # A key that stands for nothing names no group.
    has_group = has_row[:, None] & (best > no_keys((1, 1), key_type))
    first = key_index(best) % block // vector * vector
    column = tl.arange(0, num_steps)[:, None] * block + neighbour[None, :]
    column = first[:, :, None, None] + column[None, None, :, :]
    is_real = has_group[:, :, None, None] & (column < num_columns)
    place = rows[:, None, None, None] * num_columns + column
    keys = _load_keys(scores, place, is_real, column, key_type)
    members: tl.constexpr = padded_k * num_steps * vector
    best = tl.topk(tl.reshape(keys, (block_rows, members)), padded_k)

  rank = tl.arange(0, padded_k)[None, :]
  is_real = has_row[:, None] & (rank < top_k)
  place = rows[:, None] * top_k + rank
  image = (best >> (key_type.primitive_bitwidth // 2)).to(tl.int32)
  bits = flip_negative(image, values.dtype.element_ty)
  tl.store(values + place, bits, mask=is_real)
  tl.store(columns + place, key_index(best), mask=is_real)


@triton.jit
def make_keys(image, index, key_type: tl.constexpr):
  """Keys in the order of `image`, of equal ones those of lower `index` first.

  Args:
    image: int32 in the order of the scores.
    index: int32, from 0 to 2**31 - 1; to 2**16 - 1 for keys of 32 bits.
    key_type: int64 or int32.
  """
  low: tl.constexpr = key_type.primitive_bitwidth // 2
  # ~index, cut to the low half without a sign.
  complement = (~index.to(key_type)) & ((1 << low) - 1)
  return (image.to(key_type) << low) | complement


@triton.jit
def key_index(keys):
  """The index of `make_keys`, int32."""
  low: tl.constexpr = keys.dtype.primitive_bitwidth // 2
  return ((~keys) & ((1 << low) - 1)).to(tl.int32)


@triton.jit
def key_score(keys):
  """The float32 score of keys of 64 bits."""
  return flip_negative((keys >> 32).to(tl.int32), tl.int32).to(
    tl.float32, bitcast=True
  )


@triton.jit
def no_keys(shape: tl.constexpr, key_type: tl.constexpr):
  """Keys that no real one is below."""
  ones = tl.full(shape, 1, key_type)
  return ones << (key_type.primitive_bitwidth - 1)


@triton.jit
def flip_negative(bits, bits_type: tl.constexpr):
  """Bits of floats to integers of the same order, or back: its own inverse."""
  bits = bits.to(bits_type)
  width: tl.constexpr = bits_type.primitive_bitwidth
  ones: tl.constexpr = (1 << (width - 1)) - 1
  return bits ^ ((bits >> (width - 1)) & ones)


@triton.jit
def _load_keys(scores, place, is_real, column, key_type: tl.constexpr):
  """Keys of loaded bits; where nothing is real, the lowest."""
  bits = tl.load(scores + place, mask=is_real, other=0)
  image = flip_negative(bits, scores.dtype.element_ty).to(tl.int32)
  keys = make_keys(image, tl.broadcast_to(column, image.shape), key_type)
  return tl.where(is_real, keys, no_keys((1,) * len(keys.shape), key_type))
