"""E2E (reconstructed): outcomes fitted to what their allocation earns.

Source: Yan et al., An End-to-End Framework for Marketing Effectiveness
Optimization under Budget Constraint, arXiv 2302.04477. **Reconstructed**: its
abstract and headings could be read, its method sections could not. They say
that the marketing goal is a regulariser of the prediction loss and that its
gradient is estimated; what follows is ours.

    loss = prediction loss - alpha * goal

The goal is what the allocation by the predictions earns on the trial, counted
on the people whose own treatment it happens to name:
`V(S) = sum_i g_i 1[t_i = argmax_j S_ij]` with `S = response - multiplier cost`
and `g_i = w_i (y_i - multiplier z_i)`, averaged over several multipliers.

| here | code |
| --- | --- |
| prediction loss | that of `baselines/two_stage.py`; with `alpha=0` all of it |
| goal, and its gradient | `goal_terms`, `layers/policy_gradients.py` |
| E1, E2, E3, finite difference | `estimator`: `nes` (the likely published
  form), `row_nes`, `softmax`, `finite_difference` |
| prices | `prices`, multipliers |
| budgets | `budgets`; each has a multiplier that the training keeps |

Our choice, all of it, and why:

* V is the Lagrangian value at a multiplier that is held fixed: to first order
  the multiplier's own dependence on the predictions cancels in it.
* The multiplier of a budget is a moving average over batches. It is a
  parameter, its logarithm, that a small term of the loss pulls to the solution
  of each batch, so that it is saved and sharded like any other. AdamW's step
  does not depend on the size of a gradient and is the rate of the average
  (the recipe raises it by `scale_rules`), and the small weight keeps it out of
  the clipping.
* Budgets are shares of the way from the mean cost of the cheapest treatment
  to that of the dearest, by prediction: no unit, no number to look up.
* `center` takes the mean score of a row off its gain, which changes no
  expected gradient and much of its variance.
* Responses, costs and multipliers are in standard units (`outcomes.scores`),
  the noise in standard deviations of the scores (`smoothing`). Wide noise has
  little variance and a bias of its own: where the predictions can be right it
  bends them, so it is narrow by default.
* A warm-up on the prediction loss: at random predictions a policy means
  nothing. Labels are used twice, so the best checkpoint is chosen on held-out
  data, by `eom`.
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
from recjax.schema import Schema, suggest
from recjax.stage import Stage

DRAWING = ("nes", "row_nes")
MAX_LOG_MULTIPLIER = 10.0
PULL = 1e-3  # Weight of the averages in the loss; see above.


@dataclasses.dataclass(frozen=True)
class Config(two_stage.Config):
  """The fields of `two_stage`, and the goal.

  Attributes:
    alpha: Weight of the goal; 0 is the two-stage method.
    estimator: `nes`, `row_nes`, `softmax` or `finite_difference`.
    num_draws: Policies that the first two try each step; even.
    smoothing: Standard deviation of the noise over that of the scores.
    budgets: Where the goal is counted: 0 is the cheapest treatment for all, 1
      the dearest.
    prices: Multipliers to count it at instead, in standard deviations of the
      response for one of the cost; empty for those of the budgets.
    center: Whether a row's mean score is taken off its gain.
    warmup_share: Share of the steps on the prediction loss alone, first.
  """

  alpha: float = 1.0
  estimator: str = "softmax"
  num_draws: int = 32
  smoothing: float = 0.1
  budgets: tuple[float, ...] = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
  prices: tuple[float, ...] = ()
  center: bool = True
  warmup_share: float = 0.3

  def __post_init__(self):
    super().__post_init__()
    known = policy_gradients.ESTIMATORS
    if self.estimator not in known:
      raise UserError(
        f"unknown model.estimator {self.estimator!r}"
        + suggest(self.estimator, known)
      )
    if self.num_draws < 2 or self.num_draws % 2:
      raise UserError(
        f"model.num_draws must be even and at least 2, got {self.num_draws}"
      )
    if not 0 <= self.warmup_share < 1:
      raise UserError(
        f"model.warmup_share must lie in [0, 1), got {self.warmup_share}"
      )
    for name, low in (("alpha", 0.0), ("smoothing", 1e-6)):
      if not low <= getattr(self, name) < float("inf"):
        raise UserError(
          f"model.{name} must be finite and at least {low}, got "
          f"{getattr(self, name)}"
        )
    if not all(0 < share < 1 for share in self.budgets):
      raise UserError(
        f"model.budgets must be shares between 0 and 1, got {self.budgets}"
      )
    if not all(0 <= price < float("inf") for price in self.prices):
      raise UserError(
        f"model.prices must be finite and at least 0, got {self.prices}"
      )
    if not self.prices and not self.budgets:
      raise UserError("model.budgets and model.prices are empty; give one")


class Model(nn.Module):
  """The network of `two_stage`, and the multipliers of the budgets."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Array], dict[str, Any]]:
    config = self.config
    predictions, aux = two_stage.predict(
      config, self.schema, batch, rows, train=train
    )
    if config.alpha and not config.prices:
      aux["log_multiplier"] = self.param(
        "log_multiplier", nn.initializers.zeros, (len(config.budgets),)
      )
    if train and config.estimator in DRAWING:
      aux["rng"] = self.make_rng("dropout")
    return predictions, aux


