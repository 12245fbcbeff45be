"""MSN's whole forward pass, recomputed in float64 NumPy."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax.errors import UserError
from recjax.models import msn
from tests import oracles, toy

TINY = {
  "tasks": ["click"],
  "embed_dim": 4,
  "num_tokens": 2,
  "token_dim": 8,
  "num_layers": 1,
  "memory_layers": [0],
  "memory": {"num_keys": 6, "key_dim": 4, "top_k": 3},
}


def load(**overrides):
  return method_lib.load("msn", TINY | overrides, toy.SCHEMA)


def forward(method, params, tables, batch):
  """(predictions, aux)."""
  rows = method.read(tables, batch)
  return method.apply(params, tables, rows, batch, train=False)[:2]


def oracle(method, params, tables, batch):
  """Logits and aux sums of an MSN by the equations."""
  config = method.config
  params, tables = oracles.to_float64((params, tables))
  rows = oracles.feature_rows(
    method.tables["embedding"], tables["embedding"], batch
  )
  inputs = oracles.concat_features(toy.SCHEMA, batch, rows)
  x = oracles.feature_tokens(params["tokens"], inputs, config.num_tokens)
  for i in range(config.num_layers):
    norms = [params[f"{n}_norm_{i}"] for n in ("mix", "ffn")]
    (mix_gain, mix_bias), (ffn_gain, ffn_bias) = (
      (norm["scale"], norm["bias"]) for norm in norms
    )
    s = oracles.layer_norm(oracles.token_mixing(x) + x, mix_gain, mix_bias)
    gated = s
    if i in config.memory_layers:
      values = tables[f"memory_{i}/values"]
      memory = params[f"memory_{i}"]
      value, _ = oracles.memory(memory, values, s, config.memory)
      gated = oracles.gate(s, value, config.gate)
    hidden = oracles.per_token_network(
      params[f"ffn_{i}"], gated, config.ffn, config.moe
    )
    x = oracles.layer_norm(hidden + s, ffn_gain, ffn_bias)
  head = params["heads"]["click"]
  return x.mean(0) @ head["kernel"][:, 0] + head["bias"][0]


class MsnTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("tanh", {}),
    ("none", {"gate": "none"}),
    ("sigmoid", {"gate": "sigmoid"}),
    ("one_plus_tanh", {"gate": "one_plus_tanh"}),
    (
      "two_layers_one_memory",
      {"num_layers": 2, "memory_layers": [1], "num_tokens": 4},
    ),
    (
      "heads_and_values_per_token",
      {
        "memory": TINY["memory"]
        | {"num_heads": 2, "value_scope": "per_token", "theta_side": "left"}
      },
    ),
    ("no_memory", {"memory_layers": []}),
    ("msn_smoe", {"ffn": "smoe", "moe": {"num_experts": 3}}),
    ("msn_relu_moe", {"ffn": "relu_moe"}),
  )
  def test_equals_the_equations(self, overrides):
    method, batch = load(**overrides), toy.make_batch(size=6)
    params, tables = oracles.random_variables(method)
    run = jax.jit(lambda p, t, b: forward(method, p, t, b)[0])
    np.testing.assert_allclose(
      run(params, tables, batch)["click"],
      oracle(method, params, tables, batch),
      rtol=1e-4,
      atol=1e-4,
    )

  def test_folding_changes_no_prediction(self):
    method, batch = load(), toy.make_batch()
    params, tables = oracles.random_variables(method)
    folded, config = msn.fold(params, method.config)
    self.assertTrue(config.memory.folded)
    self.assertEqual(
      set(params["memory_0"]) - set(folded["memory_0"]),
      {f"{a}_{n}" for a in ("row", "col") for n in ("theta", "key_gain")},
    )
    serving = dataclasses.replace(method, config=config)
    shapes, _ = jax.eval_shape(serving.init, jax.random.key(0))
    chex.assert_trees_all_equal_shapes(shapes, folded)
    expected = jax.jit(lambda: forward(method, params, tables, batch))()
    actual = jax.jit(lambda: forward(serving, folded, tables, batch))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)

  def test_a_closed_gate_does_not_cut_the_signal(self):
    method, batch = load(), toy.make_batch()
    params, tables = oracles.random_variables(method)
    tables["memory_0/values"] = jnp.zeros_like(tables["memory_0/values"])
    click = forward(method, params, tables, batch)[0]["click"]
    self.assertGreater(float(click.std()), 0.01)

  def test_counts_the_slots_of_valid_examples(self):
    method, batch = load(), toy.make_batch(num_padding=5)
    params, tables = oracles.random_variables(method)
    aux = forward(method, params, tables, batch)[1]
    self.assertEqual(aux["counters"]["memory_0"]["hits"].sum(), 2 * 11 * 3)
    numbers = msn.diagnostics(jax.device_get(aux["counters"]))
    self.assertBetween(numbers["memory_0/slots_hit"], 1 / 36, 1)
    self.assertIn("memory_0/collapsed", numbers)

  def test_counts_the_experts_beside_the_slots(self):
    method, batch = load(ffn="smoe"), toy.make_batch(num_padding=5)
    params, tables = oracles.random_variables(method)
    aux = forward(method, params, tables, batch)[1]
    numbers = msn.diagnostics(jax.device_get(aux["counters"]))
    self.assertEqual(numbers["ffn_0/active_share"], 0.5)
    self.assertIn("memory_0/collapsed", numbers)
    self.assertGreater(msn.idle_params(method.config), 0)

  def test_declares_one_table_of_values_a_memory(self):
    method = load(num_layers=3, memory_layers=[0, 2])
    self.assertCountEqual(
      method.tables, ["embedding", "memory_0/values", "memory_2/values"]
    )
    table = method.tables["memory_2/values"]
    self.assertEqual((table.num_rows, table.dim), (36, 8))

  @parameterized.parameters(
    ({"gate": "relu"}, "model.gate"),
    ({"memory_layers": [1]}, "model.memory_layers"),
    ({"memory_layers": [-1]}, "model.memory_layers"),
    ({"token_dim": 7}, "model.token_dim"),
    ({"memory": {"top_k": 99}}, "memory.top_k"),
    ({"memory": {"slots": 99}}, "config.model.memory.slots"),
    ({"tasks": ["clik"]}, "unknown label 'clik'.*'click'"),
  )
  def test_a_wrong_choice_is_a_user_error(self, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      load(**overrides)


if __name__ == "__main__":
  absltest.main()
