"""Balances the losses of tasks that share a representation.

A model gives each task its own copy of the shared representation. Backwards
the copies tell what each task asks of it, and this is where the methods act:
the trunk below is passed once, so their cost does not grow with the model.

| word | what the trunk gets |
| --- | --- |
| `none` | the sum of the tasks' gradients |
| `uncertainty` | the same of `L_t exp(-s_t) + s_t / 2`, s_t learned |
| `gradnorm` | the sum weighted by w_t, learned so that the norms meet |
| `multibalance` | the min-norm combination of the unit gradients |

Sources: Kendall et al., arXiv 1705.07115 (squared error weighs half as much,
as there); Chen et al., GradNorm, arXiv 1711.02257; He et al., MultiBalance,
arXiv 2411.11871, which takes gradients of the representation in place of the
parameters; Desideri's min-norm point by Frank and Wolfe's steps, as in Sener
and Koltun, arXiv 1810.04650.

Where we depart: nothing here has a memory beside its parameters. So `gradnorm`
measures a task's rate of training against the loss of knowing nothing (log 2,
or the mean square of a real label) and not of its first step, which the paper
allows; and `multibalance` takes the norms of this batch and no moving average
of them. The weights act on the trunk alone: each head trains on its own loss.
Under `pmap` norms are those of the device's examples.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.losses import Terms

KINDS = ("none", "uncertainty", "gradnorm", "multibalance")
COPIES = "shared"  # Name of the copies among Linen's perturbations.
NUM_STEPS = 50  # Of the search for the min-norm point.


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
  """How the losses of tasks are balanced.

  Attributes:
    kind: One of `KINDS`.
    task_weights: Fixed weight of each task's loss, in the order of the tasks;
      empty for 1.
    alpha: `gradnorm`: how much more a task that trains slowly gets.
  """

  kind: str = "none"
  task_weights: tuple[float, ...] = ()
  alpha: float = 1.5

  def check(self, tasks: tuple[str, ...]):
    """Raises a `UserError` unless the words fit the tasks."""
    if self.kind not in KINDS:
      raise UserError(
        f"model.balance.kind must be one of {', '.join(KINDS)}, got "
        f"{self.kind!r}"
      )
    weights = self.task_weights
    if weights and len(weights) != len(tasks):
      raise UserError(
        f"model.balance.task_weights must hold one number a task "
        f"({len(tasks)}), got {weights}"
      )
    if any(not 0 < weight < math.inf for weight in weights):
      raise UserError(
        f"model.balance.task_weights must be above 0 and finite, got {weights}"
      )


class TaskCopies(nn.Module):
  """Copies of a shared representation, one a task.

  Attributes:
    config: What is done to their gradients.
    num_tasks: Tasks.
  """

  config: BalanceConfig
  num_tasks: int

  @nn.compact
  def __call__(
    self, shared: Float[Array, "..."]
  ) -> tuple[Float[Array, "tasks ..."], dict[str, Array]]:
    """The copies, and what `balance_terms` needs."""
    kind, shape = self.config.kind, (self.num_tasks,)
    aux = {}
    if kind == "gradnorm":
      logits = self.param("weight_logits", nn.initializers.zeros, shape)
      weights = self.num_tasks * jax.nn.softmax(logits)
      copies, aux["rates"] = weighted_copies(shared, weights, self.config.alpha)
    elif kind == "multibalance":
      copies = min_norm_copies(shared, self.num_tasks)
    else:
      copies = _copy(shared, self.num_tasks)
    if kind == "uncertainty":
      aux["log_variance"] = self.param(
        "log_variance", nn.initializers.zeros, shape
      )
    return self.perturb(COPIES, copies), aux


def balance_terms(
  terms: Terms, aux: dict[str, Array], batch: Batch, config: Any
) -> Terms:
  """What balancing adds to the losses of the tasks.

  Args:
    terms: Task -> (sum, weight), as in `losses.task_losses`.
    aux: From `TaskCopies`.
    batch: The examples.
    config: Has `tasks` and `balance`.

  Returns:
    `<task>_balance`: what weighting adds to a task's loss, so that the term of
    the task itself stays comparable; `balance`: the loss of the weights.
  """
  tasks, balance = config.tasks, config.balance
  factors = dict.fromkeys(tasks, 1.0)
  if balance.task_weights:
    factors = dict(zip(tasks, balance.task_weights, strict=True))
  added = {}
  if "log_variance" in aux:
    for i, task in enumerate(tasks):
      half = 0.5 if task in batch.real_labels else 1.0
      factors[task] *= half * jnp.exp(-aux["log_variance"][i])
    added["balance"] = (aux["log_variance"].sum() / 2, jnp.float32(1.0))
  if "rates" in aux:
    rates = jnp.stack([_training_rate(terms[t], t, batch) for t in tasks])
    rates = jax.lax.stop_gradient(rates / jnp.maximum(rates.mean(), 1e-12))
    # Zero in value: it only hands the rates to the backward pass.
    added["balance"] = (jnp.vdot(aux["rates"], rates), jnp.float32(1.0))
  if balance.task_weights or "log_variance" in aux:
    for task, factor in factors.items():
      total, weight = terms[task]
      added[f"{task}_balance"] = ((factor - 1.0) * total, weight)
  return added


def _training_rate(term, task: str, batch: Batch) -> Float[Array, ""]:
  """The loss over the loss of knowing nothing."""
  total, weight = term
  start = math.log(2.0) * weight
  if task in batch.real_labels:
    mask = batch.label_mask[task] & batch.example_mask
    square = jnp.square(losses.symlog(batch.labels[task]))
    start = losses.masked_sum(square, mask)[0]
  return total / jnp.maximum(start, 1e-12)


def _copy(shared, num_tasks: int):
  return jnp.broadcast_to(shared[None], (num_tasks, *shared.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def weighted_copies(
  shared: Float[Array, "..."], weights: Float[Array, " tasks"], alpha: float
) -> tuple[Float[Array, "tasks ..."], Float[Array, " tasks"]]:
  """Copies whose gradients are summed with weights that learn; GradNorm.

  The second result is zero; whoever multiplies it by the tasks' relative
  rates of training r and adds it to the loss hands r to the backward pass.
  There the gradient of `shared` is `sum_t w_t g_t`, and that of `weights` the
  one of `sum_t |w_t |g_t| - mean(w |g|) r_t ** alpha|`, the target constant.
  """
  del alpha
  return _copy(shared, weights.shape[0]), jnp.zeros_like(weights)


def _weighted_fwd(shared, weights, alpha):
  return weighted_copies(shared, weights, alpha), weights


def _weighted_bwd(alpha, weights, grads):
  grads, rates = grads
  norms = jnp.sqrt(jnp.diagonal(gram_matrix(grads)))
  scaled = weights * norms
  target = scaled.mean() * jnp.maximum(rates, 0.0) ** alpha
  shared = jnp.tensordot(weights.astype(grads.dtype), grads, axes=1)
  return shared, jnp.sign(scaled - target) * norms


weighted_copies.defvjp(_weighted_fwd, _weighted_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def min_norm_copies(
  shared: Float[Array, "..."], num_tasks: int
) -> Float[Array, "tasks ..."]:
  """Copies whose gradients are combined as MultiBalance does.

  Backwards `c sum_t l_t g_t / |g_t|` with l the weights of the min-norm point
  and c the sum of the norms, so that equal norms at equal weights give the
  plain sum.
  """
  return _copy(shared, num_tasks)


def _min_norm_fwd(shared, num_tasks):
  return min_norm_copies(shared, num_tasks), None


def _min_norm_bwd(num_tasks, residual, grads):
  del num_tasks, residual
  products = gram_matrix(grads)
  norms = jnp.sqrt(jnp.diagonal(products))
  inverse = jnp.where(norms > 0, 1.0 / jnp.maximum(norms, 1e-30), 0.0)
  weights = min_norm_weights(products * jnp.outer(inverse, inverse))
  weights = weights * inverse * norms.sum()
  return (jnp.tensordot(weights.astype(grads.dtype), grads, axes=1),)


min_norm_copies.defvjp(_min_norm_fwd, _min_norm_bwd)


def gram_matrix(
  grads: Float[Array, "tasks ..."],
) -> Float[Array, "tasks tasks"]:
  """Inner products of the tasks' gradients, in float32."""
  flat = grads.reshape(grads.shape[0], -1).astype(jnp.float32)
  return flat @ flat.T


def min_norm_weights(
  products: Float[Array, "tasks tasks"],
) -> Float[Array, " tasks"]:
  """Weights on the simplex that make `l' M l` least, by Frank and Wolfe.

  Args:
    products: Inner products of the vectors that are combined.
  """
  num_tasks = products.shape[0]

  def step(_, weights):
    along = products @ weights
    corner = jax.nn.one_hot(jnp.argmin(along), num_tasks)
    towards = corner - weights
    curvature = towards @ products @ towards
    size = -(towards @ along) / jnp.maximum(curvature, 1e-12)
    return weights + jnp.clip(size, 0.0, 1.0) * towards

  start = jnp.full(num_tasks, 1.0 / num_tasks)
  return jax.lax.fori_loop(0, NUM_STEPS, step, start)
