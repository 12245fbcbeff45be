"""Kernels for GPUs, compiled for A100 and H100 without one."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from pallas_kernels import dispatch
from pallas_kernels.aot import cuda
from pallas_kernels.row_update import arg_specs as update_specs
from pallas_kernels.row_update import optimizers
from pallas_kernels.row_update.api import row_update
from pallas_kernels.sparse_gather import arg_specs as gather_specs
from pallas_kernels.sparse_gather import mosaic_gpu, pallas_gpu
from pallas_kernels.sparse_gather.api import sparse_gather_row_grads

pytestmark = pytest.mark.aot

# With 64 registers a thread a multiprocessor is half full: 1024 threads.
MAX_REGISTERS = 64
TYPES = (jnp.float32, jnp.uint16)
TARGETS = ("a100", "h100")
shape_of = jax.ShapeDtypeStruct
GATHERS = tuple(itertools.product(TARGETS, TYPES, gather_specs.ARG_SPECS))


def compile_for(target, fn, *args, **options):
  with dispatch.use("pallas_gpu", platform="gpu"):
    return cuda.compile_for(target, fn, *args, **options)


class CudaCase(parameterized.TestCase):
  def check_kernel(self, compiled, name):
    kernels = {kernel.name: kernel for kernel in compiled.kernels}
    self.assertIn(name, kernels)
    kernel = kernels[name]
    self.assertEqual((kernel.spill_stores, kernel.spill_loads), (0, 0))
    self.assertLessEqual(kernel.registers, MAX_REGISTERS)

  def check_no_copy(self, compiled, table):
    shape = ",".join(map(str, table.shape))
    made = [
      line
      for line in compiled.hlo.splitlines()
      if f"[{shape}]" in line.split("(")[0] and " copy" in line
    ]
    self.assertEqual(made, [])


class SparseGatherTest(CudaCase):
  @parameterized.parameters(*GATHERS)
  def test_sums(self, target, dtype, name):
    table, ids, weights, gate = arrays(name, dtype)
    compiled = compile_for(
      target, pallas_gpu.sparse_gather, table, ids, weights
    )
    self.check_kernel(compiled, "sparse_gather")
    # Sums go from registers to the result.
    self.assertLess(compiled.temp_bytes, 1024)
    gated = functools.partial(pallas_gpu.sparse_gather_gated, with_tanh=True)
    compiled = compile_for(target, gated, table, ids, weights, gate)
    self.check_kernel(compiled, "sparse_gather_gated")
    self.assertLess(compiled.temp_bytes, 1024)
    self.check_no_copy(compiled, table)

  @parameterized.parameters(*GATHERS)
  def test_gradient_of_weights(self, target, dtype, name):
    table, ids, _, grad = arrays(name, dtype)
    compiled = compile_for(target, pallas_gpu.weights_grad, table, ids, grad)
    self.check_kernel(compiled, "sparse_gather_weights_grad")
    self.assertLess(compiled.temp_bytes, 1024)
    self.check_no_copy(compiled, table)

  @parameterized.product(target=TARGETS, name=tuple(gather_specs.ARG_SPECS))
  def test_gradients_of_rows(self, target, name):
    table, ids, weights, grad = arrays(name, jnp.float32)
    compiled = compile_for(
      target,
      functools.partial(sparse_gather_row_grads, num_rows=table.shape[0]),
      *(ids, weights, grad),
    )
    self.check_kernel(compiled, "sparse_gather_row_grads")
    self.assertLess(compiled.temp_bytes, sort_bytes(ids.shape))


class RowUpdateTest(CudaCase):
  @parameterized.parameters(
    *itertools.product(
      TARGETS, update_specs.ARG_SPECS, ("rowwise_adagrad",), (jnp.float32,)
    ),
    *itertools.product(TARGETS, ("bags_1e6",), ("lazy_adam",), (jnp.uint16,)),
    *itertools.product(
      ("h100",), ("bags_1e6",), ("sgd", "adagrad"), (jnp.float32,)
    ),
  )
  def test_a_donated_table_is_updated_where_it_lies(
    self, target, name, optimizer, dtype
  ):
    table, reads = update_specs.ARG_SPECS[name]
    optimizer_fns = optimizers.make_row_optimizer(optimizer)
    state = jax.eval_shape(lambda: optimizer_fns.init(*table))
    table = shape_of(table, dtype)

    def step(table, state, ids, grads, weights, learning_rate, step):
      return row_update(
        *(table, state, ids, grads),
        optimizer=optimizer,
        learning_rate=learning_rate,
        weights=weights,
        step=step,
        weight_decay=0.1,
        clip_norm=1.0,
      )

    compiled = compile_for(
      target,
      step,
      *(table, state, shape_of(reads, jnp.int32)),
      shape_of((reads[0], table.shape[1]), jnp.float32),
      *(shape_of(reads, jnp.float32), shape_of((), jnp.float32)),
      shape_of((), jnp.int32),
      donate_argnums=(0, 1),
    )
    self.check_kernel(compiled, "row_update")
    self.check_no_copy(compiled, table)
    updated = jax.tree.leaves((table, state))
    num_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in updated)
    self.assertEqual(compiled.alias_bytes, num_bytes)
    self.assertLess(compiled.temp_bytes, sort_bytes(reads))


class CompileForTest(absltest.TestCase):
  def test_says_what_is_missing(self):
    with self.assertRaisesRegex(ValueError, "unknown target 'v100'"):
      cuda.compile_for("v100", lambda x: x, jnp.ones(1))

  def test_sees_a_copy_and_a_temporary(self):
    table = shape_of((1000, 64), jnp.float32)
    compiled = cuda.compile_for(
      "h100", lambda x: (x.at[0].set(1.0), jnp.sum(x)), table
    )
    self.assertEqual(compiled.argument_bytes, 4 * 64_000)
    self.assertEqual(compiled.alias_bytes, 0)
    self.assertGreater(compiled.output_bytes, 4 * 64_000)
    self.assertNotEmpty(compiled.kernels)
    self.assertTrue(all(kernel.registers > 0 for kernel in compiled.kernels))


class MosaicTest(CudaCase):
  # Hopper only: the compiler for an A100 kills the process.
  @parameterized.product(dtype=TYPES, name=tuple(gather_specs.ARG_SPECS))
  def test_compiles_for_hopper(self, dtype, name):
    table, ids, weights, gate = arrays(name, dtype)
    gated = functools.partial(mosaic_gpu.sparse_gather_gated, with_tanh=True)
    for fn, *others in (
      (mosaic_gpu.sparse_gather, weights),
      (gated, weights, gate),
      (mosaic_gpu.weights_grad, gate),
    ):
      with dispatch.use("mosaic_gpu", platform="gpu"):
        compiled = cuda.compile_for("h100", fn, table, ids, *others)
      (kernel,) = compiled.kernels
      self.assertEqual((kernel.spill_stores, kernel.spill_loads), (0, 0))
      self.assertLessEqual(kernel.registers, MAX_REGISTERS)
      self.assertLess(compiled.temp_bytes, 1024)
      self.check_no_copy(compiled, table)


def sort_bytes(reads):
  """A bound for a dozen numbers a read, which is no gradient of a read."""
  return 12 * 4 * math.prod(reads) + 10_000


def arrays(name, dtype):
  """Table, ids, weights, and an array like the result."""
  table, ids = gather_specs.ARG_SPECS[name]
  return (
    shape_of(table, dtype),
    shape_of(ids, jnp.int32),
    shape_of(ids, jnp.float32),
    shape_of((*ids[:-1], table[1]), jnp.float32),
  )


if __name__ == "__main__":
  absltest.main()
