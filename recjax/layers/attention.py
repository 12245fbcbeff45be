"""Attention to the events of a user: shared by what reads sequences.

Source: Vaswani et al., arXiv 1706.03762, in the form that normalises first.
Tensors are batch-first here, `[batch, length, dim]`.

A user's events are encoded once and may be read by many candidates. So keys
and values (`Attention.keys_values`) come apart from queries, and where there
are n times as many queries as users, the first n belong to the first user, the
next n to the second, and so on.

| word of `attention` | what runs |
| --- | --- |
| `xla` | `jax.nn.dot_product_attention` |
| `tokamax` | `tokamax.dot_product_attention`: fused kernels on GPU and TPU |

Either takes the softmax in float32. `chunk` queries are done at a time, and
once more in the backward pass, so that no more than `chunk * keys` scores of a
head and example are held; 0 does all at once.

Queries and keys have no bias (our choice): that of a key shifts all scores of
a query alike and so has no gradient.
"""

import functools
import importlib
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from recjax.errors import UserError
from recjax.layers.dropout import Dropout
from recjax.schema import suggest

IMPLEMENTATIONS = ("xla", "tokamax")


class KeysValues(NamedTuple):
  """What queries attend to; each `[users, length, heads, head_dim]`."""

  keys: Float[Array, "users length heads head_dim"]
  values: Float[Array, "users length heads head_dim"]


class TransformerLayer(nn.Module):
  """`x + Attention(LN(x))`, then `x + FFN(LN(x))`.

  Attributes:
    dim: Width of a position.
    num_heads: Attention heads.
    mlp_ratio: Inner width of the network over `dim`.
    num_queries: Only so many last positions are updated and returned; 0 for
      all. Keys are all positions.
    is_causal: True hides from a position what comes after it.
    dropout_rate: Share of inner units dropped in training.
    implementation: Word of `attention`.
    chunk: Queries done at a time; 0 for all.
    dtype: Type of the computation.
  """

  dim: int
  num_heads: int
  mlp_ratio: float = 4.0
  num_queries: int = 0
  is_causal: bool = False
  dropout_rate: float = 0.0
  implementation: str = "xla"
  chunk: int = 0
  dtype: jax.typing.DTypeLike = jnp.float32

  def setup(self):
    self.attention_norm = nn.LayerNorm(dtype=self.dtype)
    self.attention = Attention(
      self.num_heads,
      self.dim,
      self.dim,
      self.implementation,
      self.chunk,
      self.dtype,
    )
    self.ffn_norm = nn.LayerNorm(dtype=self.dtype)
    self.ffn = FeedForward(self.mlp_ratio, self.dropout_rate, self.dtype)

  def __call__(
    self,
    x: Float[Array, "batch length dim"],
    mask: Bool[Array, "batch length"],
    train: bool,
  ) -> Float[Array, "batch queries dim"]:
    """Updated positions; `mask` names the valid ones of `x`."""
    queries = last(x, self.num_queries)
    seen = key_mask(mask, queries.shape[1], self.is_causal)
    return self.update(queries, self.keys_values(x), seen, train)

  def keys_values(self, x: Float[Array, "users length dim"]) -> KeysValues:
    """What positions show to others."""
    return self.attention.keys_values(self.attention_norm(x))

  def update(
    self,
    x: Float[Array, "batch queries dim"],
    user: KeysValues,
    mask: Bool[Array, "users one_or_queries length"],
    train: bool,
    own: KeysValues | None = None,
  ) -> Float[Array, "batch queries dim"]:
    """Positions after they have seen others; see `Attention`."""
    x = x + self.attention(self.attention_norm(x), user, mask, own)
    return x + self.ffn(self.ffn_norm(x), train)


class SwiGLULayer(nn.Module):
  """`x + W_down(SiLU(W_gate LN(x)) * W_up LN(x))`: no event sees another."""

  mlp_ratio: float
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "batch length dim"],
    mask: Bool[Array, "batch length"],
    train: bool,
  ) -> Float[Array, "batch length dim"]:
    del mask  # Every position stands for itself.
    dim = x.shape[-1]
    hidden_dim = int(self.mlp_ratio * dim)
    norm = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
    gate = nn.Dense(hidden_dim, dtype=self.dtype, name="gate")(norm)
    up = nn.Dense(hidden_dim, dtype=self.dtype, name="up")(norm)
    hidden = Dropout(self.dropout_rate, deterministic=not train)(
      nn.silu(gate) * up
    )
    return x + nn.Dense(dim, dtype=self.dtype, name="down")(hidden)


