"""Wukong: stacked factorisation machines.

Source: Zhang et al., Wukong: Towards a Scaling Law for Large-Scale
Recommendation, arXiv 2403.02545.

| paper | code |
| --- | --- |
| X, n embeddings of width d | `x`, `[embeddings, batch, embed_dim]` |
| l, n_F, n_L, k | `num_layers`, `num_fm`, `num_linear`, `fm_rank` |
| X' = LN(concat(FMB(X), LCB(X)) + X), section 3.3 | `WukongLayer` |
| FMB(X) = reshape(MLP(LN(flatten(FM(X))))), section 3.4 | `FMBlock` |
| FM(X) = X X^T; X X^T Y, section 3.6 | `pair_products` |
| Y from the input, section 3.6 | `projection="attentive"` |
| LCB(X) = W_L X, section 3.5 | `LinearCompress` |
| dense features through an MLP, section 3.2 | `dense_mlp_dims`, `num_dense` |

Where layers have unlike numbers of embeddings the residual is compressed
linearly, as the paper says. Embeddings come first in memory: the linear
recombinations are then one matrix product over batch and width.

Not stated, our choice: no bias in linear compressions; the last layer of each
MLP is linear, the others end in a ReLU; dense features may give several
embeddings (`num_dense`), as important features do in the paper; a vector is
projected linearly; an attentive Y is an MLP of one hidden layer, as wide as
the first of the FMB, on the input compressed to k embeddings. Sequences and
sets enter by their mean, in the paper mostly by their sum.
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
from recjax.layers.dropout import Dropout
from recjax.layers.features import pooled_rows
from recjax.layers.heads import TaskHeads
from recjax.schema import Schema, suggest
from recjax.sparse.table import Table, embedding_table

PROJECTIONS = ("learned", "attentive")


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network.

  Attributes:
    tasks: Labels to predict.
    embed_dim: Width of every embedding, d.
    num_layers: Interaction layers, l.
    num_fm: Embeddings that a layer's factorisation machine makes, n_F.
    num_linear: Embeddings that its linear compression makes, n_L.
    fm_rank: Columns of Y, k; 0 for all products of pairs, without Y.
    projection: Y is `learned` or, `attentive`, computed from the input.
    fm_mlp_dims: Widths of the hidden layers behind a factorisation machine.
    dense_mlp_dims: Widths of the hidden layers on the dense features.
    num_dense: Embeddings that the dense features give.
    mlp_dims: Widths of the hidden layers of the last MLP.
    dropout_rate: Share of hidden units dropped in training.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  num_layers: int = 2
  num_fm: int = 16
  num_linear: int = 16
  fm_rank: int = 8
  projection: str = "learned"
  fm_mlp_dims: tuple[int, ...] = (128,)
  dense_mlp_dims: tuple[int, ...] = (64,)
  num_dense: int = 1
  mlp_dims: tuple[int, ...] = (128, 64)
  dropout_rate: float = 0.0
  embed_init_scale: float = 0.01
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(
      self,
      num_fm=1,
      num_linear=1,
      fm_rank=0,
      fm_mlp_dims=1,
      dense_mlp_dims=1,
      num_dense=1,
    )
    if self.projection not in PROJECTIONS:
      raise UserError(
        f"unknown model.projection {self.projection!r}"
        + suggest(self.projection, PROJECTIONS)
      )
    if self.projection == "attentive" and not (
      self.fm_rank and self.fm_mlp_dims
    ):
      raise UserError(
        "model.projection 'attentive' needs model.fm_rank of at least 1 and "
        "a layer in model.fm_mlp_dims; set them or use 'learned'"
      )


class Model(nn.Module):
  """Embeddings -> interaction layers -> MLP -> one logit a task."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    config = self.config
    dtype = jnp.dtype(config.dtype)
    x = self._embed(batch, rows["embedding"], train)
    for i in range(config.num_layers):
      x = WukongLayer(config, name=f"layer_{i}")(x, train=train)
    flat = x.swapaxes(0, 1).reshape(batch.size, -1)
    hidden = _Hidden(config.mlp_dims, config.dropout_rate, dtype, name="mlp")(
      flat, train=train
    )
    heads = TaskHeads(config.tasks, dtype=dtype, name="heads")
    return heads(hidden, train=train), {"embeddings": x}

  def _embed(self, batch, rows, train) -> Float[Array, "embeddings batch dim"]:
    config = self.config
    dim, dtype = config.embed_dim, jnp.dtype(config.dtype)
    vectors = pooled_rows(self.schema, batch, rows)
    vectors += [
      nn.Dense(dim, dtype=dtype, name=f"vector_{f.name}")(batch.vectors[f.name])
      for f in self.schema.vector_features
    ]
    x = jnp.stack(vectors).astype(dtype)
    if not batch.dense.shape[-1]:
      return x
    dense = _Hidden(
      config.dense_mlp_dims, config.dropout_rate, dtype, name="dense_mlp"
    )(batch.dense, train=train)
    dense = nn.Dense(config.num_dense * dim, dtype=dtype, name="dense")(dense)
    return jnp.concatenate([x, to_embeddings(dense, dim)])


