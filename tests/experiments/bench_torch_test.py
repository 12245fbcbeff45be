import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments import bench_torch
from tests import command_case


def entry(secs):
  return {"secs": secs, "quartiles": [secs, secs]}


def timed(recjax, torch, compiled=None):
  times = {"recjax": entry(recjax), "products": entry(recjax / 4)}
  times["torch"] = entry(torch)
  if compiled:
    times["torch.compile"] = entry(compiled)
  return times


class BenchTorchTest(command_case.CommandTestCase):
  """What needs no PyTorch; the command itself compares the results."""

  @parameterized.parameters(
    ("--threads=0", "--threads must be .* at least 1, got 0; .*=1,2"),
    ("--threads=1,x", "--threads must be .* got 1,x"),
    ("--memories=8", "--memories must be .* at least 16, got 8; .*256"),
    ("--steps=0", "steps=0"),
  )
  def test_wrong_numbers_are_a_mistake(self, option, message):
    outcome = self.run_command("experiments.bench_torch", option)
    self.assert_mistake(outcome, message)

  def test_missing_torch_is_told_in_one_line(self):
    outcome = self.run_command(
      "experiments.bench_torch", setup="sys.modules['torch'] = None"
    )
    self.assert_mistake(outcome, r"pip install torch==2\.13\.0$")

  def test_other_missing_modules_keep_their_trace(self):
    outcome = self.run_command(
      "experiments.bench_torch",
      setup="sys.modules['experiments.peers'] = None",
    )
    self.assertEqual(outcome.code, 1)
    self.assertIn("ModuleNotFoundError", outcome.stderr)

  def test_finds_the_products_of_matrices(self):
    @jax.jit
    def inner(x, y):
      return x @ y

    def program(x, y, w):
      weighted = jnp.einsum("bk,bkd->bd", w, y[None] * w[:, :, None])
      one = jnp.einsum("bk,kx->bx", w, y[:, :1])
      return inner(x, y).sum() + weighted.sum() + one.sum()

    x, y = jnp.ones((5, 3)), jnp.ones((3, 4))
    gradient = jax.value_and_grad(program, argnums=(0, 1))
    jaxpr = jax.make_jaxpr(gradient)(x, y, jnp.ones((2, 3))).jaxpr
    multiply, operands = bench_torch.make_products(jaxpr)
    products = multiply(operands)
    # x y, and its gradients to x and to y.
    self.assertCountEqual(
      [tuple(sorted(p.shape)) for p in products], [(4, 5), (3, 5), (3, 4)]
    )
    for product, (a, b) in zip(products, operands, strict=True):
      self.assertGreater(float(jnp.abs(product).max()), 0.0)
      self.assertEqual(a.size * b.size % product.size, 0)

  def test_same_slots_in_any_order(self):
    ours = np.array([[[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 4], [5, 6]]])
    theirs = ours[..., ::-1].copy()
    theirs[1, 1, 0] = 9
    np.testing.assert_array_equal(
      bench_torch.same_slots(ours, theirs), [True, False, True]
    )

  def test_report_judges_by_the_bars(self):
    result = {
      "num_threads": 2,
      "differences": {"rankmixer": {"output": 1e-7}, "msn": {"output": 1e-7}},
      "not_compiled": "no compiler",
      "models": {
        "rankmixer": timed(0.010, 0.012, 0.010),
        "msn": timed(0.010, 0.0119),
        "msn@256": timed(0.010, 0.010),
        "msn@1024": timed(0.0151, 0.010),
      },
    }
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
      misses = bench_torch.report(result)
    self.assertEqual(misses, ["2: msn, torch", "2: growth"])
    text = text.getvalue()
    self.assertRegex(text, r"rankmixer: 1.20 .* torch \(at least 1.2\): pass")
    self.assertRegex(text, r"rankmixer: 1.00 .* torch.compile .*: pass")
    self.assertRegex(text, r"msn: 1.19 times .* torch \(at least 1.2\): MISS")
    self.assertIn("msn: no torch.compile: no compiler", text)
    self.assertRegex(text, r"1.51 \(at most 1.5\): MISS")
    self.assertRegex(text, r"rankmixer +10.0 \(10.0 ... 10.0\).* 25%")


if __name__ == "__main__":
  absltest.main()
