import importlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import flops, run_files
from recjax import method as method_lib
from tests import toy, toy_trial
from tests.model_cases import TINY

TASKS = ("click", "like", "play_time")
SIZES = [
  {"testcase_name": f"_{name}_{size}", "name": name, "size": size}
  for name in method_lib.names()
  for size in ("tiny", "base")
]


def load(name, size, **changes):
  """A method at the contract's tiny shape, or at that of its recipe's base."""
  config = TINY.get(name, {})
  if size == "base":
    try:
      recipe = importlib.import_module(f"experiments.configs.{name}")
      config = recipe.get_config("base").to_dict()["model"]
    except ModuleNotFoundError:
      config = {}
    # Columns of the recipe's own data.
    for word in ("important_features", "scenario_priors"):
      config.pop(word, None)
  if toy_trial.is_trial(name):
    return method_lib.load(name, {**config, **changes}, toy_trial.SCHEMA)
  if "towers" in config:  # They name features of the recipe's data.
    config = config | TINY[name]
  return method_lib.load(
    name, {**config, **changes, "tasks": TASKS}, toy.SCHEMA
  )


def count(function, *args):
  return flops.count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def count_total(function, *args):
  return tuple(sum(part.values()) for part in count(function, *args))


class ModelTest(parameterized.TestCase):
  @parameterized.named_parameters(SIZES)
  def test_agrees_with_xla(self, name, size):
    method = load(name, size)
    counted = flops.count_flops(method)
    expected = run_files.count_flops(method)
    np.testing.assert_allclose(counted.total, expected, rtol=0.02)

  @parameterized.named_parameters(SIZES)
  def test_modules_add_up_and_are_those_of_the_parameters(self, name, size):
    method = load(name, size)
    counted = flops.count_flops(method)
    params = flops.count_params(method)
    np.testing.assert_allclose(sum(counted.by_module.values()), counted.total)
    np.testing.assert_allclose(
      counted.under("Model") + counted.by_module.get(flops.READS, 0.0),
      counted.total,
    )
    whole = run_files.count_params(method)
    self.assertEqual(sum(params.values()), whole["dense"] + whole["sparse"])
    # Deeper down a scope may be shared, and a path of parameters shorter.
    for path in set(params) - set(method.tables):
      self.assertGreater(counted.under("/".join(path.split("/")[:2])), 0, path)

  def test_per_token_products_of_rankmixer(self):
    method = load("rankmixer", "base")
    by_module = flops.count_flops(method).by_module
    tokens, dim, hidden = 8, 64, 128
    up = 2 * tokens * dim * hidden + tokens * hidden  # Product and bias.
    self.assertEqual(by_module["Model/block_0/ffn/up"], up)
    params = flops.count_params(method)
    self.assertEqual(
      params["Model/block_0/ffn/up"], tokens * (dim * hidden + hidden)
    )

  def test_the_layers_of_a_stack_cost_the_same(self):
    counted = flops.count_flops(load("msn", "base", memory_layers=(0, 1)))
    for part in ("memory", "ffn", "mix_norm"):
      self.assertEqual(
        counted.under(f"Model/{part}_0"), counted.under(f"Model/{part}_1")
      )
    self.assertGreater(counted.transcendentals, 0)

  def test_batches_of_any_size_cost_the_same_an_example(self):
    method = load("rankmixer", "base")
    few, many = flops.count_flops(method, 2), flops.count_flops(method, 512)
    np.testing.assert_allclose(few.total, many.total, rtol=1e-4)


class OperationTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("product", lambda x: x @ x.T),
    ("batched", lambda x: jnp.einsum("bi,bj->bij", x, x)),
    ("gelu", jax.nn.gelu),
    ("logistic", jax.nn.sigmoid),
    ("softmax", lambda x: jax.nn.softmax(x, axis=-1)),
    ("softplus", lambda x: x * jnp.tanh(x) - jnp.sqrt(abs(x))),
    ("integer_pow", lambda x: x**3 + x**7 - x**-2),
    ("reduce", lambda x: x.max(axis=-1) + x.sum(axis=-1) * x.prod(axis=-1)),
    ("sort", lambda x: jax.lax.sort(x)),
    ("top_k", lambda x: jax.lax.top_k(x, 3)[0] * 2),
    ("move", lambda x: jnp.pad(x.T.reshape(-1)[5:], (1, 2)) + 1),
    ("convert", lambda x: x.astype(jnp.bfloat16)),
    ("scatter", lambda x: jnp.zeros((7, 6)).at[jnp.array([1, 1])].add(x[:2])),
    (
      "fill",
      lambda x: x.at[x[:, 0].astype(int)].get(mode="fill", fill_value=0),
    ),
    ("remat", lambda x: jax.checkpoint(lambda y: jnp.sin(y) * y)(x)),
    ("relu", lambda x: jax.nn.relu(x) + jax.jit(jnp.exp)(x)),
    (
      "cond",
      lambda x: jax.lax.cond(
        x[0, 0] > 0, lambda y: y, lambda y: y @ y.T @ y, x
      ),
    ),
  )
  def test_agrees_with_xla(self, function):
    x = jnp.ones((8, 6))
    cost = jax.jit(function).lower(x).cost_analysis()
    total, transcendentals = count_total(function, x)
    expected = cost.get("flops") or 0.0
    np.testing.assert_allclose(total, expected, rtol=0.05, atol=10)
    self.assertEqual(transcendentals, cost.get("transcendentals", 0.0))

  def test_a_scan_costs_each_of_its_steps(self):
    def sums(x):
      zero = jnp.zeros(())
      return jax.lax.scan(lambda c, row: (c + row @ row, c), zero, x)[0]

    x = jnp.ones((7, 5))
    # A product of 5 terms, then an addition, seven times.
    self.assertEqual(count_total(sums, x), (7 * (2 * 5 + 1), 0))

  def test_a_while_costs_its_body_once(self):
    def double(x):
      return jax.lax.while_loop(lambda y: y[0] < 9, lambda y: y + y, x)

    # Four additions and one comparison.
    self.assertEqual(count_total(double, jnp.ones(4)), (4 + 1, 0))

  def test_work_without_a_use_is_not_counted(self):
    def waste(x):
      _ = x @ x.T
      return x + 1

    self.assertEqual(count_total(waste, jnp.ones((4, 4))), (16, 0))

  def test_inner_functions_count_for_the_module_around_them(self):
    def scoped(x):
      with jax.named_scope("Model"), jax.named_scope("heads"):
        x = jax.jit(lambda y: jnp.einsum("bi,bi->b", y, y))(x)
      return x * 2

    total, _ = count(scoped, jnp.ones((3, 5)))
    self.assertEqual(total, {"Model/heads": 2 * 15, flops.READS: 3})

  def test_unknown_operations_are_named(self):
    with self.assertRaisesRegex(NotImplementedError, "'fft' of the model"):
      count(jnp.fft.fft, jnp.ones(8, jnp.complex64))


if __name__ == "__main__":
  absltest.main()
