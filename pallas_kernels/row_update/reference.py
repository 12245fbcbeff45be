"""The definition of `row_update`: a gradient as large as the table.

It costs what the table holds; for tests.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.row_update import optimizers


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
  """See `api.row_update`."""
  ids, grads = flat_reads(ids, grads, weights)
  ids = drop_invalid(ids, table, num_rows)
  summed = jnp.zeros(table.shape, jnp.float32).at[ids].add(grads, mode="drop")
  touched = jnp.zeros(table.shape[:1], bool).at[ids].set(True, mode="drop")
  rows, new_state = rule.apply(
    optimizers.from_storage(table), state, summed, learning_rate, step
  )
  rows = optimizers.to_storage(rows, table.dtype)

  def choose(new, old):
    mask = touched.reshape(-1, *(1,) * (old.ndim - 1))
    return jnp.where(mask, new, old)

  return choose(rows, table), {
    name: choose(new_state[name], old) for name, old in state.items()
  }


def flat_reads(
  ids: Int[Array, "*reads"],
  grads: Float[Array, "*outputs dim"],
  weights: Float[Array, "*reads"] | None,
) -> tuple[Int[Array, " reads"], Float[Array, "reads dim"]]:
  """One id and one gradient a read, for plain reads and for bags."""
  if weights is not None:
    grads = weights[..., None] * grads[..., None, :]
  return ids.reshape(-1), grads.reshape(-1, grads.shape[-1])


def drop_invalid(
  ids: Int[Array, " reads"], table: Array, num_rows: int
) -> Int[Array, " reads"]:
  """Ids outside of [0, num_rows) become one past the table's end."""
  return jnp.where((ids < 0) | (ids >= num_rows), table.shape[0], ids)
