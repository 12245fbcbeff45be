"""What is refused, and how, where the Triton kernels cannot run.

Their values and what compilers say of them: `tests/aot/triton_test.py`.
"""

import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from pallas_kernels import dispatch
from pallas_kernels.product_key_topk.api import (
  product_key_lookup,
  product_key_topk,
)
from pallas_kernels.top_k import jax_triton
from pallas_kernels.top_k.api import top_k


def lookup(top=2, dim=4, dtype=jnp.float32):
  queries = jnp.ones((3, 2, 1, dim), dtype)
  keys = jnp.ones((2, 1, 16, dim), dtype)
  return product_key_lookup(queries, keys, top)


class JaxTritonTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(dispatch.use("jax_triton", platform="gpu"))

  @parameterized.parameters(
    lambda: top_k(jnp.ones((2, 8)), 2),
    lambda: product_key_topk(jnp.ones((2, 8)), jnp.ones((2, 8)), 2),
    lookup,
  )
  def test_without_the_wheels_the_pair_that_works_is_named(self, call):
    reason = (
      "jax_triton needs jax-triton 0.3.1 with jax 0.10.2 and the CUDA plugin "
      "of jax, and its import fails: .*jax_triton"
    )
    with mock.patch.dict(sys.modules, jax_triton=None):
      with self.assertRaisesRegex(NotImplementedError, reason):
        call()

  def test_another_pair_is_refused(self):
    modules = {
      "jax_triton": types.SimpleNamespace(__version__="0.4.1"),
      "triton": types.SimpleNamespace(knobs=None),
    }
    with mock.patch.dict(sys.modules, modules):
      with self.assertRaisesRegex(
        NotImplementedError,
        "needs jax-triton 0.3.1 with jax 0.10.2, and here is jax-triton 0.4.1 "
        f"with jax {jax.__version__}",
      ):
        top_k(jnp.ones((2, 8)), 2)

  def test_what_the_kernels_cannot_do_is_said_before(self):
    for message, call in (
      ("to 256, got k = 257", lambda: top_k(jnp.ones((1, 300)), 257)),
      (
        "k = 200 and n = 3000000",
        lambda: jax.eval_shape(
          lambda x: top_k(x, 200),
          jax.ShapeDtypeStruct((1, 3000000), jnp.float32),
        ),
      ),
      (
        "takes float32, bfloat16 and float16, got float8_e5m2",
        lambda: top_k(jnp.ones((1, 8), jnp.float8_e5m2), 2),
      ),
      ("to top_k = 64, got 65", lambda: lookup(top=65)),
      ("to 256 dimensions, got 300", lambda: lookup(dim=300)),
    ):
      with self.assertRaisesRegex(NotImplementedError, message):
        call()

  def test_every_row_within_the_limit_is_cut_into_enough_groups(self):
    for n in (1, 7, 64, 1000, 1024, 4099, 65536, 65537, 2**20):
      for k in (1, 2, 3, 16, 33, 200, 256):
        if k > n or k * n > 2**24:
          continue
        for dtype in (jnp.float32, jnp.bfloat16):
          plan = jax_triton.plan(n, k, dtype)
          size = plan["vector"] * plan["num_steps"]
          self.assertGreaterEqual(plan["num_groups"] * size, n)
          self.assertGreaterEqual(plan["num_groups"], plan["padded_k"])
          self.assertGreaterEqual(plan["padded_k"], k)
          is_short = dtype == jnp.bfloat16 and n <= 65536
          self.assertEqual(plan["key_type"], "int32" if is_short else "int64")


if __name__ == "__main__":
  absltest.main()
