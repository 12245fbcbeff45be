"""`sparse_gather` and its gradients in Pallas for Hopper, by Mosaic GPU.

Rows come to shared memory by asynchronous copies, of which each warpgroup has
several under way, and are summed there: no register waits for a row. One
warpgroup owns as many outputs as make one number for each of its threads.

Compiled for H100 without one, and run in an interpreter that knows of copies
and barriers. What cannot be known without a device: time, and whether so many
small copies are faster than the plain loads of `pallas_gpu`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.sparse_gather import reference

# Threads of a warpgroup.
_LANES = 128
# Columns that one copy may bring.
_MAX_COPY = 256
# Rows of one output that are in shared memory or on the way there.
_NUM_SLOTS = 8
# An output stays in registers: so many numbers a thread.
_MAX_DIM = 32 * _LANES


def sparse_gather(
  table: Array,
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
) -> Float[Array, "*batch dim"]:
  """See `reference.sparse_gather`.

  Raises:
    NotImplementedError: For rows that no warpgroup can share out.
  """
  _check(table)
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
  """See `reference.sparse_gather_gated`, and `sparse_gather` above."""
  _check(table)
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
  """See `reference.weights_grad`, and `sparse_gather` above."""
  _check(table)
  if not table.size or not indices.size:
    return reference.weights_grad(table, indices, output_grad)
  (grads,) = _call(
    _weights_grad_kernel,
    table,
    indices,
    [output_grad],
    out_widths=[indices.shape[-1]],
    name="sparse_gather_weights_grad",
  )
  # What uses the gradient comes behind the last read of the table.
  grads, output_grad = jax.lax.optimization_barrier((grads, output_grad))
  return [grads.reshape(indices.shape), output_grad]


def _check(table: Array) -> None:
  # The compiler of such a copy for an older GPU kills the process.
  if jax.default_backend() == "gpu":
    capability = jax.local_devices()[0].compute_capability
    if float(capability) < 9:
      raise NotImplementedError(
        "sparse_gather: mosaic_gpu needs the copies of Hopper, compute "
        f"capability 9.0, and this GPU has {capability}; take "
        "implementation='pallas_gpu'"
      )
  dim = table.shape[1]
  is_shared_out = dim % _LANES == 0 or (dim and _LANES % dim == 0)
  row_bytes = dim * table.dtype.itemsize
  if not is_shared_out or dim > _MAX_DIM or row_bytes % _LANES:
    raise NotImplementedError(
      "sparse_gather: mosaic_gpu shares a row out among 128 threads and copies "
      f"multiples of 128 bytes: it takes rows of 64 or of a multiple of 128 "
      f"numbers up to {_MAX_DIM}, and of 32 in float32, got dim = {dim} in "
      f"{table.dtype}; take implementation='pallas_gpu'"
    )


def _sums(table, indices, weights, gate, *, num_outputs: int) -> list[Array]:
  dim = table.shape[1]
  outputs = _call(
    functools.partial(_sums_kernel, is_gated=gate is not None),
    table,
    indices,
    [weights] if gate is None else [weights, gate],
    out_widths=[dim] * num_outputs,
    name="sparse_gather" if gate is None else "sparse_gather_gated",
  )
  return [x.reshape(*indices.shape[:-1], dim) for x in outputs]


def _call(kernel, table, indices, others, *, out_widths, name) -> list[Array]:
  """Arrays of `out_widths` numbers an output."""
  k, dim = indices.shape[-1], table.shape[1]
  size = math.prod(indices.shape[:-1])
  group = max(1, _LANES // dim)
  num_groups = pl.cdiv(size, group)
  num_slots = min(_NUM_SLOTS, k)

  def flat(x, fill):
    x = x.reshape(size, x.shape[-1])
    padding = ((0, num_groups * group - size), (0, 0))
    return jnp.pad(x, padding, constant_values=fill).reshape(-1)

  outputs = plgpu.kernel(
    functools.partial(kernel, k=k, dim=dim, group=group),
    out_type=[
      jax.ShapeDtypeStruct((num_groups * group * width,), jnp.float32)
      for width in out_widths
    ],
    scratch_types=[
      plgpu.SMEM((num_slots, group * dim), table.dtype),
      plgpu.Barrier(
        num_arrivals=group * pl.cdiv(dim, _MAX_COPY), num_barriers=num_slots
      ),
    ],
    grid=(num_groups,),
    grid_names=("group",),
    interpret=dispatch.interpret_mode() or None,
    kernel_name=name,
  )(table, flat(indices, -1), *(flat(x, 0) for x in others))
  return [
    x[: size * width] for x, width in zip(outputs, out_widths, strict=True)
  ]


def _sums_kernel(table, indices, weights, *refs, k, dim, group, is_gated):
  *refs, rows, barriers = refs
  first = jax.lax.axis_index("group") * group

  def add(j, read, total):
    weight = [weights[(first + p) * k + j] for p in range(group)]
    return total + _by_output(weight, dim) * read

  zeros = _strided(jnp.zeros((group * dim,), jnp.float32))
  total = _over_rows(
    *(table, indices, rows, barriers, add, zeros), first=first, k=k, dim=dim
  )
  outputs = [total]
  own = pl.ds(first * dim, group * dim)
  if is_gated:
    gate, *refs = refs
    tanh = jnp.tanh(total)
    outputs = [_strided(gate[own]) * tanh, tanh]
  for ref, output in zip(refs, outputs, strict=False):
    ref[own] = output


def _weights_grad_kernel(
  table, indices, output_grad, grads, rows, barriers, *, k, dim, group
):
  first = jax.lax.axis_index("group") * group
  grad = _strided(output_grad[pl.ds(first * dim, group * dim)])

  def dot(j, read, carry):
    products = grad * read
    for p in range(group):
      own = [float(p == q) for q in range(group)]
      masked = products if group == 1 else products * _by_output(own, dim)
      grads[(first + p) * k + j] = jnp.sum(masked)
    return carry

  _over_rows(
    *(table, indices, rows, barriers, dot, jnp.int32(0)),
    first=first,
    k=k,
    dim=dim,
  )


def _over_rows(
  table, indices, rows, barriers, body, carry, *, first, k: int, dim: int
):
  """Calls `body(j, read, carry)` with the rows that are read j-th.

  Args:
    table: In global memory.
    indices: [outputs * k].
    rows: Shared memory for some rows of each output.
    barriers: That count what has arrived there.
    body: Gets one row of each output behind one another, in float32.
    carry: First value.
    first: Number of the first output.
    k: Reads an output.
    dim: Numbers a row.
  """
  num_slots, width = rows.shape
  group = width // dim

  def load_id(j, p):
    row = indices[(first + p) * k + j]
    is_valid = (row >= 0) & (row < table.shape[0])
    return jnp.where(is_valid, row, 0), is_valid

  def start(j):
    slot = jax.lax.rem(j, num_slots)
    for p in range(group):
      row, _ = load_id(j, p)
      for column in range(0, dim, _MAX_COPY):
        size = min(_MAX_COPY, dim - column)
        plgpu.copy_gmem_to_smem(
          table.at[row, pl.ds(column, size)],
          rows.at[slot, pl.ds(p * dim + column, size)],
          barriers.at[slot],
        )

  for j in range(num_slots):
    start(jnp.int32(j))

  def step(j, carry):
    slot = jax.lax.rem(j, num_slots)
    plgpu.barrier_wait(barriers.at[slot])
    read = _strided(rows[slot])
    if read.dtype == jnp.uint16:
      read = jax.lax.bitcast_convert_type(read, jnp.bfloat16)
    read = read.astype(jnp.float32)
    is_valid = [load_id(j, p)[1] for p in range(group)]
    # Beyond the table lie zeros; what was copied instead may be NaN.
    mask = _by_output([jnp.where(x, 1.0, 0.0) for x in is_valid], dim)
    carry = body(j, jnp.where(mask > 0, read, 0.0), carry)

    @pl.when(j + num_slots < k)
    def _():
      start(j + num_slots)

    return carry

  return jax.lax.fori_loop(0, k, step, carry)


def _by_output(values, dim: int):
  """One number an output, for each of its columns."""
  width = len(values) * dim
  result = jnp.full((width,), values[0], jnp.float32)
  if len(values) > 1:
    output = _strided(jax.lax.iota(jnp.int32, width)) // dim
    for p, value in enumerate(values[1:], 1):
      result = jnp.where(output == p, jnp.full((width,), value), result)
  return result


def _strided(x):
  """Spreads what comes next out of memory over the threads, in one way.

  Alike for all types, so that they can be multiplied.
  """
  if dispatch.interpret_mode():  # The interpreter knows of no layouts.
    return x
  (width,) = x.shape
  vec_size = next(n for n in (4, 2, 1) if width % (n * _LANES) == 0)
  layout = plgpu.Layout.WG_STRIDED(x.shape, vec_size=vec_size)
  return plgpu.layout_cast(x, layout)
