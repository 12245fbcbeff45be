"""Writes into a table: gradients of what was read, or rows of a bank.

The only place where a table changes: by `pallas_kernels.row_update`, or, what
is not trained, by one scatter.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels.row_update.optimizers import Rule
from recjax.sparse.table import Table, to_storage


class RowGradients(NamedTuple):
  """Gradients of all that a step has read from one table.

  Attributes:
    ids: Rows, `[reads]`; of weighted sums of rows `[*batch, top_k]`.
    grads: Of each row, `[reads, dim]`; of each sum `[*batch, dim]`.
    weights: Of the rows in the sums, as `ids`; None for plain reads.
  """

  ids: Int[Array, "*reads"]
  grads: Float[Array, "*outputs dim"]
  weights: Float[Array, "*reads"] | None = None


def apply_row_gradients(
  values: Array,
  state: dict[str, Array],
  read: RowGradients,
  *,
  table: Table,
  rule: Rule,
  learning_rate: float | Float[Array, ""],
  step: Int[Array, ""],
  keep: Bool[Array, ""] | None = None,
) -> tuple[Array, dict[str, Array]]:
  """One optimiser step on the rows that were read.

  Args:
    values: The table as stored; donate it.
    state: The optimiser's state; arrays with a leading row axis.
    read: What was read and its gradients; ids out of range are ignored.
    table: Its declaration. Rows that only pad it are as little trained as
      those past its end.
    rule: Optimiser, decay and clipping.
    learning_rate: Step size.
    step: Update count, from 1.
    keep: False leaves the table as it is. A batch is skipped by sending its
      rows out of range: choosing between two tables would copy both.

  Returns:
    The new table and state; rows that were not read are bit-identical.
  """
  ids = read.ids if keep is None else jnp.where(keep, read.ids, -1)
  return pallas_kernels.row_update(
    values,
    state,
    ids,
    read.grads,
    weights=read.weights,
    optimizer=rule.optimizer,
    learning_rate=learning_rate,
    step=step,
    weight_decay=rule.weight_decay,
    clip_norm=rule.clip_norm,
    eps=rule.eps,
    num_rows=table.num_rows,
  )


class Writes(NamedTuple):
  """Rows that a model puts into a bank, in `aux["writes"][name]`.

  Attributes:
    ids: Rows, all different; those out of range, below 0 too, are ignored.
    rows: What they hold from the next step on.
  """

  ids: Int[Array, " writes"]
  rows: Float[Array, "writes dim"]


def apply_writes(
  values: Mapping[str, Array],
  writes: Mapping[str, Writes],
  *,
  tables: Mapping[str, Table],
  step: Int[Array, ""],
  keep: Bool[Array, ""],
) -> dict[str, Array]:
  """The banks after a step's writes, and the tables that date them.

  Args:
    values: All tables as stored; donate them.
    writes: Bank -> what is written to it.
    tables: All declarations.
    step: Number of the step, from 1.
    keep: False leaves the banks as they are, as in `apply_row_gradients`.

  Returns:
    The arrays that changed; rows that were not written are bit-identical.

  Raises:
    ValueError: If a table is written that is no bank.
  """
  changed = {}
  stamped = {t.stamps: name for name, t in tables.items() if t.stamps}
  for name, (ids, rows) in writes.items():
    if name not in tables or tables[name].trained or tables[name].stamps:
      raise ValueError(
        f"the model writes to {name!r}, which tables() does not declare as a "
        "bank; declare it with trained=False"
      )
    end = tables[name].num_rows
    # A negative index would count from the end.
    ids = jnp.where(keep & (ids >= 0) & (ids < end), ids, values[name].shape[0])
    parts = {name: to_storage(rows, tables[name])}
    if name in stamped:
      stamp = jnp.full((len(ids), 1), step, jnp.float32)
      parts[stamped[name]] = stamp
    for target, part in parts.items():
      changed[target] = values[target].at[ids].set(part, mode="drop")
  return changed