class WukongLayer(nn.Module):
  """`LN(concat(FMB(X), LCB(X)) + X)`."""

  config: Config

  @nn.compact
  def __call__(
    self, x: Float[Array, "embeddings batch dim"], *, train: bool
  ) -> Float[Array, "outputs batch dim"]:
    config = self.config
    dtype = jnp.dtype(config.dtype)
    num_outputs = config.num_fm + config.num_linear
    products = FMBlock(config, name="fm")(x, train=train)
    linear = LinearCompress(config.num_linear, dtype, name="linear")(x)
    residual = x
    if len(x) != num_outputs:
      residual = LinearCompress(num_outputs, dtype, name="residual")(x)
    x = jnp.concatenate([products, linear]) + residual
    return nn.LayerNorm(dtype=dtype, name="norm")(x)


class FMBlock(nn.Module):
  """`reshape(MLP(LN(flatten(X X^T Y))))`."""

  config: Config

  @nn.compact
  def __call__(
    self, x: Float[Array, "embeddings batch dim"], *, train: bool
  ) -> Float[Array, "num_fm batch dim"]:
    config = self.config
    dtype = jnp.dtype(config.dtype)
    flat = pair_products(x, self._compress(x)).reshape(x.shape[1], -1)
    flat = nn.LayerNorm(dtype=dtype, name="norm")(flat)
    hidden = _Hidden(
      config.fm_mlp_dims, config.dropout_rate, dtype, name="mlp"
    )(flat, train=train)
    width = config.num_fm * config.embed_dim
    output = nn.Dense(width, dtype=dtype, name="output")(hidden)
    return to_embeddings(output, config.embed_dim)

  def _compress(self, x):
    """`Y^T X`: what every embedding is multiplied with."""
    config = self.config
    dtype, rank = jnp.dtype(config.dtype), config.fm_rank
    if not rank:
      return x
    if config.projection == "learned":
      return LinearCompress(rank, dtype, name="project")(x)
    num, batch, _ = x.shape
    few = LinearCompress(rank, dtype, name="attend_compress")(x)
    few = few.swapaxes(0, 1).reshape(batch, -1)
    hidden = nn.Dense(config.fm_mlp_dims[0], dtype=dtype, name="attend_hidden")
    output = nn.Dense(num * rank, dtype=dtype, name="attend_output")
    y = output(nn.relu(hidden(few))).reshape(batch, num, rank)
    return jnp.einsum("bnk,nbd->kbd", y, x)


class LinearCompress(nn.Module):
  """`W X`: every output embedding is a weighted sum of the input embeddings.

  Attributes:
    num_outputs: Embeddings to make.
    dtype: Type of the computation; parameters are float32.
  """

  num_outputs: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "embeddings batch dim"]
  ) -> Float[Array, "outputs batch dim"]:
    num, batch, dim = x.shape
    shape = (num, self.num_outputs)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
    return (kernel.T @ x.reshape(num, -1)).reshape(-1, batch, dim)


class _Hidden(nn.Module):
  """Layers of `Dropout(ReLU(Dense(x)))`."""

  dims: tuple[int, ...]
  dropout_rate: float
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, x, *, train: bool):
    for i, dim in enumerate(self.dims):
      x = nn.relu(nn.Dense(dim, dtype=self.dtype, name=f"dense_{i}")(x))
      x = Dropout(self.dropout_rate, deterministic=not train)(x)
    return x


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """One embedding table for all id features."""
  return {
    "embedding": embedding_table(
      schema, config.embed_dim, init_scale=config.embed_init_scale
    )
  }


loss_fn = losses.plain_loss_fn


def pair_products(
  x: Float[Array, "embeddings batch dim"], z: Float[Array, "others batch dim"]
) -> Float[Array, "batch embeddings others"]:
  """Dot products of the embeddings of an example with those of `z`.

  With `z = Y^T X` this is `X X^T Y`, at the cost of n k d instead of n^2 d.
  """
  return jnp.einsum("nbd,kbd->bnk", x, z)


def to_embeddings(
  x: Float[Array, "batch width"], dim: int
) -> Float[Array, "embeddings batch dim"]:
  """Cuts a vector into embeddings of width `dim`, these first."""
  return x.reshape(x.shape[0], -1, dim).swapaxes(0, 1)
