"""Rows and columns of vector registers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def to_column(row: Float[Array, "1 n"]) -> Float[Array, "n 1"]:
  """A row as a column, by a sum along lanes: exact, and no shuffle of data."""
  return jnp.sum(_on_diagonal(row), axis=1, keepdims=True)


def to_row(column: Float[Array, "n 1"]) -> Float[Array, "1 n"]:
  """A column as a row, by a sum along sublanes."""
  return jnp.sum(_on_diagonal(column), axis=0, keepdims=True)


def _on_diagonal(x: Array) -> Array:
  n = max(x.shape)
  rows = jax.lax.broadcasted_iota(jnp.int32, (n, n), 0)
  columns = jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)
  return jnp.where(rows == columns, x, jnp.zeros((), x.dtype))
