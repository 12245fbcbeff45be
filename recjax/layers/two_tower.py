"""Two linear towers over a self-attentive history: PROMO's backbone.

Source: the two-tower model of PROMO (arXiv 2412.18082) on top of SASRec (Kang
and McAuley, arXiv 1808.09781), as in the authors' released configuration.

| paper | code |
| --- | --- |
| SASRec block: LN on the queries alone | `SequenceEncoder` |
| user vector: mean over valid positions | its last line |
| user = W [user id; W' user features; SASRec] | `Towers.user` |
| item = W [item id; W' item features] | `Towers.item` |
| score = user . item | `dot` |

Both towers are linear, as released. SASRec has an item table of its own
(`sequence`); the towers read `embedding`. With several tasks each has its own
last layer of the user tower, and the history is trained on the first (our
choice: the source has one task).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers.dropout import Dropout
from recjax.layers.features import masked_mean
from recjax.schema import Feature, Schema, suggest
from recjax.sparse.table import Table, embedding_table
from recjax.stage import Stage


@dataclasses.dataclass(frozen=True)
class TowersConfig:
  """What the towers read, and the shape of the history's encoder.

  Ids of user and item are those of the schema's roles and always read.

  Attributes:
    user_features: Further features of the user's side, context included.
    item_features: Further features of the item's side.
    history: Sequence of items that the encoder reads.
    num_blocks: Attention blocks.
    num_heads: Heads of each; divides the width of an embedding.
  """

  user_features: tuple[str, ...] = ()
  item_features: tuple[str, ...] = ()
  history: str = "positive_history"
  num_blocks: int = 2
  num_heads: int = 4


@struct.dataclass
class Towers:
  """What `TwoTowers` gives.

  Attributes:
    user: Task -> vector of the user.
    item: Vector of the item.
    sequence_scores: Task -> score of the history alone.
    scores: Task -> user . item.
  """

  user: dict[str, Float[Array, "batch dim"]]
  item: Float[Array, "batch dim"]
  sequence_scores: dict[str, Float[Array, " batch"]]
  scores: dict[str, Float[Array, " batch"]]


class TowersModel(nn.Module):
  """The Linen module of a method on this backbone.

  A method adds `decode(encoded, batch, rows, *, train)`.

  Attributes:
    config: The method's, with `tasks`, `embed_dim`, `towers`, `dropout_rate`
      and `dtype`.
    schema: What the batch holds.
  """

  config: Any
  schema: Schema

  def setup(self):
    config = self.config
    dtype = jnp.dtype(config.dtype)
    self.sequence_encoder = SequenceEncoder(
      config.towers.num_blocks,
      config.towers.num_heads,
      config.dropout_rate,
      dtype,
    )
    self.backbone = TwoTowers(
      config.towers, self.schema, config.tasks, config.embed_dim, dtype
    )

  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    encoded = self.encode_user(batch, rows, train=train)
    return self.decode(encoded, batch, rows, train=train)

  @property
  def encoded_features(self) -> tuple[str, ...]:
    """What `encode_user` reads; the other lists are the candidate's."""
    return (self.config.towers.history,)

  def encode_user(
    self,
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    *,
    train: bool = False,
  ) -> Float[Array, "batch dim"]:
    """The history's vector."""
    name = self.config.towers.history
    return self.sequence_encoder(
      rows["sequence"][name], batch.id_mask[name], train=train
    )


class TwoTowers(nn.Module):
  """Vectors of user and item, and their product.

  Attributes:
    config: What is read.
    schema: What the batch holds.
    tasks: Names of the tasks.
    dim: Width of every embedding and vector.
    dtype: Type of the computation; scores are float32.
  """

  config: TowersConfig
  schema: Schema
  tasks: tuple[str, ...]
  dim: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    sequence: Float[Array, "users dim"],
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    *,
    user_id: Float[Array, "batch dim"] | None = None,
    item_id: Float[Array, "batch dim"] | None = None,
  ) -> Towers:
    """Runs both towers.

    Args:
      sequence: The history's vector of each example, or of one user for all.
      batch: The examples.
      rows: Embedding rows of the tables `sequence` and `embedding`.
      user_id: Stands for the embedding of the user's id, where a method makes
        its own.
      item_id: Likewise of the item's.
    """
    config, embeddings = self.config, rows["embedding"]
    user_role, item_role = roles(self.schema)
    sequence = jnp.broadcast_to(sequence, (batch.size, self.dim))
    user = [embeddings[user_role] if user_id is None else user_id, sequence]
    user += self._features("user", config.user_features, batch, embeddings)
    item = [embeddings[item_role] if item_id is None else item_id]
    item += self._features("item", config.item_features, batch, embeddings)
    user, item = (jnp.concatenate(parts, axis=-1) for parts in (user, item))
    users = {
      task: linear(self.dim, self.dtype, f"user_{task}")(user)
      for task in self.tasks
    }
    item = linear(self.dim, self.dtype, "item")(item)
    # On its own the history predicts the same for every task.
    score = dot(sequence, rows["sequence"][item_role])
    return Towers(
      user=users,
      item=item,
      sequence_scores={task: score for task in self.tasks},
      scores={task: dot(vector, item) for task, vector in users.items()},
    )

  def _features(self, side: str, names, batch: Batch, embeddings):
    if not names:
      return []
    values = concat_named(self.schema, names, batch, embeddings)
    name = f"{side}_features"
    return [nn.Dense(self.dim, dtype=self.dtype, name=name)(values)]


