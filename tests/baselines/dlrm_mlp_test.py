"""DLRM's whole forward pass, recomputed in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax.baselines import dlrm_mlp
from recjax.errors import UserError
from tests import oracles, toy

TINY = {"tasks": ["click", "play_time"], "embed_dim": 4, "mlp_dims": [8, 5]}
MEMORY = {"num_keys": 6, "key_dim": 4, "top_k": 3}


def load(**overrides):
  return method_lib.load("dlrm_mlp", TINY | overrides, toy.SCHEMA)


def oracle(method, params, tables, batch):
  """Task -> logit by the equations."""
  config = method.config
  params, tables = oracles.to_float64((params, tables))
  rows = oracles.feature_rows(
    method.tables["embedding"], tables["embedding"], batch
  )
  x = oracles.concat_features(toy.SCHEMA, batch, rows, params.get("inputs"))
  if config.interaction == "dot":
    num, dim = len(toy.SCHEMA.id_features), config.embed_dim
    vectors = [x[:, i * dim : (i + 1) * dim] for i in range(num)]
    dense = np.asarray(batch.dense, np.float64)
    vectors.append(np.maximum(_dense(params["bottom"], dense), 0))
    products = [
      (vectors[i] * vectors[j]).sum(-1)
      for i in range(num + 1)
      for j in range(i)
    ]
    x = np.concatenate([x, np.stack(products, axis=1)], axis=1)
  for i in range(len(config.mlp_dims)):
    if i in config.memory_layers:
      memory, values = params[f"memory_{i}"], tables[f"memory_{i}/values"]
      value, _ = oracles.memory(memory, values, x[None], config.memory)
      x = oracles.gate(x, value[0], config.gate)
    x = np.maximum(_dense(params[f"mlp_{i}"], x), 0)
  return {t: _dense(params["heads"][t], x)[:, 0] for t in config.tasks}


def _dense(params, x):
  return x @ params["kernel"] + params["bias"]


class DlrmMlpTest(parameterized.TestCase):
  @parameterized.parameters(
    {},
    {"interaction": "dot"},
    {"interaction": "dot", "numeric_dim": 2, "mlp_dims": [6]},
    {"mlp_dims": []},
    {"memory_layers": [0, 1], "memory": MEMORY},
    {
      "memory_layers": [0],
      "memory": MEMORY | {"num_heads": 2},
      "gate": "one_plus_tanh",
      "interaction": "dot",
      "numeric_dim": 2,
    },
  )
  def test_equals_the_equations(self, **overrides):
    method, batch = load(**overrides), toy.make_batch(size=6)
    params, tables = oracles.random_variables(method)

    def forward(params, tables, batch):
      rows = method.read(tables, batch)
      return method.apply(params, tables, rows, batch, train=False)[0]

    actual = jax.jit(forward)(params, tables, batch)
    expected = oracle(method, params, tables, batch)
    self.assertCountEqual(actual, expected)
    for task, logits in expected.items():
      np.testing.assert_allclose(actual[task], logits, rtol=1e-4, atol=1e-4)

  def test_dot_interaction_equals_loops(self):
    vectors = np.asarray(jax.random.normal(jax.random.key(0), (3, 4, 5)))
    expected = [
      [np.dot(v[i], v[j]) for i in range(4) for j in range(i)] for v in vectors
    ]
    actual = dlrm_mlp.dot_interaction(jnp.asarray(vectors))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

  def test_only_the_dot_form_has_a_bottom_network(self):
    for interaction, has_bottom in (("none", False), ("dot", True)):
      method = load(interaction=interaction)
      params, _ = jax.eval_shape(method.init, jax.random.key(0))
      self.assertEqual("bottom" in params, has_bottom)

  def test_values_are_as_wide_as_the_input_of_their_layer(self):
    # 5 id features of width 4, a vector of 3, 2 numbers with 2 hinges each.
    concat = 5 * 4 + 3 + 2 * (1 + 2)
    for interaction, first in (("none", concat), ("dot", concat + 15)):
      method = load(
        memory_layers=[0, 1], interaction=interaction, numeric_dim=2
      )
      dims = [method.tables[f"memory_{i}/values"].dim for i in (0, 1)]
      self.assertEqual(dims, [first, 8])

  def test_counts_the_slots_of_valid_examples(self):
    method = load(memory_layers=[1], memory=MEMORY)
    batch = toy.make_batch(num_padding=5)
    params, tables = oracles.random_variables(method)
    rows = method.read(tables, batch)
    aux = method.apply(params, tables, rows, batch, train=False)[1]
    self.assertEqual(aux["counters"]["memory_1"]["hits"].sum(), 11 * 3)
    numbers = dlrm_mlp.diagnostics(jax.device_get(aux["counters"]))
    self.assertIn("memory_1/perplexity", numbers)

  @parameterized.parameters(
    ({"memory_layers": [2]}, "model.memory_layers.*0 ... 1 .*mlp_dims"),
    ({"memory_layers": [0], "mlp_dims": []}, "must be empty"),
    ({"gate": "relu"}, "model.gate must be one of tanh"),
  )
  def test_a_wrong_memory_is_a_user_error(self, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      load(**overrides)

  def test_a_wrong_interaction_is_a_user_error(self):
    with self.assertRaisesRegex(UserError, "model.interaction.*'cross'"):
      load(interaction="cross")


if __name__ == "__main__":
  absltest.main()
