"""DRP and DPM: the return on investment itself is learned.

Source: Zhou et al., Direct Heterogeneous Causal Learning for Resource
Allocation Problems in Marketing, arXiv 2211.15728 (AAAI 2023). With one
treatment (DRP) people are sorted by the ratio of what it adds to what it
costs; with several levels (DPM) the ratio is that of each level to the one
before, and falls from level to level.

For a pair of neighbouring levels, sigma the sigmoid and s the network's
output, the loss is

    -[ mean over the upper of (y s + z ln(1 - sigma(s)))
       - mean over the lower of (y s + z ln(1 - sigma(s))) ]

Its derivative by s is `-(dy - dz sigma(s))`, dy and dz the differences of the
means: it is 0 where sigma(s) is the ratio dy / dz, and the loss is convex
where the upper level costs more.

| paper | code |
| --- | --- |
| decision factor, ROI | `ratios` |
| DRP, DPM loss | `ratio_terms` |
| diminishing marginal utility | `falling_logits` |

Reconstructed: the form of the loss is from restatements. Our choice: ratios
lie in (0, `max_ratio`) in standard units (`outcomes.scores`); means weigh by
one over the propensity; a fall is a `softplus`. The method predicts no
outcomes, and an allocation needs some: the control's response and all costs
have a prediction loss, and a response is the one before plus ratio times the
difference in cost, which leaves every decision to the ratios.
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
from recjax.layers import outcomes
from recjax.layers.outcomes import Units
from recjax.schema import Schema


@dataclasses.dataclass(frozen=True)
class Config(two_stage.Config):
  """The fields of `two_stage`, and the range of the ratios.

  Attributes:
    max_ratio: Largest ratio, in standard deviations of the response for one
      of the cost.
  """

  max_ratio: float = 4.0

  def __post_init__(self):
    super().__post_init__()
    self.require_learner("shared", "drp")
    if not 0 < self.max_ratio < float("inf"):
      raise UserError(
        f"model.max_ratio must be above 0 and finite, got {self.max_ratio}"
      )


class Model(nn.Module):
  """Features -> trunk -> ratios, the control's response and costs."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Array], dict[str, Any]]:
    config, units = self.config, Units.of(self.schema)
    num = self.schema.trial.num_treatments
    x = two_stage.trunk(
      config,
      self.schema,
      batch,
      rows,
      (*config.mlp_dims, *config.head_dims),
      train=train,
    )

    def head(width, name):
      return nn.Dense(width, dtype=jnp.float32, name=name)(x)

    logits = falling_logits(head(num - 1, "ratios"))
    raw = {"response": head(1, "control")}
    if "cost" in units.names:
      raw["cost"] = head(num, "cost")
    predictions = units.predictions(
      raw | {"response": jnp.broadcast_to(raw["response"], (len(x), num))}
    )
    ratios = config.max_ratio * jax.nn.sigmoid(logits)
    # A ratio of standard units, and what it is worth in the data's.
    worth = ratios * (units.scale / units.cost_scale)
    steps = worth * jnp.diff(predictions["cost"], axis=-1)
    added = jnp.pad(jnp.cumsum(steps, axis=-1), ((0, 0), (1, 0)))
    predictions["response"] = predictions["response"] + added
    return predictions, {"raw": raw, "units": units, "logits": logits}


tables = two_stage.tables


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """`ratio`, and the errors of the control's response and of the costs."""
  units, raw = aux["units"], aux["raw"]
  num = predictions["response"].shape[-1]
  is_control = batch.trial.treatment == 0
  error = outcomes.factual_error(
    "response", raw["response"][:, 0], batch, units
  )
  terms = {
    "ratio": ratio_term(aux["logits"], batch, units, config.max_ratio),
    "response": outcomes.weighted_mean(
      jnp.where(is_control, error, 0.0), batch
    ),
  }
  if "cost" in units.names:
    cost = outcomes.factual(raw["cost"], batch)
    error = outcomes.factual_error("cost", cost, batch, units)
    terms["cost"] = outcomes.weighted_mean(error / num, batch)
  return terms


def ratio_term(
  logits: Float[Array, "batch pairs"],
  batch: Batch,
  units: Units,
  max_ratio: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """The loss over all pairs of neighbouring levels, summed."""
  response = outcomes.observed(batch, "response") / units.scale / max_ratio
  cost = outcomes.observed(batch, "cost") / units.cost_scale
  value = response[:, None] * logits
  value = value + cost[:, None] * jax.nn.log_sigmoid(-logits)
  pair = jnp.arange(logits.shape[-1])[None]
  treatment = batch.trial.treatment[:, None]
  upper = (treatment == pair + 1).astype(value.dtype)
  lower = (treatment == pair).astype(value.dtype)
  signed = jnp.sum((upper - lower) * value, axis=-1)
  return outcomes.weighted_mean(-signed, batch)


def falling_logits(raw: Float[Array, "batch pairs"]):
  """The first as it is, each later one lower by a `softplus`."""
  steps = jnp.concatenate([raw[:, :1], -jax.nn.softplus(raw[:, 1:])], axis=-1)
  return jnp.cumsum(steps, axis=-1)
