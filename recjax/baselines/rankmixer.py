"""RankMixer: parameter-free token mixing and per-token networks.

Source: Zhu et al., RankMixer, arXiv 2507.15551.

| paper | code |
| --- | --- |
| T tokens of width D | `num_tokens`, `token_dim` |
| eq. 2, tokenisation | `FeatureTokens` |
| eq. 3-4, multi-head token mixing, H = T | `token_mixing` |
| eq. 5, S = LN(TokenMixing(X) + X) | `RankMixerBlock`, first half |
| eq. 6-8, X' = LN(PFFN(S) + S) | `RankMixerBlock`, second half |
| mean pooling, task heads | `Model` |

Not stated there, our choice: FFN ratio (`mlp_ratio`), LayerNorm epsilon 1e-6,
the shape of the heads, dropout (0 in `paper` size), the numeric hinges.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers.features import FeatureTokens
from recjax.layers.heads import TaskHeads
from recjax.layers.per_token import PerTokenFFN, token_mixing
from recjax.schema import Schema
from recjax.sparse.table import Table, embedding_table


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network.

  Attributes:
    tasks: Labels to predict.
    embed_dim: Width of an embedding.
    num_tokens: Tokens that the features are cut into.
    token_dim: Width of a token; a multiple of `num_tokens`.
    num_layers: RankMixer blocks.
    mlp_ratio: Inner width of a per-token network over `token_dim`.
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
  mlp_ratio: float = 2.0
  head_dim: int = 0
  numeric_dim: int = 0
  dropout_rate: float = 0.0
  embed_init_scale: float = 0.01
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self)
    check_token_dim(self.num_tokens, self.token_dim)


class Model(nn.Module):
  """Tokens -> RankMixer blocks -> mean over tokens -> one logit a task."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    config = self.config
    dtype = jnp.dtype(config.dtype)
    x = FeatureTokens(
      self.schema,
      config.num_tokens,
      config.token_dim,
      config.numeric_dim,
      dtype,
      name="tokens",
    )(batch, rows["embedding"])
    for i in range(config.num_layers):
      x = RankMixerBlock(
        config.mlp_ratio, config.dropout_rate, dtype, name=f"block_{i}"
      )(x, train=train)
    heads = TaskHeads(
      config.tasks, config.head_dim, config.dropout_rate, dtype, name="heads"
    )
    return heads(x.mean(axis=0), train=train), {"tokens": x}


class RankMixerBlock(nn.Module):
  """`S = LN(TokenMixing(X) + X)`, then `LN(PFFN(S) + S)`."""

  mlp_ratio: float
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "tokens batch dim"], *, train: bool
  ) -> Float[Array, "tokens batch dim"]:
    s = nn.LayerNorm(dtype=self.dtype, name="mix_norm")(token_mixing(x) + x)
    ffn = PerTokenFFN(self.mlp_ratio, self.dropout_rate, self.dtype, name="ffn")
    return nn.LayerNorm(dtype=self.dtype, name="ffn_norm")(
      ffn(s, train=train) + s
    )


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """One embedding table for all id features."""
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
  """Cross entropy (squared error for real labels), one term a task."""
  del aux, config
  return losses.task_losses(predictions, batch)


def check_token_dim(num_tokens: int, token_dim: int):
  """Raises unless tokens can be cut into as many heads."""
  if token_dim % num_tokens:
    raise UserError(
      f"model.token_dim ({token_dim}) must be a multiple of model.num_tokens "
      f"({num_tokens}): token mixing cuts a token into that many heads"
    )
