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
| sparse variant, ReLU routing and DTSI | `ffn="relu_moe"` |

`ffn="gated"` and `"smoe"` are base lines of MSN, arXiv 2602.07526; see
`layers/per_token_moe.py`, which also says how FLOPs are counted.

Not stated there, our choice: FFN ratio (`mlp_ratio`), LayerNorm epsilon 1e-6,
the shape of the heads, dropout (0 in `paper` size), the numeric hinges.
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
from recjax.layers import per_token_moe
from recjax.layers.features import FeatureTokens
from recjax.layers.heads import TaskHeads
from recjax.layers.per_token import token_mixing
from recjax.layers.per_token_moe import (
  MoEConfig,
  add_terms,
  apply_ffn,
  split_paths,
  two_paths,
)
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
    ffn: The per-token network: `dense`, `gated`, `smoe` or `relu_moe`.
    moe: Shape of the networks that are not dense.
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
  ffn: str = "dense"
  moe: MoEConfig = MoEConfig()
  head_dim: int = 0
  numeric_dim: int = 0
  dropout_rate: float = 0.0
  embed_init_scale: float = 0.01
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self)
    check_token_dim(self.num_tokens, self.token_dim)
    if self.ffn not in per_token_moe.FFNS:
      raise UserError(
        f"model.ffn must be one of {', '.join(per_token_moe.FFNS)}, got "
        f"{self.ffn!r}"
      )


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
    return mix_and_predict(config, x, batch.example_mask, train=train)


class Trunk(nn.Module):
  """`mix_and_predict` as a module, for models that are not `nn.compact`."""

  config: Config

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "tokens batch dim"],
    example_mask: Bool[Array, " batch"],
    *,
    train: bool,
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    return mix_and_predict(self.config, x, example_mask, train=train)


class RankMixerBlock(nn.Module):
  """`S = LN(TokenMixing(X) + X)`, then `LN(PFFN(S) + S)`."""

  mlp_ratio: float
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32
  ffn: str = "dense"
  moe: MoEConfig = MoEConfig()

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "tokens batch dim"],
    example_mask: Bool[Array, " batch"],
    *,
    train: bool,
  ) -> tuple[Float[Array, "tokens batch dim"], losses.Terms, dict[str, Array]]:
    """The block's output, and the terms and counters of `apply_ffn`."""
    s = nn.LayerNorm(dtype=self.dtype, name="mix_norm")(token_mixing(x) + x)
    y, terms, counters = apply_ffn(
      self.ffn,
      self.moe,
      s,
      example_mask,
      mlp_ratio=self.mlp_ratio,
      dropout_rate=self.dropout_rate,
      dtype=self.dtype,
      train=train,
      name="ffn",
    )
    return (
      nn.LayerNorm(dtype=self.dtype, name="ffn_norm")(y + s),
      terms,
      counters,
    )


def mix_and_predict(
  config: Config,
  x: Float[Array, "tokens batch dim"],
  example_mask: Bool[Array, " batch"],
  *,
  train: bool,
) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
  """RankMixer blocks -> mean over tokens -> one logit a task.

  To be called inside `nn.compact`; the parts belong to the caller.

  Args:
    config: Of the model.
    x: Tokens, from wherever.
    example_mask: False for padding.
    train: Whether dropout and the losses of training are on.

  Returns:
    Predictions and aux, as a model does.
  """
  dtype = jnp.dtype(config.dtype)
  mask = example_mask
  two = train and config.ffn == "relu_moe"
  if two:
    x, mask = two_paths(x, axis=1), two_paths(mask)
  terms, counters = {}, {}
  for i in range(config.num_layers):
    x, more, counts = RankMixerBlock(
      config.mlp_ratio,
      config.dropout_rate,
      dtype,
      config.ffn,
      config.moe,
      name=f"block_{i}",
    )(x, mask, train=train)
    terms = add_terms(terms, more)
    if counts:
      counters[f"block_{i}"] = counts
  heads = TaskHeads(
    config.tasks, config.head_dim, config.dropout_rate, dtype, name="heads"
  )
  aux = {"terms": terms, "counters": counters}
  pooled = x.mean(axis=0)
  if two:
    x, _ = split_paths(x, axis=1)
    pooled, dense = split_paths(pooled)
    aux["dense_path"] = heads(dense, train=train)
  return heads(pooled, train=train), aux | {"tokens": x}


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
  """Cross entropy (squared error for real labels), one term a task.

  Experts add `moe_balance` or `moe_penalty`; the dense path of `relu_moe`, a
  term `<task>_dense_path` a task.
  """
  del config
  terms = losses.task_losses(predictions, batch)
  dense = losses.task_losses(aux.get("dense_path", {}), batch)
  terms |= {f"{task}_dense_path": term for task, term in dense.items()}
  return terms | aux.get("terms", {})


def diagnostics(counters: dict[str, Any]) -> dict[str, float]:
  """How the experts of each block are used; see `expert_usage`."""
  return {
    f"{layer}/{name}": value
    for layer, counts in counters.items()
    for name, value in per_token_moe.expert_usage(counts).items()
  }


def idle_params(config: Config) -> int:
  """Dense parameters that a served example does not use; see the layer."""
  return config.num_layers * per_token_moe.idle_params(
    config.ffn,
    config.moe,
    num_tokens=config.num_tokens,
    token_dim=config.token_dim,
    mlp_ratio=config.mlp_ratio,
  )


def check_token_dim(num_tokens: int, token_dim: int):
  """Raises unless tokens can be cut into as many heads."""
  if token_dim % num_tokens:
    raise UserError(
      f"model.token_dim ({token_dim}) must be a multiple of model.num_tokens "
      f"({num_tokens}): token mixing cuts a token into that many heads"
    )


def check_single_path(ffn: str):
  """Raises for the network that trains on two paths of examples."""
  if ffn == "relu_moe":
    raise UserError(
      "model.ffn=relu_moe trains every example on two paths, which this model "
      "does not; use dense, gated or smoe"
    )
