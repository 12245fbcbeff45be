"""DIN's pooling of each sequence, then RankMixer.

Sources: Zhou et al., Deep Interest Network, arXiv 1706.06978; Zhu et al.,
RankMixer, arXiv 2507.15551; OneTrans, arXiv 2510.26104, has RankMixer with DIN
in its tables and does not say more of it.

Each sequence is pooled by an activation unit of its own, which sees an event
with its sides and times and the candidate (`layers/events.py`,
`baselines/din.py`), and becomes one token beside those of the other features.

Our choice: the candidate is mapped to the width of an event, so that sequences
of whatever vocabulary have a target; weights are not normalised, as in DIN.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax.baselines import rankmixer
from recjax.baselines.din import (
  ACTIVATIONS,
  NORMALIZATIONS,
  ActivationUnit,
  event_weights,
  weighted_sum,
)
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import events as events_lib
from recjax.layers.events import EventEmbedding, Events, repeat_users
from recjax.layers.features import FeatureTokens
from recjax.schema import Schema, suggest


@dataclasses.dataclass(frozen=True)
class Config(rankmixer.Config):
  """RankMixer's fields, and the sequences.

  Attributes:
    event_dim: Width of an event.
    attention_dims: Widths of the hidden layers of an activation unit.
    normalization: Of the weights of a sequence: `none` or `softmax`.
    activation: `dice` or `prelu`, in the activation unit.
    target_features: Features of the candidate; empty for the one with the
      role `item`.
  """

  event_dim: int = 32
  attention_dims: tuple[int, ...] = (36,)
  normalization: str = "none"
  activation: str = "dice"
  target_features: tuple[str, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_network(self, event_dim=1, attention_dims=1)
    if not self.attention_dims:
      raise UserError(
        "model.attention_dims must name at least one hidden layer: without "
        "one an activation unit is linear and cannot compare event and target"
      )
    for name, allowed in (
      ("normalization", NORMALIZATIONS),
      ("activation", ACTIVATIONS),
    ):
      value = getattr(self, name)
      if value not in allowed:
        raise UserError(
          f"unknown model.{name} {value!r}" + suggest(value, allowed)
        )


class Model(nn.Module):
  """Events weighted by the candidate -> a token a sequence -> RankMixer."""

  config: Config
  schema: Schema

  def setup(self):
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    sequences = events_lib.require_sequences(self.schema, "din_rankmixer")
    if len(sequences) >= config.num_tokens:
      raise UserError(
        f"model.num_tokens ({config.num_tokens}) must be above the number of "
        f"sequences ({len(sequences)}); a token is needed for the other "
        "features"
      )
    self.events = EventEmbedding(self.schema, config.event_dim, dtype)
    self.pools = {f.name: Pool(config) for f in sequences}
    self.tokens = FeatureTokens(
      events_lib.without_sequences(self.schema),
      config.num_tokens - len(sequences),
      config.token_dim,
      config.numeric_dim,
      dtype,
    )
    self.trunk = rankmixer.Trunk(config)

  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    state = self.encode_user(batch, rows, train=train)
    return self.decode(state, batch, rows, train=train)

  def encode_user(
    self,
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    *,
    train: bool = False,
  ) -> dict[str, Events]:
    """Sequence -> its events, before any candidate; see HyFormer."""
    del train
    return self.events(batch, rows["embedding"])

  def decode(
    self,
    state: dict[str, Events],
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    *,
    train: bool = False,
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    """Predictions for examples of the users of `state`; see HyFormer."""
    names = events_lib.target_features(self.schema, self.config.target_features)
    target = jnp.concatenate([rows["embedding"][n] for n in names], axis=-1)
    pooled = [
      self.pools[f.name](state[f.name], target, train)
      for f in self.schema.sequences
    ]
    tokens = self.tokens(batch, rows["embedding"])
    x = jnp.concatenate([jnp.stack(pooled), tokens])
    return self.trunk(x, batch.example_mask, train=train)


class Pool(nn.Module):
  """One sequence as a token, its events weighted by the candidate."""

  config: Config

  @nn.compact
  def __call__(
    self, events: Events, target: Float[Array, "batch width"], train: bool
  ) -> Float[Array, "batch token_dim"]:
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    vectors = repeat_users(events.vectors, target.shape[0])
    mask = repeat_users(events.mask, target.shape[0])
    target = nn.Dense(config.event_dim, dtype=dtype, name="target")(target)
    scores = ActivationUnit(
      config.attention_dims,
      config.activation,
      config.dropout_rate,
      dtype,
      name="attend",
    )(vectors, target, train=train)
    weights = event_weights(scores, mask, config.normalization)
    pooled = weighted_sum(weights.astype(dtype), vectors)
    return nn.Dense(config.token_dim, dtype=dtype, name="project")(pooled)


tables = rankmixer.tables
loss_fn = rankmixer.loss_fn
diagnostics = rankmixer.diagnostics
idle_params = rankmixer.idle_params
