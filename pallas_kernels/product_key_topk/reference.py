"""The definitions: all pairs, a full sort, dense products."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.top_k import reference as top_k_reference


def product_key_topk(
  row_scores: Float[Array, "*rows keys"],
  col_scores: Float[Array, "*rows keys"],
  *,
  top_k: int,
) -> tuple[Float[Array, "*rows top_k"], Int[Array, "*rows top_k"]]:
  """See `api.product_key_topk`."""
  sums = row_scores[..., :, None] + col_scores[..., None, :]
  sums = sums.reshape(*sums.shape[:-2], sums.shape[-1] ** 2)
  return top_k_reference.top_k(sums, k=top_k)


def product_key_lookup(
  queries: Float[Array, "*rows 2 heads dim"],
  keys: Float[Array, "2 heads keys dim"],
  gain: Float[Array, "2 dim"] | None,
  *,
  top_k: int,
) -> tuple[Float[Array, "*rows heads top_k"], Int[Array, "*rows heads top_k"]]:
  """See `api.product_key_lookup`."""
  row_scores, col_scores = scores(queries, keys, gain)
  best, slots = product_key_topk(row_scores, col_scores, top_k=top_k)
  return jax.nn.softmax(best, axis=-1), slots


def scores(
  queries: Float[Array, "*rows 2 heads dim"],
  keys: Float[Array, "2 heads keys dim"],
  gain: Float[Array, "2 dim"] | None,
) -> tuple[Float[Array, "*rows heads keys"], Float[Array, "*rows heads keys"]]:
  """Products of each query with the sub-keys of its axis and head."""
  if gain is not None:
    queries = layer_norm(queries, gain)
  row = jnp.einsum("...hd,hnd->...hn", queries[..., 0, :, :], keys[0])
  col = jnp.einsum("...hd,hnd->...hn", queries[..., 1, :, :], keys[1])
  return row, col


def layer_norm(
  x: Float[Array, "*rows 2 heads dim"], gain: Float[Array, "2 dim"]
) -> Float[Array, "*rows 2 heads dim"]:
  """Zero mean and unit variance over the last axis, times `gain`."""
  normal = normalise(x)
  return normal * jnp.broadcast_to(gain[:, None], x.shape)


def normalise(
  x: Float[Array, "*rows dim"], eps: float = 1e-6
) -> Float[Array, "*rows dim"]:
  """Zero mean and unit variance over the last axis."""
  centred = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.mean(centred**2, axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + eps)
