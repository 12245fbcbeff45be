"""DFCL: decision-focused causal learning, with three losses.

Source: Zhou et al., Decision Focused Causal Learning for Direct Counterfactual
Marketing Optimization, arXiv 2407.13664 (KDD 2024), as restated in notes and
in Bi-DFCL, arXiv 2510.19517, whose algorithm 5 gives the rule of `ifd`.

| paper | code |
| --- | --- |
| L = alpha L_pred + L_decision | `loss_fn`, `alpha` |
| Lagrange multipliers lambda | `prices` |
| PL, `-sum_i w_i (y_i - lambda z_i) softmax(r - lambda c)[t_i]` | `pl` |
| MER, the same with a temperature | `mer`, `temperature` |
| IFD, finite differences of the dual value | `ifd`, `min_gap` |
| half of the epochs on L_pred first | `warmup_share` |

Our choice: weights are one over the propensity; the decision loss is a mean
over prices and people; responses, costs and prices are in standard units
(`outcomes.scores`), where the paper's data has both in events a person.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import losses
from recjax.baselines import two_stage
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import outcomes, policy_gradients
from recjax.schema import suggest
from recjax.stage import Stage

DECISION_LOSSES = ("pl", "mer", "ifd")


@dataclasses.dataclass(frozen=True)
class Config(two_stage.Config):
  """The fields of `two_stage`, and the decision loss.

  Attributes:
    loss: `pl`, `mer` or `ifd`.
    alpha: Weight of the prediction loss, above 0.
    prices: Multipliers, in standard deviations of the response for one of the
      cost; small ones serve large budgets.
    temperature: Of `mer`; with 1 it is `pl`.
    min_gap: Of `ifd`: gaps of scores below it count as it.
    warmup_share: Share of the steps on the prediction loss alone, first.
  """

  loss: str = "ifd"
  alpha: float = 1.0
  prices: tuple[float, ...] = (0.1, 0.5, 1.0)
  temperature: float = 3.0
  min_gap: float = 0.05
  warmup_share: float = 0.5

  def __post_init__(self):
    super().__post_init__()
    if self.loss not in DECISION_LOSSES:
      raise UserError(
        f"unknown model.loss {self.loss!r}"
        + suggest(self.loss, DECISION_LOSSES)
      )
    for name in ("alpha", "temperature", "min_gap"):
      if not 0 < getattr(self, name) < float("inf"):
        raise UserError(
          f"model.{name} must be above 0 and finite, got {getattr(self, name)}"
        )
    if not 0 <= self.warmup_share < 1:
      raise UserError(
        f"model.warmup_share must lie in [0, 1), got {self.warmup_share}"
      )
    if not self.prices or not all(
      0 <= price < float("inf") for price in self.prices
    ):
      raise UserError(
        "model.prices must name at least one multiplier, finite and at least "
        f"0, got {self.prices}"
      )


Model = two_stage.Model
tables = two_stage.tables


def stages(config: Config) -> tuple[Stage, ...]:
  """The predictions first, then the decisions too."""
  if not config.warmup_share:
    return (Stage(),)
  return (
    Stage("warmup", share=config.warmup_share, loss_fn=warmup_loss),
    Stage("decision", share=1.0 - config.warmup_share),
  )


def warmup_loss(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """Alpha times the prediction losses."""
  terms = two_stage.loss_fn(predictions, aux, batch, config)
  return {k: (config.alpha * v, weight) for k, (v, weight) in terms.items()}


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """The prediction losses, and `decision`."""
  terms = warmup_loss(predictions, aux, batch, config)
  values = []
  for price in config.prices:
    scores = outcomes.scores(predictions, price, aux["units"])
    gain = outcomes.gains(batch, price, aux["units"])
    values.append(policy_value(scores, gain, batch, config))
  count = jnp.sum(batch.example_mask.astype(jnp.float32))
  return terms | {"decision": (-sum(values) / len(values), count)}


def policy_value(
  scores: Float[Array, "batch treatments"],
  gain: Float[Array, " batch"],
  batch: Batch,
  config: Config,
) -> Float[Array, ""]:
  """What a policy earns: the softmax policy's, or the dual decision's."""
  if config.loss != "ifd":
    temperature = config.temperature if config.loss == "mer" else 1.0
    probs = jax.nn.softmax(scores / temperature, axis=-1)
    return jnp.sum(gain * outcomes.factual(probs, batch))
  fixed = jax.lax.stop_gradient(scores)
  treatment = jnp.where(batch.example_mask, batch.trial.treatment, 0)
  gradient = policy_gradients.finite_difference(
    fixed, treatment, gain, config.min_gap
  )
  matched = jnp.argmax(fixed, axis=-1) == treatment
  return policy_gradients.surrogate(
    jnp.sum(jnp.where(matched, gain, 0.0)), gradient, scores
  )
