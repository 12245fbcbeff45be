"""The GPU kernels on a GPU, at the shapes in use, against XLA there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.aot import cases

pytestmark = pytest.mark.gpu

# Those that hold more than 10 GB with what XLA keeps beside them.
LARGE = ("top_k/rows_4096x65536",)
NAMES = [name for name in cases.all_cases() if name not in LARGE]


class GpuKernelsTest(parameterized.TestCase):
  @parameterized.product(
    implementation=("pallas_gpu", "mosaic_gpu", "jax_triton"), name=NAMES
  )
  def test_equals_xla(self, implementation, name):
    self.assertEqual(jax.default_backend(), "gpu", "make test-gpu needs a GPU")
    case = cases.all_cases()[name]
    arguments = case.make_arguments()

    def run(implementation):
      with (
        pallas_kernels.use(implementation),
        jax.default_matmul_precision("float32"),
      ):
        return jax.jit(lambda *x: case.fn(*x))(*arguments)

    try:
      got = run(implementation)
    except NotImplementedError as error:
      self.skipTest(str(error))
    except ValueError as error:
      if "unknown implementation" not in str(error):
        raise
      self.skipTest(str(error))
    for a, b in zip(*map(jax.tree.leaves, (got, run("xla"))), strict=True):
      if jnp.issubdtype(a.dtype, jnp.integer):
        # Of nearly equal sums another may come first.
        self.assertGreater(np.mean(np.equal(a, b)), 0.999)
      else:
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * scale)


if __name__ == "__main__":
  absltest.main()
