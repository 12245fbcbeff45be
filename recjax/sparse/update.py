"""Writes the gradients of what was read back into a table.

The only place where a table changes, by `pallas_kernels.row_update`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels.row_update.optimizers import Rule
from recjax.sparse.table import Table


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
