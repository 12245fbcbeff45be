"""The search and the lookup by the kernels of `triton_kernels`.

The lookup holds the scores of a block of rows in registers, from the products
to the choice: XLA writes and reads [rows, keys] of them on each axis, and
sorts these whole. Its gradient makes the scores' gradient anew where it is
needed, in place of a scatter into [rows, keys].
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu import triton
from pallas_kernels.product_key_topk import xla

_MAX_K = 64
_MAX_DIM = 256
# Rows and keys of a product that keep all threads at work.
_MIN_PRODUCT = 16
# Programs that keep the largest GPUs at work.
_NUM_PROGRAMS = 512


def product_key_topk(
  row_scores: Float[Array, "*rows keys"],
  col_scores: Float[Array, "*rows keys"],
  *,
  top_k: int,
) -> tuple[Float[Array, "*rows top_k"], Int[Array, "*rows top_k"]]:
  """See `api.product_key_topk`."""
  options = plan_topk(row_scores.shape[-1], top_k)
  triton.require("product_key_topk")
  fn = functools.partial(_topk, options=options)
  return triton.over_rows(fn, 2)(row_scores, col_scores)


def product_key_topk_grad(
  slots: Int[Array, "*rows top_k"],
  grads: Float[Array, "*rows top_k"],
  *,
  num_keys: int,
) -> tuple[Float[Array, "*rows keys"], Float[Array, "*rows keys"]]:
  """Gradients of both score vectors from those of the best sums.

  A sum over what hits a key, which XLA makes one loop of: it reads the slots
  and writes each result once, and nothing is scattered.
  """

  def gather(hits):
    key = jax.lax.broadcasted_iota(
      jnp.int32, (*hits.shape, num_keys), hits.ndim
    )
    hit = hits[..., None] == key
    return jnp.sum(jnp.where(hit, grads[..., None], 0), axis=-2)

  return gather(slots // num_keys), gather(slots % num_keys)


def product_key_lookup(
  queries: Float[Array, "*rows 2 heads dim"],
  keys: Float[Array, "2 heads keys dim"],
  gain: Float[Array, "2 dim"] | None,
  *,
  top_k: int,
) -> tuple[Float[Array, "*rows heads top_k"], Int[Array, "*rows heads top_k"]]:
  """See `api.product_key_lookup`."""
  options = plan_lookup(*keys.shape[1:], top_k) | {"has_gain": gain is not None}
  triton.require("product_key_topk")
  fn = functools.partial(_lookup, options=options)
  return triton.over_rows(fn, 1)(queries, keys, gain)


def product_key_lookup_grad(
  queries: Float[Array, "*rows 2 heads dim"],
  keys: Float[Array, "2 heads keys dim"],
  gain: Float[Array, "2 dim"] | None,
  weights: Float[Array, "*rows heads top_k"],
  slots: Int[Array, "*rows heads top_k"],
  grads: Float[Array, "*rows heads top_k"],
) -> tuple[Array, Array, Array | None]:
  """Gradients of queries, keys and gain from that of the weights."""
  triton.require("product_key_topk")
  inner = jnp.sum(weights * grads, axis=-1, keepdims=True)
  score_grads = weights * (grads - inner)
  # All arrays may be mapped over: the gradient of the keys is a sum over rows.
  fn = triton.over_rows(_lookup_grad, 0)
  return fn(queries, keys, gain, slots, score_grads)


def plan_topk(num_keys: int, top_k: int) -> dict[str, Any]:
  """Constants of the search.

  Raises:
    NotImplementedError: For a `top_k` that is sorted better by others.
  """
  if top_k > _MAX_K:
    raise NotImplementedError(
      "product_key_topk: jax_triton keeps the pairs of the best scores in "
      f"registers, to top_k = {_MAX_K}, got {top_k}"
    )
  num_best = triton.power_of_two(min(top_k, num_keys))
  num_pairs = len(xla.candidate_pairs(top_k, num_keys)[0])
  padded_k = triton.power_of_two(top_k)
  padded_pairs = max(triton.power_of_two(num_pairs), padded_k)
  block_keys = max(num_best, min(triton.power_of_two(num_keys), 256))
  block_rows = max(1, 1024 // block_keys)
  return {
    "num_keys": num_keys,
    "top_k": top_k,
    "padded_k": padded_k,
    "num_best": num_best,
    "num_pairs": num_pairs,
    "padded_pairs": padded_pairs,
    "block_rows": block_rows,
    "block_keys": block_keys,
    # Up to 8 keys a thread, of two registers each, and as many to compare.
    "num_warps": 8 if block_rows * padded_pairs > 1024 else 4,
  }


def plan_lookup(
  num_heads: int, num_keys: int, key_dim: int, top_k: int
) -> dict[str, Any]:
  """Constants of the lookup; see `plan_topk`."""
  if key_dim > _MAX_DIM:
    raise NotImplementedError(
      "product_key_topk: jax_triton keeps a query in registers, to "
      f"{_MAX_DIM} dimensions, got {key_dim}"
    )
  options = plan_topk(num_keys, top_k)
  # 128 registers a thread on compute capability 9.0, so that two programs of
  # 8 warps share a multiprocessor; 206 with twice the keys and dimensions.
  return options | {
    "num_heads": num_heads,
    "key_dim": key_dim,
    "block_rows": _MIN_PRODUCT,
    "block_keys": max(
      options["num_best"], min(options["block_keys"], 128), _MIN_PRODUCT
    ),
    "block_dim": 8,
    "padded_dim": max(triton.power_of_two(key_dim), _MIN_PRODUCT),
    "num_warps": 8,
  }


def _topk(row_scores, col_scores, options):
  from pallas_kernels.product_key_topk import triton_kernels

  rows = math.prod(row_scores.shape[:-1])
  shape = (rows, options["top_k"])
  sums, slots = triton.call(
    "product_key_topk",
    triton_kernels.topk_kernel,
    [x.reshape(rows, -1) for x in (row_scores, col_scores)] + [_pairs(options)],
    [rows],
    [(shape, jnp.float32), (shape, jnp.int32)],
    grid=[triton.ceil_div(rows, options["block_rows"])],
    **options,
  )
  shape = (*row_scores.shape[:-1], options["top_k"])
  return sums.reshape(shape), slots.reshape(shape)


def _lookup(queries, keys, gain, options):
  from pallas_kernels.product_key_topk import triton_kernels

  rows, heads = math.prod(queries.shape[:-3]), keys.shape[1]
  shape = (rows, heads, options["top_k"])
  weights, slots = triton.call(
    "product_key_lookup",
    triton_kernels.lookup_kernel,
    [queries, keys, _or_one(gain), _pairs(options)],
    [rows],
    [(shape, jnp.float32), (shape, jnp.int32)],
    grid=[triton.ceil_div(rows, options["block_rows"]), heads],
    **options,
  )
  shape = (*queries.shape[:-3], *shape[1:])
  return weights.reshape(shape), slots.reshape(shape)


def _lookup_grad(queries, keys, gain, slots, score_grads):
  from pallas_kernels.product_key_topk import triton_kernels

  rows = math.prod(queries.shape[:-3])
  _, heads, num_keys, dim = keys.shape
  padded_dim = max(triton.power_of_two(dim), _MIN_PRODUCT)
  options = {
    "num_heads": heads,
    "num_keys": num_keys,
    "key_dim": dim,
    "has_gain": gain is not None,
    "top_k": slots.shape[-1],
    "block_rows": _MIN_PRODUCT,
    "padded_dim": padded_dim,
    "num_warps": 4,
  }
  blocks = triton.ceil_div(rows, options["block_rows"])
  query_grads, gain_grads = triton.call(
    "product_key_lookup_queries_grad",
    triton_kernels.queries_grad_kernel,
    [queries, keys, _or_one(gain), slots, score_grads],
    [rows],
    [
      (queries.shape, jnp.float32),
      ((blocks if gain is not None else 1, heads, 2, dim), jnp.float32),
    ],
    grid=[blocks, heads],
    **options,
  )
  block_keys = min(max(triton.power_of_two(num_keys), _MIN_PRODUCT), 64)
  # 8 rows a product, so that its operands leave registers for the sums.
  options |= {"block_rows": 8, "num_warps": min(max(padded_dim // 8, 4), 16)}
  key_blocks = triton.ceil_div(num_keys, block_keys)
  shares = max(1, min(blocks, _NUM_PROGRAMS // (key_blocks * 2 * heads)))
  (key_grads,) = triton.call(
    "product_key_lookup_keys_grad",
    triton_kernels.keys_grad_kernel,
    [queries, _or_one(gain), slots, score_grads],
    [rows],
    [((shares, *keys.shape), jnp.float32)],
    grid=[key_blocks, shares, 2 * heads],
    block_keys=block_keys,
    **options,
  )
  gain_grads = None if gain is None else gain_grads.sum(axis=(0, 1))
  return query_grads, key_grads.sum(axis=0), gain_grads


def _or_one(gain):
  """An array in any case: a kernel takes no None."""
  return jnp.ones(1) if gain is None else gain


def _pairs(options):
  """The ranks of `candidate_pairs`, with zeros to a power of two."""
  pairs = np.zeros((2, options["padded_pairs"]), np.int32)
  pairs[:, : options["num_pairs"]] = xla.candidate_pairs(
    options["top_k"], options["num_keys"]
  )
  return jnp.asarray(pairs)