class SequenceEncoder(nn.Module):
  """SASRec's blocks on a history; the mean over its valid positions.

  Queries are normalised, keys and values are not; the point-wise network has
  the width of its input, ReLU, and a residual connection from its normalised
  input. An empty history gives zeros.

  Attributes:
    num_blocks: Attention blocks.
    num_heads: Heads of each.
    dropout_rate: On inputs, attention weights and hidden units.
    dtype: Type of the computation.
  """

  num_blocks: int
  num_heads: int
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    events: Float[Array, "batch max_len dim"],
    mask: Bool[Array, "batch max_len"],
    *,
    train: bool,
    prefix: Float[Array, "batch num_prefix dim"] | None = None,
  ) -> Float[Array, "batch dim"]:
    """The mean over events, and over the `prefix` put before them."""
    max_len, dim = events.shape[1:]

    def dense(name):
      return nn.Dense(
        dim,
        dtype=self.dtype,
        kernel_init=nn.initializers.xavier_normal(),
        name=name,
      )

    def norm(name):
      return nn.LayerNorm(dtype=self.dtype, name=name)

    positions = self.param(
      "positions", nn.initializers.xavier_normal(), (max_len, dim)
    )
    x = events * jnp.sqrt(jnp.float32(dim)) + positions[None]
    if prefix is not None:
      x = jnp.concatenate([prefix.astype(x.dtype), x], axis=1)
      mask = jnp.concatenate([jnp.ones(prefix.shape[:2], bool), mask], axis=1)
    x = jnp.where(mask[..., None], x, 0.0).astype(self.dtype)
    x = Dropout(self.dropout_rate, deterministic=not train)(x)
    for i in range(self.num_blocks):
      query = norm(f"query_norm_{i}")(x)
      q, k, v = (
        dense(f"{part}_{i}")(values)
        for part, values in (("query", query), ("key", x), ("value", x))
      )
      weights = attention_weights(q, k, mask, self.num_heads)
      weights = Dropout(self.dropout_rate, deterministic=not train)(weights)
      x = query + dense(f"mix_{i}")(weighted_values(weights, v))
      x = norm(f"ffn_norm_{i}")(x)
      hidden = nn.relu(dense(f"up_{i}")(x))
      hidden = Dropout(self.dropout_rate, deterministic=not train)(hidden)
      x = x + dense(f"down_{i}")(hidden)
    return masked_mean(norm("last_norm")(x), mask)


def sequence_loss(predictions, aux, batch, config) -> losses.Terms:
  """The first task's loss of the history's score alone."""
  del predictions
  task = config.tasks[0]
  return losses.task_losses({task: aux["sequence"][task]}, batch)


def towers_loss(predictions, aux, batch, config) -> losses.Terms:
  """The tasks' losses of the backbone."""
  del predictions, config
  return losses.task_losses(aux["towers"], batch)


# How the backbone is trained; what a method tunes then begins at its best.
BACKBONE_STAGES = (
  Stage(
    "sequence",
    share=0.3,
    trainable=("sequence", "sequence_encoder/.*"),
    loss_fn=sequence_loss,
    predictions="sequence",
  ),
  Stage(
    "towers",
    share=0.35,
    trainable=("embedding", "backbone/.*"),
    loss_fn=towers_loss,
    initialize_from="best",
    predictions="towers",
  ),
)


def linear(dim: int, dtype, name: str) -> nn.Dense:
  """A layer without a bias, Xavier-normal as all of the released model."""
  return nn.Dense(
    dim,
    use_bias=False,
    dtype=dtype,
    kernel_init=nn.initializers.xavier_normal(),
    name=name,
  )


def tower_tables(
  config: TowersConfig,
  schema: Schema,
  dim: int,
  *,
  init_scale: float,
  lists: tuple[str, ...] = (),
) -> dict[str, Table]:
  """The tables that `TwoTowers` reads.

  Args:
    config: What the towers read.
    schema: With `vocab_sizes`.
    dim: Width of an embedding.
    init_scale: Standard deviation of the initial values.
    lists: Further features that read the towers' own table.
  """
  user, item = roles(schema)
  ids = {f.name for f in schema.id_features}
  names = (user, item, *config.user_features, *config.item_features, *lists)
  return {
    "sequence": named_table(
      schema, (config.history, item), dim, init_scale=init_scale
    ),
    "embedding": named_table(
      schema, [n for n in names if n in ids], dim, init_scale=init_scale
    ),
  }


def cold_tables(config: Any, schema: Schema) -> dict[str, Table]:
  """`tables` of a method that has a way of its own with cold items.

  Args:
    config: Has `towers`, `embed_dim`, `embed_init_scale` and what `check_cold`
      looks at.
    schema: What the data holds.
  """
  check_towers(config.towers, schema, config.embed_dim)
  check_cold(config, schema)
  return tower_tables(
    config.towers, schema, config.embed_dim, init_scale=config.embed_init_scale
  )


