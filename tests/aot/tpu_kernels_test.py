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
OPERATORS = tuple(dict.fromkeys(name.split("/")[0] for name in ALL))
SOME = (
  "sparse_gather/msn_paper",
  "row_update/bags_1e6_128",
  "top_k/rows_4096x65536",
  "product_key_lookup_grad/msn_paper",
)
# The gradient of few keys or of several heads does not fit the registers yet.
SPILLING = (
  "product_key_lookup_grad/msn_base",
  "product_key_lookup_grad/heads_4",
)
# A process of its own: the compiler is told once to write down schedules, and
# would write those of all other tests too.
SCRIPT = """
import dataclasses, json, sys
from pallas_kernels import dispatch
from pallas_kernels.aot import cases, tpu
target, folder, *names = sys.argv[1:]
tpu.keep_schedules(folder)
for name in names:
  case = cases.all_cases()[name]
  with dispatch.use("pallas_tpu", platform="tpu"):
    program = tpu.compile_for(
      target, case.fn, *case.arguments, donate_argnums=case.donate
    )
  print(json.dumps(dataclasses.asdict(program)))
"""


def compile_all(target, names):
  """Programs of cases, with the schedules of their kernels."""
  with tempfile.TemporaryDirectory() as folder:
    done = subprocess.run(
      [sys.executable, "-c", SCRIPT, target, folder, *names],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
  if done.returncode:
    raise AssertionError(done.stderr[-2000:])
  for line in re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE):
    fields = json.loads(line)
    schedule = tpu.Schedule(*fields.pop("schedule"))
    yield tpu.Compiled(**fields, schedule=schedule)


class TpuKernelsTest(parameterized.TestCase):
  @parameterized.parameters(
    *(("v5e", operator) for operator in OPERATORS), ("v5p", ""), ("v6e", "")
  )
  def test_compiles_as_the_report_says(self, target, operator):
    names = [name for name in ALL if name.split("/")[0] == operator] or SOME
    programs = compile_all(target, names)
    for name, program in zip(names, programs, strict=True):
      with self.subTest(name):
        self.check_memory(cases.all_cases()[name], program)
        known = REPORT[f"{target}/pallas_tpu/{name}"]
        self.check_schedule(name, program.schedule, known, target)

  def check_memory(self, case, program):
    self.assertIn("tpu_custom_call", program.hlo)
    if case.table_bytes:
      self.assertLess(program.temp_bytes, case.table_bytes)
      shape = ",".join(map(str, case.arguments[0].shape))
      self.assertNotRegex(program.hlo, rf"= f32\[{shape}\]\S* copy\(")
    if case.donate:
      donated = case.table_bytes + 4 * case.arguments[0].shape[0]
      self.assertGreaterEqual(program.alias_bytes, donated)
    if "lookup" in case.name:
      # No scores of all keys in HBM.
      _, keys, *_ = case.arguments
      rows = math.prod(case.arguments[0].shape) // keys.shape[-1] // 2
      self.assertLess(program.temp_bytes, 4 * rows * keys.shape[2])

  def check_schedule(self, name, schedule, known, target):
    self.assertGreater(schedule.bundles, 0)
    self.assertLessEqual(schedule.bundles, 1.02 * known["bundles"])
    self.assertLessEqual(schedule.vector_spills, known["vector_spills"])
    self.assertLessEqual(schedule.scalar_spills, known["scalar_spills"])
    if target != "v6e" and name not in SPILLING:
      self.assertEqual(schedule.vector_spills, 0)

  @parameterized.parameters(*ALL)
  def test_moves_little_more_than_the_minimum(self, name):
    found = REPORT[f"v5e/pallas_tpu/{name}"]
    case = cases.all_cases()[name]
    if name.startswith(("sparse_gather/", "product_key_lookup")):
      self.assertLessEqual(found["kernel_bytes"], 1.2 * case.fused_bytes)
    with dispatch.use("pallas_tpu", platform="tpu"):
      moved = cases.kernel_bytes(case.fn, *case.arguments)
    self.assertEqual(moved, found["kernel_bytes"])


if __name__ == "__main__":
  absltest.main()
