"""`row_update` in Pallas for NVIDIA GPUs, by Triton.

Reads are sorted by row. One program of the grid owns a row: it sums the row's
gradients in registers, applies the optimiser, and writes row and state where
they lie. Nothing is added atomically, summed gradients are never written, and
the result is the same at every call.

Compiled for A100 and H100 without one: registers and spills are known, and
that a donated table is not copied. Time is not, nor what a row costs that
takes most of the reads: one program sums them all.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.gpu import rows as gpu_rows
from pallas_kernels.native.call import result_type
from pallas_kernels.row_update import optimizers

# A program holds whole rows of table, state and gradient in registers.
_MAX_DIM = 4096


def row_update(
  table: Array,
  state: dict[str, Array],
  ids: Int[Array, "*reads"],
  grads: Float[Array, "*outputs dim"],
  weights: Float[Array, "*reads"] | None,
  learning_rate: Float[Array, ""],
  step: Int[Array, ""],
  *,
  rule: optimizers.Rule,
  num_rows: int,
) -> tuple[Array, dict[str, Array]]:
  """See `api.row_update`.

  Raises:
    NotImplementedError: For rows that registers cannot hold.
  """
  dim = table.shape[1]
  if dim > _MAX_DIM:
    raise NotImplementedError(
      f"row_update: pallas_gpu holds a row of at most {_MAX_DIM} entries in "
      f"registers, got dim = {dim}; take implementation='xla'"
    )
  if not num_rows:
    return table, state
  groups = gpu_rows.group_reads(ids.reshape(-1), num_rows)
  num_warps = max(1, pl.next_power_of_2(dim) // 256)
  num_reads, width = gpu_rows.tile_sizes(dim, 4 * num_warps, _MAX_DIM)
  inputs = [*groups, grads.reshape(-1, dim)]
  if weights is not None:
    inputs.append(weights.reshape(-1))
  inputs += [learning_rate.reshape(1), step.reshape(1)]
  updated = [table, *state.values()]
  table, *arrays = pl.pallas_call(
    functools.partial(
      _kernel,
      rule=rule,
      names=tuple(state),
      num_reads=num_reads,
      width=width,
      k=1 if weights is None else ids.shape[-1],
      is_weighted=weights is not None,
    ),
    out_shape=[
      result_type(x.shape, x.dtype, *inputs, *updated) for x in updated
    ],
    grid=groups.rows.shape,
    input_output_aliases={len(inputs) + i: i for i in range(len(updated))},
    compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
    cost_estimate=_cost(updated, ids.size, groups.rows.size),
    interpret=dispatch.interpret_mode(),
    name="row_update",
  )(*inputs, *updated)
  return table, dict(zip(state, arrays, strict=True))


def _kernel(
  rows,
  starts,
  order,
  grads,
  *refs,
  rule,
  names,
  num_reads,
  width,
  k,
  is_weighted,
):
  weights = None
  if is_weighted:
    weights, *refs = refs
  learning_rate, step, *refs = refs
  # Results lie where the arguments did; what is read is written after.
  table, *arrays = refs[len(refs) // 2 :]
  state = dict(zip(names, arrays, strict=True))
  dim = table.shape[1]

  i = pl.program_id(0)
  start, end = starts[i], starts[i + 1]
  columns = jax.lax.iota(jnp.int32, width)
  total = gpu_rows.sum_reads(
    *(order, weights, grads, start, end, columns), num_rows=num_reads, k=k
  )
  row = jnp.full((1,), rows[i], jnp.int32)
  # Behind the distinct rows there is nothing to do.
  mask = jnp.full((1,), start < end)

  def read(ref):
    if len(ref.shape) == 1:
      return plt.load(ref.at[row], mask=mask, other=0.0)
    return gpu_rows.load_rows(ref, row, columns, mask=mask)

  def write(ref, values):
    if len(ref.shape) == 1:
      plt.store(ref.at[row], values, mask=mask)
    else:
      gpu_rows.store_rows(ref, row, columns, values, mask=mask)

  new_rows, new_state = rule.apply(
    read(table),
    {name: read(ref) for name, ref in state.items()},
    total[None, :],
    learning_rate[0],
    step[0],
    dim=dim,
  )
  write(table, new_rows)
  for name, ref in state.items():
    write(ref, new_state[name])


def _cost(updated, num_reads: int, size: int) -> pl.CostEstimate:
  """As if every read were of another row."""
  dim = updated[0].shape[1]
  row_bytes = sum(x.dtype.itemsize * x.size // x.shape[0] for x in updated)
  return pl.CostEstimate(
    flops=2 * num_reads * dim + 8 * size * dim,
    bytes_accessed=num_reads * (4 * dim + 8) + size * (2 * row_bytes + 8),
    transcendentals=size * dim,
  )
