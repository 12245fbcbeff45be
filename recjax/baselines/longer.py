"""LONGER, then RankMixer: sequences are compressed first and mixed after.

Sources: Chai et al., LONGER, arXiv 2505.04421; HyFormer, arXiv 2601.12681,
whose BaseArch this is: LONGER for each sequence, its query tokens beside the
other features' tokens, RankMixer over all of them.

| paper | code |
| --- | --- |
| H, behaviours with time and position | `EventEmbedding` |
| token merge, K neighbours side by side | `merge_tokens`, `merge_len` |
| InnerTrans, inside each group | `inner` |
| G, global tokens | `global_tokens`: `target`, `cls`, `user`, `features` |
| O = [G; H_S], the k most recent | `recent_len` |
| cross-causal layer, N self-causal ones | `layers`, 1 + `num_self_layers` |

The mask: a sequence token sees itself and the sequence tokens before it, a
global token sees all sequence tokens and all global ones. So the keys and
values of a sequence are those of a user, whoever is the candidate; the paper
says so of the candidate alone, we of all global tokens, for no schema says
which features are the user's.

BaseArch with global tokens, a row of HyFormer's ablation, is
`global_tokens=("target", "cls", "user", "features")`. LONGER puts `features`
(compressed cross features) among its tokens too; BaseArch does not.

Not stated, our choice: layers normalise first; groups are counted from the
most recent event; the global tokens of the last layer, side by side, are mapped
to `num_queries` tokens; InnerTrans is one layer of two heads.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recjax import config as config_lib
from recjax.baselines import rankmixer
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import events as events_lib
from recjax.layers.attention import (
  KeysValues,
  TransformerLayer,
  check_attention,
  key_mask,
  last,
)
from recjax.layers.events import EventEmbedding, Events
from recjax.layers.features import ConcatFeatures, FeatureTokens
from recjax.schema import Schema, suggest

GLOBAL_TOKENS = ("target", "cls", "user", "features")
INNER_HEADS = 2


@dataclasses.dataclass(frozen=True)
class Config(rankmixer.Config):
  """RankMixer's fields, and the sequences.

  Attributes:
    event_dim: Width of an event.
    num_queries: Tokens that each sequence is compressed to; of `num_tokens`.
    num_heads: Attention heads.
    num_self_layers: Self-attention layers behind the first one.
    recent_len: Sequence tokens kept behind the first layer, the most recent.
    merge_len: Neighbours merged into one sequence token.
    inner_trans: True lets neighbours attend to each other before.
    encoder_mlp_ratio: Inner width of a layer's network over its width.
    global_tokens: What asks: some of `target`, `cls`, `user`, `features`.
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
  num_self_layers: int = 1
  recent_len: int = 50
  merge_len: int = 1
  inner_trans: bool = False
  encoder_mlp_ratio: float = 4.0
  global_tokens: tuple[str, ...] = ("target", "cls", "user")
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
      num_self_layers=0,
      recent_len=1,
      merge_len=1,
      attention_chunk=0,
    )
    check_mlp_ratio(self.encoder_mlp_ratio)
    if not self.global_tokens:
      raise UserError(
        "model.global_tokens is empty; name some of " + ", ".join(GLOBAL_TOKENS)
      )
    for name in self.global_tokens:
      if name not in GLOBAL_TOKENS:
        raise UserError(
          f"unknown model.global_tokens {name!r}" + suggest(name, GLOBAL_TOKENS)
        )
    check_attention(
      self.width, self.num_heads, self.attention, "event_dim * merge_len"
    )
    if self.inner_trans:
      check_attention(self.event_dim, INNER_HEADS, self.attention, "event_dim")

  @property
  def width(self) -> int:
    """Width of a sequence token."""
    return self.event_dim * self.merge_len


class SequenceState(NamedTuple):
  """What the candidates of a user share of one sequence.

  Attributes:
    keys_values: Of each layer.
    mask: Which keys there are, of each layer.
  """

  keys_values: tuple[KeysValues, ...]
  mask: tuple[Bool[Array, "users length"], ...]


