"""Product-key memory: exact top-k of num_keys ** 2 slots by two short searches.

Sources: MSN, arXiv 2602.07526 (the memory as a gate of a ranker); Lample et
al., Large Memory Layers with Product Keys, arXiv 1907.05242 (the search); Zhu
et al., SimVQ, arXiv 2411.02038 (over-parameterised keys).

| paper | code |
| --- | --- |
| sqrt(n) sub-keys K_row, K_col | `row_keys`, `col_keys`, `num_keys` each |
| Theta_row, Theta_col | `row_theta`, `col_theta` |
| V, the value table | the in-model table `values` |
| S_row, S_col, TopK, A | `pallas_kernels.product_key_lookup` |
| v_o = sum_a w_a V[a] | the layer's output |

Not stated in MSN, our choice (each a field of `MemoryConfig`): Theta acts
before the LayerNorm, from the right (d x d, as in SimVQ) or the left, from the
identity; LayerNorm has a gain and no bias, the gains start at key_dim ** -0.25
so that a score has unit variance; heads are summed; values start with standard
deviation 1, for a smaller one leaves tanh(v_o) near 0 and starves what it
gates.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from recjax.errors import UserError
from recjax.layers.per_token import PerTokenDense
from recjax.sparse import in_model
from recjax.sparse.table import Table

SCOPES = ("per_token", "per_sample")
VALUE_SCOPES = ("shared", "per_token")
THETA_SIDES = ("right", "left")
VALUE_DTYPES = ("float32", "bfloat16")
AXES = ("row", "col")


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """Shape of one memory.

  Attributes:
    num_keys: Sub-keys per axis; the memory has `num_keys ** 2` slots.
    key_dim: Width of a sub-key and of half a query.
    top_k: Slots read per head.
    num_heads: Independent searches whose outputs are summed.
    query_scope: `per_token`: every token searches for itself; `per_sample`:
      one search from the mean token serves all.
    value_scope: `shared` values, or a table `per_token`.
    shared_query: True: one query projection for all tokens, else one each.
    use_layer_norm: LayerNorm on queries and keys.
    use_over_parameterization: Keys pass through a learned Theta.
    theta_side: `right`: K Theta (d x d); `left`: Theta K (num_keys squared).
    freeze_base_keys: True: no gradient reaches the stored keys, only Theta, as
      in SimVQ. Weight decay still would: give them the rule
      `optimizer.scale_rules=("memory_.*/(row|col)_keys=0",)` as well.
    value_init_scale: Standard deviation of initial values.
    value_learning_rate: Multiplies the sparse learning rate for the values.
    value_dtype: Storage of the values, `float32` or `bfloat16`.
    folded: Effective keys are stored constants (serving); see `fold_keys`.
  """

  num_keys: int = 64
  key_dim: int = 32
  top_k: int = 16
  num_heads: int = 1
  query_scope: str = "per_token"
  value_scope: str = "shared"
  shared_query: bool = False
  use_layer_norm: bool = True
  use_over_parameterization: bool = True
  theta_side: str = "right"
  freeze_base_keys: bool = False
  value_init_scale: float = 1.0
  value_learning_rate: float = 1.0
  value_dtype: str = "float32"
  folded: bool = False

  def __post_init__(self):
    for name, allowed in (
      ("query_scope", SCOPES),
      ("value_scope", VALUE_SCOPES),
      ("theta_side", THETA_SIDES),
      ("value_dtype", VALUE_DTYPES),
    ):
      if getattr(self, name) not in allowed:
        raise UserError(
          f"memory.{name} must be one of {', '.join(allowed)}, got "
          f"{getattr(self, name)!r}"
        )
    for name in ("key_dim", "num_heads"):
      if getattr(self, name) < 1:
        raise UserError(
          f"memory.{name} must be at least 1, got {getattr(self, name)}"
        )
    if not 1 <= self.top_k <= self.num_keys:
      raise UserError(
        f"memory.top_k ({self.top_k}) must be between 1 and memory.num_keys "
        f"({self.num_keys})"
      )

  @property
  def num_slots(self) -> int:
    """Slots of one value table."""
    return self.num_keys**2


class ProductKeyMemory(nn.Module):
  """Every token reads `top_k` slots per head; returns their weighted sum.

  Attributes:
    config: Shape of the memory.
    dtype: Type of the query projection; scores and weights are float32.
  """

  config: MemoryConfig
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "tokens batch dim"],
    example_mask: Bool[Array, " batch"],
  ) -> tuple[Float[Array, "tokens batch dim"], dict[str, Any]]:
    """Reads the memory.

    Args:
      x: What enters the layer that the memory steers.
      example_mask: False for padding, which reads nothing.

    Returns:
      v_o in float32, and {"slots", "weights"} of the reads, of shape
      `[tokens or 1, batch, heads, top_k]`.
    """
    config = self.config
    num_tokens = x.shape[0]
    source = x
    if config.query_scope == "per_sample":
      source = x.mean(axis=0, keepdims=True)
    weights, slots = self._search(source)

    if config.value_scope == "per_token":
      offset = config.num_slots * jnp.arange(num_tokens)
      ids = slots + offset[:, None, None, None]
      read_weights = jnp.broadcast_to(weights, ids.shape)
    else:
      ids, read_weights = slots, weights
    # The stored table is longer than its slots; only its end reads nothing.
    table = value_table(config, num_tokens=num_tokens, value_dim=x.shape[-1])
    ids = jnp.where(example_mask[:, None, None], ids, table.shape[0])
    merge_heads = lambda a: a.reshape(*a.shape[:2], -1)  # noqa: E731
    output = in_model.read(
      self, "values", merge_heads(ids), merge_heads(read_weights)
    )
    output = jnp.broadcast_to(output, x.shape)
    return output, {"slots": slots, "weights": weights}

  def _search(
    self, x: Float[Array, "tokens batch dim"]
  ) -> tuple[
    Float[Array, "tokens batch heads top_k"],
    Int[Array, "tokens batch heads top_k"],
  ]:
    """Weights and slots of every query."""
    config = self.config
    tokens, batch, _ = x.shape
    width = 2 * config.num_heads * config.key_dim
    dense = nn.Dense if config.shared_query else PerTokenDense
    queries = dense(width, dtype=self.dtype, name="query")(x)
    queries = queries.astype(jnp.float32).reshape(
      tokens, batch, 2, config.num_heads, config.key_dim
    )
    gain = None
    if config.use_layer_norm:
      gain = jnp.stack([self._gain(f"{name}_query_gain") for name in AXES])
    keys = jnp.stack([self._keys(name) for name in AXES])
    return pallas_kernels.product_key_lookup(
      queries, keys, config.top_k, gain=gain
    )

  def _keys(self, name: str) -> Float[Array, "heads keys dim"]:
    config = self.config
    shape = (config.num_heads, config.num_keys, config.key_dim)
    scale = config.key_dim**-0.5
    keys = self.param(f"{name}_keys", nn.initializers.normal(scale), shape)
    if config.folded:
      return keys
    if config.freeze_base_keys:
      keys = jax.lax.stop_gradient(keys)
    theta = gain = None
    if config.use_over_parameterization:
      size = config.key_dim if config.theta_side == "right" else config.num_keys
      theta = self.param(f"{name}_theta", _identities, (shape[0], size, size))
    if config.use_layer_norm:
      gain = self._gain(f"{name}_key_gain")
    return effective_keys(keys, theta, gain, theta_side=config.theta_side)

  def _gain(self, name: str) -> Float[Array, " dim"]:
    dim = self.config.key_dim
    return self.param(name, nn.initializers.constant(dim**-0.25), (dim,))


def effective_keys(
  keys: Float[Array, "heads keys dim"],
  theta: Float[Array, "heads size size"] | None,
  gain: Float[Array, " dim"] | None,
  *,
  theta_side: str,
) -> Float[Array, "heads keys dim"]:
  """`LN(Theta K)`; a part that is None is left out."""
  if theta is not None:
    equation = "hnd,hde->hne" if theta_side == "right" else "hmn,hnd->hmd"
    operands = (keys, theta) if theta_side == "right" else (theta, keys)
    keys = jnp.einsum(equation, *operands)
  if gain is not None:
    keys = layer_norm(keys, gain)
  return keys


def layer_norm(
  x: Float[Array, "*shape dim"], gain: Float[Array, " dim"], eps: float = 1e-6
) -> Float[Array, "*shape dim"]:
  """Zero mean and unit variance over the last axis, times `gain`."""
  centred = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.mean(centred**2, axis=-1, keepdims=True)
  normal = centred * jax.lax.rsqrt(variance + eps)
  return normal * jnp.broadcast_to(gain, x.shape)


def fold_keys(params: dict[str, Any], config: MemoryConfig) -> dict[str, Any]:
  """Parameters of one memory with Theta and LayerNorm folded into the keys.

  For serving: with `dataclasses.replace(config, folded=True)` they give the
  same scores and cost one constant table per axis.
  """
  folded = {
    name: value
    for name, value in params.items()
    if not name.endswith(("_theta", "_key_gain"))
  }
  for axis in AXES:
    folded[f"{axis}_keys"] = effective_keys(
      params[f"{axis}_keys"],
      params.get(f"{axis}_theta"),
      params.get(f"{axis}_key_gain"),
      theta_side=config.theta_side,
    )
  return folded


def value_table(
  config: MemoryConfig, *, num_tokens: int, value_dim: int
) -> Table:
  """Declaration of the memory's values, named `<layer>/values`."""
  copies = num_tokens if config.value_scope == "per_token" else 1
  return Table(
    num_rows=copies * config.num_slots,
    dim=value_dim,
    in_model=True,
    init_scale=config.value_init_scale,
    learning_rate_scale=config.value_learning_rate,
    dtype=config.value_dtype,
  )


def _identities(rng: Array, shape: tuple[int, ...]) -> Array:
  del rng
  return jnp.broadcast_to(jnp.eye(shape[-1]), shape)
