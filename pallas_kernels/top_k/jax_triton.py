"""`top_k` by the Triton kernel of `triton_kernels`, for NVIDIA GPUs."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu import triton

_MAX_K = 256
# Keys that one program holds: loaded ones, groups, or members of the k best.
_MAX_SORTED = 8192
# A vector of 16 bytes is what a thread loads at once.
_VECTOR_BYTES = 16
# Keys a thread sorts at once: with more of 64 bits the registers run out.
_KEYS_PER_THREAD = 16


def top_k(
  x: Float[Array, "*rows n"], *, k: int, is_sorted: bool = True
) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
  """See `api.top_k`; always sorted."""
  del is_sorted
  if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
      f"top_k: jax_triton takes float32, bfloat16 and float16, got {x.dtype}"
    )
  if k > _MAX_K:
    raise NotImplementedError(
      f"top_k: jax_triton sorts k in registers, to {_MAX_K}, got k = {k}"
    )
  options = plan(x.shape[-1], max(k, 1), x.dtype)
  triton.require("top_k")
  if k == 0:
    shape = (*x.shape[:-1], k)
    return jnp.zeros(shape, x.dtype), jnp.zeros(shape, jnp.int32)
  fn = functools.partial(_call, options=options)
  return triton.over_rows(fn, 1)(x)


def plan(n: int, k: int, dtype: Any) -> dict[str, Any]:
  """Constants and warps of the kernel for rows of `n`.

  A row of n in groups of size g takes a sort of n / g maxima and one of k * g
  members; both are least together at g = sqrt(n / k).

  Raises:
    NotImplementedError: If the groups are too many or too large to sort.
  """
  itemsize = jnp.dtype(dtype).itemsize
  padded_k = triton.power_of_two(k)
  size = triton.power_of_two(math.isqrt(max(n // padded_k, 1)))
  num_groups = max(triton.power_of_two(triton.ceil_div(n, size)), padded_k)
  num_sorted = max(num_groups, padded_k * size)
  if num_sorted > _MAX_SORTED:
    raise NotImplementedError(
      f"top_k: jax_triton sorts {_MAX_SORTED} keys at once, which is enough "
      f"for k * n to {_MAX_SORTED**2 // 4}, got k = {k} and n = {n}"
    )
  vector = min(size, _VECTOR_BYTES // itemsize, _MAX_SORTED // num_groups)
  # 16 bits of score and 16 of column.
  key_type = "int32" if itemsize == 2 and n <= 2**16 else "int64"
  loaded = num_groups * vector
  block_rows = max(1, 1024 // max(loaded, num_sorted))
  num_warps = triton.ceil_div(
    max(loaded, num_sorted) * block_rows, 32 * _KEYS_PER_THREAD
  )
  return {
    "num_columns": n,
    "top_k": k,
    "padded_k": padded_k,
    "block_rows": block_rows,
    "num_groups": num_groups,
    "vector": vector,
    "num_steps": size // vector,
    "key_type": key_type,
    "num_warps": min(max(triton.power_of_two(num_warps), 2), 16),
  }


def _call(x, options):
  import triton.language as tl

  from pallas_kernels.top_k import triton_kernels

  options = options | {"key_type": getattr(tl, options["key_type"])}
  rows, n = math.prod(x.shape[:-1]), x.shape[-1]
  bits_type = jnp.int32 if x.dtype.itemsize == 4 else jnp.int16
  bits = jax.lax.bitcast_convert_type(x, bits_type).reshape(rows, n)
  shape = (rows, options["top_k"])
  values, columns = triton.call(
    "top_k",
    triton_kernels.top_k_kernel,
    [bits],
    [rows],
    [(shape, bits_type), (shape, jnp.int32)],
    grid=[triton.ceil_div(rows, options["block_rows"])],
    **options,
  )
  values = jax.lax.bitcast_convert_type(values, x.dtype)
  shape = (*x.shape[:-1], options["top_k"])
  return values.reshape(shape), columns.reshape(shape)
