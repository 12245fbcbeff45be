"""What trial methods share: outcomes in their own units, losses and gains.

Predictions of a trial method are `response` and `cost`, `[batch, treatments]`
each, in the units of the data. The network works on raw numbers: a binary
response is a logit, a real one is counted from the trial's mean in standard
deviations, a cost is a `softplus` in standard deviations. Where the data
states the cost of each treatment it is taken as it stands.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from recjax import losses
from recjax.batch import Batch
from recjax.schema import Schema

COST_FLOOR = 1e-6  # In standard deviations: keeps every ratio finite.


@dataclasses.dataclass(frozen=True)
class Units:
  """How raw numbers and outcomes hang together; see the module.

  Attributes:
    is_binary: Whether the response is 0 or 1.
    mean, scale: Of the response in the training part, in its unit.
    cost_scale: Standard deviation of the cost there, in its unit.
    known_cost: The cost of each treatment, where the data states it.
  """

  is_binary: bool
  mean: float
  scale: float
  cost_scale: float
  known_cost: tuple[float, ...] | None

  @classmethod
  def of(cls, schema: Schema):
    """The units of a prepared trial."""
    trial = schema.trial
    return cls(
      is_binary=trial.is_binary,
      mean=trial.response_mean,
      scale=trial.response_std or 1.0,
      cost_scale=trial.cost_std or 1.0,
      known_cost=trial.known_cost,
    )

  @property
  def names(self) -> tuple[str, ...]:
    """Outcomes that a network must predict."""
    return ("response",) if self.known_cost else ("response", "cost")

  def scale_of(self, name: str) -> float:
    """Standard deviation of an outcome."""
    return self.scale if name == "response" else self.cost_scale

  @property
  def base_logit(self) -> float:
    """That of the mean: rare events are not learned from one half on."""
    rate = min(max(self.mean, 1e-6), 1 - 1e-6)
    return math.log(rate) - math.log1p(-rate)

  def response(self, raw: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Raw numbers as expected responses."""
    if self.is_binary:
      return jax.nn.sigmoid(raw + self.base_logit)
    return self.mean + self.scale * raw

  def cost(self, raw: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Raw numbers as expected costs, above 0."""
    return self.cost_scale * (jax.nn.softplus(raw) + COST_FLOOR)

  def predictions(
    self, raw: Mapping[str, Float[Array, "batch treatments"]]
  ) -> dict[str, Float[Array, "batch treatments"]]:
    """Response and cost of every treatment, in the units of the data."""
    response = self.response(raw["response"])
    if self.known_cost is not None:
      cost = jnp.asarray(self.known_cost, jnp.float32)
      cost = jnp.broadcast_to(cost, response.shape)
    else:
      cost = self.cost(raw["cost"]).at[:, 0].set(0.0)
    return {"response": response, "cost": cost}


def weights(batch: Batch) -> Float[Array, " batch"]:
  """One over the propensity of each one's treatment; 0 for padding."""
  propensity = jnp.where(batch.example_mask, batch.trial.propensity, 1.0)
  return jnp.where(batch.example_mask, 1.0 / propensity, 0.0)


def factual(
  outcome: Float[Array, "batch treatments"], batch: Batch
) -> Float[Array, " batch"]:
  """The entry of the treatment that each one had; 0 for padding."""
  treatment = jnp.where(batch.example_mask, batch.trial.treatment, 0)
  found = jnp.take_along_axis(outcome, treatment[:, None], axis=-1)[:, 0]
  return jnp.where(batch.example_mask, found, 0.0)


def observed(batch: Batch, name: str) -> Float[Array, " batch"]:
  """`response` or `cost` as it was; 0 for padding."""
  return jnp.where(batch.example_mask, getattr(batch.trial, name), 0.0)


def outcome_losses(
  raw: Mapping[str, Float[Array, "batch treatments"]],
  batch: Batch,
  units: Units,
) -> losses.Terms:
  """Errors on what was seen, each weighted by one over its propensity.

  `1/T sum_i w_i (y_i - r_i[t_i])^2`, in units of the trial's variance: under
  randomisation an unbiased estimate of the error over the whole table (DFCL,
  arXiv 2407.13664, theorem 1). Cross entropy for a binary response.
  """
  num = raw["response"].shape[-1]
  terms = {}
  for name in units.names:
    error = factual_error(name, factual(raw[name], batch), batch, units)
    terms[name] = weighted_mean(error / num, batch)
  return terms


def factual_error(
  name: str, raw: Float[Array, " batch"], batch: Batch, units: Units
) -> Float[Array, " batch"]:
  """Error of the raw outcome of each one's own treatment."""
  seen = observed(batch, name)
  if name == "cost":
    seen = seen / units.cost_scale
    return jnp.square(jax.nn.softplus(raw) + COST_FLOOR - seen)
  if units.is_binary:
    logits = raw + units.base_logit
    return optax.losses.sigmoid_binary_cross_entropy(logits, seen)
  return jnp.square(raw - (seen - units.mean) / units.scale)


def weighted_mean(
  values: Float[Array, " batch"], batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Values times `weights`, summed, and the number of people."""
  count = jnp.sum(batch.example_mask.astype(jnp.float32))
  return jnp.sum(weights(batch) * values), count


def scores(
  predictions: Mapping[str, Float[Array, "batch treatments"]],
  multiplier: Float[Array, ""] | float,
  units: Units,
) -> Float[Array, "batch treatments"]:
  """Response minus multiplier times cost, in standard units.

  In these a response is divided by its standard deviation in the trial, a cost
  by that of the cost, and a multiplier is a ratio of the two.
  """
  response = predictions["response"] / units.scale
  return response - multiplier * (predictions["cost"] / units.cost_scale)


def gains(
  batch: Batch,
  multiplier: Float[Array, ""] | float,
  units: Units,
  baseline: Float[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
  """`w_i (y_i - multiplier z_i - b_i)`: what a match with i is worth.

  Args:
    batch: The trial.
    multiplier: Price of a unit of cost, in standard units as in `scores`.
    units: Of the trial.
    baseline: b, any function of the features: each policy matches everyone
      with the same weight on average, so that it changes no gradient but its
      variance.
  """
  value = observed(batch, "response") / units.scale
  value = value - multiplier * (observed(batch, "cost") / units.cost_scale)
  if baseline is not None:
    value = value - jax.lax.stop_gradient(baseline)
  return weights(batch) * value
