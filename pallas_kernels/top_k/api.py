"""The k largest entries of each row, exactly.

Source of the kernels' idea, to find a bound by the integer image of the
scores and to keep what reaches it: AIR Top-K, Zhang et al., Parallel Top-K
Algorithms on GPU, SC 2023. Here a single bound is found from the maxima of
groups, in place of a histogram for each digit.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.top_k import cpu, reference, xla

IMPLEMENTATIONS = {
  "reference": reference.top_k,
  "xla": xla.top_k,
  "cpu": cpu.top_k,
  "pallas_tpu": dispatch.lazy("pallas_kernels.top_k.pallas_tpu", "top_k"),
  "jax_triton": dispatch.lazy("pallas_kernels.top_k.jax_triton", "top_k"),
}


def top_k(
  x: Float[Array, "*rows n"],
  k: int,
  *,
  is_sorted: bool = True,
  implementation: str | None = None,
) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
  """The `k` largest entries of the last axis and where they stand.

  Differentiable in the values: a gradient goes back to the chosen entries.

  Args:
    x: Any floats. NaN counts as the largest (one with a sign bit as the
      least), as in `jax.lax.top_k`.
    k: From 0 to n; static.
    is_sorted: True for descending values, and of equal ones the lower index
      first. False may give the same entries in another order, sooner.
    implementation: See `pallas_kernels.dispatch`.

  Returns:
    Values and indices (int32).

  Raises:
    ValueError: For a `k` out of range or an unknown implementation.
    TypeError: If `x` holds no floats.
    NotImplementedError: If the named implementation cannot run here.

  Example:
    >>> values, indices = top_k(jnp.array([1.0, 3.0, 2.0, 3.0]), 3)
    >>> values.tolist(), indices.tolist()
    ([3.0, 3.0, 2.0], [1, 3, 2])
  """
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"top_k: x must hold floats, got {x.dtype}")
  if x.ndim < 1 or not 0 <= k <= x.shape[-1]:
    raise ValueError(
      f"top_k: k must be from 0 to the last axis of x, got k = {k} and x of "
      f"shape {x.shape}"
    )
  implementation = dispatch.resolve(implementation)
  return _top_k(x, k, x.shape[-1], is_sorted, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _top_k(x, k, n, is_sorted, implementation):
  del n  # Of use to the gradient.
  return dispatch.run(
    "top_k", IMPLEMENTATIONS, implementation, x, k=k, is_sorted=is_sorted
  )


def _forward(x, k, n, is_sorted, implementation):
  values, indices = _top_k(x, k, n, is_sorted, implementation)
  return (values, indices), indices


def _backward(k, n, is_sorted, implementation, indices, grads):
  del k, is_sorted, implementation
  value_grads, _ = grads
  zeros = jnp.zeros((*indices.shape[:-1], n), value_grads.dtype)
  return (
    jnp.put_along_axis(zeros, indices, value_grads, axis=-1, inplace=False),
  )


_top_k.defvjp(_forward, _backward)
