"""The whole training step, compiled by the TPU compiler without a TPU."""

import functools

import pytest
from absl.testing import absltest, parameterized

from experiments import paper_sizes
from recjax import method as method_lib
from tests import toy

pytestmark = pytest.mark.aot

TOKENS = {"num_tokens": 4, "token_dim": 128, "num_layers": 1}
MODELS = {
  "rankmixer": TOKENS,
  "msn": TOKENS | {"memory_layers": [0], "memory": {"num_keys": 256}},
}
# Eight chips: batches over 2, rows of tables over 4.
make_mesh = functools.cache(lambda: paper_sizes.make_tpu_mesh("v5e:2x4"))


class TpuStepTest(parameterized.TestCase):
  @parameterized.parameters(*MODELS)
  def test_compiles_for_a_mesh_and_never_gathers_a_table(self, name):
    method = method_lib.load(
      name, {"tasks": ("click",), **MODELS[name]}, toy.SCHEMA
    )
    mesh = make_mesh()
    self.assertEqual(dict(mesh.shape), {"data": 2, "model": 4})
    compiled = paper_sizes.compile_step(method, mesh, batch_size=64)
    found = paper_sizes.collectives(compiled)
    self.assertIn("all-reduce", [kind for kind, _ in found])
    if name == "msn":
      table = method.tables["memory_0/values"]
      size = table.num_rows * table.dim
      memory = compiled.memory_analysis()
      # A quarter of the table, and far less beside it.
      self.assertLess(memory.argument_size_in_bytes, 4 * size / 2)
      self.assertLess(memory.temp_size_in_bytes, 4 * size / 4)
      for kind, elements in found:
        self.assertLess(elements, size / 4, kind)


if __name__ == "__main__":
  absltest.main()
