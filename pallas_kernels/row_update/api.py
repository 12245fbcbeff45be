"""The optimiser's step on the touched rows of a table.

Source of the idea, to sum duplicates and to update the rows in the same pass
over the grouped reads: the fused embedding operator of Mudigere et al.,
Software-Hardware Co-design for Fast and Scalable Training of Deep Learning
Recommendation Models, ISCA 2022.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.row_update import cpu, optimizers, reference, xla

IMPLEMENTATIONS = {
  "reference": reference.row_update,
  "xla": xla.row_update,
  "cpu": cpu.row_update,
  "pallas_tpu": dispatch.lazy(
    "pallas_kernels.row_update.pallas_tpu", "row_update"
  ),
  "pallas_gpu": dispatch.lazy(
    "pallas_kernels.row_update.pallas_gpu", "row_update"
  ),
}
TABLE_TYPES = (jnp.float32, jnp.bfloat16, jnp.uint16)


def row_update(
  table: Array,
  state: dict[str, Array],
  ids: Int[Array, "*reads"],
  grads: Float[Array, "*outputs dim"],
  *,
  optimizer: str = "rowwise_adagrad",
  learning_rate: float | Float[Array, ""],
  weights: Float[Array, "*reads"] | None = None,
  step: int | Int[Array, ""] = 1,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
  eps: float = 1e-8,
  b1: float = 0.9,
  b2: float = 0.999,
  num_rows: int | None = None,
  implementation: str | None = None,
) -> tuple[Array, dict[str, Array]]:
  """One optimiser step on the rows of `table` that `ids` name.

  The gradients of a row that is named several times are summed first, so that
  the optimiser sees every row once. To a row's summed gradient the pull of
  `weight_decay` is added, then its norm is clipped, then it is handed to the
  optimiser. Rows that are not named stay bit-identical, and a NaN reaches
  only the rows that its gradient is for.

  Call it inside `jit` and donate table and state: they are then updated where
  they lie, and a step costs what it touches. Not differentiable.

  Args:
    table: [rows, dim]; float32, bfloat16, or uint16 that holds the bits of
      bfloat16. Computed in float32, stored rounded to the nearest even.
    state: float32 arrays of the optimiser, as its `init` gives them: {} of
      `sgd`, {"sum": [rows]} of `rowwise_adagrad`, {"sum": [rows, dim]} of
      `adagrad`, {"mu", "nu": [rows, dim]} of `lazy_adam`.
    ids: [*n] row numbers, or [*n, k] with `weights`; one outside of
      [0, num_rows) is ignored.
    grads: [*n, dim]: gradient of the row that was read or, with `weights`, of
      the weighted sum of k rows.
    optimizer: Its name; see `optimizers`.
    learning_rate: Step size; may be traced.
    weights: [*n, k]; row ids[..., j] receives weights[..., j] * grads[...].
    step: Update count, from 1; may be traced.
    weight_decay: L2 pull of the touched rows, in units of the gradient.
    clip_norm: Largest norm of a row's gradient; None means no limit.
    eps: See `optimizers`.
    b1: Decay of lazy Adam's first moment.
    b2: Decay of its second moment.
    num_rows: Rows that ids may name; None means all of the table.
    implementation: See `pallas_kernels.dispatch`.

  Returns:
    The new table and state.

  Raises:
    ValueError: For shapes or options that do not fit, an unknown optimizer or
      implementation.
    TypeError: For arrays of another type.
    NotImplementedError: If the named implementation cannot run here.

  Example:
    >>> table, state = row_update(
    ...     jnp.ones((4, 2)), {}, jnp.array([1, 3, 1, 9]), jnp.ones((4, 2)),
    ...     optimizer="sgd", learning_rate=0.25)
    >>> table[:, 0].tolist()
    [1.0, 0.5, 1.0, 0.75]
  """
  table, ids, grads = (jnp.asarray(x) for x in (table, ids, grads))
  weights = None if weights is None else jnp.asarray(weights)
  state = {name: jnp.asarray(x) for name, x in state.items()}
  learning_rate = jnp.asarray(learning_rate, jnp.float32)
  step = jnp.asarray(step, jnp.int32)
  rule = optimizers.Rule(optimizer, eps, b1, b2, weight_decay, clip_norm)
  num_rows = table.shape[0] if num_rows is None else num_rows
  _check(table, state, ids, grads, weights, rule, num_rows)
  if ids.size == 0 or table.shape[0] == 0:
    return table, state
  if ids.dtype.itemsize > 4:  # Must not wrap around into the table.
    ids = jnp.where((ids < 0) | (ids >= num_rows), -1, ids)
  return _row_update(
    rule,
    num_rows,
    dispatch.resolve(implementation),
    table,
    state,
    ids.astype(jnp.int32),
    grads.astype(jnp.float32),
    None if weights is None else weights.astype(jnp.float32),
    learning_rate,
    step,
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _row_update(rule, num_rows, implementation, *arrays):
  return dispatch.run(
    "row_update",
    IMPLEMENTATIONS,
    implementation,
    *arrays,
    rule=rule,
    num_rows=num_rows,
  )


@_row_update.defjvp
def _jvp(*args):
  del args
  raise TypeError(
    "row_update: an optimiser's step is not differentiable; take gradients "
    "before it, or put jax.lax.stop_gradient around its arguments"
  )


def _check(table, state, ids, grads, weights, rule, num_rows):
  """Raises for what does not fit together."""
  if table.ndim != 2 or table.shape[1] < 1 or table.shape[0] >= 2**31:
    raise ValueError(
      "row_update: table must be [rows, dim] with less than 2 ** 31 rows and "
      f"dim of at least 1, got shape {table.shape}"
    )
  if table.dtype not in TABLE_TYPES:
    raise TypeError(
      "row_update: table must be float32, bfloat16 or uint16 (bits of "
      f"bfloat16), got {table.dtype}"
    )
  optimizer = optimizers.make_row_optimizer(rule.optimizer)
  expected = jax.eval_shape(lambda: optimizer.init(*table.shape))
  given = {name: (x.shape, x.dtype) for name, x in state.items()}
  wanted = {name: (x.shape, x.dtype) for name, x in expected.items()}
  if given != wanted:
    raise ValueError(
      f"row_update: the state of {rule.optimizer} for a table of shape "
      f"{table.shape} is {_describe(wanted)}, got {_describe(given)}"
    )
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise TypeError(f"row_update: ids must be integers, got {ids.dtype}")
  for name, x in (("grads", grads), ("weights", weights)):
    if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(f"row_update: {name} must hold floats, got {x.dtype}")
  if weights is not None and (weights.shape != ids.shape or ids.ndim < 1):
    raise ValueError(
      "row_update: weights must have the shape of ids, [*n, k], got weights "
      f"of {weights.shape} and ids of {ids.shape}"
    )
  outputs = ids.shape if weights is None else ids.shape[:-1]
  if grads.shape != (*outputs, table.shape[1]):
    form = "without" if weights is None else "with"
    raise ValueError(
      f"row_update: grads must have shape {(*outputs, table.shape[1])} for "
      f"ids of {ids.shape} {form} weights, got {grads.shape}"
    )
  if not 0 <= num_rows <= table.shape[0]:
    raise ValueError(
      f"row_update: num_rows must be from 0 to the {table.shape[0]} rows of "
      f"the table, got {num_rows}"
    )
  if not 0 <= rule.eps or not 0 <= rule.b1 < 1 or not 0 <= rule.b2 < 1:
    raise ValueError(
      "row_update: eps must be at least 0, b1 and b2 in [0, 1), got eps = "
      f"{rule.eps}, b1 = {rule.b1} and b2 = {rule.b2}"
    )
  if rule.clip_norm is not None and not rule.clip_norm > 0:
    raise ValueError(
      "row_update: clip_norm must be above 0, or None for no limit, got "
      f"{rule.clip_norm}"
    )


def _describe(arrays):
  return {
    name: f"{dtype}{list(shape)}" for name, (shape, dtype) in arrays.items()
  }