class Model(nn.Module):
  """Each sequence -> tokens -> RankMixer with the features' tokens."""

  config: Config
  schema: Schema

  def setup(self):
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    num_features = num_feature_tokens(config, self.schema, "longer")
    self.events = EventEmbedding(self.schema, config.event_dim, dtype)
    self.readers = {f.name: Longer(config) for f in self.schema.sequences}
    plain = events_lib.without_sequences(self.schema)
    self.global_tokens = GlobalTokens(config, plain)
    self.tokens = FeatureTokens(
      plain, num_features, config.token_dim, config.numeric_dim, dtype
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
    asking = self.global_tokens(batch, rows["embedding"])
    tokens = [
      self.readers[f.name].read(state[f.name], asking, train)
      for f in self.schema.sequences
    ]
    tokens.append(self.tokens(batch, rows["embedding"]))
    x = jnp.concatenate(tokens)
    return self.trunk(x, batch.example_mask, train=train)


class GlobalTokens(nn.Module):
  """The tokens that ask, each a linear map of its own features."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, Array]
  ) -> Float[Array, "batch tokens dim"]:
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    tokens = []
    for name in config.global_tokens:
      if name == "cls":
        cls = self.param("cls", nn.initializers.normal(0.02), (config.width,))
        shape = (batch.size, config.width)
        tokens.append(jnp.broadcast_to(cls[None].astype(dtype), shape))
        continue
      if name == "features":
        x = ConcatFeatures(
          self.schema, config.numeric_dim, dtype, name="inputs"
        )(batch, rows)
      elif name == "target":
        names = events_lib.target_features(self.schema, config.target_features)
        x = jnp.concatenate([rows[n] for n in names], axis=-1)
      else:
        x = rows[user_feature(self.schema)]
      tokens.append(nn.Dense(config.width, dtype=dtype, name=name)(x))
    return jnp.stack(tokens, axis=1)


class Longer(nn.Module):
  """One sequence, and what global tokens find in it."""

  config: Config

  def setup(self):
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    kind = TransformerLayer
    if config.remat:
      # Arguments: the module, tokens, mask, and whether it is training.
      kind = nn.remat(kind, static_argnums=(3,))
    make = functools.partial(
      kind,
      mlp_ratio=config.encoder_mlp_ratio,
      dropout_rate=config.dropout_rate,
      implementation=config.attention,
      chunk=config.attention_chunk,
      dtype=dtype,
    )
    if config.inner_trans:
      self.inner = make(config.event_dim, INNER_HEADS)
    self.layers = [
      make(
        config.width,
        config.num_heads,
        num_queries=0 if i else config.recent_len,
        is_causal=True,
      )
      for i in range(1 + config.num_self_layers)
    ]
    self.out_norm = nn.LayerNorm(dtype=dtype)
    self.out = nn.Dense(config.num_queries * config.token_dim, dtype=dtype)

  def encode(self, events: Events, train: bool) -> SequenceState:
    """Keys, values and their masks of each layer."""
    groups, seen = merge_tokens(
      events.vectors, events.mask, self.config.merge_len
    )
    if self.config.inner_trans:
      shape = groups.shape
      flat = groups.reshape(-1, *shape[2:])
      flat_seen = seen.reshape(-1, seen.shape[-1])
      groups = self.inner(flat, flat_seen, train).reshape(shape)
      groups = jnp.where(seen[..., None], groups, 0.0)
    x, mask = groups.reshape(*groups.shape[:2], -1), seen.any(axis=-1)
    keys_values, masks = [], []
    for i, layer in enumerate(self.layers):
      keys_values.append(layer.keys_values(x))
      masks.append(mask)
      # Behind the last layer only global tokens are read.
      if i + 1 < len(self.layers):
        x = layer(x, mask, train)
        mask = last(mask, x.shape[1])
    return SequenceState(tuple(keys_values), tuple(masks))

  def read(
    self,
    state: SequenceState,
    x: Float[Array, "batch tokens dim"],
    train: bool,
  ) -> Float[Array, "queries batch token_dim"]:
    """The sequence's tokens for RankMixer, from its global tokens `x`."""
    for layer, user, mask in zip(
      self.layers, state.keys_values, state.mask, strict=True
    ):
      seen = key_mask(mask, x.shape[1], is_causal=False)
      x = layer.update(x, user, seen, train, own=layer.keys_values(x))
    x = self.out_norm(x)
    x = self.out(x.reshape(x.shape[0], -1))
    return x.reshape(x.shape[0], self.config.num_queries, -1).swapaxes(0, 1)


tables = rankmixer.tables
loss_fn = rankmixer.loss_fn
diagnostics = rankmixer.diagnostics
idle_params = rankmixer.idle_params


def num_feature_tokens(
  config: rankmixer.Config, schema: Schema, model: str
) -> int:
  """Tokens that the sequences, `num_queries` each, leave to the features.

  Raises:
    UserError: If there is no sequence, or no token is left.
  """
  used = config.num_queries * len(events_lib.require_sequences(schema, model))
  if used >= config.num_tokens:
    raise UserError(
      f"model.num_tokens ({config.num_tokens}) must be above the tokens of all "
      f"sequences ({used}); a token is needed for the other features"
    )
  return config.num_tokens - used


def user_feature(schema: Schema) -> str:
  """The single-valued feature with the role `user`.

  Raises:
    UserError: If there is none.
  """
  name = schema.roles.user
  known = {f.name for f in schema.id_features if not f.is_list}
  if name not in known:
    raise UserError(
      "model.global_tokens holds 'user' and no single-valued sparse feature "
      "has the role 'user'; give the role in the schema or leave the token out"
    )
  return name


def check_mlp_ratio(ratio: float) -> None:
  """Raises unless a layer's network has a width."""
  if not 0 < ratio < float("inf"):
    raise UserError(
      f"model.encoder_mlp_ratio must be above 0 and finite, got {ratio}"
    )


def merge_tokens(
  vectors: Float[Array, "users length dim"],
  mask: Bool[Array, "users length"],
  merge_len: int,
) -> tuple[
  Float[Array, "users groups merged dim"], Bool[Array, "users groups merged"]
]:
  """Neighbours in groups of `merge_len`, counted from the end."""
  missing = -vectors.shape[1] % merge_len
  vectors = jnp.pad(vectors, ((0, 0), (missing, 0), (0, 0)))
  mask = jnp.pad(mask, ((0, 0), (missing, 0)))
  shape = (mask.shape[0], -1, merge_len)
  return vectors.reshape(*shape, vectors.shape[-1]), mask.reshape(shape)


def layer_flops(seq_len: int, dim: int, merge_len: int = 1) -> float:
  """FLOPs of a self-attention layer over a whole sequence, by the paper.

  `24 L d^2 K + 4 L^2 d / K`: K neighbours make one of L / K tokens, of width
  K d.

  Example:
    >>> [round(layer_flops(2048, 32, k) / 1e6) for k in (1, 4)]
    [587, 336]
  """
  return 24 * seq_len * dim**2 * merge_len + 4 * seq_len**2 * dim / merge_len