tables = two_stage.tables


def stages(config: Config) -> tuple[Stage, ...]:
  """A warm-up on the predictions, then the goal."""
  if not config.alpha or not config.warmup_share:
    return (Stage(),)
  return (
    Stage("warmup", share=config.warmup_share, loss_fn=warmup_loss),
    Stage("goal", share=1.0 - config.warmup_share),
  )


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """That of the warm-up, and `goal`: minus alpha times what is earned."""
  terms = warmup_loss(predictions, aux, batch, config)
  if not config.alpha:
    return terms
  return terms | {"goal": goal_term(predictions, aux, batch, config)}


def warmup_loss(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """Prediction losses, and `multiplier`: how far the average is behind."""
  terms = two_stage.loss_fn(predictions, aux, batch, config)
  if "log_multiplier" in aux:
    terms["multiplier"] = multiplier_term(predictions, aux, batch, config)
  return terms


def goal_term(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Minus alpha times the value; its gradient is the estimator's."""
  units = aux["units"]
  if config.prices:
    multipliers = jnp.asarray(config.prices, jnp.float32)
  else:
    multipliers = jnp.exp(jax.lax.stop_gradient(aux["log_multiplier"]))

  def value(multiplier, rng):
    scores = outcomes.scores(predictions, multiplier, units)
    baseline = scores.mean(axis=-1) if config.center else None
    gain = outcomes.gains(batch, multiplier, units, baseline)
    return policy_value(scores, gain, batch, config, rng)

  rngs = None
  if "rng" in aux:
    rngs = jax.random.split(aux["rng"], len(multipliers))
  values = jax.vmap(value, in_axes=(0, None if rngs is None else 0))(
    multipliers, rngs
  )
  count = jnp.sum(batch.example_mask.astype(jnp.float32))
  return -config.alpha * values.mean(), count


def multiplier_term(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """How far each logarithm is from the batch's own, `sqrt(1 + d^2) - 1`."""
  units = aux["units"]
  response = jax.lax.stop_gradient(predictions["response"]) / units.scale
  cost = jax.lax.stop_gradient(predictions["cost"]) / units.cost_scale
  solved = jax.vmap(
    lambda budget: policy_gradients.solve_multiplier(
      response, cost, budget, batch.example_mask
    )
  )(policy_gradients.budgets_per_head(cost, batch.example_mask, config.budgets))
  target = jnp.log(solved + 1e-12)
  target = jnp.clip(target, -MAX_LOG_MULTIPLIER, MAX_LOG_MULTIPLIER)
  away = aux["log_multiplier"] - target
  # Bounded slopes: a price that is far off must not fill the clipped gradient.
  error = PULL * jnp.sum(jnp.sqrt(1.0 + jnp.square(away)) - 1.0)
  count = jnp.sum(batch.example_mask.astype(jnp.float32))
  return error * count, count


def policy_value(
  scores: Float[Array, "batch treatments"],
  gain: Float[Array, " batch"],
  batch: Batch,
  config: Config,
  rng: Array | None,
) -> Float[Array, ""]:
  """What the policy earns on the batch; differentiable by the estimator."""
  treatment = jnp.where(batch.example_mask, batch.trial.treatment, 0)
  fixed = jax.lax.stop_gradient(scores)
  sigma = config.smoothing * policy_gradients.spread(fixed, batch.example_mask)
  gradient = policy_gradients.value_gradient(
    config.estimator,
    fixed,
    treatment,
    gain,
    # Equal scores have no spread, and no choice.
    sigma=jnp.maximum(sigma, 1e-12),
    rng=rng,
    num_draws=config.num_draws,
  )
  # E1 weighs all noise by the whole value, that of the padding too.
  gradient = jnp.where(batch.example_mask[:, None], gradient, 0.0)
  matched = jnp.argmax(fixed, axis=-1) == treatment
  return policy_gradients.surrogate(
    jnp.sum(jnp.where(matched, gain, 0.0)), gradient, scores
  )
