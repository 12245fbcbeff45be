"""X-learner: effects from imputed counterfactuals, in two stages.

Source: Kuenzel et al., Metalearners for estimating heterogeneous treatment
effects using machine learning, arXiv 1706.03461, section 2; here for several
treatments against one control, for response and cost alike.

| paper | code |
| --- | --- |
| stage 1: mu_0, mu_1 | `base`, a network a treatment |
| D^1_i = Y_i - mu_0(X_i), of the treated | `effect_terms`, first half |
| D^0_i = mu_1(X_i) - Y_i, of the controls | second half |
| stage 2: tau_1, tau_0 | `effect_treated`, `effect_control` |
| tau = g tau_0 + (1 - g) tau_1 | `Model`; g is the share of the treatment |
| | among its own people and the controls |

Our choice: g is that share and no model, since the treatments were drawn at
random; effects are counted in standard deviations of the outcome; a cost is
at least 0; the first stage takes half of the steps.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from recjax import losses
from recjax.baselines import two_stage
from recjax.batch import Batch
from recjax.layers import outcomes
from recjax.layers.outcome_network import OutcomeNetwork
from recjax.layers.outcomes import Units
from recjax.schema import Schema
from recjax.stage import Stage


@dataclasses.dataclass(frozen=True)
class Config(two_stage.Config):
  """The fields of `two_stage`; each network is a T-learner's."""

  learner: str = "t"

  def __post_init__(self):
    super().__post_init__()
    self.require_learner("t", "x_learner")


class Model(nn.Module):
  """Outcomes of the control, and what each treatment adds."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Array], dict[str, Any]]:
    config, trial, units = self.config, self.schema.trial, Units.of(self.schema)
    dtype, count = jnp.dtype(config.dtype), trial.num_treatments
    x = two_stage.inputs(config, self.schema, batch, rows)

    def network(name, num_treatments):
      return OutcomeNetwork(
        learner="t",
        num_treatments=num_treatments,
        outcomes=units.names,
        mlp_dims=config.mlp_dims,
        head_dims=config.head_dims,
        dropout_rate=config.dropout_rate,
        dtype=dtype,
        name=name,
      )(x, train=train)

    raw = network("base", count)
    treated = network("effect_treated", count - 1)
    control = network("effect_control", count - 1)
    base = units.predictions(raw)
    share = jnp.asarray(trial.propensities, jnp.float32)
    share = (share[1:] / (share[1:] + share[0]))[None]
    predictions = dict(base)
    for name in units.names:
      effect = share * control[name] + (1.0 - share) * treated[name]
      none = base[name][:, :1]
      added = none + effect * units.scale_of(name)
      predictions[name] = jnp.concatenate([none, added], axis=-1)
    if "cost" in units.names:
      # None costs nothing, so that the effect on the cost is the cost.
      predictions["cost"] = jnp.maximum(predictions["cost"], 0.0)
    aux = {"raw": raw, "units": units, "base": base}
    return predictions, aux | {"treated": treated, "control": control}


tables = two_stage.tables


def base_loss(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """The prediction losses of the first stage."""
  return two_stage.loss_fn(predictions, aux, batch, config)


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """Squared errors of the effects against the imputed ones."""
  del predictions, config
  return {
    f"{name}_effect": effect_term(name, aux, batch)
    for name in aux["units"].names
  }


def effect_term(name: str, aux: dict[str, Any], batch: Batch):
  """One outcome's: the treated against mu_0, the controls against each mu."""
  scale = aux["units"].scale_of(name)
  base = jax.lax.stop_gradient(aux["base"][name]) / scale
  seen = outcomes.observed(batch, name) / scale
  treated, control = aux["treated"][name], aux["control"][name]
  treatment = jnp.where(batch.example_mask, batch.trial.treatment, 0)
  own = jax.nn.one_hot(treatment - 1, treated.shape[-1])
  imputed = (seen - base[:, 0])[:, None]
  error = jnp.sum(own * jnp.square(treated - imputed), axis=-1)
  imputed = base[:, 1:] - seen[:, None]
  error += jnp.where(
    treatment == 0, jnp.mean(jnp.square(control - imputed), axis=-1), 0.0
  )
  return outcomes.weighted_mean(error / base.shape[-1], batch)


STAGES = (
  Stage(
    "base",
    share=0.5,
    trainable=("base/.*", "inputs/.*", "embedding"),
    loss_fn=base_loss,
  ),
  Stage("effect", share=0.5, trainable=("effect_.*",)),
)
