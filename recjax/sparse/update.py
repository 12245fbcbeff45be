"""Writes the gradients of touched rows back into a table.

The only place where a table changes. All reads of one table in a step come
here together, so that the optimiser sees every row once.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recjax.sparse import table as table_lib
from recjax.sparse.row_optimizers import RowOptimizer
from recjax.sparse.table import Table

# Up to so many rows per read, marking rows beats sorting the ids: on two CPU
# cores 1.7 ms against 38 ms for 124,416 reads of 46,000 rows, 8.7 ms against
# 39 ms of 1,000,000 rows.
COUNTING_LIMIT = 8


@dataclasses.dataclass(frozen=True)
class UpdateRule:
  """How the touched rows of one table are updated.

  Attributes:
    optimizer: What turns a gradient into a step.
    weight_decay: L2 pull of the touched rows, added to their gradient.
    clip_norm: Largest norm of a row's gradient; None means no limit.
  """

  optimizer: RowOptimizer
  weight_decay: float = 0.0
  clip_norm: float | None = None


def apply_row_gradients(
  values: Array,
  state: dict[str, Array],
  reads: Sequence[tuple[Int[Array, " _reads"], Float[Array, "_reads dim"]]],
  *,
  table: Table,
  rule: UpdateRule,
  learning_rate: float | Float[Array, ""],
  step: Int[Array, ""],
  keep: Bool[Array, ""] | None = None,
) -> tuple[Array, dict[str, Array]]:
  """One optimiser step on the rows that were read.

  Args:
    values: The table as stored; donate it.
    state: The optimiser's state; arrays with a leading row axis.
    reads: (ids, gradients) of every read; ids out of range are ignored.
    table: Its declaration.
    rule: Optimiser, decay and clipping.
    learning_rate: Step size.
    step: Update count, from 1.
    keep: False leaves the table as it is. A batch is skipped by sending its
      rows out of range: choosing between two tables would copy both.

  Returns:
    The new table and state; rows that were not read are bit-identical.
  """
  num_rows = values.shape[0]
  ids = jnp.concatenate([ids for ids, _ in reads])
  grads = jnp.concatenate([grads for _, grads in reads])
  # Rows that only pad the table are as little trained as those past its end.
  valid = ids < table.num_rows
  if keep is not None:
    valid &= keep
  ids = jnp.where(valid, ids, num_rows)
  ids, grads = sum_duplicates(ids, grads, num_rows=num_rows)

  rows = table_lib.gather(values, ids, table)
  row_state = jax.tree.map(lambda x: table_lib.take_rows(x, ids), state)
  if rule.weight_decay:
    grads = grads + rule.weight_decay * rows
  if rule.clip_norm is not None:
    norm = jnp.linalg.norm(grads, axis=-1, keepdims=True)
    grads = grads * jnp.minimum(1.0, rule.clip_norm / (norm + 1e-12))
  delta, row_state = rule.optimizer.update(
    grads, row_state, learning_rate, step
  )
  rows = table_lib.to_storage(rows - delta, table)

  def write(x, new):
    return x.at[ids].set(new, mode="drop", indices_are_sorted=True)

  return write(values, rows), jax.tree.map(write, state, row_state)


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
