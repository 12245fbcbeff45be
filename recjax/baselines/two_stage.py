"""Two stages: predict response and cost, then allocate by the predictions.

The first stage is this file: outcomes of every treatment, fitted to what each
person's own treatment brought. The second is `recjax.allocation`, which gets
the predictions of any trial method. `learner` names the form of the network;
`s` and `t` are the S- and the T-learner (Kuenzel et al., arXiv 1706.03461),
`shared` is TARNet (arXiv 1606.03976). The X-learner trains in three stages
and has a file of its own.

| DFCL, arXiv 2407.13664 | code |
| --- | --- |
| r_ij, c_ij | `predictions["response"]`, `predictions["cost"]` |
| L_pred, theorem 1 | `loss_fn`, `outcomes.outcome_losses` |

Our choice: the factual loss weighs by one over the propensity and not by the
counts of a batch, so that it is a sum over people; responses and costs are
counted in standard deviations; widths and activations.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import outcomes
from recjax.layers.dropout import Dropout
from recjax.layers.features import ConcatFeatures
from recjax.layers.outcome_network import INCREMENTS, LEARNERS, OutcomeNetwork
from recjax.layers.outcomes import Units
from recjax.schema import Schema, suggest
from recjax.sparse.table import Table, embedding_table


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network.

  Attributes:
    learner: `s`, `t`, `shared` or `monotone`; see `layers/outcome_network.py`.
    mlp_dims: Hidden widths of the trunk (of each network, for `s` and `t`).
    head_dims: Hidden widths that follow for each treatment.
    increment: Of `monotone`: `square` or `exp`.
    embed_dim: Width of an embedding, where the data has ids.
    numeric_dim: Hinges of each dense feature; see `ConcatFeatures`.
    dropout_rate: Share of hidden units dropped in training.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  learner: str = "shared"
  mlp_dims: tuple[int, ...] = (64, 32)
  head_dims: tuple[int, ...] = (32,)
  increment: str = "square"
  embed_dim: int = 8
  numeric_dim: int = 0
  dropout_rate: float = 0.0
  embed_init_scale: float = 0.01
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self, head_dims=1)
    for name, known in (("learner", LEARNERS), ("increment", INCREMENTS)):
      value = getattr(self, name)
      if value not in known:
        raise UserError(
          f"unknown model.{name} {value!r}" + suggest(value, known)
        )

  def require_learner(self, learner: str, method: str) -> None:
    """Raises a `UserError` where a method's network has another form."""
    if self.learner != learner:
      raise UserError(
        f"model.learner of {method} must be {learner!r}, got {self.learner!r}"
      )


class Model(nn.Module):
  """Features side by side -> response and cost of every treatment."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Array], dict[str, Any]]:
    return predict(self.config, self.schema, batch, rows, train=train)


def predict(
  config: Config,
  schema: Schema,
  batch: Batch,
  rows: dict[str, dict[str, Array]],
  *,
  train: bool,
) -> tuple[dict[str, Array], dict[str, Any]]:
  """The whole of `Model`, inside the model that calls it.

  Returns:
    Predictions, and aux: the `raw` outcomes and their `units`.
  """
  units = Units.of(schema)
  raw = OutcomeNetwork(
    learner=config.learner,
    num_treatments=schema.trial.num_treatments,
    outcomes=units.names,
    mlp_dims=config.mlp_dims,
    head_dims=config.head_dims,
    increment=config.increment,
    dropout_rate=config.dropout_rate,
    dtype=jnp.dtype(config.dtype),
    name="network",
  )(inputs(config, schema, batch, rows), train=train)
  return units.predictions(raw), {"raw": raw, "units": units}


def inputs(
  config: Config,
  schema: Schema,
  batch: Batch,
  rows: dict[str, dict[str, Array]],
) -> Float[Array, "batch dim"]:
  """All features side by side, inside the model that calls it."""
  dtype = jnp.dtype(config.dtype)
  return ConcatFeatures(schema, config.numeric_dim, dtype, name="inputs")(
    batch, rows.get("embedding", {})
  )


def trunk(
  config: Config,
  schema: Schema,
  batch: Batch,
  rows: dict[str, dict[str, Array]],
  widths: tuple[int, ...],
  *,
  train: bool,
) -> Float[Array, "batch width"]:
  """The features through hidden layers, inside the model that calls it."""
  x = inputs(config, schema, batch, rows)
  for i, width in enumerate(widths):
    dense = nn.Dense(width, dtype=jnp.dtype(config.dtype), name=f"mlp_{i}")
    x = nn.relu(dense(x))
    x = Dropout(config.dropout_rate, deterministic=not train)(x)
  return x


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """One embedding table for all id features; none where there are no ids."""
  if not schema.id_features:
    return {}
  return {
    "embedding": embedding_table(
      schema, config.embed_dim, init_scale=config.embed_init_scale
    )
  }


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """`response` and, where it is predicted, `cost`."""
  del predictions, config
  return outcomes.outcome_losses(aux["raw"], batch, aux["units"])
