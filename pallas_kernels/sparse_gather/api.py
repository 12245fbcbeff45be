"""Weighted sums of the rows of a table, as a memory or a bag of ids reads it.

Source: the Sparse-Gather of MSN, arXiv 2602.07526, which the paper names but
does not define: sums over the slots that a query retrieves, here with the
paper's gate x * tanh(sum) where it is asked for, and their gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int, UInt16

from pallas_kernels import dispatch
from pallas_kernels.sparse_gather import cpu, reference, xla

_TPU = "pallas_kernels.sparse_gather.pallas_tpu"
_GPU = "pallas_kernels.sparse_gather.pallas_gpu"
_MOSAIC = "pallas_kernels.sparse_gather.mosaic_gpu"
IMPLEMENTATIONS = {
  "reference": reference.sparse_gather,
  "xla": xla.sparse_gather,
  "cpu": cpu.sparse_gather,
  "pallas_tpu": dispatch.lazy(_TPU, "sparse_gather"),
  "pallas_gpu": dispatch.lazy(_GPU, "sparse_gather"),
  "mosaic_gpu": dispatch.lazy(_MOSAIC, "sparse_gather"),
}
_GATED = {
  "reference": reference.sparse_gather_gated,
  "xla": xla.sparse_gather_gated,
  "cpu": cpu.sparse_gather_gated,
  "pallas_tpu": dispatch.lazy(_TPU, "sparse_gather_gated"),
  "pallas_gpu": dispatch.lazy(_GPU, "sparse_gather_gated"),
  "mosaic_gpu": dispatch.lazy(_MOSAIC, "sparse_gather_gated"),
}
_WEIGHTS_GRADS = {
  "reference": reference.weights_grad,
  "xla": xla.weights_grad,
  "cpu": cpu.weights_grad,
  "pallas_tpu": dispatch.lazy(_TPU, "weights_grad"),
  "pallas_gpu": dispatch.lazy(_GPU, "weights_grad"),
  "mosaic_gpu": dispatch.lazy(_MOSAIC, "weights_grad"),
}
_ROW_GRADS = {
  "reference": reference.row_grads,
  "xla": xla.row_grads,
  "cpu": cpu.row_grads,
  "pallas_tpu": dispatch.lazy(_TPU, "row_grads"),
  "pallas_gpu": dispatch.lazy(_GPU, "row_grads"),
}
_OPERATOR = "sparse_gather"
_MAX_INT32 = np.iinfo(np.int32).max


def sparse_gather(
  table: Float[Array, "rows dim"] | UInt16[Array, "rows dim"],
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
  *,
  gate: Float[Array, "*batch dim"] | None = None,
  tap: Float[Array, "*batch dim"] | None = None,
  implementation: str | None = None,
) -> Float[Array, "*batch dim"]:
  """`sum_k weights[..., k] * table[indices[..., k]]`, gated or not.

  Differentiable in weights, gate and table. The gradient of the table is as
  large as the table: for small ones. Under `stop_gradient` it is not made,
  and `sparse_gather_row_grads` gives the gradients of the rows that were read.

  Args:
    table: float32, bfloat16, or uint16: the bits of bfloat16, which have no
      gradient.
    indices: Rows; one out of range, a negative one too, reads zeros and gets
      no gradient.
    weights: Of each read.
    gate: Multiplied by the tanh of the sum, in one pass; None leaves the sum.
    tap: Zeros, whose values are not looked at. Their gradient is that of the
      sums, before a gate, and the table then has none. It is there only when
      the backward pass has read the table, so that a donated table is
      updated with it in place; any other gradient may come before that, and
      XLA then makes a copy of the table.
    implementation: See `pallas_kernels.dispatch`.

  Returns:
    Sums, or `gate * tanh(sums)`, in float32.

  Raises:
    ValueError: For shapes that do not fit or an unknown implementation.
    TypeError: For number types other than these.
    NotImplementedError: If the named implementation cannot run here.

  Example:
    >>> table = jnp.array([[1.0, 2.0], [10.0, 20.0]])
    >>> sparse_gather(table, jnp.array([0, 1]), jnp.array([1.0, 0.5])).tolist()
    [6.0, 12.0]
  """
  table = jnp.asarray(table)
  if table.dtype not in (jnp.float32, jnp.bfloat16, jnp.uint16):
    raise TypeError(
      "sparse_gather: table must be float32, bfloat16 or uint16 (the bits of "
      f"bfloat16), got {table.dtype}"
    )
  if table.ndim != 2:
    raise ValueError(
      f"sparse_gather: table must be [rows, dim], got shape {table.shape}"
    )
  indices, weights = _check_reads("sparse_gather", indices, weights)
  implementation = dispatch.resolve(implementation)
  if tap is not None:
    tap = jnp.asarray(tap, jnp.float32)
    _check_outputs("sparse_gather: tap", tap, indices, table.shape[1])
  elif table.dtype == jnp.uint16:
    tap = jnp.zeros((*indices.shape[:-1], table.shape[1]))
  else:
    constant = jax.lax.stop_gradient(weights)
    tap = _table_tap(implementation, table, indices, constant)
  reads = (jax.lax.stop_gradient(table), indices, weights, tap)
  if gate is None:
    return _gather(implementation, *reads)
  gate = jnp.asarray(gate, jnp.float32)
  _check_outputs("sparse_gather: gate", gate, indices, table.shape[1])
  return _gather_gated(implementation, *reads, gate)


def sparse_gather_row_grads(
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
  output_grad: Float[Array, "*batch dim"],
  *,
  num_rows: int | None = None,
  implementation: str | None = None,
) -> tuple[Int[Array, " rows"], Float[Array, "rows dim"]]:
  """Gradients of the rows that `sparse_gather` has read, each row once.

  The row `id` gets the sum of `weights[..., k] * output_grad[...]` over the
  reads with `indices[..., k] == id`. Nothing is as large as the table. Not
  differentiable.

  Args:
    indices: As they were read; those out of range are dropped.
    weights: As they were read.
    output_grad: Gradient of the sums, before a gate.
    num_rows: Rows of the table. None knows no upper end of the range.
    implementation: See `pallas_kernels.dispatch`.

  Returns:
    Ids in ascending order and their gradients in float32. There are as many
    as reads, or rows if these are fewer; what is left over has the id
    `num_rows` (without one, the largest int32) and gradients of zero.

  Raises:
    ValueError: For shapes that do not fit or an unknown implementation.
    TypeError: For indices that are no integers.
    NotImplementedError: If the named implementation cannot run here.

  Example:
    >>> ids, grads = sparse_gather_row_grads(
    ...     jnp.array([[3, 1], [3, 9]]), jnp.ones((2, 2)),
    ...     jnp.array([[1.0], [2.0]]), num_rows=8)
    >>> ids.tolist(), grads[:, 0].tolist()
    ([1, 3, 8, 8], [1.0, 3.0, 0.0, 0.0])
  """
  name = "sparse_gather_row_grads"
  indices, weights = _check_reads(name, indices, weights)
  output_grad = jnp.asarray(output_grad, jnp.float32)
  if output_grad.ndim < 1:
    raise ValueError(f"{name}: output_grad must be [..., dim], got a number")
  _check_outputs(
    f"{name}: output_grad", output_grad, indices, output_grad.shape[-1]
  )
  num_rows = _MAX_INT32 if num_rows is None else num_rows
  if not 0 <= num_rows <= _MAX_INT32:
    raise ValueError(f"{name}: num_rows must fit into int32, got {num_rows}")
  return _row_grads(
    dispatch.resolve(implementation), num_rows, indices, weights, output_grad
  )


def _check_reads(name: str, indices, weights) -> tuple[Array, Array]:
  """Both as the kernels take them."""
  indices = jnp.asarray(indices)
  if not jnp.issubdtype(indices.dtype, jnp.integer):
    raise TypeError(f"{name}: indices must be integers, got {indices.dtype}")
  if np.iinfo(indices.dtype).max > _MAX_INT32:
    # No conversion may bring one back into the range.
    is_valid = (indices >= 0) & (indices <= _MAX_INT32)
    indices = jnp.where(is_valid, indices.astype(jnp.int32), -1)
  weights = jnp.asarray(weights, jnp.float32)
  if indices.ndim < 1 or indices.shape != weights.shape:
    raise ValueError(
      f"{name}: indices and weights must have one shape [..., k], got "
      f"{indices.shape} and {weights.shape}"
    )
  return indices.astype(jnp.int32), weights


def _check_outputs(what: str, x: Array, indices: Array, dim: int) -> None:
  expected = (*indices.shape[:-1], dim)
  if x.shape != expected:
    raise ValueError(
      f"{what} must be [..., dim], here {expected}, got {x.shape}"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(implementation, table, indices, weights, tap):
  del tap  # Zeros.
  return _read(IMPLEMENTATIONS, implementation, table, indices, weights)


def _gather_forward(implementation, table, indices, weights, tap):
  output = _gather(implementation, table, indices, weights, tap)
  return output, (table, indices)


def _gather_backward(implementation, residuals, grad):
  return None, None, *_grads(implementation, *residuals, grad)


_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_gated(implementation, table, indices, weights, tap, gate):
  del tap
  (output,) = _read(
    _GATED, implementation, table, indices, weights, gate, with_tanh=False
  )
  return output


def _gated_forward(implementation, table, indices, weights, tap, gate):
  del tap
  output, tanh = _read(
    _GATED, implementation, table, indices, weights, gate, with_tanh=True
  )
  return output, (table, indices, gate, tanh)


def _gated_backward(implementation, residuals, grad):
  table, indices, gate, tanh = residuals
  sum_grad = grad * gate * (1.0 - tanh * tanh)
  grads = _grads(implementation, table, indices, sum_grad)
  return None, None, *grads, grad * tanh


_gather_gated.defvjp(_gated_forward, _gated_backward)


def _grads(implementation, table, indices, grad):
  """Gradients of weights and tap from that of the sums.

  They come out of one call, so that the gradient of the tap, with which the
  table may be updated, is not there before the table has been read.
  """
  return _read(_WEIGHTS_GRADS, implementation, table, indices, grad)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _table_tap(implementation, table, indices, weights):
  """A tap whose gradient goes on to the table.

  Apart from the sums, so that a table whose gradient nobody asks for costs
  nothing outside of `jit` either. The values are not looked at; they are made
  of all arguments so that the tap has every axis that `vmap` gives to one.
  """
  del implementation
  anchor = jnp.sum(table[:1, :1]) + jnp.sum(indices, -1) + jnp.sum(weights, -1)
  return jnp.broadcast_to(
    anchor[..., None].astype(jnp.float32), (*anchor.shape, table.shape[1])
  )


def _tap_forward(implementation, table, indices, weights):
  tap = _table_tap(implementation, table, indices, weights)
  return tap, (table, indices, weights)


def _tap_backward(implementation, residuals, grad):
  table, indices, weights = residuals
  ids, rows = _row_grads(implementation, table.shape[0], indices, weights, grad)
  table_grad = (
    jnp.zeros_like(table)
    .at[ids]
    .set(rows.astype(table.dtype), mode="drop", indices_are_sorted=True)
  )
  return table_grad, None, None


_table_tap.defvjp(_tap_forward, _tap_backward)


def _read(implementations, implementation, *arrays, **options):
  """Runs what reads a table: `arrays` are it, indices and others like these.

  An axis of `vmap` becomes one more leading axis of the indices, so that a
  table which has no such axis is never repeated.
  """

  @custom_vmap
  def call(*arrays):
    return dispatch.run(
      _OPERATOR, implementations, implementation, *arrays, **options
    )

  @call.def_vmap
  def fold(axis_size, is_mapped, table, *others):
    indices, *others = (
      x if mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
      for x, mapped in zip(others, is_mapped[1:], strict=True)
    )
    if is_mapped[0]:
      _, num_rows, dim = table.shape
      if axis_size * num_rows > _MAX_INT32:
        raise NotImplementedError(
          f"sparse_gather: {axis_size} tables of {num_rows} rows under vmap "
          "are more rows than int32 can count"
        )
      # The tables behind each other.
      table = table.reshape(-1, dim)
      first = num_rows * jnp.arange(axis_size, dtype=jnp.int32)
      first = first.reshape(-1, *(1,) * (indices.ndim - 1))
      is_valid = (indices >= 0) & (indices < num_rows)
      indices = jnp.where(is_valid, indices + first, -1)
    outputs = call(table, indices, *others)
    return outputs, jax.tree.map(lambda _: True, outputs)

  return call(*arrays)


def _row_grads(implementation, num_rows, *arrays):
  """Runs the gradients of rows; under `vmap`, one member after the other."""
  indices, _, output_grad = arrays
  if not indices.size or not num_rows:
    return (
      jnp.zeros((0,), jnp.int32),
      jnp.zeros((0, output_grad.shape[-1]), jnp.float32),
    )

  @custom_vmap
  def call(*arrays):
    return dispatch.run(
      _OPERATOR, _ROW_GRADS, implementation, *arrays, num_rows=num_rows
    )

  @call.def_vmap
  def one_by_one(axis_size, is_mapped, *arrays):
    arrays = tuple(
      x if mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
      for x, mapped in zip(arrays, is_mapped, strict=True)
    )
    return jax.lax.map(lambda member: call(*member), arrays), (True, True)

  return call(*arrays)
