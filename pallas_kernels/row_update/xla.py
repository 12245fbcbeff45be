"""`row_update` by XLA: duplicates are summed, then rows read and written."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.row_update import optimizers, reference

# Up to so many rows per read, marking rows beats sorting the ids: on two CPU
# cores 1.7 ms against 38 ms for 124,416 reads of 46,000 rows, 8.7 ms against
# 39 ms of 1,000,000 rows.
COUNTING_LIMIT = 8


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
  ids, grads = reference.flat_reads(ids, grads, weights)
  ids = reference.drop_invalid(ids, table, num_rows)
  ids, grads = sum_duplicates(ids, grads, num_rows=table.shape[0])

  def read(x):
    return x.at[ids].get(mode="fill", fill_value=0, indices_are_sorted=True)

  def write(x, new):
    return x.at[ids].set(new, mode="drop", indices_are_sorted=True)

  rows, new_state = rule.apply(
    optimizers.from_storage(read(table)),
    {name: read(x) for name, x in state.items()},
    grads,
    learning_rate,
    step,
  )
  rows = optimizers.to_storage(rows, table.dtype)
  return write(table, rows), {
    name: write(x, new_state[name]) for name, x in state.items()
  }


def sum_duplicates(
  ids: Int[Array, " reads"],
  grads: Float[Array, "reads dim"],
  *,
  num_rows: int,
) -> tuple[Int[Array, " rows"], Float[Array, "rows dim"]]:
  """Each id once, in ascending order, with the sum of its gradients.

  The result has a fixed size, the number of reads (or of rows, if that is
  less); unused places hold the id `num_rows`, out of range. Negative ids and
  ids of `num_rows` or more are dropped.

  Example:
    >>> ids, grads = sum_duplicates(
    ...     jnp.array([3, 1, 3]), jnp.ones((3, 2)), num_rows=8)
    >>> ids.tolist(), grads[:, 0].tolist()
    ([1, 3, 8], [1.0, 2.0, 0.0])
  """
  num_reads = ids.shape[0]
  ids = jnp.where((ids < 0) | (ids >= num_rows), num_rows, ids)
  ids = ids.astype(jnp.int32)
  capacity = min(num_reads, num_rows + 1)
  rank_fn = _rank_by_sort
  if num_rows <= COUNTING_LIMIT * num_reads:
    rank_fn = _rank_by_count
  unique, inverse = rank_fn(ids, num_rows, capacity)
  summed = jnp.zeros((capacity, grads.shape[-1]), grads.dtype)
  return unique, summed.at[inverse].add(grads)


def _rank_by_sort(ids, num_rows: int, capacity: int):
  """Distinct ids in order, and where each read's id stands among them."""
  position = jax.lax.iota(jnp.int32, ids.shape[0])
  ordered, order = jax.lax.sort((ids, position), num_keys=1)
  is_first = jnp.concatenate(
    [jnp.ones((1,), bool), ordered[1:] != ordered[:-1]]
  )
  rank = jnp.cumsum(is_first.astype(jnp.int32)) - 1
  unique = jnp.full((capacity,), num_rows, jnp.int32)
  unique = unique.at[rank].set(ordered, indices_are_sorted=True)
  inverse = jnp.zeros_like(position).at[order].set(rank, unique_indices=True)
  return unique, inverse


def _rank_by_count(ids, num_rows: int, capacity: int):
  """The same by marking rows: one number a row of the table, but no sort."""
  present = jnp.zeros((num_rows + 1,), jnp.int32).at[ids].set(1)
  rank = jnp.cumsum(present) - 1
  place = jnp.where(present > 0, rank, capacity)
  rows = jax.lax.iota(jnp.int32, num_rows + 1)
  unique = jnp.full((capacity,), num_rows, jnp.int32)
  return unique.at[place].set(rows, mode="drop"), rank[ids]
