"""How the losses of tasks pull at what they share: norms and cosines.

A method for several tasks hands each its own copy of the last representation
that they share (Linen's `perturb`, under the name `task_balance.COPIES`). One
backward pass from the sum of the losses then gives the gradient of every task
apart, and nothing below the copies is differentiated.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from recjax import parallel
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import task_balance
from recjax.losses import task_losses
from recjax.method import Method, empty_batch
from recjax.train_state import TrainState


def gram(
  state: TrainState, batch: Batch, method: Method
) -> Float[Array, "tasks tasks"]:
  """Inner products of the tasks' gradients at their copies; jit it.

  The gradients are those of each task's mean loss over its known labels, with
  respect to the shared representation of every example. Dropout is off.

  Args:
    state: Parameters (the average that evaluation uses) and tables.
    batch: The examples.
    method: Hands out copies.

  Raises:
    UserError: If the method shares nothing that it could hand out by task.
  """
  params, tables = state.eval_params, state.tables
  shapes = _copies(method, params, tables, batch)
  rows = method.read(tables, batch)

  def loss(perturbations):
    predictions, *_ = method.apply(
      params,
      tables,
      rows,
      batch,
      train=False,
      perturbations=perturbations,
    )
    terms = task_losses(predictions, batch)
    return sum(v / jnp.maximum(w, 1.0) for v, w in terms.values())

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (copies,) = jax.tree.leaves(jax.grad(loss)(zeros))
  return task_balance.gram_matrix(copies)


def compiled(
  method: Method, placement: parallel.MeshPlacement | parallel.PmapPlacement
) -> Callable[[TrainState, Batch], dict[str, float]]:
  """`f(state, batch)`, the `norms_and_cosines` of a batch in its place.

  Raises:
    UserError: As `gram`, at once.
  """
  batch = empty_batch(method.schema, method.tasks)
  jax.eval_shape(
    lambda rng: _copies(method, *method.init(rng), batch) and None,
    jax.random.key(0),
  )
  run = placement.compile_eval(functools.partial(gram, method=method))

  def measure(state: TrainState, batch: Batch) -> dict[str, float]:
    products = run(placement.eval_state(state), batch)
    return norms_and_cosines(np.asarray(products), method.tasks)

  return measure


def norms_and_cosines(
  products: Float[np.ndarray, "tasks tasks"], tasks: tuple[str, ...]
) -> dict[str, float]:
  """Names and numbers to log.

  Args:
    products: From `gram`, or the sum of several.
    tasks: Their names.

  Returns:
    `<task>/gradient_norm`, and `<task>/<other>/gradient_cosine` of each pair;
    NaN where a gradient is zero.

  Example:
    >>> values = norms_and_cosines(np.array([[4., -2.], [-2., 1.]]), ("a", "b"))
    >>> values["a/gradient_norm"], values["a/b/gradient_cosine"]
    (2.0, -1.0)
  """
  products = np.asarray(products, np.float64)
  norms = np.sqrt(np.diagonal(products))
  values = {
    f"{task}/gradient_norm": float(norm)
    for task, norm in zip(tasks, norms, strict=True)
  }
  for i, task in enumerate(tasks):
    for j in range(i + 1, len(tasks)):
      length = norms[i] * norms[j]
      cosine = products[i, j] / length if length > 0 else np.nan
      values[f"{task}/{tasks[j]}/gradient_cosine"] = float(cosine)
  return values


def _copies(method: Method, params, tables, batch: Batch):
  """Shapes of what is handed out to the tasks."""
  shapes = method.perturbation_shapes(params, tables, batch)
  if not shapes:
    raise UserError(
      f"model {method.name!r} hands no copy of a representation to each task; "
      "use a method for several tasks, such as mdl or shared_bottom"
    )
  return shapes