class FeedForward(nn.Module):
  """`W2 GELU(W1 x + b1) + b2`, the same for every position.

  Attributes:
    mlp_ratio: Inner width over the width of `x`.
    dropout_rate: Share of inner units dropped in training.
    dtype: Type of the computation.
  """

  mlp_ratio: float = 4.0
  dropout_rate: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch dim"], train: bool
  ) -> Float[Array, "*batch dim"]:
    dim = x.shape[-1]
    hidden = nn.Dense(int(self.mlp_ratio * dim), dtype=self.dtype, name="up")(x)
    hidden = Dropout(self.dropout_rate, deterministic=not train)(
      nn.gelu(hidden)
    )
    return nn.Dense(dim, dtype=self.dtype, name="down")(hidden)


class Attention(nn.Module):
  """Multi-head attention of queries to a user's keys and values.

  Attributes:
    num_heads: Heads; must divide `dim`.
    dim: Width of all heads together.
    out_dim: Width of the result.
    implementation: Word of `attention`.
    chunk: Queries done at a time; 0 for all.
    dtype: Type of the computation.
  """

  num_heads: int
  dim: int
  out_dim: int
  implementation: str = "xla"
  chunk: int = 0
  dtype: jax.typing.DTypeLike = jnp.float32

  def setup(self):
    heads = (self.num_heads, self.dim // self.num_heads)
    make = functools.partial(
      nn.DenseGeneral, heads, use_bias=False, dtype=self.dtype
    )
    self.query, self.key, self.value = make(), make(), make()
    self.out = nn.DenseGeneral(self.out_dim, axis=(-2, -1), dtype=self.dtype)

  def keys_values(self, x: Float[Array, "users length in_dim"]) -> KeysValues:
    """Keys and values of a user's positions."""
    return KeysValues(self.key(x), self.value(x))

  def __call__(
    self,
    x: Float[Array, "batch queries query_dim"],
    user: KeysValues,
    mask: Bool[Array, "users one_or_queries length"],
    own: KeysValues | None = None,
  ) -> Float[Array, "batch queries out_dim"]:
    """What the queries find.

    Args:
      x: Queries; `batch` is a multiple of `users`.
      user: What all queries of a user may attend to.
      mask: Which of it; of a query axis of 1 the same for all queries.
      own: What the queries of an example may attend to beside it, all of it.

    Returns:
      Attention, projected. Before the projection it is zero where nothing may
      be attended to.
    """
    query = self.query(x)
    if own is not None:
      return self.out(attend_beside(query, user, mask, own))
    users = user.keys.shape[0]
    # The candidates of a user are so many more queries to the same keys.
    found = attend(
      query.reshape(users, -1, *query.shape[2:]),
      user,
      mask,
      implementation=self.implementation,
      chunk=self.chunk,
    )
    return self.out(found.reshape(query.shape))


def last(
  x: Shaped[Array, "batch length ..."], number: int
) -> Shaped[Array, "batch kept ..."]:
  """The last `number` positions; all of them for 0 or where there are less."""
  return x[:, -number:]  # -0 is 0: all.


def key_mask(
  mask: Bool[Array, "batch length"], num_queries: int, is_causal: bool
) -> Bool[Array, "batch one_or_queries length"]:
  """Which positions the last `num_queries` ones may attend to."""
  if not is_causal:
    return mask[:, None]
  length = mask.shape[1]
  query = jnp.arange(length - num_queries, length)
  return mask[:, None] & (jnp.arange(length)[None] <= query[:, None])[None]


def attend(
  query: Float[Array, "users queries heads head_dim"],
  user: KeysValues,
  mask: Bool[Array, "users one_or_queries length"],
  *,
  implementation: str = "xla",
  chunk: int = 0,
) -> Float[Array, "users queries heads head_dim"]:
  """`softmax(q k / sqrt(head_dim)) v` over the keys of `mask`.

  Args:
    query: Queries.
    user: Keys and values.
    mask: Keys that a query may see; where there is none, the result and all
      gradients are zero.
    implementation: Word of `attention`.
    chunk: Queries done at a time; 0 for all.

  Raises:
    UserError: If the implementation is not installed.
  """
  function = find(implementation)
  empty = ~mask.any(axis=-1, keepdims=True)

  def attend_some(query, mask, empty):
    # A fused kernel need not know of a query without a key.
    found = function(query, *user, mask=(mask | empty)[:, None])
    return jnp.where(empty[..., None], jnp.zeros((), found.dtype), found)

  if not chunk or query.shape[1] <= chunk:
    return attend_some(query, mask, empty)
  num = query.shape[1]
  parts = [_chunks(x, num, chunk) for x in (query, mask, empty)]
  found = jax.lax.map(
    jax.checkpoint(lambda part: attend_some(*part)), tuple(parts)
  )
  found = found.swapaxes(0, 1).reshape(query.shape[0], -1, *query.shape[2:])
  return found[:, :num]


def attend_beside(
  query: Float[Array, "batch queries heads head_dim"],
  user: KeysValues,
  mask: Bool[Array, "users one_or_queries length"],
  own: KeysValues,
) -> Float[Array, "batch queries heads head_dim"]:
  """One softmax over a user's keys and those of the example itself.

  The user's keys are not repeated for its examples.
  """
  users, (batch, num) = user.keys.shape[0], query.shape[:2]
  scale = query.shape[-1] ** -0.5
  grouped = query.reshape(users, batch // users, *query.shape[1:])
  score = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  of_user = score("ucqhd,ulhd->ucqhl", grouped, user.keys)
  of_user = jnp.where(
    mask[:, None, :, None], of_user, jnp.finfo(jnp.float32).min
  ).reshape(batch, num, *of_user.shape[-2:])
  of_own = score("bqhd,bkhd->bqhk", query, own.keys)
  weights = jax.nn.softmax(
    scale * jnp.concatenate([of_user, of_own], axis=-1), axis=-1
  ).astype(query.dtype)
  to_user, to_own = jnp.split(weights, [of_user.shape[-1]], axis=-1)
  to_user = to_user.reshape(users, -1, *to_user.shape[1:])
  found = jnp.einsum("ucqhl,ulhd->ucqhd", to_user, user.values)
  return found.reshape(query.shape) + jnp.einsum(
    "bqhk,bkhd->bqhd", to_own, own.values
  )


def find(implementation: str):
  """The function of a word of `attention`.

  Raises:
    UserError: If there is no such word or its library is not installed.
  """
  if implementation == "xla":
    return functools.partial(jax.nn.dot_product_attention, implementation="xla")
  if implementation == "tokamax":
    try:
      return importlib.import_module("tokamax").dot_product_attention
    except ImportError as error:
      raise UserError(
        f"model.attention = 'tokamax' needs the package tokamax ({error}); "
        "`pip install tokamax`, or set it to 'xla'"
      ) from error
  raise UserError(
    f"unknown model.attention {implementation!r}"
    + suggest(implementation, IMPLEMENTATIONS)
  )


def check_attention(
  dim: int, num_heads: int, implementation: str, dim_name: str
) -> None:
  """Checks what the configs of models with attention share.

  Raises:
    UserError: If the heads do not divide `dim`, or as `find` does.
  """
  if num_heads < 1 or dim % num_heads:
    raise UserError(
      f"model.{dim_name} ({dim}) must be a multiple of model.num_heads "
      f"({num_heads})"
    )
  find(implementation)


def _chunks(x: Array, num: int, chunk: int) -> Array:
  """`[chunks, users, chunk, ...]` of the queries, padded behind."""
  if x.shape[1] == 1:
    return jnp.broadcast_to(x[None], (-(-num // chunk), *x.shape))
  x = jnp.pad(x, ((0, 0), (0, -num % chunk), *[(0, 0)] * (x.ndim - 2)))
  return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)
