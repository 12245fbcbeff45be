"""MSN's training step at the paper's size, compiled with the kernels in it."""

import functools
import re

import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from experiments import paper_sizes
from pallas_kernels.aot import cuda, tpu, triton_target
from recjax import method as method_lib
from recjax.data.pipeline import open_dataset

pytestmark = pytest.mark.aot

MEMORY = "memory_0/values"


@functools.cache
def paper_step():
  """The step, the shapes of its state and batch, and one memory's shape."""
  paper = paper_sizes.MODELS["MSN"]
  config = paper_sizes.recipe_config(paper)
  columns = open_dataset(config["data"])
  method = method_lib.load(paper.recipe, config["model"], columns.schema)
  table = method.tables[MEMORY]
  step, state, batch = paper_sizes.step_and_shapes(
    method, paper_sizes.BATCH_SIZE
  )
  return step, state, batch, (table.num_rows, table.dim)


class PaperStepTest(parameterized.TestCase):
  def check(self, program, shape):
    shape = ",".join(map(str, shape))
    self.assertNotRegex(program.hlo, rf"= f32\[{shape}\]\S* copy\(")
    # All tables and their states stay where they are.
    self.assertGreater(program.alias_bytes, 0.9 * program.output_bytes)

  def test_tpu(self):
    step, state, batch, shape = paper_step()
    with pallas_kernels.use(None, platform="tpu"):
      program = tpu.compile_for("v5p", step, state, batch, donate_argnums=0)
    self.check(program, shape)
    kernels = set(
      re.findall(
        r"^ *%(\w+)\S* = .*\"tpu_custom_call\"", program.hlo, re.MULTILINE
      )
    )
    self.assertContainsSubset(
      ("product_key_lookup", "product_key_lookup_grad", "row_update"), kernels
    )

  @parameterized.parameters("a100", "h100")
  def test_gpu(self, target):
    step, state, batch, shape = paper_step()
    capability = {"a100": 80, "h100": 90}[target]
    with (
      triton_target.triton_target(capability) as kernels,
      pallas_kernels.use(None, platform="gpu"),
    ):
      program = cuda.compile_for(target, step, state, batch, donate_argnums=0)
      resources = [triton_target.resources(kernel) for kernel in kernels]
    self.check(program, shape)
    self.assertIn("lookup_kernel", {kernel.name for kernel in kernels})
    self.assertEqual({r.spill_bytes for r in resources}, {0})
    spilled = {k.name: k.spill_stores for k in program.kernels}
    self.assertContainsSubset(("sparse_gather", "row_update"), spilled)
    ours = {n: s for n, s in spilled.items() if "gather" in n or "update" in n}
    self.assertEqual(set(ours.values()), {0}, ours)


if __name__ == "__main__":
  absltest.main()
