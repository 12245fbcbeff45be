"""E3IR (reconstructed in part): monotone, smooth responses and an allocation.

Source: E3IR, End-to-end cost-effective incentive recommendation under budget
constraint with uplift modeling, arXiv 2408.11623 (RecSys 2024), as restated in
notes. The base outcome and the increments between neighbouring levels are
predicted, the increments made positive and summed; the trunk is kept smooth by
a bound on its Lipschitz constant (Liu et al., arXiv 2202.08345); an allocation
under the budget is part of the loss.

| paper | code |
| --- | --- |
| base outcome, increments, cumulative sum | `OutcomeNetwork`, `monotone` |
| bound c_l of a layer, softplus(c_l) | `LipschitzDense` |
| smoothness, `prod_l softplus(c_l)` | `smoothness` |
| allocation module | `allocation_term` |

Where we depart: the paper differentiates through an integer programme by a
rule that could not be read. Its Lagrangian dual decides each person alone, at
the price that a budget has on the batch, and here that decision is relaxed to
a softmax, so that the loss is what the relaxed allocation earns on the trial.
Our choice: budgets as shares of the way from the cheapest to the dearest
treatment, and standard units (`outcomes.scores`).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import losses
from recjax.baselines import two_stage
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import outcomes, policy_gradients
from recjax.layers.dropout import Dropout
from recjax.layers.outcome_network import OutcomeNetwork
from recjax.layers.outcomes import Units
from recjax.schema import Schema


@dataclasses.dataclass(frozen=True)
class Config(two_stage.Config):
  """The fields of `two_stage`, the smoothness and the allocation.

  Attributes:
    alpha: Weight of the smoothness.
    beta: Weight of the allocation.
    temperature: Of the relaxed allocation, in standard units.
    budgets: Where it is counted: 0 is the cheapest treatment for all, 1 the
      dearest.
  """

  learner: str = "monotone"
  alpha: float = 1e-3
  beta: float = 1.0
  temperature: float = 0.3
  budgets: tuple[float, ...] = (0.3, 0.6)

  def __post_init__(self):
    super().__post_init__()
    self.require_learner("monotone", "e3ir")
    for name in ("alpha", "beta"):
      if not 0 <= getattr(self, name) < float("inf"):
        raise UserError(
          f"model.{name} must be finite and at least 0, got "
          f"{getattr(self, name)}"
        )
    if not 0 < self.temperature < float("inf"):
      raise UserError(
        f"model.temperature must be above 0 and finite, got {self.temperature}"
      )
    if not self.budgets or not all(0 < share < 1 for share in self.budgets):
      raise UserError(
        "model.budgets must name at least one share between 0 and 1, got "
        f"{self.budgets}"
      )


class Model(nn.Module):
  """Features -> smooth trunk -> base and increments of every treatment."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Array], dict[str, Any]]:
    config, units = self.config, Units.of(self.schema)
    dtype = jnp.dtype(config.dtype)
    x = two_stage.inputs(config, self.schema, batch, rows)
    smoothness = jnp.float32(1.0)
    for i, width in enumerate(config.mlp_dims):
      x, bound = LipschitzDense(width, dtype, name=f"mlp_{i}")(x)
      x = Dropout(config.dropout_rate, deterministic=not train)(nn.relu(x))
      smoothness = smoothness * bound
    raw = OutcomeNetwork(
      learner="monotone",
      num_treatments=self.schema.trial.num_treatments,
      outcomes=units.names,
      mlp_dims=(),
      head_dims=config.head_dims,
      increment=config.increment,
      dropout_rate=config.dropout_rate,
      dtype=dtype,
      name="heads",
    )(x, train=train)
    aux = {"raw": raw, "units": units, "smoothness": smoothness}
    return units.predictions(raw), aux


class LipschitzDense(nn.Module):
  """`x W + b` with no column of W above `softplus(c)` in sum of absolutes.

  Then no output moves by more than softplus(c) times the largest move of an
  input; c is learned, from the bound that the initial W just meets.

  Attributes:
    features: Output width.
    dtype: Type of the computation; parameters are float32.
  """

  features: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "batch dim"]
  ) -> tuple[Float[Array, "batch features"], Float[Array, ""]]:
    """The output, and the bound softplus(c)."""
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features)
    )
    bias = self.param("bias", nn.initializers.zeros, (self.features,))

    def initial(_):
      largest = jnp.max(jnp.sum(jnp.abs(kernel), axis=0))
      return jnp.log(jnp.expm1(largest))

    bound = jax.nn.softplus(self.param("bound", initial))
    sums = jnp.sum(jnp.abs(kernel), axis=0)
    kernel = kernel * jnp.minimum(1.0, bound / jnp.maximum(sums, 1e-12))[None]
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    return x @ kernel + bias[None], bound


tables = two_stage.tables


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """The prediction losses, `smoothness` and `allocation`."""
  terms = two_stage.loss_fn(predictions, aux, batch, config)
  count = jnp.sum(batch.example_mask.astype(jnp.float32))
  if config.alpha:
    terms["smoothness"] = (config.alpha * aux["smoothness"] * count, count)
  if config.beta:
    value = allocation_term(predictions, aux["units"], batch, config)
    terms["allocation"] = (-config.beta * value, count)
  return terms


def allocation_term(
  predictions: dict[str, Array],
  units: Units,
  batch: Batch,
  config: Config,
) -> Float[Array, ""]:
  """What the relaxed allocation earns, summed over people, mean over budgets.

  `sum_i w_i (y_i - price z_i) softmax((r_i - price c_i) / temperature)[t_i]`.
  """
  response = jax.lax.stop_gradient(predictions["response"]) / units.scale
  cost = jax.lax.stop_gradient(predictions["cost"]) / units.cost_scale
  budgets = policy_gradients.budgets_per_head(
    cost, batch.example_mask, config.budgets
  )
  total = jnp.float32(0.0)
  for budget in budgets:
    price = policy_gradients.solve_multiplier(
      response, cost, budget, batch.example_mask
    )
    scores = outcomes.scores(predictions, price, units)
    probs = jax.nn.softmax(scores / config.temperature, axis=-1)
    gain = outcomes.gains(batch, price, units)
    total += jnp.sum(gain * outcomes.factual(probs, batch))
  return total / len(config.budgets)
