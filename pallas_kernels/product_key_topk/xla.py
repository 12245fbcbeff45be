"""The search by XLA: two short top-k and one of the pairs that can win.

With both axes sorted, the pair (i, j), counted from 1, is beaten or matched by
i * j - 1 others, so that only pairs with i * j <= top_k are looked at: 119 of
1024 at 32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.product_key_topk import reference
from pallas_kernels.top_k import xla


def product_key_topk(
  row_scores: Float[Array, "*rows keys"],
  col_scores: Float[Array, "*rows keys"],
  *,
  top_k: int,
) -> tuple[Float[Array, "*rows top_k"], Int[Array, "*rows top_k"]]:
  """See `api.product_key_topk`."""
  num_keys = row_scores.shape[-1]
  num_best = min(top_k, num_keys)
  row_best, rows = xla.top_k(row_scores, k=num_best)
  col_best, cols = xla.top_k(col_scores, k=num_best)
  i, j = candidate_pairs(top_k, num_keys)
  sums = row_best[..., i] + col_best[..., j]
  best, winners = xla.top_k(sums, k=top_k)
  slots = rows[..., i] * num_keys + cols[..., j]
  return best, jnp.take_along_axis(slots, winners, axis=-1)


def product_key_topk_grad(
  slots: Int[Array, "*rows top_k"],
  grads: Float[Array, "*rows top_k"],
  *,
  num_keys: int,
) -> tuple[Float[Array, "*rows keys"], Float[Array, "*rows keys"]]:
  """Gradients of both score vectors from those of the best sums."""
  rows = int(np.prod(slots.shape[:-1]))
  place = jax.lax.broadcasted_iota(jnp.int32, (rows, slots.shape[-1]), 0)

  def scatter(keys):
    zeros = jnp.zeros((rows, num_keys), grads.dtype)
    flat = zeros.at[place, keys.reshape(place.shape)].add(
      grads.reshape(place.shape)
    )
    return flat.reshape(*slots.shape[:-1], num_keys)

  return scatter(slots // num_keys), scatter(slots % num_keys)


def product_key_lookup(
  queries: Float[Array, "*rows 2 heads dim"],
  keys: Float[Array, "2 heads keys dim"],
  gain: Float[Array, "2 dim"] | None,
  *,
  top_k: int,
) -> tuple[Float[Array, "*rows heads top_k"], Int[Array, "*rows heads top_k"]]:
  """See `api.product_key_lookup`."""
  row_scores, col_scores = reference.scores(queries, keys, gain)
  best, slots = product_key_topk(row_scores, col_scores, top_k=top_k)
  return jax.nn.softmax(best, axis=-1), slots


def product_key_lookup_grad(
  queries: Float[Array, "*rows 2 heads dim"],
  keys: Float[Array, "2 heads keys dim"],
  gain: Float[Array, "2 dim"] | None,
  weights: Float[Array, "*rows heads top_k"],
  slots: Int[Array, "*rows heads top_k"],
  grads: Float[Array, "*rows heads top_k"],
) -> tuple[Array, Array, Array | None]:
  """Gradients of queries, keys and gain from that of the weights."""
  inner = jnp.sum(weights * grads, axis=-1, keepdims=True)
  score_grads = product_key_topk_grad(
    slots, weights * (grads - inner), num_keys=keys.shape[2]
  )
  _, vjp = jax.vjp(reference.scores, queries, keys, gain)
  return vjp(score_grads)


def candidate_pairs(
  top_k: int, num_keys: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """0-based (i, j) with (i + 1) * (j + 1) <= top_k, both below `num_keys`."""
  size = top_k if num_keys is None else min(top_k, num_keys)
  i, j = np.divmod(np.arange(size * size), size)
  keep = (i + 1) * (j + 1) <= top_k
  return i[keep], j[keep]
