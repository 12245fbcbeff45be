"""PEPNet: gates of the scenario on the inputs, of the user on the towers.

Source: Chang et al., PEPNet, KDD 2023, arXiv 2302.01115.

| paper | code |
| --- | --- |
| Gate Neural Unit: 2 sigmoid(ReLU(x W + b) W' + b') | `GateUnit` |
| E, all embeddings | `inputs`, all features side by side |
| EPNet: O_ep = gate(E(F_d) + stop(E)) * E | `epnet` |
| O_prior: user, item, author | `prior_features`; user and item by default |
| PPNet: delta = gate(O_prior + stop(O_ep)) | `ppnet_<layer>` |
| H' = f((delta * H) W + b), a tower a task | `layer_<i>` |

`+` joins vectors. F_d is the scenario's embedding; without scenarios the gate
has the stopped embeddings alone. Between EPNet and the towers stands a
RankMixer trunk, as in the comparison of MDL (arXiv 2602.07520). What PPNet
stops is the trunk's representation, which the paper does not have. Our choice:
the gates' width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax.baselines import shared_bottom
from recjax.baselines.shared_bottom import Trunk
from recjax.batch import Batch
from recjax.layers.domain_tokens import feature_vectors, important_features
from recjax.layers.dropout import Dropout
from recjax.layers.features import ConcatFeatures, cut_into_tokens
from recjax.layers.per_token import PerTokenDense
from recjax.layers.task_balance import TaskCopies
from recjax.schema import Schema


@dataclasses.dataclass(frozen=True)
class Config(shared_bottom.Config):
  """The trunk's fields, and the gates.

  Attributes:
    tower_dims: Hidden widths of a tower.
    gate_dim: Hidden width of a gate.
    prior_features: Id features of PPNet's prior; empty for user and item.
  """

  tower_dims: tuple[int, ...] = (64,)
  gate_dim: int = 32
  prior_features: tuple[str, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_network(self, tower_dims=1, gate_dim=1)


class Model(nn.Module):
  """Gated features -> trunk -> gated towers."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    config, schema = self.config, self.schema
    dtype, num_tasks = jnp.dtype(config.dtype), len(config.tasks)
    embeddings = rows["embedding"]
    inputs = ConcatFeatures(schema, config.numeric_dim, dtype, name="inputs")(
      batch, embeddings
    )
    stopped = jax.lax.stop_gradient(inputs)
    if schema.roles.scenario is not None:
      scenario = embeddings[schema.roles.scenario].astype(dtype)
      stopped = jnp.concatenate([scenario, stopped], axis=-1)
    inputs *= GateUnit(config.gate_dim, inputs.shape[-1], dtype, name="epnet")(
      stopped
    )
    tokens = PerTokenDense(config.token_dim, dtype, name="project")(
      cut_into_tokens(inputs, config.num_tokens)
    )
    pooled, aux = Trunk(config, schema, name="trunk")(
      batch, embeddings, train=train, tokens=tokens
    )
    names = important_features(schema, config.prior_features)
    prior = feature_vectors(schema, batch, embeddings, names)
    prior = jnp.concatenate(
      [*prior, jax.lax.stop_gradient(pooled)], axis=-1
    ).astype(dtype)
    x, aux["balance"] = TaskCopies(config.balance, num_tasks, name="balance")(
      pooled
    )
    for i, dim in enumerate((*config.tower_dims, 1)):
      width = x.shape[-1]
      gate = GateUnit(
        config.gate_dim, num_tasks * width, dtype, name=f"ppnet_{i}"
      )(prior)
      x *= gate.reshape(-1, num_tasks, width).swapaxes(0, 1)
      last = i == len(config.tower_dims)
      x = PerTokenDense(dim, jnp.float32 if last else dtype, name=f"layer_{i}")(
        x
      )
      if not last:
        x = Dropout(config.dropout_rate, deterministic=not train)(nn.gelu(x))
    return dict(zip(config.tasks, x[..., 0], strict=True)), aux


class GateUnit(nn.Module):
  """`2 sigmoid(ReLU(x W + b) W' + b')`: 1 where it knows nothing.

  Attributes:
    hidden_dim: Inner width.
    features: Output width.
    dtype: Type of the computation.
  """

  hidden_dim: int
  features: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "batch dim"]
  ) -> Float[Array, "batch features"]:
    hidden = nn.Dense(self.hidden_dim, dtype=self.dtype, name="up")(x)
    gate = nn.Dense(self.features, dtype=self.dtype, name="down")
    return 2.0 * jax.nn.sigmoid(gate(nn.relu(hidden)))


tables = shared_bottom.tables
loss_fn = shared_bottom.loss_fn
diagnostics = shared_bottom.diagnostics
idle_params = shared_bottom.idle_params
