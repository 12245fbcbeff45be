"""`top_k` by XLA's own operator."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def top_k(
  x: Float[Array, "*rows n"], *, k: int, is_sorted: bool = True
) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
  """See `api.top_k`; always sorted."""
  del is_sorted
  # Other types than float32 take a full sort on the CPU: 770 ms and not 32 ms
  # for 4096 rows of 1024 in bfloat16. Nothing is lost on the way and back.
  if jnp.finfo(x.dtype).bits < 32:
    values, indices = jax.lax.top_k(x.astype(jnp.float32), k)
    return values.astype(x.dtype), indices
  return tuple(jax.lax.top_k(x, k))
