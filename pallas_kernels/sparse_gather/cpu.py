"""`sparse_gather` and its gradients by the C++ kernels of `cpu.cc`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.native import build
from pallas_kernels.native.call import result_type


def sparse_gather(
  table: Array,
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
) -> Float[Array, "*batch dim"]:
  """See `reference.sparse_gather`."""
  shape = (*indices.shape[:-1], table.shape[-1])
  (output,) = _call("sparse_gather", [shape], table, indices, weights)
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
  shapes = [gate.shape] * (1 + with_tanh)
  return _call("sparse_gather_gated", shapes, table, indices, weights, gate)


def weights_grad(
  table: Array,
  indices: Int[Array, "*batch k"],
  output_grad: Float[Array, "*batch dim"],
) -> list[Float[Array, "*batch _"]]:
  """See `reference.weights_grad`."""
  return _call(
    "sparse_gather_weights_grad",
    [indices.shape, output_grad.shape],
    *(table, indices, output_grad),
    aliases={2: 1},
  )


def row_grads(
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
  output_grad: Float[Array, "*batch dim"],
  *,
  num_rows: int,
) -> tuple[Int[Array, " rows"], Float[Array, "rows dim"]]:
  """See `api.sparse_gather_row_grads`."""
  size = min(indices.size, num_rows)
  call = jax.ffi.ffi_call(
    build.target("sparse_gather_row_grads"),
    [
      result_type(shape, dtype, indices, weights, output_grad)
      for shape, dtype in (
        ((size,), jnp.int32),
        ((size, output_grad.shape[-1]), jnp.float32),
      )
    ],
  )
  return tuple(call(indices, weights, output_grad, num_rows=num_rows))


def _call(handler: str, shapes, *arrays, aliases=None) -> list[Array]:
  """float32 results from a handler of `cpu.cc`."""
  types = [result_type(shape, jnp.float32, *arrays) for shape in shapes]
  call = jax.ffi.ffi_call(
    build.target(handler), types, input_output_aliases=aliases
  )
  return call(*arrays)
