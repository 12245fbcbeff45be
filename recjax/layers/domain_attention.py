"""Tokens of scenarios and tasks read feature tokens, each by its own maps.

Source: MDL, arXiv 2602.07520, eq. 7-8; see `recjax.models.mdl`.

Keys and values are not projected token by token. With `q` and `a` the query
and the attention weights of a head, `q . (W_K f) = (W_K' q) . f` and
`sum_j a_j (W_V f_j) = W_V (sum_j a_j f_j)`: the same numbers for the work of
one token in place of that of all feature tokens.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from recjax.batch import Batch
from recjax.layers.grouped import Blocks, grouped_product, take_groups
from recjax.layers.per_token import (
  KERNEL_INIT,
  PerTokenDense,
  token_mixing,
)


class DomainAttention(nn.Module):
  """Tokens read features, each with its own maps; eq. 7-8.

  `ask` comes before `attend` and `receive` after it, so that the tokens of
  several families read the features at once.

  Attributes:
    num_tokens: Sets of weights.
    dim: Width of a token.
    num_heads: Heads.
    pre_norm: Whether queries are normalised.
    output: After the heads: `per_token`, `shared` or `none`.
    dtype: Type of the computation; weights are normalised in float32.
  """

  num_tokens: int
  dim: int
  num_heads: int
  pre_norm: bool = True
  output: str = "per_token"
  dtype: jax.typing.DTypeLike = jnp.float32

  def setup(self):
    shape = (self.num_tokens, self.dim, self.dim)
    self.query = self.param("query", KERNEL_INIT, shape)
    self.key = self.param("key", KERNEL_INIT, shape)
    self.value = self.param("value", KERNEL_INIT, shape)
    if self.pre_norm:
      self.query_norm = nn.LayerNorm(dtype=self.dtype)
    if self.output == "per_token":
      self.output_kernel = self.param("output", KERNEL_INIT, shape)
    elif self.output == "shared":
      self.output_dense = nn.Dense(
        self.dim, use_bias=False, dtype=self.dtype, name="output"
      )

  def ask(
    self,
    x: Float[Array, "tokens rows dim"],
    blocks: Blocks | None = None,
  ) -> Float[Array, "read_by batch heads dim"]:
    """What a feature's product with is its score.

    Args:
      x: Tokens; with `blocks`, the token of each example's scenario in them.
      blocks: Where the examples lie.
    """
    if self.pre_norm:
      x = self.query_norm(x)
    x, query, key = self._promote(x, self.query, self.key)
    if blocks is not None:
      query = take_groups(query, blocks.group_id)
      key = take_groups(key, blocks.group_id)
    query = jnp.einsum("trd,tde->tre", x, query)
    # [tokens, dim, heads, head]; scaled as scores are.
    key = key.reshape(*key.shape[:-1], *self._heads) * self._heads[1] ** -0.5
    query = query.reshape(*query.shape[:-1], *self._heads)
    asked = jnp.einsum("trhk,tdhk->trhd", query, key)
    return asked if blocks is None else blocks.unpack(asked)[None]

  def receive(
    self,
    read: Float[Array, "read_by batch heads dim"],
    blocks: Blocks | None = None,
  ) -> Float[Array, "tokens rows dim"]:
    """What a token reads, from the mean features of its heads."""
    (value,) = self._promote(self.value)
    group_id = None
    if blocks is not None:
      read, group_id = blocks.pack(read[0]), blocks.group_id
    value = take_groups(value, group_id)
    value = value.reshape(*value.shape[:-1], *self._heads)
    read = jnp.einsum("trhd,tdhk->trhk", read, value)
    read = read.reshape(*read.shape[:-2], self.dim)
    if self.output == "per_token":
      (kernel,) = self._promote(self.output_kernel)
      return grouped_product(read, kernel, group_id)
    return self.output_dense(read) if self.output == "shared" else read

  @property
  def _heads(self) -> tuple[int, int]:
    return self.num_heads, self.dim // self.num_heads

  def _promote(self, *arrays):
    return nn.dtypes.promote_dtype(*arrays, dtype=self.dtype)


class MixWithFeatures(nn.Module):
  """Token mixing of task and feature tokens, in place of attention.

  Every token is cut into as many heads as there are tokens; a task's mixed
  token holds its head of all of them, and is brought back to the token's width
  by a map of its own (our choice: the paper names the ablation only).
  """

  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    tasks: Float[Array, "tasks batch dim"],
    x: Float[Array, "features batch dim"],
  ) -> Float[Array, "tasks batch dim"]:
    both = jnp.concatenate([x, tasks])
    num, dim = len(both), both.shape[-1]
    both = jnp.pad(both, ((0, 0), (0, 0), (0, -dim % num)))
    mixed = token_mixing(both)[len(x) :]
    return PerTokenDense(dim, self.dtype, name="project")(mixed)


def attend_together(
  asked: dict[str, Float[Array, "tokens batch heads dim"]],
  features: Float[Array, "batch features dim"],
) -> dict[str, tuple[Array, Array]]:
  """`attend` of several families at once: of each its weights and mean."""
  weights, read = attend(jnp.concatenate(list(asked.values())), features)
  ends = np.cumsum([len(part) for part in asked.values()])[:-1]
  pairs = zip(jnp.split(weights, ends), jnp.split(read, ends), strict=True)
  return dict(zip(asked, pairs, strict=True))


def attend(
  asked: Float[Array, "tokens batch heads dim"],
  features: Float[Array, "*tasks batch features dim"],
) -> tuple[
  Float[Array, "tokens batch heads features"],
  Float[Array, "tokens batch heads dim"],
]:
  """Softmax over the features of `asked . feature`, and their mean by it."""
  if features.ndim == 4:
    scores = jnp.einsum("tbhd,tbnd->tbhn", asked, features)
    weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(asked.dtype)
    return weights, jnp.einsum("tbhn,tbnd->tbhd", weights, features)
  num_tokens, batch, num_heads, dim = asked.shape
  # One small product an example runs faster than any other order.
  asked = asked.swapaxes(0, 1).reshape(batch, -1, dim)
  scores = jnp.einsum("bqd,bnd->bqn", asked, features)
  weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(asked.dtype)
  read = jnp.einsum("bqn,bnd->bqd", weights, features)
  return tuple(
    v.reshape(batch, num_tokens, num_heads, -1).swapaxes(0, 1)
    for v in (weights, read)
  )


def count(
  attention: dict[str, Array], batch: Batch, num_scenarios: int
) -> dict[str, dict[str, Array]]:
  """Sums over valid examples of the weights, mean over heads, by token.

  Scenario tokens are counted by the scenario of the example.
  """
  valid = batch.example_mask.astype(jnp.float32)
  counted = {}
  for family, weights in attention.items():
    weights = weights.mean(axis=2).astype(jnp.float32)
    if family == "specific":
      own = jax.nn.one_hot(batch.scenario, num_scenarios) * valid[:, None]
      total, count = jnp.einsum("bn,bs->sn", weights[0], own), own.sum(axis=0)
      # Scenario 0 is none: its examples lie in another's blocks.
      total, count = total[1:], count[1:]
    else:
      total = jnp.einsum("tbn,b->tn", weights, valid)
      count = jnp.full(len(weights), valid.sum())
    counted[family] = {"attention": total, "examples": count}
  return counted


def mean_weights(sums: dict[str, np.ndarray]) -> Float[np.ndarray, "tokens n"]:
  """Mean weights of the tokens that were used, from their sums."""
  total, count = np.asarray(sums["attention"]), np.asarray(sums["examples"])
  return total[count > 0] / count[count > 0, None]
