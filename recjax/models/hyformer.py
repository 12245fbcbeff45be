"""HyFormer: queries that read long sequences and meet the features, in turns.

Source: HyFormer, arXiv 2601.12681. A few query tokens, made from everything
that is known of an example, read each sequence of the user by cross-attention
(decoding), are mixed with the tokens of the other features (boosting), and go
on to the next layer as better queries.

| paper | code |
| --- | --- |
| F_1 ... F_M, non-sequence tokens | `tokens`, M = num_tokens - all queries |
| Seq_s, [L_s, D] | `EventEmbedding`, of width `event_dim` |
| GlobalInfo, Q = [FFN_1, ..., FFN_N] | `QueryGeneration` |
| H_l: full, LONGER-style, light | `encoder`: `full`, `longer`, `swiglu` |
| S_short, L_H | the last `recent_len` events |
| K_l = H_l W_K, V_l = H_l W_V | `Decoding.keys_values` |
| Q_s = CrossAttn(Q_s, K_s, V_s) | `Decoding` |
| Q + PerTokenFFN(mix(Q)) | `Boosting` |
| MLP head | `heads`, on what `head_input` says |

The rows of the paper's ablation are words of the config:

| row | words |
| --- | --- |
| query without sequence-pooling tokens | `query_input="features"` |
| query from target features only | `query_input="target"` |
| sequences merged, queries shared | `merge_sequences=True` |
| BaseArch, and with global tokens | `baselines/longer.py` |

Left open there, our choice, and the words that change it: tokens are LayerNorm-
alised before query generation, decoding and boosting and after the residual of
boosting (`paper_literal` leaves all these out); decoding has a residual
(`decode_residual`); boosted feature tokens go on to the next layer
(`reinject_features`: the first ones enter each); every query sees the pooled
events of all sequences (`pooled="own"`: of its own); the head reads the queries
side by side and the mean of the feature tokens (`head_input`); an encoder goes
on from the events of the layer before; LONGER-style compression happens in the
first layer, and the later ones attend within what is left; sequences may be
narrower than tokens; merged sequences are told apart by a vector each.

Nothing of a candidate reaches `encode_user`: it reads the sequences alone, for
no schema says which other features are the user's. So one user's state serves
any number of candidates; `decode` takes the examples of a user one after the
other, as many for each.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import events as events_lib
from recjax.layers.attention import (
  Attention,
  KeysValues,
  SwiGLULayer,
  TransformerLayer,
  check_attention,
  last,
)
from recjax.layers.events import EventEmbedding, Events
from recjax.layers.features import FeatureTokens
from recjax.layers.heads import TaskHeads
from recjax.layers.per_token import PerTokenDense, PerTokenFFN, token_mixing
from recjax.schema import Schema, suggest
from recjax.sparse.table import Table, embedding_table

CHOICES = {
  "encoder": ("longer", "full", "swiglu"),
  "query_input": ("all", "features", "target"),
  "pooled": ("all", "own"),
  "head_input": ("queries_and_mean", "queries", "mean"),
}
MERGED = "merged"  # Name of the one sequence that all are merged into.


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network.

  Attributes:
    tasks: Labels to predict.
    embed_dim: Width of an embedding.
    num_tokens: Tokens that are mixed, those of the queries among them; what
      the queries leave is the number of feature tokens.
    token_dim: Width of a token; a multiple of `num_tokens`.
    num_layers: Layers of decoding and boosting.
    num_queries: Queries of each sequence in the order of the schema, or one
      number for all; merged sequences take the first.
    num_heads: Attention heads.
    mlp_ratio: Inner width of a per-token network over `token_dim`.
    encoder: How events become keys and values: `longer`, `full` or `swiglu`.
    event_dim: Width of events, keys and values; 0 for `token_dim`.
    recent_len: `longer`: events kept, the most recent ones.
    encoder_mlp_ratio: Inner width of an encoder's network over `event_dim`.
    merge_sequences: True merges all sequences into one.
    query_input: What queries are made from: `all`; `features`: no sequences;
      `target`: the rows of the target features alone.
    query_dim: Inner width of a query's network; 0 for 4 `token_dim`.
    target_features: Features of the candidate, for `query_input="target"`;
      empty for the one with the role `item`.
    pooled: Whose mean event a query is made from: `all` or `own`.
    paper_literal: True leaves out every LayerNorm outside the encoders.
    decode_residual: Decoding adds to the query instead of replacing it.
    reinject_features: Each layer starts from the first feature tokens.
    head_input: `queries_and_mean`, `queries`, or `mean` of all tokens.
    attention: `xla` or `tokamax`; see `layers/attention.py`.
    attention_chunk: Queries of an attention done at a time; 0 for all.
    remat: True computes the encoders once more in the backward pass, to hold
      less memory.
    head_dim: Hidden width of a task head; 0 for a linear head.
    numeric_dim: Hinges of each dense feature; see `ConcatFeatures`.
    dropout_rate: Share of hidden units dropped in training.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  num_tokens: int = 8
  token_dim: int = 64
  num_layers: int = 2
  num_queries: tuple[int, ...] = (1,)
  num_heads: int = 4
  mlp_ratio: float = 2.0
  encoder: str = "longer"
  event_dim: int = 0
  recent_len: int = 50
  encoder_mlp_ratio: float = 2.0
  merge_sequences: bool = False
  query_input: str = "all"
  query_dim: int = 0
  target_features: tuple[str, ...] = ()
  pooled: str = "all"
  paper_literal: bool = False
  decode_residual: bool = True
  reinject_features: bool = False
  head_input: str = "queries_and_mean"
  attention: str = "xla"
  attention_chunk: int = 0
  remat: bool = False
  head_dim: int = 0
  numeric_dim: int = 0
  dropout_rate: float = 0.0
  embed_init_scale: float = 0.01
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(
      self,
      num_queries=1,
      event_dim=0,
      recent_len=1,
      query_dim=0,
      attention_chunk=0,
    )
    if not 0 < self.encoder_mlp_ratio < math.inf:
      raise UserError(
        "model.encoder_mlp_ratio must be above 0 and finite, got "
        f"{self.encoder_mlp_ratio}"
      )
    if self.token_dim % self.num_tokens:
      raise UserError(
        f"model.token_dim ({self.token_dim}) must be a multiple of "
        f"model.num_tokens ({self.num_tokens}): token mixing cuts a token into "
        "that many heads"
      )
    for name, allowed in CHOICES.items():
      value = getattr(self, name)
      if value not in allowed:
        raise UserError(
          f"unknown model.{name} {value!r}" + suggest(value, allowed)
        )
    dim_name = "event_dim" if self.event_dim else "token_dim"
    check_attention(self.width, self.num_heads, self.attention, dim_name)

  @property
  def width(self) -> int:
    """Width of events."""
    return self.event_dim or self.token_dim

  def queries(self, schema: Schema) -> dict[str, int]:
    """Sequence -> number of its queries.

    Raises:
      UserError: If the data has no sequence, the numbers are not as many as
        the sequences, or no token is left for the other features.
    """
    names = [f.name for f in events_lib.require_sequences(schema, "hyformer")]
    numbers = self.num_queries
    if self.merge_sequences:
      names, numbers = [MERGED], numbers[:1]
    if len(numbers) not in (1, len(names)):
      raise UserError(
        f"model.num_queries {self.num_queries} must be one number, or one for "
        f"each sequence: {', '.join(names)}"
      )
    if len(numbers) == 1:
      numbers *= len(names)
    if sum(numbers) >= self.num_tokens:
      raise UserError(
        f"model.num_tokens ({self.num_tokens}) must be above the number of all "
        f"queries ({sum(numbers)}); a token is needed for the other features"
      )
    return dict(zip(names, numbers, strict=True))


class UserState(NamedTuple):
  """What the candidates of a user share.

  Attributes:
    pooled: Sequence -> mean event.
    mask: Sequence -> which keys there are.
    keys_values: Sequence -> keys and values of each layer.
  """

  pooled: dict[str, Float[Array, "users dim"]]
  mask: dict[str, Bool[Array, "users length"]]
  keys_values: dict[str, tuple[KeysValues, ...]]


class Model(nn.Module):
  """Layers of decoding and boosting -> queries -> one logit a task."""

  config: Config
  schema: Schema

  def setup(self):
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    self.num_queries = config.queries(self.schema)
    layers = range(config.num_layers)
    self.events = EventEmbedding(self.schema, config.width, dtype)
    if config.merge_sequences:
      shape = (len(self.schema.sequences), config.width)
      self.kinds = self.param("kinds", nn.initializers.normal(0.02), shape)
    self.encoders = {
      name: [make_encoder(config, i) for i in layers]
      for name in self.num_queries
    }
    self.decoders = {
      name: [Decoding(config) for _ in layers] for name in self.num_queries
    }
    self.tokens = FeatureTokens(
      events_lib.without_sequences(self.schema),
      config.num_tokens - sum(self.num_queries.values()),
      config.token_dim,
      config.numeric_dim,
      dtype,
    )
    if not config.paper_literal:
      self.token_norm = nn.LayerNorm(dtype=dtype)
    self.generate = QueryGeneration(config)
    self.boosters = [Boosting(config) for _ in layers]
    self.heads = TaskHeads(
      config.tasks, config.head_dim, config.dropout_rate, dtype
    )

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
  ) -> UserState:
    """What does not depend on the candidate.

    Args:
      batch: Users. Only their sequences are read.
      rows: Embedding rows of these.
      train: Whether dropout is on.
    """
    events = self.events(batch, rows["embedding"])
    if self.config.merge_sequences:
      kinds = self.kinds.astype(self.config.dtype)
      events = {MERGED: events_lib.merge_events(events, kinds)}
    mask, keys_values = {}, {}
    for name, sequence in events.items():
      mask[name], keys_values[name] = self._encode(name, sequence, train)
    pooled = {n: events_lib.pooled_events(e) for n, e in events.items()}
    return UserState(pooled, mask, keys_values)

  def decode(
    self,
    state: UserState,
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    *,
    train: bool = False,
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    """Predictions for examples of the users of `state`.

    Args:
      state: Of as many users as divide the examples.
      batch: Examples; those of the first user come first, and so on. Their
        sequences are not read.
      rows: Embedding rows of the other features.
      train: Whether dropout is on.
    """
    config = self.config
    features = self.tokens(batch, rows["embedding"])
    if not config.paper_literal:
      features = self.token_norm(features)
    tokens = jnp.concatenate(
      [self._queries(state, batch, rows, features), features]
    )
    num_queries = sum(self.num_queries.values())
    for i, boost in enumerate(self.boosters):
      if config.reinject_features:
        tokens = jnp.concatenate([tokens[:num_queries], features])
      parts, first = [], 0
      for name, number in self.num_queries.items():
        queries = tokens[first : first + number]
        parts.append(
          self.decoders[name][i](
            queries, state.keys_values[name][i], state.mask[name]
          )
        )
        first += number
      tokens = boost(jnp.concatenate([*parts, tokens[first:]]), train=train)
    x = head_input(tokens, num_queries, config.head_input)
    return self.heads(x, train=train), {"tokens": tokens}

  def _encode(self, name: str, events: Events, train: bool):
    """Mask, and keys and values of each layer."""
    h, mask, found = events.vectors, events.mask, []
    for encode, decoder in zip(
      self.encoders[name], self.decoders[name], strict=True
    ):
      h = encode(h, mask, train)
      mask = last(mask, h.shape[1])
      found.append(decoder.keys_values(h))
    return mask, tuple(found)

  def _queries(
    self, state: UserState, batch: Batch, rows, features
  ) -> Float[Array, "queries batch dim"]:
    """The queries of all sequences, in the order of the schema."""
    config = self.config
    if config.query_input == "target":
      names = events_lib.target_features(self.schema, config.target_features)
      shared = [rows["embedding"][name] for name in names]
    else:
      shared = list(features)
    pooled = {}
    if config.query_input == "all":
      # A mapping that has been through `jit` is in another order.
      pooled = {
        name: events_lib.repeat_users(state.pooled[name], batch.size)
        for name in self.num_queries
      }
    own = config.pooled == "own"
    inputs = [
      jnp.concatenate(
        [*shared, *(v for n, v in pooled.items() if not own or n == name)],
        axis=-1,
      )
      for name, number in self.num_queries.items()
      for _ in range(number)
    ]
    return self.generate(jnp.stack(inputs).astype(config.dtype))


class QueryGeneration(nn.Module):
  """`FFN_i(GlobalInfo)`, a network of two layers for each query."""

  config: Config

  @nn.compact
  def __call__(
    self, x: Float[Array, "queries batch width"]
  ) -> Float[Array, "queries batch dim"]:
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    if not config.paper_literal:
      x = nn.LayerNorm(dtype=dtype, name="input_norm")(x)
    hidden_dim = config.query_dim or 4 * config.token_dim
    hidden = nn.silu(PerTokenDense(hidden_dim, dtype, name="up")(x))
    queries = PerTokenDense(config.token_dim, dtype, name="down")(hidden)
    if not config.paper_literal:
      queries = nn.LayerNorm(dtype=dtype, name="output_norm")(queries)
    return queries


class Decoding(nn.Module):
  """Queries of one sequence read its keys and values in one layer."""

  config: Config

  def setup(self):
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    self.attention = Attention(
      config.num_heads,
      config.width,
      config.token_dim,
      config.attention,
      config.attention_chunk,
      dtype,
    )
    if not config.paper_literal:
      self.query_norm = nn.LayerNorm(dtype=dtype)
      self.event_norm = nn.LayerNorm(dtype=dtype)

  def keys_values(self, h: Float[Array, "users length dim"]) -> KeysValues:
    """`H W_K` and `H W_V`."""
    if not self.config.paper_literal:
      h = self.event_norm(h)
    return self.attention.keys_values(h)

  def __call__(
    self,
    queries: Float[Array, "queries batch dim"],
    user: KeysValues,
    mask: Bool[Array, "users length"],
  ) -> Float[Array, "queries batch dim"]:
    x = queries
    if not self.config.paper_literal:
      x = self.query_norm(x)
    found = self.attention(x.swapaxes(0, 1), user, mask[:, None])
    found = found.swapaxes(0, 1)
    return queries + found if self.config.decode_residual else found


class Boosting(nn.Module):
  """`Q + PerTokenFFN(mix(Q))`: the residual is that of the un-mixed tokens."""

  config: Config

  @nn.compact
  def __call__(
    self, x: Float[Array, "tokens batch dim"], *, train: bool
  ) -> Float[Array, "tokens batch dim"]:
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    mixed = token_mixing(x)
    if not config.paper_literal:
      mixed = nn.LayerNorm(dtype=dtype, name="mix_norm")(mixed)
    ffn = PerTokenFFN(config.mlp_ratio, config.dropout_rate, dtype, name="ffn")
    x = x + ffn(mixed, train=train)
    if not config.paper_literal:
      x = nn.LayerNorm(dtype=dtype, name="output_norm")(x)
    return x


def make_encoder(config: Config, layer: int) -> nn.Module:
  """The encoder of one sequence in one layer: `H_l = encoder(H_{l-1})`."""
  kind = SwiGLULayer if config.encoder == "swiglu" else TransformerLayer
  if config.remat:
    # Arguments: the module, events, mask, and whether it is training.
    kind = nn.remat(kind, static_argnums=(3,))
  shape = {
    "mlp_ratio": config.encoder_mlp_ratio,
    "dropout_rate": config.dropout_rate,
    "dtype": jnp.dtype(config.dtype),
  }
  if config.encoder == "swiglu":
    return kind(**shape)
  compresses = config.encoder == "longer" and layer == 0
  return kind(
    config.width,
    config.num_heads,
    num_queries=config.recent_len if compresses else 0,
    implementation=config.attention,
    chunk=config.attention_chunk,
    **shape,
  )


def head_input(
  tokens: Float[Array, "tokens batch dim"], num_queries: int, kind: str
) -> Float[Array, "batch width"]:
  """What the heads read of the last layer's tokens, the queries first."""
  if kind == "mean":
    return tokens.mean(axis=0)
  parts = list(tokens[:num_queries])
  if kind == "queries_and_mean":
    parts.append(tokens[num_queries:].mean(axis=0))
  return jnp.concatenate(parts, axis=-1)


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """One embedding table for all id features."""
  return {
    "embedding": embedding_table(
      schema, config.embed_dim, init_scale=config.embed_init_scale
    )
  }


loss_fn = losses.plain_loss_fn
