"""Masked losses as (sum, weight) pairs.

A loss never divides: the train step sums numerators and weights over devices
first, so that one device, a mesh and `pmap` give the same value.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from recjax.batch import Batch

Terms = dict[str, tuple[Array, Array]]


def task_losses(
  predictions: dict[str, Float[Array, " batch"]],
  batch: Batch,
) -> Terms:
  """One term a task: cross entropy for binary labels, squared error for real.

  Missing labels and padding do not count.

  Args:
    predictions: Task -> logit, or `symlog` of the expected real label.
    batch: Labels, their kinds and masks.

  Returns:
    Task -> (sum over counted examples, their number).
  """
  terms = {}
  for task, prediction in predictions.items():
    mask = batch.label_mask[task] & batch.example_mask
    labels = batch.labels[task]
    if task in batch.real_labels:
      terms[task] = squared_error(prediction, symlog(labels), mask)
    else:
      terms[task] = binary_cross_entropy(prediction, labels, mask)
  return terms


def plain_loss_fn(
  predictions: dict[str, Float[Array, " batch"]],
  aux: dict[str, Any],
  batch: Batch,
  config: Any,
) -> Terms:
  """The `loss_fn` of a method that has nothing but its tasks' losses."""
  del aux, config
  return task_losses(predictions, batch)


def binary_cross_entropy(
  logits: Float[Array, " batch"],
  labels: Float[Array, " batch"],
  mask: Bool[Array, " batch"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Sum of the cross entropies in nats, and the number of examples."""
  # NaN must not meet the logits: its gradient would be NaN times zero.
  labels = jnp.where(mask, labels, 0.0)
  values = optax.losses.sigmoid_binary_cross_entropy(logits, labels)
  return masked_sum(values, mask)


def squared_error(
  predictions: Float[Array, " batch"],
  targets: Float[Array, " batch"],
  mask: Bool[Array, " batch"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Sum of the squared differences, and the number of examples."""
  targets = jnp.where(mask, targets, 0.0)
  return masked_sum(jnp.square(predictions - targets), mask)


def masked_sum(
  values: Float[Array, "*batch"], mask: Bool[Array, "*batch"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Sum over valid entries and their number; NaN in a masked entry is inert."""
  total = jnp.sum(jnp.where(mask, values, 0.0))
  return total, jnp.sum(mask.astype(jnp.float32))


def symlog(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """`sign(x) log(1 + |x|)`: tames long tails such as play time."""
  return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Inverse of `symlog`."""
  return jnp.sign(x) * jnp.expm1(jnp.abs(x))
