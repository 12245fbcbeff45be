"""Rows of tables in Pallas kernels that the Triton lowering compiles.

For Ampere and Hopper. A program of the grid works on tiles whose sides are
powers of two; what stands out over an array is masked, and a masked lane reads
zero and writes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int

# float32 numbers a thread holds of a tile: two loads of 16 bytes.
_PER_THREAD = 8


class Grouped(NamedTuple):
  """Reads sorted by the row that they name.

  Attributes:
    rows: Distinct rows in ascending order, padded with `num_rows`.
    starts: One more than rows: reads of the row i stand in `order` from
      starts[i] to starts[i + 1]; a padded one has none.
    order: Positions of the reads, row after row.
  """

  rows: Int[Array, " rows"]
  starts: Int[Array, " rows_and_one"]
  order: Int[Array, " reads"]


def group_reads(ids: Int[Array, " reads"], num_rows: int) -> Grouped:
  """Sorts reads by row; those outside of [0, num_rows) are in no group.

  One sort and one scatter whose targets are distinct: on the GPU duplicates
  that are scattered to one place wait for one another.
  """
  num_reads = ids.shape[0]
  size = min(num_reads, num_rows)
  ids = jnp.where((ids < 0) | (ids >= num_rows), num_rows, ids)
  position = jax.lax.iota(jnp.int32, num_reads)
  ordered, order = jax.lax.sort((ids, position), num_keys=1)
  num_valid = jnp.sum(ordered < num_rows, dtype=jnp.int32)
  before = jnp.concatenate([jnp.full((1,), -1, jnp.int32), ordered[:-1]])
  is_first = (ordered != before) & (ordered < num_rows)
  rank = jnp.cumsum(is_first.astype(jnp.int32)) - 1
  place = jnp.where(is_first, rank, size + 1 + position)
  starts = jnp.broadcast_to(num_valid, (size + 1,))
  starts = starts.at[place].set(position, mode="drop", unique_indices=True)
  rows = ordered.at[starts[:-1]].get(mode="clip")
  return Grouped(
    jnp.where(starts[:-1] < num_valid, rows, num_rows), starts, order
  )


def tile_sizes(dim: int, num_warps: int, max_width: int) -> tuple[int, int]:
  """Rows and columns of a tile for so many warps."""
  width = min(max_width, pl.next_power_of_2(dim))
  return max(1, 32 * _PER_THREAD * num_warps // width), width


def load_rows(ref, rows, columns, *, mask):
  """float32 [rows, columns] of a table [rows, dim] of any type.

  Args:
    ref: float32, bfloat16 or uint16, the bits of bfloat16.
    rows: One number a row of the tile.
    columns: One number a column; those past the end are masked here.
    mask: Which rows are read; no other is touched.
  """
  at, mask = _grid(ref, rows, columns, mask)
  values = plt.load(ref.at[at], mask=mask, other=0)
  if values.dtype == jnp.uint16:
    values = jax.lax.bitcast_convert_type(values, jnp.bfloat16)
  return values.astype(jnp.float32)


def store_rows(ref, rows, columns, values, *, mask) -> None:
  """Writes what `load_rows` reads, rounded to the nearest even."""
  at, mask = _grid(ref, rows, columns, mask)
  if ref.dtype == jnp.uint16:
    values = jax.lax.bitcast_convert_type(
      values.astype(jnp.bfloat16), jnp.uint16
    )
  plt.store(ref.at[at], values.astype(ref.dtype), mask=mask)


def sum_reads(order, weights, grads, start, end, columns, *, num_rows: int, k):
  """Sum of `weights[r, j] * grads[r]` over a group of reads r * k + j.

  Args:
    order: From `Grouped`.
    weights: [reads], or None for the sum of `grads[r]`.
    grads: [outputs, dim] in float32.
    start: First place in `order`.
    end: The place behind the last one.
    columns: Of the gradient.
    num_rows: Gradients that are read at a time.
    k: Reads an output.

  Returns:
    [columns], added up in the same order at every call.
  """
  lanes = jax.lax.iota(jnp.int32, num_rows)

  def step(i, total):
    place = start + i * num_rows + lanes
    mask = place < end
    read = plt.load(order.at[place], mask=mask, other=0)
    values = load_rows(grads, read // k, columns, mask=mask)
    if weights is not None:
      weight = plt.load(weights.at[read], mask=mask, other=0.0)
      values = weight[:, None] * values
    return total + jnp.sum(values, axis=0)

  num_steps = (end - start + num_rows - 1) // num_rows
  zeros = jnp.zeros(columns.shape, jnp.float32)
  return jax.lax.fori_loop(0, num_steps, step, zeros)


def _grid(ref, rows, columns, mask):
  """Both as tiles: the interpreter takes no broadcast within an index."""
  shape = (rows.shape[0], columns.shape[0])
  mask = mask[:, None] & (columns < ref.shape[1])[None, :]
  at = (
    jnp.broadcast_to(rows[:, None], shape),
    jnp.broadcast_to(columns[None, :], shape),
  )
  return at, mask
