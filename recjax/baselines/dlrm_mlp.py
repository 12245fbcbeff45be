"""DLRM: embeddings, an optional dot interaction, and an MLP.

Sources: Naumov et al., Deep Learning Recommendation Model, arXiv 1906.00091.
The "DLRM-MLP" base line of RankMixer (arXiv 2507.15551) and MSN (arXiv
2602.07526) is the form without the dot interaction, the default here.

| paper | code |
| --- | --- |
| bottom MLP on the dense features | `bottom` (with `interaction="dot"`) |
| dot products of all pairs of embeddings | `dot_interaction` |
| top MLP | `mlp_dims` |

With `memory_layers` a product-key memory gates what enters a layer of the top
MLP: x * tanh(v_o), the literal form of MSN, with the whole input as the one
token. A RankMixer block keeps the un-gated input in its residual; an MLP has
none, so here a closed gate does cut the signal (the values' initial scale of 1
keeps it open; `gate="one_plus_tanh"` starts from the plain MLP's signal).

Departures: sequences and sets enter by their mean; with the dot interaction
the top MLP also sees all inputs, not only the output of the bottom MLP.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax import losses
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import memory_gate
from recjax.layers.dropout import Dropout
from recjax.layers.features import (
  ConcatFeatures,
  concat_width,
  pooled_rows,
)
from recjax.layers.heads import TaskHeads
from recjax.layers.memory_gate import MemoryGate, check_memory, memory_tables
from recjax.layers.product_key_memory import MemoryConfig
from recjax.schema import Schema
from recjax.sparse.table import Table, embedding_table


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network.

  Attributes:
    tasks: Labels to predict.
    embed_dim: Width of an embedding.
    mlp_dims: Widths of the hidden layers of the top MLP.
    interaction: `none` or `dot`.
    memory: Shape of each memory.
    memory_layers: Layers of the top MLP whose input a memory gates, from 0.
    gate: `tanh`, `none`, `sigmoid` or `one_plus_tanh`.
    numeric_dim: Hinges of each dense feature; see `ConcatFeatures`.
    dropout_rate: Share of hidden units dropped in training.
    embed_init_scale: Standard deviation of initial embeddings.
    dtype: Type of the computation; parameters are float32.
  """

  tasks: tuple[str, ...] = ("click",)
  embed_dim: int = 16
  mlp_dims: tuple[int, ...] = (256, 128)
  interaction: str = "none"
  memory: MemoryConfig = MemoryConfig()
  memory_layers: tuple[int, ...] = ()
  gate: str = "tanh"
  numeric_dim: int = 0
  dropout_rate: float = 0.0
  embed_init_scale: float = 0.01
  dtype: str = "float32"

  def __post_init__(self):
    config_lib.check_network(self)
    if self.interaction not in ("none", "dot"):
      raise UserError(
        f"model.interaction must be 'none' or 'dot', got {self.interaction!r}"
      )
    check_memory(
      self.memory_layers,
      self.gate,
      num_layers=len(self.mlp_dims),
      source="mlp_dims",
    )


class Model(nn.Module):
  """Embeddings -> (dot products) -> MLP -> one logit a task."""

  config: Config
  schema: Schema

  @nn.compact
  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    config = self.config
    dtype = jnp.dtype(config.dtype)
    embeddings = rows["embedding"]
    x = ConcatFeatures(self.schema, config.numeric_dim, dtype, name="inputs")(
      batch, embeddings
    )
    if config.interaction == "dot":
      vectors = pooled_rows(self.schema, batch, embeddings)
      if batch.dense.shape[-1]:
        bottom = nn.Dense(config.embed_dim, dtype=dtype, name="bottom")
        vectors.append(nn.relu(bottom(batch.dense)))
      products = dot_interaction(jnp.stack(vectors, axis=1).astype(dtype))
      x = jnp.concatenate([x, products], axis=-1)
    counters = {}
    for i, dim in enumerate(config.mlp_dims):
      if i in config.memory_layers:
        gated, counters[f"memory_{i}"] = MemoryGate(
          config.memory, config.gate, dtype, name=f"memory_{i}"
        )(x[None], batch.example_mask)
        x = gated[0]
      x = nn.relu(nn.Dense(dim, dtype=dtype, name=f"mlp_{i}")(x))
      x = Dropout(config.dropout_rate, deterministic=not train)(x)
    heads = TaskHeads(config.tasks, dtype=dtype, name="heads")
    return heads(x, train=train), {"counters": counters}


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """One embedding table for all id features, and the values of memories."""
  embedding = embedding_table(
    schema, config.embed_dim, init_scale=config.embed_init_scale
  )
  dims = (input_dim(config, schema), *config.mlp_dims)
  return {"embedding": embedding} | memory_tables(
    {i: dims[i] for i in config.memory_layers}, config.memory, num_tokens=1
  )


loss_fn = losses.plain_loss_fn


diagnostics = memory_gate.diagnostics
fold = memory_gate.fold


def input_dim(config: Config, schema: Schema) -> int:
  """Width of what enters the top MLP."""
  dim = concat_width(schema, config.embed_dim, config.numeric_dim)
  if config.interaction == "dot":
    vectors = len(schema.id_features) + bool(schema.dense_features)
    dim += vectors * (vectors - 1) // 2
  return dim


def dot_interaction(
  vectors: Float[Array, "batch features dim"],
) -> Float[Array, "batch pairs"]:
  """Dot products of all pairs i > j of the vectors of an example."""
  products = jnp.einsum("bid,bjd->bij", vectors, vectors)
  row, column = jnp.tril_indices(vectors.shape[1], k=-1)
  return products[:, row, column]
