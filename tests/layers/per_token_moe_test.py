"""Gates and experts of a token against float64 NumPy and plain loops."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax.errors import UserError
from recjax.layers import per_token_moe as moe
from recjax.layers.per_token_moe import MoEConfig
from tests import oracles

TOKENS, BATCH, DIM = 2, 5, 4
MASK = jnp.asarray([True, True, False, True, True])
VALID = np.asarray(MASK)
CONFIG = MoEConfig(num_experts=3, gate_dim=3)


def inputs(batch=BATCH, seed=0):
  x = jax.random.normal(jax.random.key(seed), (TOKENS, batch, DIM))
  return x, jnp.resize(MASK, (batch,))


def random_params(ffn, config, seed=0, **shape):
  """Parameters far from their initial values."""
  shapes = jax.eval_shape(
    lambda: Network(ffn, config, **shape).init(
      jax.random.key(0), *inputs(), train=False
    )
  )["params"]
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes
  )


class Network(nn.Module):
  """`apply_ffn` with the network's parameters at `ffn`."""

  ffn: str
  config: MoEConfig
  dtype: jax.typing.DTypeLike = jnp.float32
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, x, example_mask, *, train):
    return moe.apply_ffn(
      self.ffn,
      self.config,
      x,
      example_mask,
      mlp_ratio=2.0,
      dropout_rate=self.dropout_rate,
      dtype=self.dtype,
      train=train,
      name="ffn",
    )


def apply(ffn, params, x, mask, *, config=CONFIG, train=False):
  network = Network(ffn, config)
  run = lambda p, x: network.apply({"params": p}, x, mask, train=train)  # noqa: E731
  return jax.jit(run)(params, x)


class NetworkTest(parameterized.TestCase):
  @parameterized.parameters(
    ("dense", CONFIG),
    ("gated", CONFIG),
    ("smoe", CONFIG),
    ("smoe", MoEConfig(num_experts=3, top_k=1)),
    ("relu_moe", CONFIG),
  )
  def test_serves_by_the_equation(self, ffn, config):
    params, (x, mask) = random_params(ffn, config), inputs()
    y, terms, _ = apply(ffn, params, x, mask, config=config)
    params, x = oracles.to_float64((params["ffn"], x))
    expected = oracles.per_token_network(params, x, ffn, config)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    self.assertEqual(set(terms), {"moe_balance"} if ffn == "smoe" else set())

  @parameterized.parameters("gated", "smoe", "relu_moe")
  def test_experts_are_as_wide_as_their_share(self, ffn):
    # Dense: 8 hidden units; 2 of 4 experts active.
    params = random_params(ffn, MoEConfig())["ffn"]
    if ffn == "gated":
      self.assertEqual(params["ffn"]["up"]["kernel"].shape, (2, 4, 8))
      self.assertEqual(params["gate_down"]["kernel"].shape, (2, 4, 32))
    else:
      self.assertEqual(params["experts"]["down"].shape, (2, 4, 4, 4))
      self.assertEqual(params["experts"]["up"]["kernel"].shape, (2, 4, 16))

  @parameterized.parameters("gated", "smoe", "relu_moe")
  def test_computes_in_bfloat16_near_float32(self, ffn):
    params, (x, mask) = random_params(ffn, CONFIG), inputs()
    params = jax.tree.map(lambda p: 0.3 * p, params)
    half = Network(ffn, CONFIG, jnp.bfloat16)
    x = x.astype(jnp.bfloat16)
    y, _, _ = half.apply({"params": params}, x, mask, train=False)
    expected, _, _ = apply(ffn, params, x.astype(jnp.float32), mask)
    self.assertEqual(y.dtype, jnp.bfloat16)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.05)

  @parameterized.parameters("gated", "smoe", "relu_moe")
  def test_dropout_is_for_training_only(self, ffn):
    params, (x, mask) = random_params(ffn, CONFIG), inputs(4)
    network = Network(ffn, CONFIG, dropout_rate=0.5)

    def run(seed, train):
      rngs = {"dropout": jax.random.key(seed)}
      variables = {"params": params}
      return network.apply(variables, x, mask, train=train, rngs=rngs)[0]

    np.testing.assert_array_equal(run(0, False), run(1, False))
    self.assertTrue(bool(jnp.any(run(0, True) != run(1, True))))

  def test_initial_experts_have_the_variance_of_a_dense_network(self):
    x, mask = jax.random.normal(jax.random.key(0), (2, 400, 32)), jnp.ones(400)
    mask = mask > 0
    stds = {}
    for ffn in ("dense", "smoe"):
      network = Network(ffn, MoEConfig(num_experts=1, top_k=1))
      (y, _, _), _ = network.init_with_output(
        jax.random.key(1), x, mask, train=False
      )
      stds[ffn] = float(y.std())
    self.assertAlmostEqual(stds["smoe"], stds["dense"], delta=0.05)

  def test_two_paths_lie_side_by_side(self):
    x = jnp.arange(3.0)
    twice = moe.two_paths(x)
    np.testing.assert_array_equal(twice, [0, 0, 1, 1, 2, 2])
    joined = moe.join_paths(x[None], -x[None], axis=1)
    np.testing.assert_array_equal(joined, [[0, 0, 1, -1, 2, -2]])
    served, dense = moe.split_paths(joined, axis=1)
    np.testing.assert_array_equal(served[0], x)
    np.testing.assert_array_equal(dense[0], -x)


