"""`sparse_gather` and its gradients in Pallas for NVIDIA GPUs, by Triton.

Rows are summed in registers as they come in; nothing of [reads, dim] is ever
written. A program of the grid owns some outputs, or one row of the table, so
nothing is added atomically and the result is the same at every call.

Compiled for A100 and H100 without one: registers and spills are known, and
that no table is copied. Time is not, nor how well reads hit the caches, nor
what a row costs that takes most of the reads: one program sums them all.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.gpu import rows as gpu_rows
from pallas_kernels.native.call import result_type
from pallas_kernels.sparse_gather import reference

_NUM_WARPS = 4
# Reads of one output that are under way at a time.
_UNROLL = 4
_MAX_WIDTH = 256
# A row of the table is written by few warps, of which there are many.
_MAX_ROW_WIDTH = 512


def sparse_gather(
  table: Array,
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
) -> Float[Array, "*batch dim"]:
  """See `reference.sparse_gather`."""
  if not table.size or not indices.size:
    return reference.sparse_gather(table, indices, weights)
  (output,) = _sums(table, indices, weights, None, num_outputs=1)
  return output


def sparse_gather_gated(
  table: Array,
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
  gate: Float[Array, "*batch dim"],
  *,
  with_tanh: bool,
) -> list[Float[Array, "*batch dim"]]:
  """See `reference.sparse_gather_gated`."""
  if not table.size or not indices.size:
    return reference.sparse_gather_gated(
      table, indices, weights, gate, with_tanh=with_tanh
    )
  return _sums(table, indices, weights, gate, num_outputs=1 + with_tanh)


def weights_grad(
  table: Array,
  indices: Int[Array, "*batch k"],
  output_grad: Float[Array, "*batch dim"],
) -> list[Float[Array, "*batch _"]]:
  """See `reference.weights_grad`."""
  if not table.size or not indices.size:
    return reference.weights_grad(table, indices, output_grad)
  k, dim = indices.shape[-1], table.shape[1]
  num_outputs = indices.size // k
  num_rows, width = gpu_rows.tile_sizes(dim, _NUM_WARPS, 1024)
  inputs = (
    table,
    indices.reshape(num_outputs, k),
    output_grad.reshape(num_outputs, dim),
  )
  types = [
    result_type((num_outputs, n), jnp.float32, *inputs) for n in (k, dim)
  ]
  grads, output_grad_again = pl.pallas_call(
    functools.partial(_weights_grad_kernel, num_rows=num_rows, width=width),
    out_shape=types,
    grid=(pl.cdiv(num_outputs, num_rows),),
    # The gradient goes through the call untouched, so that what uses it comes
    # behind the last read of the table.
    input_output_aliases={2: 1},
    compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
    cost_estimate=_cost(table, indices, num_outputs * dim + indices.size),
    interpret=dispatch.interpret_mode(),
    name="sparse_gather_weights_grad",
  )(*inputs)
  return [
    grads.reshape(indices.shape),
    output_grad_again.reshape(output_grad.shape),
  ]


def row_grads(
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
  output_grad: Float[Array, "*batch dim"],
  *,
  num_rows: int,
) -> tuple[Int[Array, " rows"], Float[Array, "rows dim"]]:
  """See `api.sparse_gather_row_grads`."""
  k, dim = indices.shape[-1], output_grad.shape[-1]
  if not dim:
    return reference.row_grads(indices, weights, output_grad, num_rows=num_rows)
  groups = gpu_rows.group_reads(indices.reshape(-1), num_rows)
  size = groups.rows.shape[0]
  num_warps = max(1, min(_MAX_ROW_WIDTH, dim) // 256)
  num_reads, width = gpu_rows.tile_sizes(dim, 4 * num_warps, _MAX_ROW_WIDTH)
  inputs = (
    groups.starts,
    groups.order,
    weights.reshape(-1),
    output_grad.reshape(-1, dim),
  )
  grads = pl.pallas_call(
    functools.partial(_row_grads_kernel, num_reads=num_reads, width=width, k=k),
    out_shape=result_type((size, dim), jnp.float32, *inputs),
    grid=(size, pl.cdiv(dim, width)),
    compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
    cost_estimate=pl.CostEstimate(
      flops=2 * indices.size * dim,
      bytes_accessed=4 * (indices.size * (dim + 2) + size * (dim + 2)),
      transcendentals=0,
    ),
    interpret=dispatch.interpret_mode(),
    name="sparse_gather_row_grads",
  )(*inputs)
  return groups.rows, grads


def _sums(table, indices, weights, gate, *, num_outputs: int) -> list[Array]:
  """Sums, or with a gate what `reference.sparse_gather_gated` returns."""
  k, dim = indices.shape[-1], table.shape[1]
  batch = indices.shape[:-1]
  size = math.prod(batch)
  num_rows, width = gpu_rows.tile_sizes(dim, _NUM_WARPS, _MAX_WIDTH)
  inputs = [table, indices.reshape(size, k), weights.reshape(size, k)]
  if gate is not None:
    inputs.append(gate.reshape(size, dim))
  moved = size * dim * (num_outputs + (gate is not None)) + 2 * size * k
  outputs = pl.pallas_call(
    functools.partial(
      _sums_kernel, num_rows=num_rows, width=width, is_gated=gate is not None
    ),
    out_shape=[
      result_type((size, dim), jnp.float32, *inputs) for _ in range(num_outputs)
    ],
    grid=(pl.cdiv(size, num_rows), pl.cdiv(dim, width)),
    compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
    cost_estimate=_cost(
      table, indices, moved, 0 if gate is None else size * dim
    ),
    interpret=dispatch.interpret_mode(),
    name="sparse_gather" if gate is None else "sparse_gather_gated",
  )(*inputs)
  return [x.reshape(*batch, dim) for x in outputs]


def _sums_kernel(table, indices, weights, *refs, num_rows, width, is_gated):
  k = indices.shape[1]
  rows, mask = _own_rows(indices, num_rows)
  columns = pl.program_id(1) * width + jax.lax.iota(jnp.int32, width)

  def add(first, total):
    for j in range(min(_UNROLL, k)):
      ids, is_read = _load_ids(indices, rows, first + j, mask, table.shape[0])
      column = jnp.full((num_rows,), first + j, jnp.int32)
      weight = plt.load(
        weights.at[rows, column], mask=mask & (column < k), other=0.0
      )
      read = gpu_rows.load_rows(table, ids, columns, mask=is_read)
      total += weight[:, None] * read
    return total

  total = _over_reads(k, add, jnp.zeros((num_rows, width), jnp.float32))
  outputs = [total]
  if is_gated:
    gate, *refs = refs
    tanh = jnp.tanh(total)
    gate = gpu_rows.load_rows(gate, rows, columns, mask=mask)
    outputs = [gate * tanh, tanh]
  for ref, output in zip(refs, outputs, strict=False):
    gpu_rows.store_rows(ref, rows, columns, output, mask=mask)


def _weights_grad_kernel(
  table, indices, output_grad, grads, output_grad_again, *, num_rows, width
):
  del output_grad_again  # The same memory as `output_grad`.
  k, dim = indices.shape[1], table.shape[1]
  rows, mask = _own_rows(indices, num_rows)
  first_columns = jax.lax.iota(jnp.int32, width)
  # The gradient stays in registers, if one tile is all of it.
  first_grad = gpu_rows.load_rows(output_grad, rows, first_columns, mask=mask)

  def dot(first, carry):
    for j in range(min(_UNROLL, k)):
      ids, is_read = _load_ids(indices, rows, first + j, mask, table.shape[0])
      read = gpu_rows.load_rows(table, ids, first_columns, mask=is_read)
      products = first_grad * read
      for block in range(1, pl.cdiv(dim, width)):
        columns = block * width + first_columns
        grad = gpu_rows.load_rows(output_grad, rows, columns, mask=mask)
        read = gpu_rows.load_rows(table, ids, columns, mask=is_read)
        products += grad * read
      column = jnp.full((num_rows,), first + j, jnp.int32)
      plt.store(
        grads.at[rows, column],
        jnp.sum(products, axis=1),
        mask=mask & (column < k),
      )
    return carry

  _over_reads(k, dot, jnp.int32(0))


def _row_grads_kernel(
  starts, order, weights, output_grad, grads, *, num_reads, width, k
):
  row = pl.program_id(0)
  columns = pl.program_id(1) * width + jax.lax.iota(jnp.int32, width)
  total = gpu_rows.sum_reads(
    *(order, weights, output_grad, starts[row], starts[row + 1], columns),
    num_rows=num_reads,
    k=k,
  )
  gpu_rows.store_rows(
    grads,
    jnp.full((1,), row, jnp.int32),
    columns,
    total[None, :],
    mask=jnp.ones((1,), bool),
  )


def _own_rows(indices, num_rows: int):
  """Outputs of this program, and which of them there are."""
  rows = pl.program_id(0) * num_rows + jax.lax.iota(jnp.int32, num_rows)
  return rows, rows < indices.shape[0]


def _load_ids(indices, rows, column, mask, num_table_rows: int):
  """Rows to be read, and whether they are in the table."""
  column = jnp.full(rows.shape, column, jnp.int32)
  mask = mask & (column < indices.shape[1])
  ids = plt.load(indices.at[rows, column], mask=mask, other=-1)
  is_read = (ids >= 0) & (ids < num_table_rows)
  return jnp.where(is_read, ids, 0), is_read


def _over_reads(k: int, body, carry):
  """Calls `body(first, carry)` for each group of reads."""
  step = min(_UNROLL, k)
  return jax.lax.fori_loop(
    0, pl.cdiv(k, step), lambda i, carry: body(i * step, carry), carry
  )


def _cost(table, indices, num_other: int, num_tanh: int = 0) -> pl.CostEstimate:
  """For reads of rows, beside `num_other` numbers of four bytes."""
  num_read = indices.size * table.shape[1]
  return pl.CostEstimate(
    flops=2 * num_read,
    bytes_accessed=num_read * table.dtype.itemsize
    + 4 * (num_other + indices.size),
    transcendentals=num_tanh,
  )
