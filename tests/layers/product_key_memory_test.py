"""The memory against brute force over all slots, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax.errors import UserError
from recjax.layers import product_key_memory as pkm
from recjax.sparse import in_model
from tests import oracles

TOKENS, BATCH, DIM = 3, 5, 8
BASE = pkm.MemoryConfig(num_keys=6, key_dim=4, top_k=3)
CHOICES = {
  "default": {},
  "two_heads": {"num_heads": 2},
  "per_sample": {"query_scope": "per_sample"},
  "value_per_token": {"value_scope": "per_token"},
  "one_search_of_values_per_token": {
    "query_scope": "per_sample",
    "value_scope": "per_token",
    "num_heads": 2,
  },
  "shared_query": {"shared_query": True},
  "no_layer_norm": {"use_layer_norm": False},
  "no_theta": {"use_over_parameterization": False},
  "left_theta": {"theta_side": "left", "num_heads": 2},
  "neither": {"use_layer_norm": False, "use_over_parameterization": False},
  "all_keys": {"top_k": 6},
}
NAMED = [
  {"testcase_name": f"_{name}", "choice": choice}
  for name, choice in CHOICES.items()
]


def make(choice=None, seed=0):
  """Config, table, random parameters, values and inputs of one memory."""
  config = dataclasses.replace(BASE, **(choice or {}))
  rng = np.random.default_rng(seed)
  table = pkm.value_table(config, num_tokens=TOKENS, value_dim=DIM)
  values = jnp.asarray(rng.normal(size=table.shape), jnp.float32)
  x = jnp.asarray(rng.normal(size=(TOKENS, BATCH, DIM)), jnp.float32)
  shapes = jax.eval_shape(lambda: init(config, values, x))
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(
      float(path[-1].key.endswith("gain")) + 0.5 * rng.normal(size=leaf.shape),
      jnp.float32,
    ),
    shapes,
  )
  return config, params, values, x


def init(config, values, x):
  mutated = pkm.ProductKeyMemory(config).apply(
    {in_model.TABLES: {"values": values}},
    x,
    jnp.ones(x.shape[1], bool),
    rngs={"params": jax.random.key(0)},
    mutable=["params", in_model.READS],
  )[1]
  return mutated["params"]


def apply(config, params, values, x, mask=None, tap=None):
  """(v_o, searches, what the table was read with)."""
  variables = {"params": params, in_model.TABLES: {"values": values}}
  if tap is not None:
    variables[in_model.TAPS] = {"values": tap}
  (output, searches), mutated = pkm.ProductKeyMemory(config).apply(
    variables,
    x,
    jnp.ones(x.shape[1], bool) if mask is None else mask,
    mutable=[in_model.READS],
  )
  return output, searches, mutated[in_model.READS]["values"]


def keys_of(params, config):
  """Effective keys of both axes as the layer computes them."""
  return {
    axis: pkm.effective_keys(
      params[f"{axis}_keys"],
      params.get(f"{axis}_theta"),
      params.get(f"{axis}_key_gain"),
      theta_side=config.theta_side,
    )
    for axis in ("row", "col")
  }


class ProductKeyMemoryTest(parameterized.TestCase):
  @parameterized.named_parameters(NAMED)
  def test_equals_brute_force(self, choice):
    config, params, values, x = make(choice)
    output, searches, _ = jax.jit(apply, static_argnums=0)(
      config, params, values, x
    )
    expected, weights = oracles.memory(
      *oracles.to_float64((params, values, x)), config
    )
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    actual = np.zeros(weights.shape)
    np.put_along_axis(
      actual,
      np.asarray(searches["slots"]),
      np.asarray(searches["weights"], np.float64),
      axis=-1,
    )
    np.testing.assert_allclose(actual, weights, rtol=1e-4, atol=1e-6)

  @parameterized.named_parameters(NAMED)
  def test_parameters_are_those_of_the_choice(self, choice):
    config, params, _, _ = make(choice)
    heads, keys, dim = config.num_heads, config.num_keys, config.key_dim
    size = dim if config.theta_side == "right" else keys
    expected = {f"{a}_keys": (heads, keys, dim) for a in ("row", "col")}
    for axis in ("row", "col"):
      if config.use_over_parameterization:
        expected[f"{axis}_theta"] = (heads, size, size)
      if config.use_layer_norm:
        expected |= {f"{axis}_key_gain": (dim,), f"{axis}_query_gain": (dim,)}
    query = params.pop("query")
    self.assertEqual({n: p.shape for n, p in params.items()}, expected)
    lead = {"per_token": (TOKENS,), "per_sample": (1,)}[config.query_scope]
    lead = () if config.shared_query else lead
    self.assertEqual(query["kernel"].shape, (*lead, DIM, 2 * heads * dim))

  @parameterized.named_parameters(NAMED)
  def test_folding_changes_nothing(self, choice):
    config, params, values, x = make(choice)
    folded = pkm.fold_keys(params, config)
    serving = dataclasses.replace(config, folded=True)
    self.assertEmpty([n for n in folded if n.endswith(("_theta", "key_gain"))])
    shapes = jax.eval_shape(lambda: init(serving, values, x))
    self.assertEqual(jax.tree.structure(shapes), jax.tree.structure(folded))
    run = jax.jit(apply, static_argnums=0)
    expected = run(config, params, values, x)[0]
    actual = run(serving, folded, values, x)[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

  @parameterized.parameters(1, 2)
  def test_equal_values_come_out_as_they_are(self, num_heads):
    config, params, values, x = make({"num_heads": num_heads})
    output = apply(config, params, jnp.full_like(values, 0.7), x)[0]
    np.testing.assert_allclose(output, num_heads * 0.7, rtol=1e-5)

  @parameterized.parameters("shared", "per_token")
  def test_padding_reads_nothing(self, value_scope):
    config, params, values, x = make({"value_scope": value_scope})
    self.assertGreater(len(values) % (TOKENS * config.num_slots), 0)
    mask = jnp.arange(BATCH) < 3
    output, _, reads = apply(config, params, values, x, mask)
    self.assertTrue((output[:, 3:] == 0).all())
    self.assertTrue((output[:, :3] != 0).all())
    self.assertTrue((reads["ids"][:, 3:] >= len(values)).all())

  def test_each_token_has_its_own_values(self):
    config, params, values, x = make({"value_scope": "per_token"})
    table = pkm.value_table(config, num_tokens=TOKENS, value_dim=DIM)
    self.assertEqual(table.num_rows, TOKENS * config.num_slots)
    ids = np.asarray(apply(config, params, values, x)[2]["ids"])
    first = config.num_slots * np.arange(TOKENS)[:, None, None]
    self.assertTrue(((first <= ids) & (ids < first + config.num_slots)).all())

  def test_initial_scores_have_unit_variance(self):
    config = pkm.MemoryConfig(num_keys=32, key_dim=32, top_k=4)
    x = jax.random.normal(jax.random.key(1), (2, 64, DIM))
    values = jnp.zeros((config.num_slots, DIM))

    params = jax.jit(init, static_argnums=0)(config, values, x)
    params, x = oracles.to_float64((params, x))
    scores = [oracles.sub_scores(params, q, 0, 0, config) for q in x[0]]
    self.assertBetween(float(np.std(scores)), 0.8, 1.2)

  @parameterized.parameters(True, False)
  def test_only_theta_moves_keys_that_were_not_selected(self, use_theta):
    config, params, values, x = make({"use_over_parameterization": use_theta})
    x = x[:1, :1]
    params["query"] = jax.tree.map(lambda p: p[:1], params["query"])

    def loss(params):
      output, searches, _ = apply(config, params, values, x)
      return jnp.sum(output**2), searches["slots"]

    grads, slots = jax.jit(jax.grad(loss, has_aux=True))(params)
    rows = np.asarray(slots).ravel() // config.num_keys
    self.assertLess(len(set(rows)), config.num_keys)
    after = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    # The gains are shared by all keys; what is asked is whether Theta moves.
    after["row_key_gain"] = params["row_key_gain"]
    old, new = (keys_of(p, config)["row"][0] for p in (params, after))
    moved = np.any(np.abs(new - old) > 1e-7, axis=-1)
    self.assertTrue(moved[rows].all())
    others = np.setdiff1d(np.arange(config.num_keys), rows)
    np.testing.assert_array_equal(moved[others], use_theta)

  @parameterized.parameters(True, False)
  def test_frozen_base_keys_have_no_gradient(self, freeze):
    config, params, values, x = make({"freeze_base_keys": freeze})
    loss = lambda p: jnp.sum(apply(config, p, values, x)[0] ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    for axis in ("row", "col"):
      self.assertEqual(bool((grads[f"{axis}_keys"] == 0).all()), freeze)
      self.assertTrue(bool((grads[f"{axis}_theta"] != 0).any()))
      self.assertTrue(bool((grads[f"{axis}_query_gain"] != 0).any()))

  def test_the_gradient_at_the_tap_is_that_of_the_output(self):
    config, params, values, x = make({"query_scope": "per_sample"})
    loss = lambda tap: jnp.sum(  # noqa: E731
      apply(config, params, values, x, tap=tap)[0] ** 2
    )
    output = apply(config, params, values, x)[0]
    grad = jax.grad(loss)(jnp.zeros((1, BATCH, DIM)))
    np.testing.assert_allclose(grad[0], (2 * output).sum(0), rtol=1e-5)

  def test_bfloat16_values_are_near_float32(self):
    config, params, values, x = make()
    half = dataclasses.replace(config, value_dtype="bfloat16")
    table = pkm.value_table(half, num_tokens=TOKENS, value_dim=DIM)
    self.assertEqual(table.dtype, "bfloat16")
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    actual = apply(half, params, bits, x)[0]
    expected = apply(config, params, values, x)[0]
    np.testing.assert_allclose(actual, expected, atol=0.02)

  @parameterized.parameters(
    {"query_scope": "per_word"},
    {"value_scope": "none"},
    {"theta_side": "up"},
    {"value_dtype": "float16"},
    {"top_k": 0},
    {"top_k": 65},
    {"num_heads": 0},
    {"key_dim": 0},
  )
  def test_a_wrong_choice_is_a_user_error(self, **choice):
    (name,) = choice
    with self.assertRaisesRegex(UserError, f"memory.{name}"):
      pkm.MemoryConfig(**choice)


if __name__ == "__main__":
  absltest.main()