class SparseMoETest(parameterized.TestCase):
  def test_the_balance_is_that_of_valid_examples(self):
    params, (x, mask) = random_params("smoe", CONFIG), inputs()
    _, terms, counters = apply("smoe", params, x, mask)
    router, x = oracles.to_float64((params["ffn"]["router"], x))
    logits = oracles.per_token_dense(router, x[:, VALID])
    gates = oracles.top_k_gates(logits, 2)
    probs = oracles.top_k_gates(logits, 3)
    balance = 3 * ((gates > 0).mean(1) / 2 * probs.mean(1)).sum()
    total, weight = terms["moe_balance"]
    np.testing.assert_allclose(total / weight, 0.01 * balance, rtol=1e-5)
    self.assertEqual(weight, VALID.sum())
    np.testing.assert_array_equal(counters["active"], (gates > 0).sum(1))

  def test_what_padding_holds_changes_no_term(self):
    for ffn, train in (("smoe", False), ("relu_moe", True)):
      params, (x, mask) = random_params(ffn, CONFIG), inputs(6)
      mask = jnp.repeat(mask[:3], 2)
      other = jnp.where(mask[None, :, None], x, jnp.nan)
      first = apply(ffn, params, x, mask, train=train)[1:]
      second = apply(ffn, params, other, mask, train=train)[1:]
      jax.tree.map(np.testing.assert_array_equal, first, second)

  def test_an_empty_batch_has_no_loss(self):
    for ffn, train in (("smoe", False), ("relu_moe", True)):
      params, (x, mask) = random_params(ffn, CONFIG), inputs(4)
      _, terms, _ = apply(ffn, params, x, mask & False, train=train)
      for total, weight in terms.values():
        self.assertEqual((float(total), float(weight)), (0.0, 0.0))

  def test_all_experts_chosen_is_the_softmax_mixture(self):
    config = MoEConfig(num_experts=3, top_k=3)
    params, (x, mask) = random_params("smoe", config), inputs()
    y, _, _ = apply("smoe", params, x, mask, config=config)
    params, x = oracles.to_float64((params["ffn"], x))
    logits = oracles.per_token_dense(params["router"], x)
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = oracles.experts(params["experts"], x, gates)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)

  def test_equal_logits_choose_the_first_experts(self):
    gates, chosen = moe.top_k_gates(jnp.zeros((1, 4)), 2)
    np.testing.assert_array_equal(chosen, [[1, 1, 0, 0]])
    np.testing.assert_allclose(gates, [[0.5, 0.5, 0, 0]])

  def test_an_expert_not_chosen_gets_no_gradient(self):
    params, (x, mask) = random_params("smoe", CONFIG), inputs()
    x = x[:, :1]

    def loss(params):
      return apply("smoe", params, x, mask[:1])[0].sum()

    grads = jax.grad(loss)(params)["ffn"]
    _, _, counters = apply("smoe", params, x, mask[:1])
    moved = np.any(np.asarray(grads["experts"]["down"]) != 0, axis=(2, 3))
    np.testing.assert_array_equal(moved, counters["active"] > 0)
    logits = np.asarray(grads["router"]["bias"])[:, 0]
    np.testing.assert_array_equal(logits != 0, counters["active"] > 0)

  def test_balance_is_one_if_even_and_the_number_if_collapsed(self):
    even = jnp.full((4,), 0.25)
    one = jnp.asarray([0.0, 1.0, 0.0, 0.0])
    self.assertAlmostEqual(float(moe.load_balance(even, even)), 1.0)
    self.assertAlmostEqual(float(moe.load_balance(one, one)), 4.0)

  def test_no_load_that_follows_its_probabilities_is_below_one(self):
    probs = jax.random.dirichlet(jax.random.key(0), jnp.ones(4), (200,))
    balance = moe.load_balance(probs, probs)
    self.assertGreaterEqual(float(balance.min()), 1.0)
    # Even is a minimum: any step from it costs.
    near = 0.25 + 0.01 * (probs - probs.mean(axis=-1, keepdims=True))
    self.assertGreater(float(moe.load_balance(near, near).min()), 1.0)

  def test_balance_pulls_a_collapsed_router_apart(self):
    x, mask = inputs(64)
    x, mask = x[:1], jnp.ones_like(mask)
    config = MoEConfig(num_experts=4, top_k=1, balance_weight=1.0)
    network = Network("smoe", config)
    params = network.init(jax.random.key(0), x, mask, train=False)["params"]
    bias = params["ffn"]["router"]["bias"]
    params["ffn"]["router"]["bias"] = bias.at[..., 0].set(5.0)

    def loss(params):
      _, terms, counters = network.apply(
        {"params": params}, x, mask, train=True
      )
      total, weight = terms["moe_balance"]
      return total / weight, moe.load_balance(
        counters["active"] / 64, counters["active"] / 64
      )

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    loads = []
    for _ in range(60):
      (_, load), grads = step(params)
      loads.append(float(load[0]))
      params = jax.tree.map(lambda p, g: p - 1.0 * g, params, grads)
    self.assertGreater(loads[0], 3.0)
    self.assertLess(loads[-1], 1.5)


