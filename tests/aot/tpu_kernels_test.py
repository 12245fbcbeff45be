"""The TPU kernels, compiled by the TPU compiler without a TPU.

And held against `pallas_kernels/aot/report.json`: a kernel that has become
longer, or moves more, does not go by unseen.
"""

import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
from absl.testing import absltest, parameterized

from pallas_kernels import dispatch
from pallas_kernels.aot import cases, report, tpu

pytestmark = pytest.mark.aot

ROOT = pathlib.Path(__file__).parents[2]
REPORT = json.loads(report.REPORT.read_text())
# One chip compiles all that it takes, the others what differs most.
ALL = [key.split("/", 2)[2] for key in REPORT if key.startswith("v5e/pallas")]
SOME = (
  "sparse_gather/msn_paper",
  "row_update/bags_1e6_128",
  "top_k/rows_4096x65536",
  "product_key_lookup_grad/msn_paper",
)
# Compiles the entries named and prints what the report would hold.
SCRIPT = """
import json, sys
from pallas_kernels.aot import report, tpu
tpu.keep_schedules(sys.argv[1])
for key in sys.argv[2:]:
  print(json.dumps(report.compile_entry(key)))
"""


class TpuKernelsTest(parameterized.TestCase):
  @parameterized.parameters(
    *(("v5e", name) for name in ALL),
    *(("v5p", name) for name in SOME),
    *(("v6e", name) for name in SOME),
  )
  def test_compiles_and_never_copies_a_table(self, target, name):
    case = cases.all_cases()[name]
    with dispatch.use("pallas_tpu", platform="tpu"):
      program = tpu.compile_for(
        target, case.fn, *case.arguments, donate_argnums=case.donate
      )
    self.assertIn("tpu_custom_call", program.hlo)
    if case.table_bytes:
      self.assertLess(program.temp_bytes, case.table_bytes)
      shape = ",".join(map(str, case.arguments[0].shape))
      self.assertNotRegex(program.hlo, rf"= f32\[{shape}\]\S* copy\(")
    if case.donate:
      donated = case.table_bytes + 4 * case.arguments[0].shape[0]
      self.assertGreaterEqual(program.alias_bytes, donated)
    if "lookup" in name:
      # No scores of all keys in HBM.
      _, keys, *_ = case.arguments
      rows = math.prod(case.arguments[0].shape) // keys.shape[-1] // 2
      self.assertLess(program.temp_bytes, 4 * rows * keys.shape[2])

  @parameterized.parameters(*ALL)
  def test_moves_little_more_than_the_minimum(self, name):
    found = REPORT[f"v5e/pallas_tpu/{name}"]
    case = cases.all_cases()[name]
    if name.startswith(("sparse_gather/", "product_key_lookup")):
      self.assertLessEqual(found["kernel_bytes"], 1.2 * case.fused_bytes)
    with dispatch.use("pallas_tpu", platform="tpu"):
      moved = cases.kernel_bytes(case.fn, *case.arguments)
    self.assertEqual(moved, found["kernel_bytes"])

  def test_no_kernel_has_become_longer(self):
    keys = [f"v5e/pallas_tpu/{name}" for name in SOME]
    with tempfile.TemporaryDirectory() as folder:
      done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, *keys],
        cwd=ROOT,
        capture_output=True,
        text=True,
      )
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    lines = re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE)
    for key, line in zip(keys, lines, strict=True):
      bundles, known = json.loads(line)["bundles"], REPORT[key]["bundles"]
      self.assertGreater(bundles, 0)
      self.assertLessEqual(bundles, 1.02 * known, key)


if __name__ == "__main__":
  absltest.main()
