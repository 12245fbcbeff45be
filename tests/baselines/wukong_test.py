"""Wukong's blocks and whole forward pass, recomputed in float64 NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax.baselines import wukong
from recjax.errors import UserError
from tests import oracles, toy

TINY = {
  "tasks": ["click", "play_time"],
  "embed_dim": 4,
  "num_layers": 2,
  "num_fm": 3,
  "num_linear": 2,
  "fm_rank": 2,
  "fm_mlp_dims": [6],
  "dense_mlp_dims": [5],
  "mlp_dims": [7, 4],
}


def load(schema=toy.SCHEMA, **overrides):
  return method_lib.load("wukong", TINY | overrides, schema)


def forward(method, params, tables, batch):
  """(predictions, aux)."""

  def run(params, tables, batch):
    rows = method.read(tables, batch)
    return method.apply(params, tables, rows, batch, train=False)[:2]

  return jax.jit(run)(params, tables, batch)


def oracle(method, params, tables, batch):
  """Task -> logit by the equations, one example after the other."""
  config, schema = method.config, method.schema
  params, tables = oracles.to_float64((params, tables))
  rows = oracles.feature_rows(
    method.tables["embedding"], tables["embedding"], batch
  )
  num = len(schema.id_features)
  concat = oracles.concat_features(schema, batch, rows)
  logits = {task: [] for task in config.tasks}
  for b in range(batch.size):
    x = concat[b, : num * config.embed_dim].reshape(num, -1)
    for feature in schema.vector_features:
      vector = np.asarray(batch.vectors[feature.name][b], np.float64)
      x = np.vstack([x, _dense(params[f"vector_{feature.name}"], vector)])
    if schema.dense_features:
      dense = np.asarray(batch.dense[b], np.float64)
      dense = _dense(
        params["dense"], _relu_mlp(params.get("dense_mlp", {}), dense)
      )
      x = np.vstack([x, dense.reshape(config.num_dense, -1)])
    for i in range(config.num_layers):
      x = layer(config, params[f"layer_{i}"], x)
    hidden = _relu_mlp(params.get("mlp", {}), x.ravel())
    for task in config.tasks:
      logits[task].append(_dense(params["heads"][task], hidden)[0])
  return {task: np.asarray(values) for task, values in logits.items()}


def layer(config, params, x):
  """`LN(concat(FMB(X), LCB(X)) + X)` of one example, `[embeddings, dim]`."""
  products = fm_block(config, params["fm"], x)
  output = np.vstack([products, params["linear"]["kernel"].T @ x])
  residual = x
  if "residual" in params:
    residual = params["residual"]["kernel"].T @ x
  norm = params["norm"]
  return oracles.layer_norm(output + residual, norm["scale"], norm["bias"])


def fm_block(config, params, x):
  """`reshape(MLP(LN(flatten(X X^T Y))))` of one example."""
  interactions = all_pairs(x)
  if config.fm_rank:
    interactions = interactions @ projection(config, params, x)
  norm = params["norm"]
  flat = oracles.layer_norm(interactions.ravel(), norm["scale"], norm["bias"])
  output = _dense(params["output"], _relu_mlp(params.get("mlp", {}), flat))
  return output.reshape(config.num_fm, config.embed_dim)


def projection(config, params, x):
  """Y, `[embeddings, rank]`."""
  if config.projection == "learned":
    return params["project"]["kernel"]
  few = params["attend_compress"]["kernel"].T @ x
  hidden = np.maximum(_dense(params["attend_hidden"], few.ravel()), 0)
  return _dense(params["attend_output"], hidden).reshape(len(x), -1)


def all_pairs(x):
  """Dot products of every pair, in plain loops."""
  products = np.zeros((len(x), len(x)))
  for i, j in np.ndindex(*products.shape):
    products[i, j] = sum(a * b for a, b in zip(x[i], x[j], strict=True))
  return products


def _relu_mlp(params, x):
  for i in range(len(params)):
    x = np.maximum(_dense(params[f"dense_{i}"], x), 0)
  return x


def _dense(params, x):
  return x @ params["kernel"] + params["bias"]


class WukongTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("learned", {}),
    ("attentive", {"projection": "attentive", "num_dense": 2}),
    ("all_pairs", {"fm_rank": 0, "num_layers": 1}),
    ("one_size", {"num_fm": 4, "num_linear": 3, "num_dense": 1}),
    ("deep", {"fm_mlp_dims": [6, 5], "num_layers": 3}),
    ("linear", {"fm_mlp_dims": [], "dense_mlp_dims": [], "mlp_dims": []}),
  )
  def test_equals_the_equations(self, overrides):
    self.check_oracle(load(**overrides))

  def test_needs_neither_numbers_nor_vectors(self):
    features = toy.SCHEMA.id_features
    self.check_oracle(load(dataclasses.replace(toy.SCHEMA, features=features)))

  def check_oracle(self, method):
    batch = toy.make_batch(size=6)
    if not method.schema.dense_features:
      batch = batch.replace(dense=jnp.zeros((6, 0)), vectors={})
    params, tables = oracles.random_variables(method)
    actual = forward(method, params, tables, batch)[0]
    expected = oracle(method, params, tables, batch)
    self.assertCountEqual(actual, expected)
    for task, logits in expected.items():
      np.testing.assert_allclose(actual[task], logits, rtol=1e-3, atol=1e-3)

  def test_compressed_products_are_all_pairs_times_the_projection(self):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3, 5)), rng.normal(size=(7, 2))
    linear = wukong.LinearCompress(2)
    z = linear.apply({"params": {"kernel": jnp.asarray(y)}}, jnp.asarray(x))
    actual = wukong.pair_products(jnp.asarray(x), z)
    for b in range(3):
      expected = all_pairs(x[:, b]) @ y
      np.testing.assert_allclose(actual[b], expected, rtol=1e-4, atol=1e-4)

  def test_the_identity_as_projection_gives_all_pairs(self):
    x = jax.random.normal(jax.random.key(0), (5, 3, 4))
    linear = wukong.LinearCompress(5)
    z = linear.apply({"params": {"kernel": jnp.eye(5)}}, x)
    np.testing.assert_allclose(
      wukong.pair_products(x, z), wukong.pair_products(x, x), rtol=1e-6
    )

  def test_a_layer_without_weights_normalises_its_input(self):
    config = wukong.Config(num_fm=3, num_linear=2, embed_dim=4)
    x = 3 * jax.random.normal(jax.random.key(0), (5, 2, 4)) + 1
    wukong_layer = wukong.WukongLayer(config)
    init = functools.partial(wukong_layer.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(1), x)["params"]
    self.assertNotIn("residual", shapes)
    params = jax.tree.map(lambda p: jnp.zeros(p.shape), shapes)
    params["norm"]["scale"] = jnp.ones(4)
    apply = jax.jit(functools.partial(wukong_layer.apply, train=False))
    actual = apply({"params": params}, x)
    expected = oracles.layer_norm(np.asarray(x, np.float64), 1.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)

  def test_linear_compression_raises_no_order(self):
    """It is linear in X; the products are of order two."""
    x = jax.random.normal(jax.random.key(0), (5, 2, 4))
    linear = wukong.LinearCompress(3)
    params = linear.init(jax.random.key(1), x)
    once, thrice = (linear.apply(params, k * x) for k in (1.0, 3.0))
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-5, atol=1e-6)
    products = (wukong.pair_products(k * x, k * x) for k in (1.0, 3.0))
    once, thrice = products
    np.testing.assert_allclose(thrice, 9 * once, rtol=1e-5)

  def test_size_is_that_of_the_equations(self):
    params, _ = jax.eval_shape(load(num_dense=2).init, jax.random.key(0))
    sizes = [
      sum(leaf.size for leaf in jax.tree.leaves(params[f"layer_{i}"]))
      for i in range(2)
    ]
    dim, rank, num_fm, outputs, hidden = 4, 2, 3, 5, 6
    num_inputs = 5 + 1 + 2
    for n, size, residual in (
      (num_inputs, sizes[0], num_inputs * outputs),
      (outputs, sizes[1], 0),
    ):
      fm = n * rank + 2 * n * rank
      fm += (n * rank + 1) * hidden + (hidden + 1) * num_fm * dim
      self.assertEqual(size, fm + 2 * n + residual + 2 * dim)

  def test_embeddings_are_cut_from_the_front(self):
    x = jnp.arange(12.0).reshape(2, 6)
    actual = wukong.to_embeddings(x, 2)
    np.testing.assert_array_equal(actual[:, 1], [[6, 7], [8, 9], [10, 11]])

  @parameterized.parameters(
    ({"projection": "attention"}, "projection 'attention'.*'attentive'"),
    ({"projection": "attentive", "fm_rank": 0}, "needs model.fm_rank"),
    ({"projection": "attentive", "fm_mlp_dims": []}, "a layer in"),
    ({"num_fm": 0}, "num_fm must be at least 1"),
    ({"num_linear": 0}, "num_linear must be at least 1"),
    ({"fm_rank": -1}, "fm_rank must be at least 0"),
    ({"num_dense": 0}, "num_dense must be at least 1"),
    ({"fm_mlp_dims": [0]}, "fm_mlp_dims must be at least 1"),
    ({"dense_mlp_dims": [3, 0]}, "dense_mlp_dims must be at least 1"),
  )
  def test_mistakes_are_user_errors(self, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      load(**overrides)


if __name__ == "__main__":
  absltest.main()