class ReLUMoETest(parameterized.TestCase):
  def test_training_takes_both_paths(self):
    params, (x, mask) = random_params("relu_moe", CONFIG), inputs()
    both, mask2 = moe.two_paths(x, axis=1), moe.two_paths(mask)
    y, terms, counters = apply("relu_moe", params, both, mask2, train=True)
    network, x64 = oracles.to_float64((params["ffn"], x))
    served, dense = moe.split_paths(y, axis=1)
    for actual, router in ((served, "h_infer"), (dense, "h_train")):
      gates = oracles.relu_gates(network[router], x64)
      expected = oracles.experts(network["experts"], x64, gates)
      np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)

    gates = oracles.relu_gates(network["h_infer"], x64)[:, VALID]
    share = (gates > 0).mean()
    factor = 1e-3 * math.exp(10.0 * (share - 0.5))
    total, weight = terms["moe_penalty"]
    np.testing.assert_allclose(total, factor * gates.sum(), rtol=1e-5)
    self.assertEqual(weight, VALID.sum())
    np.testing.assert_array_equal(counters["active"], (gates > 0).sum(1))

  def test_serving_knows_nothing_of_the_dense_router(self):
    params, (x, mask) = random_params("relu_moe", CONFIG), inputs()
    y, terms, _ = apply("relu_moe", params, x, mask)
    self.assertEqual(terms, {})
    router = params["ffn"]["h_train"]
    params["ffn"]["h_train"] = jax.tree.map(lambda p: p + 1.0, router)
    np.testing.assert_array_equal(apply("relu_moe", params, x, mask)[0], y)

  def test_each_path_trains_its_router_and_the_penalty_only_one(self):
    params, (x, mask) = random_params("relu_moe", CONFIG), inputs()
    both, mask = moe.two_paths(x, axis=1), moe.two_paths(mask)

    def parts(params):
      y, terms, _ = apply("relu_moe", params, both, mask, train=True)
      served, dense = moe.split_paths(y, axis=1)
      return served.sum(), dense.sum(), terms["moe_penalty"][0]

    trained = []
    for part in range(3):
      grads = jax.grad(lambda p, part=part: parts(p)[part])(params)["ffn"]
      trained.append(
        {
          name
          for name in ("h_train", "h_infer", "experts")
          if any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads[name]))
        }
      )
    self.assertEqual(trained[0], {"h_infer", "experts"})
    self.assertEqual(trained[1], {"h_train", "experts"})
    self.assertEqual(trained[2], {"h_infer"})

  def test_the_factor_grows_with_the_share_and_has_no_gradient(self):
    def factor(active):
      counters = {"active": jnp.full((2, 4), active), "examples": 10.0}
      return moe.penalty_factor(counters, MoEConfig())

    self.assertAlmostEqual(float(factor(5.0)), 1e-3, places=8)
    self.assertAlmostEqual(float(factor(10.0)), 1e-3 * math.exp(5), places=5)
    self.assertLess(float(factor(1.0)), 1e-4)
    self.assertEqual(float(jax.grad(factor)(5.0)), 0.0)

  def test_the_penalty_brings_the_active_share_to_the_budget(self):
    shares = {weight: self._train(weight) for weight in (0.0, 0.01)}
    self.assertGreater(shares[0.01][0], 0.7)
    self.assertGreater(shares[0.0][-1], 0.6)
    self.assertBetween(shares[0.01][-1], 0.1, 0.4)

  def _train(self, penalty_weight):
    """Active share of `h_infer` while the network learns a random map."""
    config = MoEConfig(
      num_experts=4, activation_budget=0.25, penalty_weight=penalty_weight
    )
    x = jax.random.normal(jax.random.key(0), (TOKENS, 64, DIM))
    target = jnp.tanh(x[..., ::-1] * 2.0)
    both, mask = moe.two_paths(x, axis=1), jnp.ones(128) > 0
    network = Network("relu_moe", config)
    params = network.init(jax.random.key(1), x, mask[:64], train=False)

    def loss(variables):
      y, terms, counters = network.apply(variables, both, mask, train=True)
      error = jnp.mean((y - moe.two_paths(target, axis=1)) ** 2)
      total, weight = terms["moe_penalty"]
      return error + total / weight, counters["active"].mean() / 64

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    shares = []
    for _ in range(150):
      (_, share), grads = step(params)
      shares.append(float(share))
      params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
    return shares


