"""DCN-V2: layers that cross the features explicitly, and an MLP.

Source: Wang et al., DCN V2: Improved Deep & Cross Network and Practical
Lessons for Web-scale Learning to Rank Systems, arXiv 2008.13535.

| paper | code |
| --- | --- |
| eq. 1, x' = x_0 * (W x + b) + x | `CrossLayer`, `low_rank=0` |
| eq. 2, W = U V^T, rank r | `low_rank` |
| eq. 3, K experts weighted by G_i(x) | `num_experts`, `expert_gate` |
| eq. 4, U g(C g(V^T x)) | `expert_activation` |
| stacked: MLP on the crossed features | `structure="stacked"` |
| parallel: crossed features beside the MLP's output | `structure="parallel"` |
| deep layers h' = ReLU(W h + b) | `mlp_dims` |

Not stated, our choice: every cross layer has a gate of its own, linear with a
bias, and one bias b for all its experts, as eq. 3 is written; a single expert
has no gate, with which eq. 3 is eq. 2. Sequences and sets enter by their mean.

With `memory_layers` a product-key memory gates what enters a deep layer, as
in `dlrm_mlp`: the whole input is the one token, and there is no residual, so a
closed gate cuts the signal (of the deep part, where `structure="parallel"`).
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
from recjax.layers import memory_gate
from recjax.layers.dropout import Dropout
from recjax.layers.features import ConcatFeatures, concat_width
from recjax.layers.heads import TaskHeads
from recjax.layers.memory_gate import MemoryGate
from recjax.layers.product_key_memory import MemoryConfig
from recjax.schema import Schema, suggest
from recjax.sparse.table import Table, embedding_table

STRUCTURES = ("stacked", "parallel")
EXPERT_GATES = ("softmax", "sigmoid", "constant")
ACTIVATIONS = {
  "identity": lambda x: x,
  "relu": nn.relu,
  "tanh": nn.tanh,
  "hard_tanh": nn.hard_tanh,
}
# One draw per expert, scaled by the width of one expert's input.
_EXPERTS_INIT = nn.initializers.variance_scaling(
  1.0, "fan_in", "truncated_normal", batch_axis=(0,)
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network.

  Attributes:
    tasks: Labels to predict.
    embed_dim: Width of an embedding.
    structure: `stacked` or `parallel`.
    num_cross_layers: Cross layers; the highest polynomial order is one more.
    low_rank: Rank r of a cross layer's matrix, of each expert; 0 for full.
    num_experts: Low-rank experts of a cross layer.
    expert_gate: `softmax`, `sigmoid` or `constant` (all weights 1).
    expert_activation: g of eq. 4, `relu`, `tanh` or `hard_tanh`; `identity`
      for eq. 3, which has no C.
    mlp_dims: Widths of the deep layers.
    numeric_dim: Hinges of each dense feature; see `ConcatFeatures`.
    dropout_rate: Share of the deep layers' units dropped in training.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
    memory_layers: Deep layers whose input a memory gates, counted from 0.
    memory: Shape of each memory.
    gate: How; see `layers/memory_gate.py`.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  structure: str = "stacked"
  num_cross_layers: int = 2
  low_rank: int = 0
  num_experts: int = 1
  expert_gate: str = "softmax"
  expert_activation: str = "identity"
  mlp_dims: tuple[int, ...] = (256, 128)
  numeric_dim: int = 0
  dropout_rate: float = 0.0
  embed_init_scale: float = 0.01
  dtype: str = "float32"
  memory_layers: tuple[int, ...] = ()
  memory: MemoryConfig = MemoryConfig()
  gate: str = "tanh"

  def __post_init__(self):
    config_lib.check_network(
      self, num_cross_layers=1, low_rank=0, num_experts=1
    )
    for name, allowed in (
      ("structure", STRUCTURES),
      ("expert_gate", EXPERT_GATES),
      ("expert_activation", ACTIVATIONS),
    ):
      value = getattr(self, name)
      if value not in allowed:
        raise UserError(
          f"unknown model.{name} {value!r}" + suggest(value, allowed)
        )
    if not self.low_rank and (
      self.num_experts > 1 or self.expert_activation != "identity"
    ):
      raise UserError(
        "model.num_experts and model.expert_activation are for low-rank "
        "cross layers; set model.low_rank to at least 1"
      )
    memory_gate.check_memory(
      self.memory_layers,
      self.gate,
      num_layers=len(self.mlp_dims),
      source="mlp_dims",
    )


class Model(nn.Module):
  """Embeddings -> cross layers and MLP -> one logit a task."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    config = self.config
    dtype = jnp.dtype(config.dtype)
    x0 = ConcatFeatures(self.schema, config.numeric_dim, dtype, name="inputs")(
      batch, rows["embedding"]
    )
    crossed = x0
    for i in range(config.num_cross_layers):
      crossed = CrossLayer(
        config.low_rank,
        config.num_experts,
        config.expert_gate,
        config.expert_activation,
        dtype,
        name=f"cross_{i}",
      )(x0, crossed)
    deep = crossed if config.structure == "stacked" else x0
    deep, counters = self._deep(deep, batch, train)
    if config.structure == "parallel":
      deep = jnp.concatenate([crossed, deep], axis=-1)
    heads = TaskHeads(config.tasks, dtype=dtype, name="heads")
    return heads(deep, train=train), {"counters": counters}

  def _deep(self, x, batch, train):
    config = self.config
    dtype = jnp.dtype(config.dtype)
    counters = {}
    for i, dim in enumerate(config.mlp_dims):
      if i in config.memory_layers:
        gated, counters[f"memory_{i}"] = MemoryGate(
          config.memory, config.gate, dtype, name=f"memory_{i}"
        )(x[None], batch.example_mask)
        x = gated[0]
      x = nn.relu(nn.Dense(dim, dtype=dtype, name=f"mlp_{i}")(x))
      x = Dropout(config.dropout_rate, deterministic=not train)(x)
    return x, counters


