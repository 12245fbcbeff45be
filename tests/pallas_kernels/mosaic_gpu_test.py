"""Mosaic GPU kernels in their interpreter, with races looked for."""

import contextlib
import functools
import inspect
import unittest
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import sparse_gather_test
from absl.testing import absltest, parameterized
from jax._src.pallas.mosaic_gpu.interpret import (
  gpu_callbacks as interpreter_state,
)
from jax.experimental.pallas import mosaic_gpu as plgpu
from sparse_gather_test import close, ids, normal, stored

from pallas_kernels import dispatch
from pallas_kernels.aot import cases
from pallas_kernels.sparse_gather import mosaic_gpu
from pallas_kernels.sparse_gather.api import sparse_gather

NAME = "mosaic_gpu"


def interpreter():
  """Public since jax 0.12."""
  if hasattr(plgpu, "InterpretGPUParams"):
    return plgpu.InterpretGPUParams(detect_races=True)
  from jax._src.pallas.mosaic_gpu.interpret import params

  return params.InterpretGPUParams(detect_races=True)


@contextlib.contextmanager
def moved_bytes():
  """Bytes of each copy, load and store in global memory that kernels make."""
  moved = []
  get, swap = interpreter_state._get, interpreter_state._swap

  def count(fn, args, options, values=None):
    given = inspect.signature(fn).bind(*args, **options).arguments
    key = interpreter_state.HostAllocationKey.from_array(
      given["allocation_key_as_array"]
    )
    space = interpreter_state.GPU_MEMORY_SPACE_BY_IDX[key.memory_space_id]
    # Without coordinates results are fetched, after the kernel.
    is_kernel = given["grid_point_coords"] is not None
    if is_kernel and interpreter_state.is_gmem_memory_space(space):
      moved.append((given["val"] if values is None else values).nbytes)

  @functools.wraps(get)
  def counted_get(*args, **options):
    token, values = get(*args, **options)
    count(get, args, options, values)
    return token, values

  @functools.wraps(swap)
  def counted_swap(*args, **options):
    count(swap, args, options)
    return swap(*args, **options)

  with (
    mock.patch.object(interpreter_state, "_get", counted_get),
    mock.patch.object(interpreter_state, "_swap", counted_swap),
  ):
    yield moved


class SparseGatherTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(dispatch.use(NAME, interpret=interpreter()))

  def tearDown(self):
    if hasattr(interpreter_state, "_races"):  # Raised at once since jax 0.12.
      races = interpreter_state._races
      self.assertFalse(races is not None and races.races_found)
    super().tearDown()

  # Two outputs in a program, four, one; with more reads than slots; and a row
  # that takes two copies.
  @parameterized.parameters(
    (64, jnp.float32, (3, 5)),
    (64, jnp.uint16, (2, 1, 3)),
    (32, jnp.float32, (3, 2)),
    (128, jnp.bfloat16, (1, 19)),
    (384, jnp.float32, (2, 3)),
  )
  def test_values_and_gradients_with_a_gate(self, dim, dtype, shape):
    indices = ids(shape).at[0, 1].set(4)
    table, weights = stored(normal((23, dim)), dtype), normal(shape, 1)
    gate, grad = normal((*shape[:-1], dim), 2), normal((*shape[:-1], dim), 9)

    output, pull = jax.vjp(
      lambda w, g: sparse_gather(table, indices, w, gate=g), weights, gate
    )
    want, (_, *want_grads) = sparse_gather_test.expected(
      table, indices, weights, gate, grad
    )
    close(output, want)
    for got, want in zip(pull(grad), want_grads, strict=True):
      close(got, want)

  def test_what_is_not_read_leaves_no_trace(self):
    table = jnp.ones((4, 64)).at[0].set(np.nan)
    indices, weights = jnp.array([[9, 2], [-1, 3]]), jnp.ones((2, 2))
    np.testing.assert_array_equal(
      sparse_gather(table, indices, weights), np.ones((2, 64))
    )

  @unittest.skipUnless(
    hasattr(interpreter_state, "GPU_MEMORY_SPACE_BY_IDX"),
    "counts inside the interpreter of jax 0.10; later ones are built otherwise",
  )
  @parameterized.parameters(64, 128, 384)
  def test_moves_what_the_other_kernel_for_gpus_says(self, dim):
    table, weights = normal((23, dim)), normal((4, 9), 1)
    indices = ids((4, 9), high=23) % 23

    def step(weights, output_grad):
      output, pull = jax.vjp(
        lambda w: sparse_gather(table, indices, w), weights
      )
      return output, pull(output_grad)

    arrays = weights, normal((4, dim), 2)
    with moved_bytes() as moved:
      jax.block_until_ready(step(*arrays))
    with dispatch.use("pallas_gpu", platform="gpu"):
      estimate = cases.kernel_bytes(step, *arrays)
    self.assertLess(abs(sum(moved) - estimate), 0.02 * estimate)

  def test_nothing_to_read(self):
    output = sparse_gather(normal((5, 64)), ids((3, 0)), normal((3, 0)))
    np.testing.assert_array_equal(output, np.zeros((3, 64)))

  @parameterized.parameters(
    (7, jnp.float32), (96, jnp.float32), (32, jnp.uint16), (8192, jnp.float32)
  )
  def test_refuses_rows_that_it_cannot_share_out(self, dim, dtype):
    table = jnp.zeros((2, dim), dtype)
    with self.assertRaisesRegex(NotImplementedError, "128 threads"):
      mosaic_gpu.sparse_gather(table, jnp.zeros((1, 1), int), jnp.ones((1, 1)))


if __name__ == "__main__":
  absltest.main()
