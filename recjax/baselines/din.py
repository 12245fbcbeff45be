"""DIN: a user's history, weighted by how it speaks to the target item.

Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction,
arXiv 1706.06978.

| paper | code |
| --- | --- |
| e_1 ... e_H, behaviours; v_A, the ad | rows of a sequence; of its target |
| a(e_j, v_A), activation unit, figure 2 | `ActivationUnit` |
| eq. 3, v_U(A) = sum_j a(e_j, v_A) e_j | `weighted_sum` |
| PReLU, eq. 8, and Dice, eq. 9 | `Rectifier` |
| fully connected layers | `mlp_dims` |
| mini-batch aware regularisation, eq. 4-7 | weight decay of touched rows |

A sequence is matched with the single-valued feature whose vocabulary it
shares; both read the same rows. A sequence without one has no target and is
pooled by its mean, as sets are. Each sequence has an activation unit of its
own, for likes and views need not speak alike (our choice).

Departures:
* Dice takes mean and variance over the units of a layer, not over a
  mini-batch: no moving averages, and no example sees another.
* The unit sees e, v, e * v and e - v, as in the authors' code; the text names
  e, v and their outer product.
* Row decay (`optimizer.sparse.weight_decay`) pulls all rows of a batch alike,
  without the 1 / n_j that spares frequent ids.
* One logit a task in place of a softmax over two classes.
Not stated: the start of alpha, 0.25 here.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers.dropout import Dropout
from recjax.layers.features import ConcatFeatures
from recjax.layers.heads import TaskHeads
from recjax.schema import Schema, suggest
from recjax.sparse.table import Table, embedding_table

ACTIVATIONS = ("dice", "prelu")
NORMALIZATIONS = ("none", "softmax")


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network.

  Attributes:
    tasks: Labels to predict.
    embed_dim: Width of an embedding.
    attention_dims: Widths of the hidden layers of an activation unit.
    normalization: Of the weights of a sequence: `none`, as in the paper, or
      `softmax`.
    mlp_dims: Widths of the hidden layers behind the pooled features.
    activation: `dice` or `prelu`, in both networks.
    numeric_dim: Hinges of each dense feature; see `ConcatFeatures`.
    dropout_rate: Share of hidden units dropped in training.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  attention_dims: tuple[int, ...] = (36,)
  normalization: str = "none"
  mlp_dims: tuple[int, ...] = (200, 80)
  activation: str = "dice"
  numeric_dim: int = 0
  dropout_rate: float = 0.0
  embed_init_scale: float = 0.01
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self, attention_dims=1)
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
  """Embeddings -> sequences pooled towards their target -> MLP -> logits."""

  config: Config
  schema: Schema

  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    encoded = self.encode_user(batch, rows)
    return self.decode(encoded, batch, rows, train=train)

  def encode_user(
    self, batch: Batch, rows: dict[str, dict[str, Array]]
  ) -> dict[str, tuple[Array, Array]]:
    """The events and mask of each sequence that has a target."""
    return {
      name: (rows["embedding"][name], batch.id_mask[name])
      for name in targets(self.schema)
    }

  @nn.compact
  def decode(
    self,
    encoded: dict[str, tuple[Array, Array]],
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    *,
    train: bool,
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    """Predictions; `encoded` is of each example, or of one user for all."""
    config = self.config
    dtype = jnp.dtype(config.dtype)
    embeddings = rows["embedding"]
    interests, weights = {}, {}
    for name, target in targets(self.schema).items():
      events, mask = encoded[name]
      scores = ActivationUnit(
        config.attention_dims,
        config.activation,
        config.dropout_rate,
        dtype,
        name=f"attend_{name}",
      )(events, embeddings[target], train=train)
      weights[name] = event_weights(scores, mask, config.normalization)
      interests[name] = weighted_sum(weights[name], events)
    x = ConcatFeatures(self.schema, config.numeric_dim, dtype, name="inputs")(
      batch, embeddings, interests
    )
    for i, dim in enumerate(config.mlp_dims):
      x = nn.Dense(dim, dtype=dtype, name=f"mlp_{i}")(x)
      x = Rectifier(config.activation, name=f"rectify_{i}")(x)
      x = Dropout(config.dropout_rate, deterministic=not train)(x)
    heads = TaskHeads(config.tasks, dtype=dtype, name="heads")
    return heads(x, train=train), {"weights": weights}


class ActivationUnit(nn.Module):
  """`a(e, v)`: an MLP on `[e, v, e * v, e - v]`, one number an event.

  The first layer's kernel is that of the concatenation, rows in this order.
  It is applied in parts, so that what depends on the target alone is computed
  once an example and not once an event: half the work, the same function.

  Attributes:
    hidden_dims: Widths of the hidden layers, at least one.
    activation: `dice` or `prelu`.
    dropout_rate: Share of hidden units dropped in training.
    dtype: Type of the computation; the weights are float32.
  """

  hidden_dims: tuple[int, ...]
  activation: str = "dice"
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    events: Float[Array, "users max_len dim"],
    target: Float[Array, "batch dim"],
    *,
    train: bool,
  ) -> Float[Array, "batch max_len"]:
    x = self._first_layer(events, target)
    for i, dim in enumerate(self.hidden_dims):
      if i:
        x = nn.Dense(dim, dtype=self.dtype, name=f"dense_{i}")(x)
      x = Rectifier(self.activation, name=f"rectify_{i}")(x)
      x = Dropout(self.dropout_rate, deterministic=not train)(x)
    return nn.Dense(1, dtype=jnp.float32, name="score")(x)[..., 0]

  def _first_layer(self, events, target):
    dim = events.shape[-1]
    shape = (4 * dim, self.hidden_dims[0])
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros, shape[1:])
    events, target, kernel, bias = nn.dtypes.promote_dtype(
      events, target, kernel, bias, dtype=self.dtype
    )
    of_event, of_target, of_product, of_difference = jnp.split(kernel, 4)
    hidden = target @ (of_target - of_difference) + bias[None]
    hidden = hidden[:, None] + events @ (of_event + of_difference)
    return hidden + (events * target[:, None]) @ of_product


class Rectifier(nn.Module):
  """`p(s) s + (1 - p(s)) alpha s` with one learned alpha a unit.

  PReLU: p(s) is 1 where s > 0, else 0. Dice: the sigmoid of s, normalised
  over the units of the layer (in the paper: over the mini-batch).

  Attributes:
    kind: `dice` or `prelu`.
  """

  kind: str

  @nn.compact
  def __call__(
    self, s: Float[Array, "*batch dim"]
  ) -> Float[Array, "*batch dim"]:
    initial = nn.initializers.constant(0.25)
    alpha = self.param("alpha", initial, s.shape[-1:]).astype(s.dtype)
    alpha = alpha.reshape((1,) * (s.ndim - 1) + alpha.shape)
    if self.kind == "prelu":
      return jnp.where(s > 0, s, alpha * s)
    wide = s.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    p = jax.nn.sigmoid(centred * jax.lax.rsqrt(variance + 1e-8))
    p = p.astype(s.dtype)
    return p * s + (1 - p) * alpha * s


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """One embedding table; a sequence and its target read the same rows."""
  return {
    "embedding": embedding_table(
      schema, config.embed_dim, init_scale=config.embed_init_scale
    )
  }


loss_fn = losses.plain_loss_fn


def targets(schema: Schema) -> dict[str, str]:
  """Sequence -> the feature that names the target in its vocabulary.

  That is the single-valued feature which owns the vocabulary, else the first
  that shares it. A sequence without one is left out.

  Example:
    >>> from recjax.schema import Feature
    >>> item = Feature("item_id", "sparse")
    >>> seen = Feature("seen", "sequence", vocabulary="item_id")
    >>> targets(Schema((item, seen), ()))
    {'seen': 'item_id'}
  """
  single = [f for f in schema.id_features if not f.is_list]
  # Of several features the first is kept; owners of a vocabulary go before.
  single.sort(key=lambda feature: feature.name != feature.vocab)
  named: dict[str, str] = {}
  for feature in single:
    named.setdefault(feature.vocab, feature.name)
  return {
    feature.name: named[feature.vocab]
    for feature in schema.id_features
    if feature.kind == "sequence" and feature.vocab in named
  }


def event_weights(
  scores: Float[Array, "batch max_len"],
  mask: Bool[Array, "users max_len"],
  normalization: str,
) -> Float[Array, "batch max_len"]:
  """Scores as weights; 0 where masked, also where all of a row is."""
  if normalization == "softmax":
    # The finite floor keeps a row without events finite.
    floor = jnp.finfo(scores.dtype).min
    scores = jax.nn.softmax(jnp.where(mask, scores, floor), axis=-1)
  return jnp.where(mask, scores, 0.0)


def weighted_sum(
  weights: Float[Array, "batch max_len"],
  events: Float[Array, "users max_len dim"],
) -> Float[Array, "batch dim"]:
  """`sum_j w_j e_j`."""
  return jnp.matmul(weights[:, None], events)[:, 0]