class SizeTest(parameterized.TestCase):
  @parameterized.parameters(("smoe", 2), ("relu_moe", 2))
  def test_idle_params_are_those_of_the_experts_not_active(self, ffn, active):
    params = random_params(ffn, MoEConfig())["ffn"]
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    expected = count(params["experts"]) * (4 - active) / 4
    expected += count(params.get("h_train", {}))
    actual = moe.idle_params(
      ffn, MoEConfig(), num_tokens=TOKENS, token_dim=DIM, mlp_ratio=2.0
    )
    self.assertEqual(actual, expected)

  def test_other_networks_have_no_idle_params(self):
    for ffn in ("dense", "gated"):
      shape = dict(num_tokens=2, token_dim=4, mlp_ratio=2.0)
      self.assertEqual(moe.idle_params(ffn, CONFIG, **shape), 0)

  def test_usage_tells_an_even_load_from_a_collapse(self):
    even = moe.expert_usage({"active": np.full((2, 4), 5), "examples": 10})
    self.assertAlmostEqual(even["active_share"], 0.5)
    self.assertAlmostEqual(even["perplexity"], 1.0)
    self.assertEqual(even["unused_experts"], 0.0)
    one = {"active": np.asarray([[10, 0, 0, 0]]), "examples": 10}
    collapsed = moe.expert_usage(one)
    self.assertAlmostEqual(collapsed["perplexity"], 0.25)
    self.assertEqual(collapsed["unused_experts"], 0.75)

  @parameterized.parameters(
    ({"top_k": 5}, r"moe.top_k \(5\) must be between 1 and moe.num_experts"),
    ({"top_k": 0}, "moe.top_k"),
    ({"gate_dim": 0}, "moe.gate_dim must be at least 1"),
    ({"activation_budget": 0.0}, r"moe.activation_budget must lie in \(0, 1\]"),
    ({"activation_budget": 1.5}, "moe.activation_budget"),
    ({"balance_weight": -1.0}, "moe.balance_weight must be at least 0"),
    ({"penalty_rate": math.nan}, "moe.penalty_rate"),
    ({"penalty_weight": math.inf}, "moe.penalty_weight"),
  )
  def test_a_mistake_is_one_line(self, values, message):
    with self.assertRaisesRegex(UserError, message) as caught:
      MoEConfig(**values)
    self.assertNotIn("\n", str(caught.exception))


if __name__ == "__main__":
  absltest.main()
