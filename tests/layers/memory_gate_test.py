"""The gate against float64 NumPy, its names, and the config's mistakes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax.errors import UserError
from recjax.layers import memory_gate
from recjax.layers.memory_gate import MemoryGate
from recjax.layers.product_key_memory import MemoryConfig, ProductKeyMemory
from recjax.sparse import in_model
from tests import oracles

CONFIG = MemoryConfig(num_keys=5, key_dim=4, top_k=3)
MASK = jnp.asarray([True, True, False, True])


def inputs(tokens=2, dim=6):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(tokens, 4, dim)), jnp.float32)
  values = jnp.asarray(rng.normal(size=(CONFIG.num_slots, dim)), jnp.float32)
  return x, values


def run(module, x, values, params=None):
  """(result, parameters); new parameters unless some are given."""
  variables = {in_model.TABLES: {"values": values}}
  if params is not None:
    variables["params"] = params
  result, mutated = module.apply(
    variables,
    x,
    MASK,
    rngs={"params": jax.random.key(3)},
    mutable=["params", in_model.READS],
  )
  return result, mutated["params"]


class MemoryGateTest(parameterized.TestCase):
  @parameterized.product(kind=memory_gate.GATES, tokens=(1, 2))
  def test_equals_the_equation(self, kind, tokens):
    x, values = inputs(tokens)
    (gated, counters), params = run(MemoryGate(CONFIG, kind), x, values)
    params64, x64, values64 = oracles.to_float64((params, x, values))
    value, _ = oracles.memory(params64, values64, x64, CONFIG)
    expected = oracles.gate(x64, value, kind)
    valid = np.asarray(MASK)
    np.testing.assert_allclose(
      gated[:, valid], expected[:, valid], rtol=1e-4, atol=1e-5
    )
    self.assertEqual(counters["hits"].sum(), tokens * 3 * CONFIG.top_k)

  def test_is_the_memory_under_its_own_name(self):
    x, values = inputs()
    _, gate_params = run(MemoryGate(CONFIG), x, values)
    _, memory_params = run(ProductKeyMemory(CONFIG), x, values)
    chex.assert_trees_all_equal(gate_params, memory_params)

  def test_a_memory_of_one_value_gates_by_a_constant(self):
    x, values = inputs()
    for kind, factor in (
      ("tanh", np.tanh(0.3)),
      ("none", 0.3),
      ("sigmoid", 1 / (1 + np.exp(-0.3))),
      ("one_plus_tanh", 1 + np.tanh(0.3)),
    ):
      module = MemoryGate(CONFIG, kind)
      (gated, _), _ = run(module, x, jnp.full_like(values, 0.3))
      np.testing.assert_allclose(
        gated[:, 0], factor * x[:, 0], rtol=1e-5, err_msg=kind
      )

  def test_the_product_has_the_type_of_the_computation(self):
    x, values = inputs()
    module = MemoryGate(CONFIG, dtype=jnp.bfloat16)
    (gated, _), params = run(module, x.astype(jnp.bfloat16), values)
    self.assertEqual(gated.dtype, jnp.bfloat16)
    for leaf in jax.tree.leaves(params):
      self.assertEqual(leaf.dtype, jnp.float32)


class ConfigTest(parameterized.TestCase):
  def test_declares_a_table_a_layer_as_wide_as_its_input(self):
    tables = memory_gate.memory_tables({0: 8, 2: 3}, CONFIG, num_tokens=4)
    self.assertEqual(
      {name: (table.num_rows, table.dim) for name, table in tables.items()},
      {"memory_0/values": (25, 8), "memory_2/values": (25, 3)},
    )
    own = dataclasses.replace(CONFIG, value_scope="per_token")
    (table,) = memory_gate.memory_tables({1: 8}, own, num_tokens=4).values()
    self.assertEqual(table.num_rows, 4 * 25)
    self.assertTrue(table.in_model)

  @parameterized.parameters(
    ((), "relu", 2, "model.gate must be one of tanh.*'relu'"),
    ((0, 0), "tanh", 2, r"memory_layers \(0, 0\) must name a layer once"),
    ((2,), "tanh", 2, r"must lie in 0 \.\.\. 1 \(model.num_layers gives 2"),
    ((-1,), "tanh", 2, r"must lie in 0 \.\.\. 1"),
    ((0,), "tanh", 0, "must be empty: model.num_layers"),
  )
  def test_a_mistake_is_one_line(self, layers, gate, num_layers, message):
    with self.assertRaisesRegex(UserError, message) as caught:
      memory_gate.check_memory(
        layers, gate, num_layers=num_layers, source="num_layers"
      )
    self.assertNotIn("\n", str(caught.exception))

  def test_no_memory_is_no_mistake(self):
    memory_gate.check_memory((), "tanh", num_layers=0, source="mlp_dims")

  def test_diagnostics_are_named_by_layer(self):
    x, values = inputs()
    (_, counters), _ = run(MemoryGate(CONFIG), x, values)
    numbers = memory_gate.diagnostics({"memory_3": jax.device_get(counters)})
    self.assertBetween(numbers["memory_3/slots_hit"], 3 / 25, 1)

  def test_folded_keys_gate_alike(self):
    @dataclasses.dataclass(frozen=True)
    class Config:
      memory: MemoryConfig = CONFIG
      memory_layers: tuple[int, ...] = (1,)

    x, values = inputs()
    (expected, _), params = run(MemoryGate(CONFIG), x, values)
    folded, config = memory_gate.fold({"memory_1": params}, Config())
    self.assertNotIn("row_theta", folded["memory_1"])
    (actual, _), _ = run(
      MemoryGate(config.memory), x, values, folded["memory_1"]
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
