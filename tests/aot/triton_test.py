"""The Triton kernels: values by its interpreter, and what compilers say.

They are compiled within the operators as these are called, at the shapes in
use: by Triton and NVIDIA's assembler, and the whole program by XLA for CUDA.
"""

import os
import pathlib
import re
import subprocess
import sys
import unittest

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from pallas_kernels import dispatch
from pallas_kernels.aot import cuda, triton_target
from pallas_kernels.product_key_topk import arg_specs as search_specs
from pallas_kernels.product_key_topk.api import (
  product_key_lookup,
  product_key_topk,
)
from pallas_kernels.top_k import arg_specs as top_k_specs
from pallas_kernels.top_k.api import top_k

pytestmark = pytest.mark.aot

ROOT = pathlib.Path(__file__).parents[2]
CAPABILITY = {"a100": 80, "h100": 90}


class TritonValuesTest(parameterized.TestCase):
  @parameterized.parameters("top_k", "search", "lookup")
  def test_interpreted_values_equal_numpy_in_float64(self, what):
    done = subprocess.run(
      [sys.executable, "-m", "tests.aot.triton_values", what],
      cwd=ROOT,
      env=os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    self.assertEqual(done.returncode, 0, done.stdout)
    self.assertIn("checked", done.stdout)


@unittest.skipIf(
  sys.version_info >= (3, 12),
  "jax-triton 0.3.1 works with jax 0.10.2 only, the last of Python 3.11",
)
class TritonCompiledTest(parameterized.TestCase):
  def compile(self, target, registers, fn, *shapes):
    """The program, of kernels without a spill and of few registers each."""
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with (
      dispatch.use("jax_triton", platform="gpu"),
      triton_target.triton_target(CAPABILITY[target]) as kernels,
    ):
      program = cuda.compile_for(target, fn, *arrays)
    found = {k.name: triton_target.resources(k) for k in kernels}
    self.assertEqual(set(found), set(registers))
    for name, ceiling in registers.items():
      self.assertEqual(found[name].spill_bytes, 0, name)
      self.assertEqual(found[name].stack_bytes, 0, name)
      self.assertLessEqual(found[name].registers, ceiling, name)
    calls = re.findall(r'custom_call_target="([^"]*)"', program.hlo)
    self.assertEqual(calls, ["triton_kernel_call"] * len(registers))
    self.assertNotRegex(program.hlo, r"= \S+ sort\(")
    return program

  @parameterized.parameters(
    ("a100", "msn_paper", jnp.float32),
    ("h100", "msn_paper", jnp.float32),
    ("a100", "rows_4096x65536", jnp.float32),
    ("h100", "rows_4096x65536", jnp.bfloat16),
  )
  def test_top_k(self, target, name, dtype):
    shape, k = top_k_specs.ARG_SPECS[name]
    program = self.compile(
      target, {"top_k_kernel": 64}, lambda x: top_k(x, k), (shape, dtype)
    )
    # 16 bytes hold the addresses of the two results.
    self.assertLessEqual(program.temp_bytes, 16)

  def test_search_and_its_gradient(self):
    spec = search_specs.ARG_SPECS["msn_paper"]
    scores = ((spec.rows, spec.num_keys), jnp.float32)
    sums = ((spec.rows, spec.top_k), jnp.float32)

    def step(row, col, grads):
      _, vjp = jax.vjp(lambda *x: product_key_topk(*x, spec.top_k)[0], row, col)
      return vjp(grads)

    program = self.compile(
      "h100", {"topk_kernel": 64}, step, scores, scores, sums
    )
    # Slots, sums and two numbers of keys: no [rows, top_k, keys].
    self.assertLess(program.temp_bytes, 5 * 4 * spec.rows * spec.top_k)

  @parameterized.parameters(
    ("a100", "msn_paper", True),
    ("h100", "msn_paper", True),
    ("h100", "msn_paper_1024", False),
  )
  def test_lookup_keeps_no_scores(self, target, name, has_grad):
    spec = search_specs.ARG_SPECS[name]
    queries = (spec.rows, 2, spec.num_heads, spec.key_dim)
    keys = (2, spec.num_heads, spec.num_keys, spec.key_dim)
    chosen = (spec.rows, spec.num_heads, spec.top_k)
    registers = {"lookup_kernel": 128}

    def forward(queries, keys, gain, grads):
      del grads
      return product_key_lookup(queries, keys, spec.top_k, gain=gain)

    def step(*arrays):
      weights, vjp, slots = jax.vjp(
        lambda *x: forward(*x, None), *arrays[:3], has_aux=True
      )
      return weights, slots, vjp(arrays[3])

    if has_grad:
      registers |= {"queries_grad_kernel": 64, "keys_grad_kernel": 104}
    program = self.compile(
      target,
      registers,
      step if has_grad else forward,
      *((s, jnp.float32) for s in (queries, keys, (2, spec.key_dim), chosen)),
    )
    scores = rf"f32\[({spec.rows}|{spec.rows},{spec.num_heads})"
    self.assertNotRegex(program.hlo, scores + rf",{spec.num_keys}\]")
    # Less than the scores of one axis, and with the gradient, for parts of
    # the gradients that are summed at the end, than half of them.
    size = 4 * spec.rows * spec.num_heads * spec.num_keys
    self.assertLess(program.temp_bytes, size / 2 if has_grad else size / 8)


if __name__ == "__main__":
  absltest.main()
