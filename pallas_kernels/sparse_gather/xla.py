"""`sparse_gather` and its gradients in XLA's own operators.

Rows are taken in one flat gather. A loop over k holds less and is faster by
itself, but where a donated table is read in a loop and updated afterwards XLA
makes a copy of all of it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sparse_gather import reference

# Up to so many rows per read, marking rows beats sorting the ids.
_COUNTING_LIMIT = 8


def sparse_gather(
  table: Array,
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
) -> Float[Array, "*batch dim"]:
  """See `reference.sparse_gather`."""
  rows = _take_rows(table, indices)
  return jnp.einsum("...k,...kd->...d", weights, rows, precision="highest")


def sparse_gather_gated(
  table: Array,
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
  gate: Float[Array, "*batch dim"],
  *,
  with_tanh: bool,
) -> list[Float[Array, "*batch dim"]]:
  """See `reference.sparse_gather_gated`."""
  tanh = jnp.tanh(sparse_gather(table, indices, weights))
  return [gate * tanh, tanh][: 1 + with_tanh]


def weights_grad(
  table: Array,
  indices: Int[Array, "*batch k"],
  output_grad: Float[Array, "*batch dim"],
) -> list[Float[Array, "*batch _"]]:
  """See `reference.weights_grad`."""
  # The very gather of the forward pass, of which XLA keeps one.
  rows = _take_rows(table, indices)
  grads = jnp.einsum("...d,...kd->...k", output_grad, rows, precision="highest")
  return [grads, output_grad]


def row_grads(
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
  output_grad: Float[Array, "*batch dim"],
  *,
  num_rows: int,
) -> tuple[Int[Array, " rows"], Float[Array, "rows dim"]]:
  """See `api.sparse_gather_row_grads`."""
  k, dim = indices.shape[-1], output_grad.shape[-1]
  ids = indices.reshape(-1)
  size = min(ids.size, num_rows)
  ids = jnp.where((ids < 0) | (ids >= num_rows), num_rows, ids)
  rank_fn = _rank_by_sort
  if num_rows <= _COUNTING_LIMIT * ids.size:
    rank_fn = _rank_by_count
  unique, place = rank_fn(ids, num_rows, size)
  place = jnp.where(ids < num_rows, place, size).reshape(-1, k)
  weights = weights.reshape(-1, k)
  output_grad = output_grad.reshape(weights.shape[0], dim)

  def add(j, summed):
    return summed.at[place[:, j]].add(
      weights[:, j, None] * output_grad, mode="drop"
    )

  return unique, jax.lax.fori_loop(0, k, add, jnp.zeros((size, dim)))


def _rank_by_sort(ids, num_rows: int, size: int):
  """Distinct ids in order, and where each read's id stands among them."""
  position = jax.lax.iota(jnp.int32, ids.shape[0])
  ordered, order = jax.lax.sort((ids, position), num_keys=1)
  is_first = jnp.concatenate(
    [jnp.ones((1,), bool), ordered[1:] != ordered[:-1]]
  )
  rank = jnp.cumsum(is_first.astype(jnp.int32)) - 1
  unique = jnp.full((size,), num_rows, jnp.int32)
  unique = unique.at[rank].set(ordered, mode="drop", indices_are_sorted=True)
  return unique, jnp.zeros_like(ids).at[order].set(rank, unique_indices=True)


def _rank_by_count(ids, num_rows: int, size: int):
  """The same by marking rows: one number a row of the table, but no sort."""
  present = jnp.zeros((num_rows,), jnp.int32).at[ids].set(1, mode="drop")
  rank = jnp.cumsum(present) - 1
  place = jnp.where(present > 0, rank, size)
  rows = jax.lax.iota(jnp.int32, num_rows)
  unique = jnp.full((size,), num_rows, jnp.int32)
  return unique.at[place].set(rows, mode="drop"), rank.at[ids].get(mode="clip")


def _take_rows(
  table: Array, indices: Int[Array, "*reads"]
) -> Float[Array, "*reads dim"]:
  """`reference.take_rows` for a table in bfloat16 too."""
  # XLA on the CPU converts a whole bfloat16 array at each use, not its bits.
  if table.dtype == jnp.bfloat16:
    table = jax.lax.bitcast_convert_type(table, jnp.uint16)
  return reference.take_rows(table, indices)
