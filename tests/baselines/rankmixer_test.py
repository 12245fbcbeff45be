"""RankMixer's whole forward pass, recomputed in float64 NumPy."""

import jax
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax.errors import UserError
from tests import oracles, toy

TINY = {
  "tasks": ["click", "play_time"],
  "embed_dim": 4,
  "num_tokens": 2,
  "token_dim": 8,
  "num_layers": 2,
}


def load(**overrides):
  return method_lib.load("rankmixer", TINY | overrides, toy.SCHEMA)


def oracle(method, params, tables, batch):
  """Task -> logit by the equations."""
  config = method.config
  params, tables = oracles.to_float64((params, tables))
  rows = oracles.feature_rows(
    method.tables["embedding"], tables["embedding"], batch
  )
  inputs = oracles.concat_features(
    toy.SCHEMA, batch, rows, params["tokens"].get("inputs")
  )
  x = oracles.feature_tokens(params["tokens"], inputs, config.num_tokens)
  for i in range(config.num_layers):
    block = params[f"block_{i}"]
    s = _norm(block["mix_norm"], oracles.token_mixing(x) + x)
    x = _norm(block["ffn_norm"], oracles.per_token_ffn(block["ffn"], s) + s)
  return {
    task: _head(params["heads"], task, x.mean(0)) for task in config.tasks
  }


def _norm(params, x):
  return oracles.layer_norm(x, params["scale"], params["bias"])


def _head(params, task, x):
  if f"{task}_hidden" in params:
    x = oracles.gelu(_dense(params[f"{task}_hidden"], x))
  return _dense(params[task], x)[:, 0]


def _dense(params, x):
  return x @ params["kernel"] + params["bias"]


class RankMixerTest(parameterized.TestCase):
  @parameterized.parameters(
    {},
    {"num_tokens": 4, "token_dim": 12, "num_layers": 1, "head_dim": 5},
    {"mlp_ratio": 1.0, "numeric_dim": 3, "num_layers": 1},
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

  def test_size_is_that_of_the_equations(self):
    method = load()
    params, _ = jax.eval_shape(method.init, jax.random.key(0))
    block = sum(leaf.size for leaf in jax.tree.leaves(params["block_0"]))
    tokens, dim, inner = 2, 8, 16
    self.assertEqual(
      block, tokens * (2 * dim * inner + inner + dim) + 2 * 2 * dim
    )

  def test_a_token_must_divide_into_heads(self):
    with self.assertRaisesRegex(UserError, r"token_dim \(9\).*multiple"):
      load(token_dim=9)


if __name__ == "__main__":
  absltest.main()
