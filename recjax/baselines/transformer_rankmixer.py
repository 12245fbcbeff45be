"""A Transformer over each sequence, then RankMixer.

Sources: HyFormer, arXiv 2601.12681, which compares with "Transformer ->
RankMixer" and does not say what is inside; Vaswani et al., arXiv 1706.03762;
Zhu et al., RankMixer, arXiv 2507.15551.

Our choice: `num_encoder_layers` layers of full self-attention that normalise
first, over all events and nothing else; then the candidate attends to them
once, with `num_queries` queries for each sequence. What these find are tokens
beside those of the other features.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recjax import config as config_lib
from recjax.baselines import rankmixer
from recjax.baselines.longer import check_mlp_ratio, num_feature_tokens
from recjax.batch import Batch
from recjax.layers import events as events_lib
from recjax.layers.attention import (
  Attention,
  KeysValues,
  TransformerLayer,
  check_attention,
)
from recjax.layers.events import EventEmbedding, Events
from recjax.layers.features import FeatureTokens
from recjax.schema import Schema


@dataclasses.dataclass(frozen=True)
class Config(rankmixer.Config):
  """RankMixer's fields, and the sequences.

  Attributes:
    event_dim: Width of an event.
    num_queries: Tokens that each sequence gives; of `num_tokens`.
    num_heads: Attention heads.
    num_encoder_layers: Layers of self-attention over a sequence.
    encoder_mlp_ratio: Inner width of a layer's network over `event_dim`.
    target_features: Features of the candidate; empty for the one with the
      role `item`.
    attention: `xla` or `tokamax`; see `layers/attention.py`.
    attention_chunk: Queries of an attention done at a time; 0 for all.
    remat: True computes layers once more in the backward pass, to hold less
      memory.
  """

  event_dim: int = 32
  num_queries: int = 1
  num_heads: int = 4
  num_encoder_layers: int = 1
  encoder_mlp_ratio: float = 4.0
  target_features: tuple[str, ...] = ()
  attention: str = "xla"
  attention_chunk: int = 0
  remat: bool = False

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_network(
      self,
      event_dim=1,
      num_queries=1,
      num_encoder_layers=1,
      attention_chunk=0,
    )
    check_mlp_ratio(self.encoder_mlp_ratio)
    check_attention(self.event_dim, self.num_heads, self.attention, "event_dim")


class SequenceState(NamedTuple):
  """What the candidates of a user share of one sequence."""

  keys_values: KeysValues
  mask: Bool[Array, "users length"]


class Model(nn.Module):
  """Encoded events -> what the candidate finds -> RankMixer."""

  config: Config
  schema: Schema

  def setup(self):
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    num_features = num_feature_tokens(
      config, self.schema, "transformer_rankmixer"
    )
    self.events = EventEmbedding(self.schema, config.event_dim, dtype)
    self.readers = {f.name: Reader(config) for f in self.schema.sequences}
    self.tokens = FeatureTokens(
      events_lib.without_sequences(self.schema),
      num_features,
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
  ) -> dict[str, SequenceState]:
    """Sequence -> what does not depend on the candidate; see HyFormer."""
    events = self.events(batch, rows["embedding"])
    return {
      name: self.readers[name].encode(sequence, train)
      for name, sequence in events.items()
    }

  def decode(
    self,
    state: dict[str, SequenceState],
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    *,
    train: bool = False,
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    """Predictions for examples of the users of `state`; see HyFormer."""
    names = events_lib.target_features(self.schema, self.config.target_features)
    target = jnp.concatenate([rows["embedding"][n] for n in names], axis=-1)
    tokens = [
      self.readers[f.name].read(state[f.name], target)
      for f in self.schema.sequences
    ]
    tokens.append(self.tokens(batch, rows["embedding"]))
    x = jnp.concatenate(tokens)
    return self.trunk(x, batch.example_mask, train=train)


class Reader(nn.Module):
  """One sequence, and what the candidate finds in it."""

  config: Config

  def setup(self):
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    kind = TransformerLayer
    if config.remat:
      # Arguments: the module, events, mask, and whether it is training.
      kind = nn.remat(kind, static_argnums=(3,))
    make = functools.partial(
      kind,
      config.event_dim,
      config.num_heads,
      config.encoder_mlp_ratio,
      dropout_rate=config.dropout_rate,
      implementation=config.attention,
      chunk=config.attention_chunk,
      dtype=dtype,
    )
    self.layers = [make() for _ in range(config.num_encoder_layers)]
    self.event_norm = nn.LayerNorm(dtype=dtype)
    self.target = nn.Dense(config.num_queries * config.event_dim, dtype=dtype)
    self.target_norm = nn.LayerNorm(dtype=dtype)
    self.attention = Attention(
      config.num_heads,
      config.event_dim,
      config.token_dim,
      config.attention,
      config.attention_chunk,
      dtype,
    )

  def encode(self, events: Events, train: bool) -> SequenceState:
    """Keys and values of the events, behind the last layer."""
    x = events.vectors
    for layer in self.layers:
      x = layer(x, events.mask, train)
    keys_values = self.attention.keys_values(self.event_norm(x))
    return SequenceState(keys_values, events.mask)

  def read(
    self, state: SequenceState, target: Float[Array, "batch width"]
  ) -> Float[Array, "queries batch token_dim"]:
    """What the queries of the candidate find."""
    shape = (target.shape[0], self.config.num_queries, self.config.event_dim)
    queries = self.target_norm(self.target(target).reshape(shape))
    found = self.attention(queries, state.keys_values, state.mask[:, None])
    return found.swapaxes(0, 1)


tables = rankmixer.tables
loss_fn = rankmixer.loss_fn
diagnostics = rankmixer.diagnostics
idle_params = rankmixer.idle_params
