"""MSN: a product-key memory gates the per-token networks of a RankMixer.

Source: MSN, arXiv 2602.07526. Every token retrieves `top_k` of `num_keys ** 2`
slots; the squashed sum of the slots' values multiplies what enters the
per-token network. Capacity grows with the slots, the work of an example with
`top_k` and the square root of the slots.

| paper | code |
| --- | --- |
| x_in | `s`, the mixed and normalised tokens |
| x_in * tanh(v_o) | `MemoryGate` with `gate="tanh"` |
| L layers with a memory | `memory_layers` |
| MSN-FFN, MSN-SMoE | `ffn="dense"`, `ffn="smoe"` |

Not stated, our choice: the residual of the block stays on the un-gated S, so
that a closed gate cannot cut the signal; memories do not share values between
layers; for the rest see `layers/memory_gate.py` and
`layers/product_key_memory.py`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax.baselines import rankmixer
from recjax.batch import Batch
from recjax.layers import memory_gate
from recjax.layers.features import FeatureTokens
from recjax.layers.heads import TaskHeads
from recjax.layers.memory_gate import MemoryGate, check_memory, memory_tables
from recjax.layers.per_token import token_mixing
from recjax.layers.per_token_moe import (
  add_terms,
  apply_ffn,
  split_paths,
  two_paths,
)
from recjax.layers.product_key_memory import MemoryConfig
from recjax.schema import Schema
from recjax.sparse.table import Table


@dataclasses.dataclass(frozen=True)
class Config(rankmixer.Config):
  """RankMixer's fields, and the memory.

  Attributes:
    memory: Shape of each memory.
    memory_layers: Blocks that have one, counted from 0.
    gate: `tanh`, `none`, `sigmoid` or `one_plus_tanh`.
  """

  memory: MemoryConfig = MemoryConfig()
  memory_layers: tuple[int, ...] = (0, 1)
  gate: str = "tanh"

  def __post_init__(self):
    super().__post_init__()
    check_memory(
      self.memory_layers,
      self.gate,
      num_layers=self.num_layers,
      source="num_layers",
    )


class Model(nn.Module):
  """Tokens -> blocks, some gated by a memory -> mean -> one logit a task."""

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
    mask = batch.example_mask
    two = train and config.ffn == "relu_moe"
    if two:
      x, mask = two_paths(x, axis=1), two_paths(mask)
    terms, counters = {}, {}
    for i in range(config.num_layers):
      s = nn.LayerNorm(dtype=dtype, name=f"mix_norm_{i}")(token_mixing(x) + x)
      gated = s
      if i in config.memory_layers:
        gated, counters[f"memory_{i}"] = MemoryGate(
          config.memory, config.gate, dtype, name=f"memory_{i}"
        )(s, mask)
      y, more, counts = apply_ffn(
        config.ffn,
        config.moe,
        gated,
        mask,
        mlp_ratio=config.mlp_ratio,
        dropout_rate=config.dropout_rate,
        dtype=dtype,
        train=train,
        name=f"ffn_{i}",
      )
      terms = add_terms(terms, more)
      if counts:
        counters[f"ffn_{i}"] = counts
      # The residual is un-gated: a closed gate must not cut the signal.
      x = nn.LayerNorm(dtype=dtype, name=f"ffn_norm_{i}")(y + s)
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
  """The embedding table, and the values of each memory."""
  return rankmixer.tables(config, schema) | memory_tables(
    {i: config.token_dim for i in config.memory_layers},
    config.memory,
    num_tokens=config.num_tokens,
  )


loss_fn = rankmixer.loss_fn
idle_params = rankmixer.idle_params


def diagnostics(counters: dict[str, Any]) -> dict[str, float]:
  """How the slots of each memory and the experts of each layer are used."""
  experts = {k: v for k, v in counters.items() if k.startswith("ffn_")}
  memories = {k: v for k, v in counters.items() if k not in experts}
  return memory_gate.diagnostics(memories) | rankmixer.diagnostics(experts)


fold = memory_gate.fold
