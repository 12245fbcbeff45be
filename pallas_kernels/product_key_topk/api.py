"""Exact search of a memory of `num_keys ** 2` slots by two short score vectors.

Sources: Lample et al., Large Memory Layers with Product Keys, arXiv 1907.05242
(the search); MSN, arXiv 2602.07526 (LayerNorm before the scores). Only pairs
that can win are looked at: see `xla`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.product_key_topk import cpu, reference, xla

_TPU = "pallas_kernels.product_key_topk.pallas_tpu"
_TRITON = "pallas_kernels.product_key_topk.jax_triton"
IMPLEMENTATIONS = {
  "reference": reference.product_key_topk,
  "xla": xla.product_key_topk,
  "cpu": cpu.product_key_topk,
  "pallas_tpu": dispatch.lazy(_TPU, "product_key_topk"),
  "jax_triton": dispatch.lazy(_TRITON, "product_key_topk"),
}
_TOPK_GRADS = {
  "reference": xla.product_key_topk_grad,
  "xla": xla.product_key_topk_grad,
  "cpu": cpu.product_key_topk_grad,
  "pallas_tpu": dispatch.lazy(_TPU, "product_key_topk_grad"),
  "jax_triton": dispatch.lazy(_TRITON, "product_key_topk_grad"),
}
LOOKUPS = {
  "reference": reference.product_key_lookup,
  "xla": xla.product_key_lookup,
  "cpu": cpu.product_key_lookup,
  "pallas_tpu": dispatch.lazy(_TPU, "product_key_lookup"),
  "jax_triton": dispatch.lazy(_TRITON, "product_key_lookup"),
}
_LOOKUP_GRADS = {
  "reference": xla.product_key_lookup_grad,
  "xla": xla.product_key_lookup_grad,
  "cpu": cpu.product_key_lookup_grad,
  "pallas_tpu": dispatch.lazy(_TPU, "product_key_lookup_grad"),
  "jax_triton": dispatch.lazy(_TRITON, "product_key_lookup_grad"),
}
_OPERATOR = "product_key_topk"


def product_key_topk(
  row_scores: Float[Array, "*rows keys"],
  col_scores: Float[Array, "*rows keys"],
  top_k: int,
  *,
  implementation: str | None = None,
) -> tuple[Float[Array, "*rows top_k"], Int[Array, "*rows top_k"]]:
  """The `top_k` largest sums `row_scores[i] + col_scores[j]`, exactly.

  Differentiable in the scores: the gradient of a sum goes to its two parts.

  Args:
    row_scores: Scores of the first axis; computed with in float32.
    col_scores: Scores of the second axis.
    top_k: From 1 to keys squared; static.
    implementation: See `pallas_kernels.dispatch`.

  Returns:
    Sums in descending order and slots `i * keys + j`, int32. Which of equal
    sums is returned is unspecified but the same at every call.

  Raises:
    ValueError: For shapes that do not fit or an unknown implementation.
    NotImplementedError: If the named implementation cannot run here.

  Example:
    >>> row, col = jnp.array([0.0, 1.0]), jnp.array([0.0, 0.5])
    >>> scores, slots = product_key_topk(row, col, 2)
    >>> scores.tolist(), slots.tolist()
    ([1.5, 1.0], [3, 2])
  """
  row_scores = jnp.asarray(row_scores, jnp.float32)
  col_scores = jnp.asarray(col_scores, jnp.float32)
  if row_scores.ndim < 1 or row_scores.shape != col_scores.shape:
    raise ValueError(
      "product_key_topk: both scores must have one shape [..., keys], got "
      f"{row_scores.shape} and {col_scores.shape}"
    )
  _check_top_k("product_key_topk", top_k, row_scores.shape[-1])
  implementation = dispatch.resolve(implementation)
  return _topk(
    row_scores, col_scores, top_k, row_scores.shape[-1], implementation
  )


def product_key_lookup(
  queries: Float[Array, "*rows 2 heads dim"],
  keys: Float[Array, "2 heads keys dim"],
  top_k: int,
  *,
  gain: Float[Array, "2 dim"] | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "*rows heads top_k"], Int[Array, "*rows heads top_k"]]:
  """Slots that queries find in a memory, and the weights to read them with.

  LayerNorm of the queries, their products with the sub-keys, the best
  `top_k` sums, softmax over these. Differentiable in queries, keys and gain;
  the choice of slots is not.

  Args:
    queries: For each head a query of the row axis and one of the column axis.
    keys: Sub-keys of both axes, by head; as the products take them, with
      whatever normalises them applied.
    top_k: From 1 to keys squared; static.
    gain: Scale after the LayerNorm (no bias, epsilon 1e-6), by axis; None
      leaves the LayerNorm out.
    implementation: See `pallas_kernels.dispatch`.

  Returns:
    Weights in float32, descending, of sum 1, and slots `row * keys + col`.

  Raises:
    ValueError: For shapes that do not fit or an unknown implementation.
    NotImplementedError: If the named implementation cannot run here.

  Example:
    >>> queries = jnp.ones((5, 2, 1, 4))
    >>> keys = jax.random.normal(jax.random.key(0), (2, 1, 8, 4))
    >>> weights, slots = product_key_lookup(queries, keys, 3)
    >>> weights.shape, slots.shape
    ((5, 1, 3), (5, 1, 3))
  """
  queries = jnp.asarray(queries, jnp.float32)
  keys = jnp.asarray(keys, jnp.float32)
  if (
    keys.ndim != 4
    or queries.ndim < 3
    or keys.shape[0] != 2
    or queries.shape[-3:] != (2, keys.shape[1], keys.shape[3])
  ):
    raise ValueError(
      "product_key_lookup: queries must be [..., 2, heads, dim] and keys "
      f"[2, heads, keys, dim], got {queries.shape} and {keys.shape}"
    )
  if gain is not None:
    gain = jnp.asarray(gain, jnp.float32)
    if gain.shape != (2, keys.shape[3]):
      raise ValueError(
        "product_key_lookup: gain must be [2, dim], here "
        f"{(2, keys.shape[3])}, got {gain.shape}"
      )
  _check_top_k("product_key_lookup", top_k, keys.shape[2])
  implementation = dispatch.resolve(implementation)
  return _lookup(queries, keys, gain, top_k, implementation)


def _check_top_k(name: str, top_k: int, num_keys: int) -> None:
  if not 1 <= top_k <= num_keys**2:
    raise ValueError(
      f"{name}: top_k must be from 1 to keys squared ({num_keys**2}), got "
      f"{top_k}"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _topk(row_scores, col_scores, top_k, num_keys, implementation):
  del num_keys  # Of use to the gradient.
  return dispatch.run(
    _OPERATOR,
    IMPLEMENTATIONS,
    implementation,
    row_scores,
    col_scores,
    top_k=top_k,
  )


def _topk_forward(row_scores, col_scores, top_k, num_keys, implementation):
  scores, slots = _topk(row_scores, col_scores, top_k, num_keys, implementation)
  return (scores, slots), slots


def _topk_backward(top_k, num_keys, implementation, slots, grads):
  del top_k
  return tuple(
    dispatch.run(
      _OPERATOR,
      _TOPK_GRADS,
      implementation,
      slots,
      grads[0],
      num_keys=num_keys,
    )
  )


_topk.defvjp(_topk_forward, _topk_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _lookup(queries, keys, gain, top_k, implementation):
  return dispatch.run(
    _OPERATOR, LOOKUPS, implementation, queries, keys, gain, top_k=top_k
  )


def _lookup_forward(queries, keys, gain, top_k, implementation):
  weights, slots = _lookup(queries, keys, gain, top_k, implementation)
  return (weights, slots), (queries, keys, gain, weights, slots)


def _lookup_backward(top_k, implementation, residuals, grads):
  del top_k
  weight_grads, _ = grads
  return tuple(
    dispatch.run(
      _OPERATOR, _LOOKUP_GRADS, implementation, *residuals, weight_grads
    )
  )


_lookup.defvjp(_lookup_forward, _lookup_backward)
