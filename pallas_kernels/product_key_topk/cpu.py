"""The search by the C++ kernels of `cpu.cc`: float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.native import build
from pallas_kernels.native.call import result_type


def product_key_topk(
  row_scores: Float[Array, "*rows keys"],
  col_scores: Float[Array, "*rows keys"],
  *,
  top_k: int,
) -> tuple[Float[Array, "*rows top_k"], Int[Array, "*rows top_k"]]:
  """See `api.product_key_topk`."""
  shape = (*row_scores.shape[:-1], top_k)
  return _call(
    "product_key_topk",
    [(shape, jnp.float32), (shape, jnp.int32)],
    row_scores,
    col_scores,
    vmap_method="broadcast_all",
  )


def product_key_topk_grad(
  slots: Int[Array, "*rows top_k"],
  grads: Float[Array, "*rows top_k"],
  *,
  num_keys: int,
) -> tuple[Float[Array, "*rows keys"], Float[Array, "*rows keys"]]:
  """See `xla.product_key_topk_grad`."""
  result = ((*slots.shape[:-1], num_keys), jnp.float32)
  return _call(
    "product_key_topk_grad",
    [result, result],
    slots,
    grads,
    vmap_method="broadcast_all",
  )


def product_key_lookup(
  queries: Float[Array, "*rows 2 heads dim"],
  keys: Float[Array, "2 heads keys dim"],
  gain: Float[Array, "2 dim"] | None,
  *,
  top_k: int,
) -> tuple[Float[Array, "*rows heads top_k"], Int[Array, "*rows heads top_k"]]:
  """See `api.product_key_lookup`; no score leaves the processor's cache."""
  shape = (*queries.shape[:-3], keys.shape[1], top_k)
  return _call(
    "product_key_lookup",
    [(shape, jnp.float32), (shape, jnp.int32)],
    queries,
    keys,
    _or_none(gain, keys),
  )


def product_key_lookup_grad(
  queries: Float[Array, "*rows 2 heads dim"],
  keys: Float[Array, "2 heads keys dim"],
  gain: Float[Array, "2 dim"] | None,
  weights: Float[Array, "*rows heads top_k"],
  slots: Int[Array, "*rows heads top_k"],
  grads: Float[Array, "*rows heads top_k"],
) -> tuple[Array, Array, Array | None]:
  """See `xla.product_key_lookup_grad`; a product with a chosen key is all."""
  some_gain = _or_none(gain, keys)
  query_grads, key_grads, gain_grads = _call(
    "product_key_lookup_grad",
    [(x.shape, jnp.float32) for x in (queries, keys, some_gain)],
    queries,
    keys,
    some_gain,
    weights,
    slots,
    grads,
  )
  return query_grads, key_grads, None if gain is None else gain_grads


def _call(handler, results, *arrays, vmap_method="sequential"):
  """Results of (shape, type) from a handler of `cpu.cc`."""
  types = [result_type(shape, dtype, *arrays) for shape, dtype in results]
  call = jax.ffi.ffi_call(build.target(handler), types, vmap_method=vmap_method)
  return tuple(call(*arrays))


def _or_none(gain, keys):
  """A kernel's arguments are arrays: no gain is an empty one."""
  return jnp.zeros((2, 0), keys.dtype) if gain is None else gain
