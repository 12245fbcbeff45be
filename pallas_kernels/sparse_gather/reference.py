"""The definition of `sparse_gather` and its gradients, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sparse_gather(
  table: Array,
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
) -> Float[Array, "*batch dim"]:
  """Weighted sums of rows; see `api.sparse_gather`."""
  rows = take_rows(table, indices)
  return jnp.sum(weights[..., None] * rows, axis=-2)


def sparse_gather_gated(
  table: Array,
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
  gate: Float[Array, "*batch dim"],
  *,
  with_tanh: bool,
) -> list[Float[Array, "*batch dim"]]:
  """`gate * tanh(sums)`, and `tanh(sums)` behind it if that is wanted."""
  tanh = jnp.tanh(sparse_gather(table, indices, weights))
  return [gate * tanh, tanh][: 1 + with_tanh]


def weights_grad(
  table: Array,
  indices: Int[Array, "*batch k"],
  output_grad: Float[Array, "*batch dim"],
) -> list[Float[Array, "*batch _"]]:
  """`<output_grad[...], table[indices[..., k]]>`, and `output_grad` again."""
  rows = take_rows(table, indices)
  return [jnp.sum(output_grad[..., None, :] * rows, axis=-1), output_grad]


def row_grads(
  indices: Int[Array, "*batch k"],
  weights: Float[Array, "*batch k"],
  output_grad: Float[Array, "*batch dim"],
  *,
  num_rows: int,
) -> tuple[Int[Array, " rows"], Float[Array, "rows dim"]]:
  """See `api.sparse_gather_row_grads`."""
  ids = indices.reshape(-1)
  ids = jnp.where((ids < 0) | (ids >= num_rows), num_rows, ids)
  size = min(ids.size, num_rows)
  unique = jnp.unique(ids, size=size, fill_value=num_rows)
  place = jnp.where(ids < num_rows, jnp.searchsorted(unique, ids), size)
  grads = weights[..., None] * output_grad[..., None, :]
  dim = output_grad.shape[-1]
  summed = jnp.zeros((size, dim), jnp.float32)
  return unique, summed.at[place].add(grads.reshape(ids.size, dim), mode="drop")


def take_rows(
  table: Array, indices: Int[Array, "*reads"]
) -> Float[Array, "*reads dim"]:
  """`table[indices]` in float32; zeros where an index is out of range."""
  if not table.shape[0]:
    return jnp.zeros((*indices.shape, table.shape[1]))
  rows = table.at[indices].get(
    mode="fill", fill_value=0, wrap_negative_indices=False
  )
  return to_float(rows)


def to_float(rows: Array) -> Float[Array, "*reads dim"]:
  """Stored numbers as float32."""
  if rows.dtype == jnp.uint16:
    rows = jax.lax.bitcast_convert_type(rows, jnp.bfloat16)
  return rows.astype(jnp.float32)
