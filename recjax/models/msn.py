"""MSN: a product-key memory gates the per-token networks of a RankMixer.

Source: MSN, arXiv 2602.07526. Every token retrieves `top_k` of `num_keys ** 2`
slots; the squashed sum of the slots' values multiplies what enters the
per-token network. Capacity grows with the slots, the work of an example with
`top_k` and the square root of the slots.

| paper | code |
| --- | --- |
| x_in | `s`, the mixed and normalised tokens |
| v_o | `value`, output of `ProductKeyMemory` |
| x_in * tanh(v_o) | `gate(s, value, "tanh")` |
| L layers with a memory | `memory_layers` |

Not stated, our choice: the residual of the block stays on the un-gated S, so
that a closed gate cannot cut the signal; memories do not share values between
layers; for the rest see `layers/product_key_memory.py`. Gates beside `tanh`:
`none` (x v) and `sigmoid` are rows of the paper's ablation, `one_plus_tanh`
(x (1 + tanh v)) is ours.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax.baselines import rankmixer
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import memory_usage
from recjax.layers.features import FeatureTokens
from recjax.layers.heads import TaskHeads
from recjax.layers.per_token import PerTokenFFN, token_mixing
from recjax.layers.product_key_memory import (
  MemoryConfig,
  ProductKeyMemory,
  fold_keys,
  value_table,
)
from recjax.schema import Schema
from recjax.sparse.table import Table

GATES = ("tanh", "none", "sigmoid", "one_plus_tanh")


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
    if self.gate not in GATES:
      raise UserError(
        f"model.gate must be one of {', '.join(GATES)}, got {self.gate!r}"
      )
    if any(not 0 <= i < self.num_layers for i in self.memory_layers):
      raise UserError(
        f"model.memory_layers {self.memory_layers} must lie in 0 ... "
        f"{self.num_layers - 1} (model.num_layers is {self.num_layers})"
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
    counters = {}
    for i in range(config.num_layers):
      s = nn.LayerNorm(dtype=dtype, name=f"mix_norm_{i}")(token_mixing(x) + x)
      gated = s
      if i in config.memory_layers:
        value, reads = ProductKeyMemory(
          config.memory, dtype, name=f"memory_{i}"
        )(s, batch.example_mask)
        gated = gate(s, value.astype(dtype), config.gate)
        counters[f"memory_{i}"] = memory_usage.count(
          reads, value, batch.example_mask, num_slots=config.memory.num_slots
        )
      ffn = PerTokenFFN(
        config.mlp_ratio, config.dropout_rate, dtype, name=f"ffn_{i}"
      )
      # The residual is un-gated: a closed gate must not cut the signal.
      x = nn.LayerNorm(dtype=dtype, name=f"ffn_norm_{i}")(
        ffn(gated, train=train) + s
      )
    heads = TaskHeads(
      config.tasks, config.head_dim, config.dropout_rate, dtype, name="heads"
    )
    aux = {"tokens": x, "counters": counters}
    return heads(x.mean(axis=0), train=train), aux


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """The embedding table, and the values of each memory."""
  declared = rankmixer.tables(config, schema)
  for i in config.memory_layers:
    declared[f"memory_{i}/values"] = value_table(
      config.memory, num_tokens=config.num_tokens, value_dim=config.token_dim
    )
  return declared


loss_fn = rankmixer.loss_fn


def diagnostics(counters: dict[str, Any]) -> dict[str, float]:
  """How the slots of each memory are used; see `memory_usage.summarize`."""
  return {
    f"{layer}/{name}": value
    for layer, counts in counters.items()
    for name, value in memory_usage.summarize(counts).items()
  }


def gate(
  x: Float[Array, "tokens batch dim"],
  value: Float[Array, "tokens batch dim"],
  kind: str,
) -> Float[Array, "tokens batch dim"]:
  """`x` steered by the memory's value; see the module's docstring."""
  if kind == "tanh":
    return x * jnp.tanh(value)
  if kind == "sigmoid":
    return x * jax.nn.sigmoid(value)
  if kind == "one_plus_tanh":
    return x * (1.0 + jnp.tanh(value))
  return x * value


def fold(
  params: dict[str, Any], config: Config
) -> tuple[dict[str, Any], Config]:
  """Parameters and config with constant keys, for serving."""
  params = dict(params)
  for i in config.memory_layers:
    name = f"memory_{i}"
    params[name] = fold_keys(params[name], config.memory)
  memory = dataclasses.replace(config.memory, folded=True)
  return params, dataclasses.replace(config, memory=memory)
