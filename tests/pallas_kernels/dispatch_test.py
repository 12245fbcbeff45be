"""What runs where: choice of implementations, and the building of kernels."""

import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from pallas_kernels import dispatch
from pallas_kernels.native import build
from pallas_kernels.top_k.api import top_k

ROOT = pathlib.Path(__file__).parents[2]
X = jnp.arange(12.0).reshape(3, 4)
# Runs `top_k` in a fresh process and says what ran, from the log.
SCRIPT = """
from absl import logging
logging.use_absl_handler()
logging.set_verbosity(logging.INFO)
import jax.numpy as jnp
from pallas_kernels.top_k.api import top_k
for _ in range(2):
  print(top_k(jnp.arange(4.0), 2)[1].tolist())
try:
  top_k(jnp.arange(4.0), 2, implementation="cpu")
except NotImplementedError as error:
  print(error)
"""


def custom_calls(fn, *arguments, **options):
  lowered = jax.jit(fn).trace(*arguments).lower(**options)
  return lowered.as_text().count("pallas_kernels.top_k")


class DispatchTest(absltest.TestCase):
  def test_a_kernel_runs_on_its_platform_and_xla_elsewhere(self):
    fn = lambda x: top_k(x, 2)  # noqa: E731
    self.assertEqual(custom_calls(fn, X), 1)
    self.assertEqual(custom_calls(fn, X, lowering_platforms=("tpu",)), 0)
    self.assertNotIn("case", jax.jit(fn).lower(X).compile().as_text())

  def test_use_takes_the_place_of_none_only(self):
    with dispatch.use("xla"):
      self.assertEqual(custom_calls(lambda x: top_k(x, 2), X), 0)
      self.assertEqual(
        custom_calls(lambda x: top_k(x, 2, implementation="cpu"), X), 1
      )
      with dispatch.use(None):
        self.assertEqual(custom_calls(lambda x: top_k(x, 2), X), 1)
    self.assertEqual(custom_calls(lambda x: top_k(x, 2), X), 1)
    with self.assertRaisesRegex(ValueError, "'gpu'; there are"):
      with dispatch.use("gpu"):
        top_k(X, 2)
    self.assertEqual(custom_calls(lambda x: top_k(x, 2), X), 1)

  def test_a_kernel_of_another_platform_says_what_it_needs(self):
    reason = "top_k: pallas_tpu needs a TPU, and this is compiled for cpu"
    with self.assertRaisesRegex(NotImplementedError, reason):
      top_k(X, 2, implementation="pallas_tpu")
    with dispatch.use("pallas_tpu", platform="gpu"):
      with self.assertRaisesRegex(NotImplementedError, "compiled for gpu"):
        top_k(X, 2)

  def test_the_platform_of_use_is_the_one_compiled_for(self):
    fn = lambda x: top_k(x, 2)  # noqa: E731
    with dispatch.use(None, platform="tpu"):
      with mock.patch.dict(dispatch.DEFAULTS, tpu={}):
        self.assertEqual(custom_calls(fn, X), 0)

  def test_the_gradient_is_of_the_implementation_that_use_named(self):
    from pallas_kernels.product_key_topk.api import product_key_topk

    def loss(row):
      return product_key_topk(row, X, 2)[0].sum()

    with dispatch.use("xla"):
      _, vjp = jax.vjp(loss, X)
    text = jax.jit(vjp).lower(jnp.float32(1.0)).as_text()
    self.assertNotIn("pallas_kernels.", text)

  def test_an_export_for_other_machines_has_no_custom_call(self):
    with dispatch.use("xla"):
      exported = jax.export.export(
        jax.jit(lambda x: top_k(x, 2)), platforms=("cpu", "tpu", "cuda")
      )(X)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(X)[1], top_k(X, 2)[1])


class BuildTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def start(self, **environment):
    return subprocess.Popen(
      [sys.executable, "-c", SCRIPT],
      cwd=ROOT,
      env=os.environ
      | {"PALLAS_KERNELS_CACHE": str(self.folder / "cache")}
      | environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def test_two_processes_build_a_library_once(self):
    processes = [self.start() for _ in range(2)]
    for process in processes:
      output, _ = process.communicate(timeout=120)
      self.assertEqual(process.returncode, 0, output)
      self.assertEqual(output.count("[3, 2]"), 2, output)
      self.assertEqual(output.count("the C++ kernel runs on the CPU"), 1)
    names = sorted(p.suffix for p in (self.folder / "cache").iterdir())
    self.assertEqual(names, [".lock", ".so"])

  def test_without_a_compiler_xla_runs_and_one_line_says_so(self):
    output, _ = self.start(CXX="no-such-compiler").communicate(timeout=120)
    self.assertEqual(output.count("[3, 2]"), 2, output)
    self.assertEqual(output.count("the XLA implementation runs"), 1, output)
    self.assertIn("no C++ kernel, for there is no C++ compiler", output)

  def test_a_compiler_that_fails_is_told_of(self):
    flags = "--no-such-flag"
    output, _ = self.start(PALLAS_KERNELS_CXXFLAGS=flags).communicate(
      timeout=120
    )
    self.assertEqual(output.count("[3, 2]"), 2, output)
    self.assertRegex(output, "XLA implementation runs, for .* failed: .*flag")

  def test_a_cache_that_cannot_be_written_is_told_of(self):
    (self.folder / "cache").write_text("a file")
    output, _ = self.start().communicate(timeout=120)
    self.assertEqual(output.count("[3, 2]"), 2, output)
    self.assertRegex(output, "XLA implementation runs, for its library cannot")

  def test_the_name_of_a_library_holds_what_it_depends_on(self):
    source = self.folder / "op" / "cpu.cc"
    source.parent.mkdir()
    source.write_text('extern "C" int one() { return 1; }\n')
    with mock.patch.dict(
      os.environ, {"PALLAS_KERNELS_CACHE": str(self.folder / "cache")}
    ):
      compiler = build._compiler()
      first = build._build(source, compiler)
      self.assertEqual(build._build(source, compiler), first)
      with mock.patch.dict(os.environ, {"PALLAS_KERNELS_CXXFLAGS": "-DX"}):
        self.assertNotEqual(build._build(source, compiler), first)
      with mock.patch.object(build, "_processor", return_value="another"):
        self.assertNotEqual(build._build(source, compiler), first)
      source.write_text('extern "C" int one() { return 2; }\n')
      self.assertNotEqual(build._build(source, compiler), first)


if __name__ == "__main__":
  absltest.main()
