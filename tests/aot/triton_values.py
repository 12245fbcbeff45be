"""Values of the Triton kernels, and what they move, by Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.aot.triton_values top_k

A process of its own: Triton reads the variable when a kernel is defined. The
interpreter takes seconds a program, so that sizes are small here.
"""

import contextlib
import functools
import sys
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import torch
from triton.runtime import interpreter

from pallas_kernels import dispatch
from pallas_kernels.aot import triton_bytes
from pallas_kernels.gpu import triton
from pallas_kernels.product_key_topk import reference
from pallas_kernels.product_key_topk.api import (
  product_key_lookup,
  product_key_topk,
)
from pallas_kernels.top_k.api import top_k

RNG = np.random.default_rng(0)


CHECKED = set()


@contextlib.contextmanager
def moved_bytes():
  """Bytes of each load and store of the kernels that run in this block."""
  moved = []
  builder = interpreter.InterpreterBuilder
  load, store = builder.create_masked_load, builder.create_masked_store

  def count(ptrs, mask):
    itemsize = ptrs.get_element_ty().primitive_bitwidth // 8
    moved.append(itemsize * int(np.sum(mask.data)))

  def counted_load(self, ptrs, mask, *rest):
    count(ptrs, mask)
    return load(self, ptrs, mask, *rest)

  def counted_store(self, ptrs, value, mask, *rest):
    count(ptrs, mask)
    return store(self, ptrs, value, mask, *rest)

  with (
    mock.patch.object(builder, "create_masked_load", counted_load),
    mock.patch.object(builder, "create_masked_store", counted_store),
  ):
    yield moved


@contextlib.contextmanager
def interpreted():
  """The operators of this block call the interpreter, on the CPU."""

  def call(
    operator, kernel, arrays, scalars, results, *, grid, num_warps, **options
  ):
    del operator, num_warps

    def run(*arrays):
      # NaN and not zeros: what is not written must not look right.
      outputs = [
        torch.from_numpy(np.full(shape, np.nan if dtype == "float32" else -1))
        .to(getattr(torch, jnp.dtype(dtype).name))
        .contiguous()
        for shape, dtype in results
      ]
      arrays = [torch.from_numpy(np.array(x)) for x in arrays]
      with moved_bytes() as moved:
        kernel[tuple(grid)](*arrays, *scalars, *outputs, **options)
      name = kernel.fn.__name__
      want = triton_bytes.issued_bytes(name, *scalars, grid, options)
      np.testing.assert_allclose(sum(moved), want, rtol=0.05, err_msg=name)
      CHECKED.add(name)
      return [x.numpy() for x in outputs]

    types = [jax.ShapeDtypeStruct(*result) for result in results]
    return jax.pure_callback(run, types, *arrays)

  with (
    mock.patch.object(triton, "call", call),
    mock.patch.object(triton, "require", lambda operator: None),
    dispatch.use("jax_triton", platform="gpu"),
  ):
    yield


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def check_top_k():
  special = np.array([0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1, -1e-45])
  for rows, n, k in ((3, 1, 1), (5, 7, 7), (3, 300, 20), (2, 1500, 1)):
    x = RNG.integers(-9, 9, (rows, n)).astype(np.float32)
    x[0] = RNG.choice(special.astype(np.float32), n)
    x[-1] = 2.0
    # The least of all, which is also what stands for nothing.
    x[1:, n // 2] = np.array(-1, np.int32).view(np.float32)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
      ours = jnp.asarray(x).astype(dtype)
      values, indices = top_k(ours, k)
      bits = np.asarray(ours.astype(jnp.float32)).view(np.int32).astype(int)
      order = np.where(bits < 0, -(2**31) - 1 - bits, bits)
      place = np.broadcast_to(np.arange(n), x.shape)
      want = np.lexsort((place, -order), axis=-1)[:, :k]
      np.testing.assert_array_equal(indices, want)
      same = jnp.dtype(f"int{8 * ours.dtype.itemsize}")
      np.testing.assert_array_equal(
        np.asarray(values).view(same),
        np.take_along_axis(np.asarray(ours).view(same), want, axis=-1),
      )
  chex.assert_shape(top_k(jnp.ones((0, 4)), 2), (0, 2))
  stacked = jax.vmap(lambda x: top_k(x, 2)[1])(normal(3, 2, 8))
  chex.assert_shape(stacked, (3, 2, 2))


def check_search():
  for shape, top in (((5, 7), 3), ((2, 300), 9), ((2, 4), 16)):
    for row, col in (
      (normal(*shape), normal(*shape)),
      # Ties: sums of whole numbers, and keys that are masked out.
      (RNG.integers(0, 3, shape) * 1.0, RNG.integers(0, 3, shape) * 1.0),
      (np.full(shape, -np.inf), normal(*shape)),
    ):
      row, col = np.float32(row), np.float32(col)
      sums, slots = map(np.asarray, product_key_topk(row, col, top))
      pairs = (row[:, :, None] + col[:, None, :]).reshape(len(row), -1)
      np.testing.assert_array_equal(sums, -np.sort(-pairs)[:, :top])
      np.testing.assert_array_equal(
        np.take_along_axis(pairs, slots, axis=-1), sums
      )
      assert all(len(set(found)) == top for found in slots.tolist())
  grads = normal(2, top)
  _, vjp = jax.vjp(lambda *x: product_key_topk(*x, top)[0], row, col)
  want = np.zeros((2, *shape))
  for r, j in np.ndindex(2, top):
    want[0, r, slots[r, j] // shape[1]] += grads[r, j]
    want[1, r, slots[r, j] % shape[1]] += grads[r, j]
  np.testing.assert_allclose(vjp(grads), want, atol=1e-5)


def check_lookup():
  # Odd sizes with a gain, a row more than a program takes, two blocks of keys.
  for rows, heads, num_keys, dim, top, has_gain in (
    (5, 2, 7, 5, 3, True),
    (17, 1, 16, 16, 4, False),
    (3, 1, 150, 20, 5, True),
  ):
    arrays = [normal(rows, 2, heads, dim), normal(2, heads, num_keys, dim)]
    arrays += [normal(2, dim)] if has_gain else []
    grads = normal(rows, heads, top)

    def run(lookup, dtype, arrays=arrays, grads=grads, top=top):
      def weights_of(queries, keys, gain=None):
        return lookup(queries, keys, gain, top)

      cast = [jnp.asarray(x, dtype) for x in arrays]
      weights, vjp, slots = jax.vjp(weights_of, *cast, has_aux=True)
      return (weights, vjp(jnp.asarray(grads, dtype))), slots

    (got, slots) = run(
      lambda q, k, g, top: product_key_lookup(q, k, top, gain=g), jnp.float32
    )
    with jax.enable_x64(True):
      want, want_slots = run(
        lambda q, k, g, top: reference.product_key_lookup(q, k, g, top_k=top),
        jnp.float64,
      )
    np.testing.assert_array_equal(slots, want_slots)
    # Sums of up to 17 rows of products of a few units in float32.
    chex.assert_trees_all_close(
      jax.tree.map(np.float64, got), want, atol=2e-5, rtol=2e-5
    )
  shared = functools.partial(product_key_lookup, top_k=2)
  found = jax.vmap(shared, in_axes=(0, None))(
    normal(2, 3, 2, 1, 8), normal(2, 1, 4, 8)
  )
  chex.assert_shape(found, (2, 3, 1, 2))


if __name__ == "__main__":
  with interpreted():
    globals()[f"check_{sys.argv[1]}"]()
  print("checked", *sorted(CHECKED))