class CrossLayer(nn.Module):
  """`x_0 * (W x + b) + x`, with W full, of low rank, or a mixture of such.

  Attributes:
    low_rank: Rank of W; 0 for a full matrix.
    num_experts: Low-rank matrices.
    expert_gate: Of the experts' weights, `softmax`, `sigmoid` or `constant`.
    activation: g in `U g(C g(V^T x))`; `identity` leaves C out.
    dtype: Type of the computation; parameters are float32.
  """

  low_rank: int = 0
  num_experts: int = 1
  expert_gate: str = "softmax"
  activation: str = "identity"
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x0: Float[Array, "batch dim"], x: Float[Array, "batch dim"]
  ) -> Float[Array, "batch dim"]:
    if not self.low_rank:
      return x0 * nn.Dense(x.shape[-1], dtype=self.dtype, name="dense")(x) + x
    experts = self._experts(x)
    weights = self._weights(x)
    return x0 * jnp.einsum("be,ebd->bd", weights, experts) + x

  def _experts(self, x) -> Float[Array, "experts batch dim"]:
    """`U_i g(C_i g(V_i^T x)) + b`."""
    num, rank, dim = self.num_experts, self.low_rank, x.shape[-1]
    v = self.param("v", _EXPERTS_INIT, (num, dim, rank))
    u = self.param("u", _EXPERTS_INIT, (num, rank, dim))
    bias = self.param("bias", nn.initializers.zeros, (dim,))
    x, v, u, bias = nn.dtypes.promote_dtype(x, v, u, bias, dtype=self.dtype)
    hidden = jnp.einsum("bd,edr->ebr", x, v)
    if self.activation != "identity":
      g = ACTIVATIONS[self.activation]
      c = self.param("c", _EXPERTS_INIT, (num, rank, rank)).astype(self.dtype)
      hidden = g(jnp.einsum("ebr,ers->ebs", g(hidden), c))
    return jnp.einsum("ebr,erd->ebd", hidden, u) + bias[None, None]

  def _weights(self, x) -> Float[Array, "batch experts"]:
    shape = (x.shape[0], self.num_experts)
    if self.num_experts == 1 or self.expert_gate == "constant":
      return jnp.ones(shape, self.dtype)
    logits = nn.Dense(self.num_experts, dtype=self.dtype, name="gate")(x)
    if self.expert_gate == "sigmoid":
      return nn.sigmoid(logits)
    return nn.softmax(logits.astype(jnp.float32)).astype(self.dtype)


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """One embedding table for all id features, and the values of memories."""
  # A cross layer keeps the width, so both structures feed the MLP alike.
  width = concat_width(schema, config.embed_dim, config.numeric_dim)
  dims = (width, *config.mlp_dims)
  embedding = embedding_table(
    schema, config.embed_dim, init_scale=config.embed_init_scale
  )
  memories = memory_gate.memory_tables(
    {i: dims[i] for i in config.memory_layers}, config.memory, num_tokens=1
  )
  return {"embedding": embedding} | memories


loss_fn = losses.plain_loss_fn


diagnostics = memory_gate.diagnostics
fold = memory_gate.fold
