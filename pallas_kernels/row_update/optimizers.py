"""Optimisers that see the touched rows of a table, each row once a step.

For a touched row x with gradient g (duplicates already summed), learning rate
a and step count t (from 1):

* `sgd`: no state; x -= a g.
* `rowwise_adagrad`: s, one number a row; s += mean(g^2) and
  x -= a g / (sqrt(s) + eps).
* `adagrad`: s, one number an entry; s += g^2 and x -= a g / (sqrt(s) + eps).
* `lazy_adam`: m and v, one number an entry; Adam on the touched rows only,
  bias correction by the global step t.

Row-wise Adagrad is the mean-of-squares form that production embedding engines
call "exact row-wise Adagrad". Lazy Adam differs from Adam in that a row's
moments stand still while the row is not read.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class RowOptimizer(NamedTuple):
  """`init(num_rows, dim) -> state` and `update(grads, state, lr, step)`.

  The state is a dict of arrays whose leading axis is the row; `update` gets
  the touched rows of it and returns (what to subtract from the rows, the new
  state of those rows).
  """

  init: Callable[[int, int], dict[str, Array]]
  update: Callable[..., tuple[Array, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Rule:
  """How the touched rows of one table are updated.

  Attributes:
    optimizer: Its name.
    eps: Added to the root in the divisor; `sgd` has none.
    b1: Decay of lazy Adam's first moment.
    b2: Decay of its second moment.
    weight_decay: L2 pull of the touched rows, added to their gradient.
    clip_norm: Largest norm of a row's gradient; None means no limit.
  """

  optimizer: str
  eps: float = 1e-8
  b1: float = 0.9
  b2: float = 0.999
  weight_decay: float = 0.0
  clip_norm: float | None = None

  def apply(
    self,
    rows: Float[Array, "rows dim"],
    state: dict[str, Array],
    grads: Float[Array, "rows dim"],
    learning_rate: Float[Array, ""],
    step: Int[Array, ""],
    *,
    dim: int | None = None,
  ) -> tuple[Float[Array, "rows dim"], dict[str, Array]]:
    """New rows and state of float32 rows whose gradients are summed.

    Args:
      rows: Their values.
      state: Of these rows.
      grads: Of these rows.
      learning_rate: Step size.
      step: Update count, from 1.
      dim: Entries of a row, behind which lie zeros; None means all.
    """
    if self.weight_decay:
      grads = grads + self.weight_decay * rows
    if self.clip_norm is not None:
      norm = jnp.linalg.norm(grads, axis=-1, keepdims=True)
      grads = grads * jnp.minimum(1.0, self.clip_norm / (norm + 1e-12))
    optimizer = make_row_optimizer(
      self.optimizer, eps=self.eps, b1=self.b1, b2=self.b2, dim=dim
    )
    delta, state = optimizer.update(grads, state, learning_rate, step)
    return rows - delta, state


def make_row_optimizer(
  name: str,
  *,
  eps: float = 1e-8,
  b1: float = 0.9,
  b2: float = 0.999,
  dim: int | None = None,
) -> RowOptimizer:
  """The optimiser called `name`; see the module's table.

  Raises:
    ValueError: If there is none of this name.
  """
  makers = {
    "sgd": sgd,
    "rowwise_adagrad": lambda: rowwise_adagrad(eps=eps, dim=dim),
    "adagrad": lambda: adagrad(eps=eps),
    "lazy_adam": lambda: lazy_adam(b1=b1, b2=b2, eps=eps),
  }
  if name not in makers:
    near = difflib.get_close_matches(str(name), makers, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(
      f"unknown row optimizer {name!r}{hint}; there are " + ", ".join(makers)
    )
  return makers[name]()


def sgd() -> RowOptimizer:
  """Plain gradient descent on touched rows."""

  def init(num_rows: int, dim: int) -> dict[str, Array]:
    del num_rows, dim
    return {}

  def update(grads, state, learning_rate, step):
    del step
    return learning_rate * grads, state

  return RowOptimizer(init, update)


def rowwise_adagrad(
  *, eps: float = 1e-8, dim: int | None = None
) -> RowOptimizer:
  """Adagrad with one accumulator a row: the mean of the squared gradient.

  The mean is over `dim` entries, if zeros follow them.
  """

  def init(num_rows: int, dim: int) -> dict[str, Array]:
    del dim
    return {"sum": jnp.zeros((num_rows,), jnp.float32)}

  def update(
    grads: Float[Array, "rows dim"],
    state: dict[str, Float[Array, " rows"]],
    learning_rate: float | Float[Array, ""],
    step: int | Int[Array, ""],
  ):
    del step
    mean = jnp.sum(grads**2, axis=-1) / (dim or grads.shape[-1])
    total = state["sum"] + mean
    delta = learning_rate * grads / (jnp.sqrt(total) + eps)[:, None]
    return delta, {"sum": total}

  return RowOptimizer(init, update)


def adagrad(*, eps: float = 1e-8) -> RowOptimizer:
  """Adagrad with one accumulator an entry."""

  def init(num_rows: int, dim: int) -> dict[str, Array]:
    return {"sum": jnp.zeros((num_rows, dim), jnp.float32)}

  def update(grads, state, learning_rate, step):
    del step
    total = state["sum"] + grads**2
    return learning_rate * grads / (jnp.sqrt(total) + eps), {"sum": total}

  return RowOptimizer(init, update)


def lazy_adam(
  *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> RowOptimizer:
  """Adam whose moments move only for touched rows."""

  def init(num_rows: int, dim: int) -> dict[str, Array]:
    zeros = jnp.zeros((num_rows, dim), jnp.float32)
    return {"mu": zeros, "nu": jnp.zeros_like(zeros)}

  def update(grads, state, learning_rate, step):
    mu = b1 * state["mu"] + (1 - b1) * grads
    nu = b2 * state["nu"] + (1 - b2) * grads**2
    count = jnp.asarray(step, jnp.float32)
    mu_hat = mu / (1 - b1**count)
    nu_hat = nu / (1 - b2**count)
    delta = learning_rate * mu_hat / (jnp.sqrt(nu_hat) + eps)
    return delta, {"mu": mu, "nu": nu}

  return RowOptimizer(init, update)


def from_storage(rows: Array) -> Float[Array, "*shape"]:
  """Stored rows as float32; uint16 holds the bits of bfloat16."""
  if rows.dtype == jnp.uint16:
    rows = jax.lax.bitcast_convert_type(rows, jnp.bfloat16)
  return rows.astype(jnp.float32)


def to_storage(rows: Float[Array, "*shape"], dtype) -> Array:
  """float32 rows as a table of `dtype` stores them, to the nearest even."""
  if dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
  return rows.astype(dtype)
