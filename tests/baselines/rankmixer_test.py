"""RankMixer's whole forward pass, recomputed in float64 NumPy."""

import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax.baselines import rankmixer
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
    y = oracles.per_token_network(block["ffn"], s, config.ffn, config.moe)
    x = _norm(block["ffn_norm"], y + s)
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
    {"ffn": "gated", "moe": {"gate_dim": 3}},
    {"ffn": "smoe", "moe": {"num_experts": 3}},
    {"ffn": "relu_moe", "moe": {"num_experts": 3}},
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

  def test_training_sends_examples_along_both_paths(self):
    method, batch = load(ffn="relu_moe", num_layers=1), toy.make_batch(size=6)
    params, tables = oracles.random_variables(method)
    rows = method.read(tables, batch)

    def forward(params, train):
      return method.apply(params, tables, rows, batch, train=train)[:2]

    predictions, aux = jax.jit(forward, static_argnums=1)(params, True)
    served, _ = jax.jit(forward, static_argnums=1)(params, False)
    chex.assert_trees_all_close(predictions, served, rtol=1e-5, atol=1e-5)
    ffn = params["block_0"]["ffn"]
    ffn["h_train"], ffn["h_infer"] = ffn["h_infer"], ffn["h_train"]
    swapped, _ = jax.jit(forward, static_argnums=1)(params, False)
    chex.assert_trees_all_close(
      aux["dense_path"], swapped, rtol=1e-5, atol=1e-5
    )
    self.assertEqual(aux["tokens"].shape, (2, 6, 8))
    terms = method.module.loss_fn(predictions, aux, batch, method.config)
    self.assertCountEqual(
      terms,
      [
        *("click", "play_time"),
        *("click_dense_path", "play_time_dense_path"),
        "moe_penalty",
      ],
    )

  def test_experts_are_counted_per_block(self):
    method, batch = load(ffn="smoe"), toy.make_batch(size=6, num_padding=2)
    params, tables = oracles.random_variables(method)
    rows = method.read(tables, batch)
    aux = method.apply(params, tables, rows, batch, train=False)[1]
    self.assertEqual(aux["counters"]["block_1"]["examples"], 4)
    numbers = rankmixer.diagnostics(jax.device_get(aux["counters"]))
    self.assertEqual(numbers["block_0/active_share"], 0.5)

  def test_idle_params_are_those_of_every_layer(self):
    # 2 layers, 2 tokens, 2 idle experts of 8 -> 8 -> 8 with their biases.
    smoe = 2 * 2 * 2 * (2 * 8 * 8 + 2 * 8)
    for ffn, number in (("dense", 0), ("gated", 0), ("smoe", smoe)):
      config = load(ffn=ffn).config
      self.assertEqual(rankmixer.idle_params(config), number, ffn)

  def test_an_unknown_network_is_a_user_error(self):
    with self.assertRaisesRegex(UserError, "model.ffn must be one of dense.*"):
      load(ffn="moe")

  def test_a_token_must_divide_into_heads(self):
    with self.assertRaisesRegex(UserError, r"token_dim \(9\).*multiple"):
      load(token_dim=9)


if __name__ == "__main__":
  absltest.main()
