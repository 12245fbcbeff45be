"""The search by the C++ kernels of `cpu.cc`: float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.native import build


def product_key_topk(
  row_scores: Float[Array, "*rows keys"],
  col_scores: Float[Array, "*rows keys"],
  *,
  top_k: int,
) -> tuple[Float[Array, "*rows top_k"], Int[Array, "*rows top_k"]]:
  """See `api.product_key_topk`."""
  shape = (*row_scores.shape[:-1], top_k)
  return tuple(
    _call(
      "product_key_topk",
      _struct(shape),
      _struct(shape, jnp.int32),
      vmap_method="broadcast_all",
    )(row_scores, col_scores)
  )


def product_key_topk_grad(
  slots: Int[Array, "*rows top_k"],
  grads: Float[Array, "*rows top_k"],
  *,
  num_keys: int,
) -> tuple[Float[Array, "*rows keys"], Float[Array, "*rows keys"]]:
  """See `xla.product_key_topk_grad`."""
  out = _struct((*slots.shape[:-1], num_keys))
  call = _call("product_key_topk_grad", out, out, vmap_method="broadcast_all")
  return tuple(call(slots, grads))


def product_key_lookup(
  queries: Float[Array, "*rows 2 heads dim"],
  keys: Float[Array, "2 heads keys dim"],
  gain: Float[Array, "2 dim"] | None,
  *,
  top_k: int,
) -> tuple[Float[Array, "*rows heads top_k"], Int[Array, "*rows heads top_k"]]:
  """See `api.product_key_lookup`; no score leaves the processor's cache."""
  shape = (*queries.shape[:-3], keys.shape[1], top_k)
  call = _call("product_key_lookup", _struct(shape), _struct(shape, jnp.int32))
  return tuple(call(queries, keys, _or_none(gain, keys)))


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
  call = _call(
    "product_key_lookup_grad",
    _struct(queries.shape),
    _struct(keys.shape),
    _struct(some_gain.shape),
  )
  query_grads, key_grads, gain_grads = call(
    queries, keys, some_gain, weights, slots, grads
  )
  return query_grads, key_grads, None if gain is None else gain_grads


def _call(handler: str, *outputs, vmap_method: str = "sequential"):
  return jax.ffi.ffi_call(
    build.target(handler), outputs, vmap_method=vmap_method
  )


def _struct(shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _or_none(gain, keys):
  """A kernel's arguments are arrays: no gain is an empty one."""
  return jnp.zeros((2, 0), keys.dtype) if gain is None else gain
