"""`top_k` by the C++ kernel of `cpu.cc`: float32 and bfloat16."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.native import build
from pallas_kernels.native.call import result_type


def top_k(
  x: Float[Array, "*rows n"], *, k: int, is_sorted: bool = True
) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
  """See `api.top_k`."""
  if x.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
      f"top_k: the C++ kernel takes float32 and bfloat16, got {x.dtype}"
    )
  shape = (*x.shape[:-1], k)
  call = jax.ffi.ffi_call(
    build.target("top_k"),
    [result_type(shape, dtype, x) for dtype in (x.dtype, jnp.int32)],
    vmap_method="broadcast_all",
  )
  return tuple(call(x, is_sorted=is_sorted))
