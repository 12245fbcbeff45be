"""A product-key memory that gates what enters a layer, for any ranker.

Source: MSN, arXiv 2602.07526, x_in * tanh(v_o): the sum of the slots that an
input retrieves multiplies it before the layer. Gates beside `tanh`: `none`
(x v) and `sigmoid` are rows of the paper's ablation, `one_plus_tanh`
(x (1 + tanh v)) is ours.

A model with memories holds `memory_layers`, `memory` and `gate` in its config
and

* checks them with `check_memory`,
* calls `MemoryGate(..., name=f"memory_{i}")` on the input of layer i and puts
  the counters in `aux["counters"][f"memory_{i}"]`,
* adds `memory_tables` to its `tables()`,
* takes `diagnostics` and `fold` from here under the same names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recjax.errors import UserError
from recjax.layers import memory_usage
from recjax.layers.product_key_memory import (
  MemoryConfig,
  ProductKeyMemory,
  fold_keys,
  value_table,
)
from recjax.sparse.table import Table

GATES = ("tanh", "none", "sigmoid", "one_plus_tanh")


class MemoryGate(nn.Module):
  """Multiplies its input by what a memory says of it.

  The memory lives at the gate's own path: with the name `memory_0` its keys
  are `memory_0/row_keys` and its table `memory_0/values`.

  Attributes:
    config: Shape of the memory.
    gate: `tanh`, `none`, `sigmoid` or `one_plus_tanh`.
    dtype: Type of the query projection and of the product.
  """

  config: MemoryConfig
  gate: str = "tanh"
  dtype: jax.typing.DTypeLike = jnp.float32

  def setup(self):
    self.memory = ProductKeyMemory(self.config, self.dtype)
    nn.share_scope(self, self.memory)

  def __call__(
    self,
    x: Float[Array, "tokens batch dim"],
    example_mask: Bool[Array, " batch"],
  ) -> tuple[Float[Array, "tokens batch dim"], dict[str, Array]]:
    """Reads the memory and gates.

    Args:
      x: What would enter the layer. A layer without tokens passes `x[None]`.
      example_mask: False for padding, which reads nothing.

    Returns:
      What enters the layer instead, and counters for `diagnostics`.
    """
    value, reads = self.memory(x, example_mask)
    counters = memory_usage.count(
      reads, value, example_mask, num_slots=self.config.num_slots
    )
    return gate(x, value.astype(self.dtype), self.gate), counters


def gate(
  x: Float[Array, "tokens batch dim"],
  value: Float[Array, "tokens batch dim"],
  kind: str,
) -> Float[Array, "tokens batch dim"]:
  """`x` steered by the memory's value; `kind` is one of `GATES`."""
  if kind == "tanh":
    return x * jnp.tanh(value)
  if kind == "sigmoid":
    return x * jax.nn.sigmoid(value)
  if kind == "one_plus_tanh":
    return x * (1.0 + jnp.tanh(value))
  return x * value


def check_memory(
  memory_layers: tuple[int, ...], gate: str, *, num_layers: int, source: str
):
  """Checks the words of a config that place memories.

  Args:
    memory_layers: Layers whose input a memory gates, counted from 0.
    gate: One of `GATES`.
    num_layers: Layers that the model has.
    source: The word of the config that says so, such as `num_layers`.

  Raises:
    UserError: For an unknown gate, or a layer that the model has not or that
      is named twice.
  """
  if gate not in GATES:
    raise UserError(
      f"model.gate must be one of {', '.join(GATES)}, got {gate!r}"
    )
  if len(set(memory_layers)) < len(memory_layers):
    raise UserError(
      f"model.memory_layers {memory_layers} must name a layer once"
    )
  if memory_layers and not num_layers:
    raise UserError(
      f"model.memory_layers {memory_layers} must be empty: model.{source} "
      "gives the model no layer to gate"
    )
  if any(not 0 <= i < num_layers for i in memory_layers):
    raise UserError(
      f"model.memory_layers {memory_layers} must lie in 0 ... "
      f"{num_layers - 1} (model.{source} gives {num_layers} layers)"
    )


def memory_tables(
  layer_dims: Mapping[int, int], config: MemoryConfig, *, num_tokens: int
) -> dict[str, Table]:
  """The value table of each memory, by the name that its gate reads.

  Args:
    layer_dims: Layer -> width of the input that its memory gates.
    config: Shape of each memory.
    num_tokens: Tokens of that input; 1 for a layer without tokens.

  Example:
    >>> sorted(memory_tables({0: 8, 2: 4}, MemoryConfig(), num_tokens=1))
    ['memory_0/values', 'memory_2/values']
  """
  return {
    f"memory_{i}/values": value_table(
      config, num_tokens=num_tokens, value_dim=dim
    )
    for i, dim in layer_dims.items()
  }


def diagnostics(counters: Mapping[str, Any]) -> dict[str, float]:
  """How the slots of each memory are used; see `memory_usage.summarize`."""
  return {
    f"{layer}/{name}": value
    for layer, counts in counters.items()
    for name, value in memory_usage.summarize(counts).items()
  }


def fold(params: Mapping[str, Any], config: Any) -> tuple[dict[str, Any], Any]:
  """Parameters and config with constant keys, for serving.

  Args:
    params: Of a model with memories.
    config: Its config; has `memory_layers` and `memory`.
  """
  params = dict(params)
  for i in config.memory_layers:
    name = f"memory_{i}"
    params[name] = fold_keys(params[name], config.memory)
  memory = dataclasses.replace(config.memory, folded=True)
  return params, dataclasses.replace(config, memory=memory)
