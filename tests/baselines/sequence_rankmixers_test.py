"""LONGER, Transformer and DIN before RankMixer, recomputed in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import flops
from recjax import method as method_lib
from recjax.baselines import longer
from recjax.errors import UserError
from recjax.layers import events as events_lib
from recjax.layers.attention import TransformerLayer
from tests import event_case, oracles
from tests.event_case import SCHEMA, dense, layer_norm

RANKMIXER = {
  "tasks": ["click"],
  "embed_dim": 4,
  "num_tokens": 4,
  "token_dim": 8,
  "num_layers": 1,
  "event_dim": 4,
}
ATTENTION = RANKMIXER | {"num_heads": 2}
TARGET = {"target_features": ["item_id", "author_id"]}


def load(name, **overrides):
  words = RANKMIXER if name == "din_rankmixer" else ATTENTION
  return method_lib.load(name, words | overrides, SCHEMA)


def compile_forward(method):
  def forward(params, tables, batch):
    rows = method.read(tables, batch)
    return method.apply(params, tables, rows, batch, train=False)[0]["click"]

  return jax.jit(forward)


def oracle(method, params, tables, batch):
  """Logits by the equations."""
  params, tables = oracles.to_float64((params, tables))
  config, table = method.config, method.tables["embedding"]
  rows = oracles.feature_rows(table, tables["embedding"], batch)
  plain = events_lib.without_sequences(SCHEMA)
  inputs = oracles.concat_features(plain, batch, rows)
  read = {
    "longer": _read_longer,
    "transformer_rankmixer": _read_transformer,
    "din_rankmixer": _read_din,
  }[method.name]
  found = []
  for b in range(batch.size):
    events = event_case.embed_events(params["events"], batch, rows, b)
    names = config.target_features or ("item_id",)
    target = np.concatenate([rows[name][b] for name in names])
    args = (config, params, target, rows["user_id"][b], inputs[b])
    found.append(
      np.concatenate([read(*args, n, v) for n, (v, _) in events.items()])
    )
  found = np.stack(found, axis=1)
  num_features = config.num_tokens - len(found)
  tokens = oracles.feature_tokens(params["tokens"], inputs, num_features)
  x = np.concatenate([found, tokens])
  trunk = params["trunk"]
  for i in range(config.num_layers):
    block = trunk[f"block_{i}"]
    s = layer_norm(block["mix_norm"], oracles.token_mixing(x) + x)
    y = oracles.per_token_ffn(block["ffn"], s)
    x = layer_norm(block["ffn_norm"], y + s)
  return dense(trunk["heads"]["click"], x.mean(0))[:, 0]


def _read_longer(config, params, target, user, inputs, name, vectors):
  inputs = {"target": target, "user": user, "features": inputs}
  x = np.array(
    [
      params["global_tokens"]["cls"]
      if token == "cls"
      else dense(params["global_tokens"][token], inputs[token])
      for token in config.global_tokens
    ]
  )
  params = params[f"readers_{name}"]
  h = _merge(config, params, vectors)
  for i in range(1 + config.num_self_layers):
    layer, kept = params[f"layers_{i}"], 0 if i else config.recent_len
    # Global tokens see every sequence token and each other.
    seen = np.concatenate([h.reshape(-1, config.width), x])
    norm = layer_norm(layer["attention_norm"], seen)
    x = x + event_case.attention(layer["attention"], norm[len(h) :], norm)
    x = x + event_case.feed_forward(
      layer["ffn"], layer_norm(layer["ffn_norm"], x)
    )
    if i < config.num_self_layers:
      h = event_case.transformer_layer(
        layer, h, num_queries=kept, is_causal=True
      )
  x = layer_norm(params["out_norm"], x)
  return dense(params["out"], x.ravel()).reshape(config.num_queries, -1)


def _merge(config, params, vectors):
  """Groups from the most recent event back; what lacks in the first is 0."""
  size, groups, end = config.merge_len, [], len(vectors)
  while end > 0:
    group = vectors[max(end - size, 0) : end]
    if config.inner_trans:
      group = event_case.transformer_layer(params["inner"], group)
    missing = np.zeros((size - len(group), config.event_dim))
    groups.insert(0, np.concatenate([missing, group]).ravel())
    end -= size
  return np.array(groups).reshape(-1, config.width)


def _read_transformer(config, params, target, user, inputs, name, vectors):
  del user, inputs
  params = params[f"readers_{name}"]
  for i in range(config.num_encoder_layers):
    vectors = event_case.transformer_layer(params[f"layers_{i}"], vectors)
  keys = layer_norm(params["event_norm"], vectors) if len(vectors) else vectors
  queries = dense(params["target"], target).reshape(-1, config.event_dim)
  queries = layer_norm(params["target_norm"], queries)
  return event_case.attention(params["attention"], queries, keys)


def _read_din(config, params, target, user, inputs, name, vectors):
  del user, inputs
  params = params[f"pools_{name}"]
  v = dense(params["target"], target)
  scores = []
  for e in vectors:
    unit = params["attend"]
    x = np.concatenate([e, v, e * v, e - v]) @ unit["kernel"] + unit["bias"]
    alpha = unit["rectify_0"]["alpha"]
    p = oracles.sigmoid((x - x.mean()) / np.sqrt(x.var() + 1e-8))
    x = p * x + (1 - p) * alpha * x
    scores.append(dense(unit["score"], x)[0])
  scores = np.array(scores)
  if config.normalization == "softmax" and len(scores):
    scores = oracles.softmax(scores)
  pooled = scores @ vectors if len(scores) else np.zeros(config.event_dim)
  return dense(params["project"], pooled)[None]


class EquationTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("longer", "longer", {"recent_len": 3}),
    (
      "longer_merged",
      "longer",
      {"merge_len": 4, "inner_trans": True, "num_self_layers": 2} | TARGET,
    ),
    (
      "longer_global",
      "longer",
      {"global_tokens": ["target", "cls", "user", "features"]},
    ),
    ("transformer", "transformer_rankmixer", {"num_encoder_layers": 2}),
    ("transformer_target", "transformer_rankmixer", TARGET),
    ("din", "din_rankmixer", {}),
    ("din_softmax", "din_rankmixer", {"normalization": "softmax"} | TARGET),
  )
  def test_equals_the_equations(self, name, overrides):
    method, batch = load(name, **overrides), event_case.make_batch()
    params, tables = oracles.random_variables(method)
    actual = compile_forward(method)(params, tables, batch)
    expected = oracle(method, params, tables, batch)
    self.assertGreater(np.std(expected), 0.03)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


class UserStateTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("longer", "longer", {"recent_len": 3, "merge_len": 2}),
    ("transformer", "transformer_rankmixer", {}),
    ("din", "din_rankmixer", {}),
  )
  def test_no_candidate_leaks_and_one_state_serves_all(self, name, overrides):
    method = load(name, **overrides)
    params, tables = oracles.random_variables(method)
    each, first = 3, event_case.make_batch()
    lists = {n for n in first.ids if n.startswith(("watched", "liked"))}

    def repeat(values):
      return {
        n: jnp.repeat(v[1:3], each, axis=0) if n in lists else v
        for n, v in values.items()
      }

    batch = first.replace(
      ids=repeat(first.ids),
      id_mask=repeat(first.id_mask),
      event_age=repeat(first.event_age),
    )
    users = jax.tree.map(lambda x: x[::each], batch)

    def rows_of(batch):
      return method._split(method.read(tables, batch), batch)

    def encode(embeddings):
      return method.model.apply(
        {"params": params},
        users,
        {"embedding": embeddings},
        method="encode_user",
      )

    @jax.jit
    def run():
      state = encode(rows_of(users)["embedding"])
      predictions, _ = method.model.apply(
        {"params": params}, state, batch, rows_of(batch), method="decode"
      )
      return predictions["click"]

    np.testing.assert_allclose(
      run(),
      compile_forward(method)(params, tables, batch),
      rtol=1e-5,
      atol=1e-5,
    )

    @jax.jit
    def slopes(embeddings):
      total = lambda e: sum(  # noqa: E731
        (x * 1.0).sum() for x in jax.tree.leaves(encode(e))
      )
      return jax.grad(total)(embeddings)

    for feature, grad in slopes(rows_of(users)["embedding"]).items():
      self.assertEqual(bool(jnp.any(grad != 0)), feature in lists, feature)


class LongerTest(parameterized.TestCase):
  def test_merging_halves_the_work_as_the_paper_says(self):
    self.assertEqual(round(longer.layer_flops(2048, 32) / 1e6), 587)
    self.assertEqual(round(longer.layer_flops(2048, 32, 4) / 1e6), 336)

  @parameterized.parameters(1, 4)
  def test_the_formula_is_what_a_layer_costs(self, merge_len):
    length, dim = 2048 // merge_len, 32 * merge_len
    layer = TransformerLayer(dim, num_heads=1)
    x, mask = jnp.zeros((1, length, dim)), jnp.ones((1, length), bool)
    init = functools.partial(layer.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), x, mask)
    jaxpr = jax.make_jaxpr(functools.partial(layer.apply, train=False))(
      params, x, mask
    )
    counted, _ = flops.count_jaxpr(jaxpr.jaxpr)
    formula = longer.layer_flops(2048, 32, merge_len)
    # The formula leaves out norms, biases, activations and the softmax.
    other = 12 * length**2 + 100 * length * dim
    self.assertBetween(sum(counted.values()), formula, formula + other)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    # 12 (K d)^2 + 13 K d in the paper, with biases of queries, keys, values.
    self.assertEqual(size, 12 * dim**2 + 10 * dim)

  @parameterized.parameters(
    ({"global_tokens": []}, "global_tokens is empty"),
    ({"global_tokens": ["item"]}, "unknown model.global_tokens 'item'"),
    ({"merge_len": 3, "num_heads": 5}, "event_dim . merge_len .12. must be"),
    ({"encoder_mlp_ratio": -1.0}, "encoder_mlp_ratio must be above 0"),
  )
  def test_mistakes(self, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      load("longer", **overrides)

  @parameterized.parameters("longer", "transformer_rankmixer", "din_rankmixer")
  def test_a_token_is_left_for_the_features(self, name):
    method = load(name, num_tokens=2)
    with self.assertRaisesRegex(UserError, "num_tokens .2. must be above"):
      jax.eval_shape(method.init, jax.random.key(0))


if __name__ == "__main__":
  absltest.main()
