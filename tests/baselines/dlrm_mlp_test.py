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

  def test_a_wrong_interaction_is_a_user_error(self):
    with self.assertRaisesRegex(UserError, "model.interaction.*'cross'"):
      load(interaction="cross")


if __name__ == "__main__":
  absltest.main()
