"""DCN-V2's layers and whole forward pass, recomputed in float64 NumPy."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax.baselines import dcnv2
from recjax.errors import UserError
from tests import oracles, toy

TINY = {"tasks": ["click", "play_time"], "embed_dim": 4, "mlp_dims": [8, 5]}
MIXTURE = {"low_rank": 3, "num_experts": 2}
G = {
  "identity": lambda x: x,
  "relu": lambda x: np.maximum(x, 0),
  "tanh": np.tanh,
  "hard_tanh": lambda x: np.clip(x, -1, 1),
}


def load(**overrides):
  return method_lib.load("dcnv2", TINY | overrides, toy.SCHEMA)


def forward(method, params, tables, batch):
  """(predictions, aux)."""

  def run(params, tables, batch):
    rows = method.read(tables, batch)
    return method.apply(params, tables, rows, batch, train=False)[:2]

  return jax.jit(run)(params, tables, batch)


def cross(config, params, x0, x):
  """Eq. 1 to 4, one example and one expert after the other."""
  output = np.array(x)
  for b in range(len(x)):
    if not config.low_rank:
      kernel = params["dense"]["kernel"]
      output[b] += x0[b] * (x[b] @ kernel + params["dense"]["bias"])
      continue
    weights = gate_weights(config, params, x[b])
    for i in range(config.num_experts):
      hidden = params["v"][i].T @ x[b]
      if config.expert_activation != "identity":
        g = G[config.expert_activation]
        hidden = g(params["c"][i].T @ g(hidden))
      expert = x0[b] * (params["u"][i].T @ hidden + params["bias"])
      output[b] += weights[i] * expert
  return output


def gate_weights(config, params, x):
  """G_i(x) of eq. 3."""
  if config.num_experts == 1 or config.expert_gate == "constant":
    return np.ones(config.num_experts)
  logits = x @ params["gate"]["kernel"] + params["gate"]["bias"]
  if config.expert_gate == "sigmoid":
    return oracles.sigmoid(logits)
  return oracles.softmax(logits)


def oracle(method, params, tables, batch):
  """Task -> logit by the equations."""
  config = method.config
  params, tables = oracles.to_float64((params, tables))
  rows = oracles.feature_rows(
    method.tables["embedding"], tables["embedding"], batch
  )
  x0 = oracles.concat_features(toy.SCHEMA, batch, rows, params.get("inputs"))
  crossed = x0
  for i in range(config.num_cross_layers):
    crossed = cross(config, params[f"cross_{i}"], x0, crossed)
  deep = {"stacked": crossed, "parallel": x0}[config.structure]
  for i in range(len(config.mlp_dims)):
    if i in config.memory_layers:
      values = tables[f"memory_{i}/values"]
      value, _ = oracles.memory(
        params[f"memory_{i}"], values, deep[None], config.memory
      )
      deep = oracles.gate(deep, value[0], config.gate)
    deep = np.maximum(_dense(params[f"mlp_{i}"], deep), 0)
  if config.structure == "parallel":
    deep = np.concatenate([crossed, deep], axis=1)
  return {t: _dense(params["heads"][t], deep)[:, 0] for t in config.tasks}


def _dense(params, x):
  return x @ params["kernel"] + params["bias"]


def layer_and_params(x, seed=0, **kwargs):
  """A cross layer and parameters far from their initial values."""
  layer = dcnv2.CrossLayer(**kwargs)
  params = jax.eval_shape(layer.init, jax.random.key(0), x, x)["params"]
  rng = np.random.default_rng(seed)
  return layer, jax.tree.map(
    lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), params
  )


class Dcnv2Test(parameterized.TestCase):
  @parameterized.named_parameters(
    ("full_rank", {}),
    ("parallel", {"structure": "parallel", "num_cross_layers": 3}),
    ("low_rank", {"low_rank": 3, "structure": "parallel"}),
    ("softmax", MIXTURE | {"num_cross_layers": 1}),
    ("sigmoid", MIXTURE | {"expert_gate": "sigmoid"}),
    ("constant", MIXTURE | {"expert_gate": "constant"}),
    ("relu", MIXTURE | {"expert_activation": "relu"}),
    ("tanh", MIXTURE | {"expert_activation": "tanh"}),
    ("hard_tanh", MIXTURE | {"expert_activation": "hard_tanh"}),
    ("numbers", {"numeric_dim": 2, "mlp_dims": [], "structure": "parallel"}),
    (
      "memories",
      {
        "memory_layers": [0, 1],
        "memory": {"num_keys": 6, "key_dim": 4, "top_k": 3},
        "gate": "one_plus_tanh",
        "low_rank": 2,
        "numeric_dim": 1,
      },
    ),
  )
  def test_equals_the_equations(self, overrides):
    method, batch = load(**overrides), toy.make_batch(size=6)
    params, tables = oracles.random_variables(method)
    actual = forward(method, params, tables, batch)[0]
    expected = oracle(method, params, tables, batch)
    self.assertCountEqual(actual, expected)
    for task, logits in expected.items():
      np.testing.assert_allclose(
        actual[task], logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max()
      )

  @parameterized.parameters({}, {"low_rank": 2}, MIXTURE)
  def test_without_weights_a_cross_layer_is_the_identity(self, **kwargs):
    x0 = jax.random.normal(jax.random.key(1), (2, 5))
    x = jax.random.normal(jax.random.key(2), (2, 5))
    layer, params = layer_and_params(x, **kwargs)
    self.assertGreater(np.abs(_apply(layer, params, x0, x) - x).max(), 0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(_apply(layer, zeros, x0, x), x)

  @parameterized.product(num_layers=(1, 2, 3), kwargs=({}, {"low_rank": 2}))
  def test_polynomial_order_is_one_more_than_the_layers(
    self, num_layers, kwargs
  ):
    x = jax.random.normal(jax.random.key(0), (1, 5))
    layers = [layer_and_params(x, s, **kwargs) for s in range(num_layers)]

    @jax.jit
    def along_a_ray(t):
      x0 = crossed = t * x
      for layer, params in layers:
        crossed = _apply(layer, params, x0, crossed)
      return crossed[0]

    order = num_layers + 1
    # The n-th difference of a polynomial of order n is not 0, the next one is.
    for n, vanishes in ((order, False), (order + 1, True)):
      terms = [
        np.float64(along_a_ray(float(i))) * (-1) ** (n - i) * math.comb(n, i)
        for i in range(n + 1)
      ]
      difference = np.abs(np.sum(terms, axis=0))
      scale = np.abs(terms).max()
      if vanishes:
        self.assertLess(difference.max(), 1e-5 * scale)
      else:
        self.assertGreater(difference.max(), 1e-3 * scale)

  def test_two_layers_hold_every_cross_up_to_order_three(self):
    """The third derivative by any three features is somewhere not zero."""
    x = jnp.full((1, 3), 0.5)
    layers = [layer_and_params(x, seed) for seed in range(2)]

    def output(x0):
      crossed = x0 = x0[None]
      for layer, params in layers:
        crossed = _apply(layer, params, x0, crossed)
      return crossed.sum()

    third = jax.jit(jax.jacfwd(jax.jacfwd(jax.grad(output))))(x[0])
    for i, j, k in itertools.combinations_with_replacement(range(3), 3):
      self.assertNotAlmostEqual(float(third[i, j, k]), 0.0, places=4)

  def test_low_rank_is_full_rank_where_the_factors_multiply_to_it(self):
    x0 = jax.random.normal(jax.random.key(1), (4, 5))
    x = jax.random.normal(jax.random.key(2), (4, 5))
    low, params = layer_and_params(x, low_rank=3)
    dense = {"kernel": params["v"][0] @ params["u"][0], "bias": params["bias"]}
    actual = _apply(low, params, x0, x)
    expected = _apply(dcnv2.CrossLayer(), {"dense": dense}, x0, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

  def test_equal_experts_under_softmax_are_one(self):
    x0 = jax.random.normal(jax.random.key(1), (4, 5))
    x = jax.random.normal(jax.random.key(2), (4, 5))
    one, params = layer_and_params(x, low_rank=3, activation="tanh")
    many, gated = layer_and_params(
      x, low_rank=3, num_experts=3, activation="tanh"
    )
    for name in "uvc":
      gated[name] = jnp.repeat(params[name], 3, axis=0)
    gated["bias"] = params["bias"]
    np.testing.assert_allclose(
      _apply(many, gated, x0, x), _apply(one, params, x0, x), rtol=1e-5,
      atol=1e-5,
    )  # fmt: skip

  def test_parallel_without_a_deep_part_still_crosses(self):
    stacked = load(structure="stacked", mlp_dims=[])
    parallel = load(structure="parallel", mlp_dims=[])
    shapes = [
      jax.eval_shape(m.init, jax.random.key(0))[0]["heads"]["click"]["kernel"]
      for m in (stacked, parallel)
    ]
    width = shapes[0].shape[0]
    self.assertEqual(shapes[1].shape[0], 2 * width)

  def test_declares_a_table_of_values_a_memory(self):
    for numeric_dim in (0, 2):
      method = load(
        memory_layers=[0, 1],
        memory={"num_keys": 6, "key_dim": 4, "top_k": 3},
        numeric_dim=numeric_dim,
      )
      params, _ = jax.eval_shape(method.init, jax.random.key(0))
      for i in range(2):
        table = method.tables[f"memory_{i}/values"]
        self.assertEqual(table.num_rows, 36)
        self.assertEqual(table.dim, params[f"mlp_{i}"]["kernel"].shape[0])
    self.assertCountEqual(load().tables, ["embedding"])

  def test_counts_and_folds_its_memories(self):
    method = load(
      memory_layers=[1], memory={"num_keys": 6, "key_dim": 4, "top_k": 3}
    )
    batch = toy.make_batch(num_padding=5)
    params, tables = oracles.random_variables(method)
    predictions, aux = forward(method, params, tables, batch)
    self.assertEqual(aux["counters"]["memory_1"]["hits"].sum(), 11 * 3)
    numbers = dcnv2.diagnostics(jax.device_get(aux["counters"]))
    self.assertBetween(numbers["memory_1/slots_hit"], 1 / 36, 1)
    folded, config = dcnv2.fold(params, method.config)
    serving = method_lib.Method("dcnv2", dcnv2, config, toy.SCHEMA)
    chex.assert_trees_all_close(
      forward(serving, folded, tables, batch)[0],
      predictions,
      rtol=1e-4,
      atol=1e-4,
    )

  @parameterized.parameters(
    ({"structure": "stack"}, "structure 'stack'.*'stacked'"),
    ({"expert_gate": "tanh"}, "expert_gate 'tanh'.*softmax"),
    (MIXTURE | {"expert_activation": "gelu"}, "expert_activation 'gelu'"),
    ({"num_experts": 2}, "num_experts.*set model.low_rank"),
    ({"expert_activation": "relu"}, "expert_activation.*model.low_rank"),
    ({"num_cross_layers": 0}, "num_cross_layers must be at least 1"),
    ({"low_rank": -1}, "low_rank must be at least 0"),
    ({"num_experts": 0}, "num_experts must be at least 1"),
    ({"memory_layers": [2]}, "memory_layers.*mlp_dims"),
    ({"gate": "relu"}, "model.gate.*'relu'"),
  )
  def test_mistakes_are_user_errors(self, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      load(**overrides)


def _apply(layer, params, x0, x):
  return jax.jit(layer.apply)({"params": params}, x0, x)


if __name__ == "__main__":
  absltest.main()
