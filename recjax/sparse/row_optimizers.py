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

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recjax.errors import UserError
from recjax.schema import suggest


class RowOptimizer(NamedTuple):
  """`init(num_rows, dim) -> state` and `update(grads, state, lr, step)`.

  The state is a dict of arrays whose leading axis is the row; `update` gets
  the touched rows of it and returns (what to subtract from the rows, the new
  state of those rows).
  """

  init: Callable[[int, int], dict[str, Array]]
  update: Callable[..., tuple[Array, dict[str, Array]]]


def make_row_optimizer(name: str, *, eps: float = 1e-8) -> RowOptimizer:
  """The optimiser called `name`; see the module's table."""
  makers = {
    "sgd": sgd,
    "rowwise_adagrad": rowwise_adagrad,
    "adagrad": adagrad,
    "lazy_adam": lazy_adam,
  }
  if name not in makers:
    raise UserError(
      f"unknown sparse optimizer {name!r}" + suggest(name, makers)
    )
  return makers[name](eps=eps)


def sgd(*, eps: float = 0.0) -> RowOptimizer:
  """Plain gradient descent on touched rows; `eps` is not used."""
  del eps

  def init(num_rows: int, dim: int) -> dict[str, Array]:
    del num_rows, dim
    return {}

  def update(grads, state, learning_rate, step):
    del step
    return learning_rate * grads, state

  return RowOptimizer(init, update)


def rowwise_adagrad(*, eps: float = 1e-8) -> RowOptimizer:
  """Adagrad with one accumulator a row: the mean of the squared gradient."""

  def init(num_rows: int, dim: int) -> dict[str, Array]:
    del dim
    return {"sum": jnp.zeros((num_rows,))}

  def update(
    grads: Float[Array, "rows dim"],
    state: dict[str, Float[Array, " rows"]],
    learning_rate: float | Float[Array, ""],
    step: Int[Array, ""],
  ):
    del step
    total = state["sum"] + jnp.mean(grads**2, axis=-1)
    delta = learning_rate * grads / (jnp.sqrt(total) + eps)[:, None]
    return delta, {"sum": total}

  return RowOptimizer(init, update)


def adagrad(*, eps: float = 1e-8) -> RowOptimizer:
  """Adagrad with one accumulator an entry."""

  def init(num_rows: int, dim: int) -> dict[str, Array]:
    return {"sum": jnp.zeros((num_rows, dim))}

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
    return {"mu": jnp.zeros((num_rows, dim)), "nu": jnp.zeros((num_rows, dim))}

  def update(grads, state, learning_rate, step):
    mu = b1 * state["mu"] + (1 - b1) * grads
    nu = b2 * state["nu"] + (1 - b2) * grads**2
    count = step.astype(jnp.float32)
    mu_hat = mu / (1 - b1**count)
    nu_hat = nu / (1 - b2**count)
    delta = learning_rate * mu_hat / (jnp.sqrt(nu_hat) + eps)
    return delta, {"mu": mu, "nu": nu}

  return RowOptimizer(init, update)