def named_table(schema: Schema, names, dim: int, **kwargs) -> Table:
  """One table for some features of the schema, in the schema's order."""
  features = tuple(f for f in schema.features if f.name in names)
  return embedding_table(
    dataclasses.replace(schema, features=features), dim, **kwargs
  )


def check_towers(config: TowersConfig, schema: Schema, embed_dim: int) -> None:
  """Raises a `UserError` for what the towers cannot read."""
  roles(schema)
  list_feature(schema, config.history, "model.towers.history")
  for side in ("user_features", "item_features"):
    for name in getattr(config, side):
      schema.feature(name)
  if embed_dim % config.num_heads:
    raise UserError(
      f"model.towers.num_heads ({config.num_heads}) must divide "
      f"model.embed_dim ({embed_dim})"
    )


def check_cold(config: Any, schema: Schema) -> None:
  """Raises a `UserError` where cold items cannot be told or described.

  Args:
    config: Of a method, with `towers`, `popularity` and `cold_below`.
    schema: What the batch holds.
  """
  check_popularity(schema, config.popularity)
  if not config.towers.item_features:
    raise UserError(
      "model.towers.item_features is empty: without its id a cold item needs "
      "features; name some"
    )


def check_popularity(schema: Schema, name: str) -> None:
  """Raises a `UserError` unless `name` is a single-valued sparse feature."""
  feature = schema.feature(name)
  if feature.kind != "sparse" or feature.multi:
    raise UserError(
      f"model.popularity: {name!r} is no sparse feature; name one whose ids "
      "rise with the item's popularity"
    )


def list_feature(schema: Schema, name: str, where: str) -> Feature:
  """The list feature called `name`.

  Raises:
    UserError: If the schema has no such feature, or it holds one id a row.
  """
  lists = [f.name for f in schema.id_features if f.is_list]
  if name not in lists:
    raise UserError(
      f"{where}: the data has no sequence {name!r}"
      + (suggest(name, lists) if lists else "")
      + "; name one of the schema, or let the data make it (KuaiRand: set "
      "data.feedback)"
    )
  return schema.feature(name)


def roles(schema: Schema) -> tuple[str, str]:
  """The features that name the user and the item.

  Raises:
    UserError: If the schema gives one of the roles to no single id.
  """
  single = [f.name for f in schema.id_features if not f.is_list]
  for role in ("user", "item"):
    name = getattr(schema.roles, role)
    if name not in single:
      raise UserError(
        f"schema: roles: two towers need {role!r} to name a sparse feature, "
        f"got {name!r}; known: {', '.join(single)}"
      )
  return schema.roles.user, schema.roles.item


def concat_named(
  schema: Schema,
  names: tuple[str, ...],
  batch: Batch,
  embeddings: dict[str, Array],
) -> Float[Array, "batch width"]:
  """Some features side by side: embeddings (lists by their mean), numbers."""
  dense = [f.name for f in schema.dense_features]
  parts = []
  for name in names:
    # Serving has pooled a user's lists before.
    if name in batch.id_mask and embeddings[name].ndim == 3:
      parts.append(masked_mean(embeddings[name], batch.id_mask[name]))
    elif name in embeddings:
      parts.append(embeddings[name])
    elif name in batch.vectors:
      parts.append(batch.vectors[name])
    else:
      column = dense.index(name)
      parts.append(batch.dense[:, column : column + 1])
  return jnp.concatenate(parts, axis=-1)


def attention_weights(
  query: Float[Array, "batch max_len dim"],
  key: Float[Array, "batch max_len dim"],
  mask: Bool[Array, "batch max_len"],
  num_heads: int,
) -> Float[Array, "batch heads max_len max_len"]:
  """Softmax over the valid events up to each event."""
  heads = (*query.shape[:2], num_heads, query.shape[-1] // num_heads)
  logits = jnp.einsum(
    "bqhd,bkhd->bhqk", query.reshape(heads), key.reshape(heads)
  )
  logits /= jnp.sqrt(jnp.asarray(heads[-1], logits.dtype))
  causal = jnp.tril(jnp.ones((query.shape[1],) * 2, bool))
  seen = causal[None, None] & mask[:, None, None]
  # The finite floor keeps a row without events finite.
  logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
  return nn.softmax(logits.astype(jnp.float32)).astype(query.dtype)


def weighted_values(
  weights: Float[Array, "batch heads max_len max_len"],
  values: Float[Array, "batch max_len dim"],
) -> Float[Array, "batch max_len dim"]:
  """Each head's sum of its part of the values."""
  heads = (*values.shape[:2], weights.shape[1], -1)
  mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, values.reshape(heads))
  return mixed.reshape(values.shape)


def dot(
  a: Float[Array, "batch dim"], b: Float[Array, "batch dim"]
) -> Float[Array, " batch"]:
  """Inner products of an example's two vectors, in float32."""
  return jnp.einsum("bd,bd->b", a, b, preferred_element_type=jnp.float32)
