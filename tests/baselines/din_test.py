"""DIN's parts and whole forward pass, recomputed in float64 NumPy."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax.baselines import din
from recjax.errors import UserError
from recjax.schema import Feature, Schema
from tests import oracles, toy

TINY = {
  "tasks": ["click", "play_time"],
  "embed_dim": 4,
  "attention_dims": [6],
  "mlp_dims": [8, 5],
}


def load(schema=toy.SCHEMA, **overrides):
  return method_lib.load("din", TINY | overrides, schema)


def forward(method, params, tables, batch):
  """(predictions, aux)."""

  def run(params, tables, batch):
    rows = method.read(tables, batch)
    return method.apply(params, tables, rows, batch, train=False)[:2]

  return jax.jit(run)(params, tables, batch)


def oracle(method, params, tables, batch):
  """Task -> logit by the equations; `history` asks about `item_id`."""
  config = method.config
  params, tables = oracles.to_float64((params, tables))
  rows = oracles.feature_rows(
    method.tables["embedding"], tables["embedding"], batch
  )
  # What stands for the history, as a list of one event: its mean is itself.
  interest = np.zeros_like(rows["history"])
  for b in range(batch.size):
    interest[b] = attend(
      config,
      params["attend_history"],
      rows["history"][b],
      np.asarray(batch.id_mask["history"][b]),
      rows["item_id"][b],
    )
  everywhere = jnp.ones_like(batch.id_mask["history"])
  x = oracles.concat_features(
    toy.SCHEMA,
    batch.replace(id_mask=batch.id_mask | {"history": everywhere}),
    rows | {"history": interest},
    params.get("inputs"),
  )
  for i in range(len(config.mlp_dims)):
    s = _dense(params[f"mlp_{i}"], x)
    alpha = params[f"rectify_{i}"]["alpha"]
    x = np.stack([rectify(config.activation, row, alpha) for row in s])
  return {t: _dense(params["heads"][t], x)[:, 0] for t in config.tasks}


def attend(config, params, events, mask, target):
  """Eq. 3 for one example, one event after the other."""
  scores = []
  for event in events[mask]:
    x = np.concatenate([event, target, event * target, event - target])
    for i in range(len(config.attention_dims)):
      x = _dense(params if i == 0 else params[f"dense_{i}"], x)
      x = rectify(config.activation, x, params[f"rectify_{i}"]["alpha"])
    scores.append(_dense(params["score"], x)[0])
  if not scores:
    return np.zeros_like(target)
  weights = np.asarray(scores)
  if config.normalization == "softmax":
    weights = oracles.softmax(weights)
  return sum(w * e for w, e in zip(weights, events[mask], strict=True))


def rectify(kind, s, alpha):
  """Eq. 8 and 9 for a vector, with the statistics of its units."""
  p = (s > 0).astype(float)
  if kind == "dice":
    p = oracles.sigmoid((s - s.mean()) / np.sqrt(s.var() + 1e-8))
  return p * s + (1 - p) * alpha * s


def _dense(params, x):
  return x @ params["kernel"] + params["bias"]


class DinTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("dice", {}),
    ("prelu", {"activation": "prelu"}),
    ("softmax", {"normalization": "softmax"}),
    ("deep_unit", {"attention_dims": [6, 3], "activation": "prelu"}),
    ("numbers", {"numeric_dim": 2, "mlp_dims": [6]}),
    ("linear", {"mlp_dims": []}),
  )
  def test_equals_the_equations(self, overrides):
    method, batch = load(**overrides), toy.make_batch(size=6)
    # One of the histories is empty.
    mask = batch.id_mask["history"].at[2].set(False)
    batch = _replace(batch, batch.ids["history"], mask)
    params, tables = oracles.random_variables(method)
    actual = forward(method, params, tables, batch)[0]
    expected = oracle(method, params, tables, batch)
    self.assertCountEqual(actual, expected)
    for task, logits in expected.items():
      np.testing.assert_allclose(actual[task], logits, rtol=1e-3, atol=1e-3)

  @parameterized.parameters("none", "softmax")
  def test_the_order_of_events_changes_nothing(self, normalization):
    method, batch = load(normalization=normalization), toy.make_batch()
    params, tables = oracles.random_variables(method)
    order = np.random.default_rng(1).permutation(5)
    other = _replace(
      batch,
      batch.ids["history"][:, order],
      batch.id_mask["history"][:, order],
    )
    first, second = (
      forward(method, params, tables, b)[0] for b in (batch, other)
    )
    chex.assert_trees_all_close(first, second, rtol=1e-4, atol=1e-4)

  @parameterized.parameters("none", "softmax")
  def test_what_masked_events_hold_changes_nothing(self, normalization):
    method, batch = load(normalization=normalization), toy.make_batch()
    params, tables = oracles.random_variables(method)
    ids, mask = batch.ids["history"], batch.id_mask["history"]
    # Another event behind the mask, and room for seven events more.
    other = _replace(batch, jnp.where(mask, ids, 17), mask)
    longer = _replace(
      batch,
      jnp.pad(ids, ((0, 0), (0, 7)), constant_values=3),
      jnp.pad(mask, ((0, 0), (0, 7))),
    )
    expected = forward(method, params, tables, batch)[0]
    for changed in (other, longer):
      actual = forward(method, params, tables, changed)[0]
      chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)

  @parameterized.parameters("none", "softmax")
  def test_an_empty_history_is_finite_and_weighs_nothing(self, normalization):
    method, batch = load(normalization=normalization), toy.make_batch(size=4)
    nothing = jnp.zeros_like(batch.id_mask["history"])
    batch = _replace(batch, batch.ids["history"], nothing)
    params, tables = oracles.random_variables(method)
    rows = method.read(tables, batch)

    def total(params, rows):
      predictions, aux, _ = method.apply(
        params, tables, rows, batch, train=False
      )
      return sum(v.sum() for v in predictions.values()), aux["weights"]

    (value, weights), grads = jax.jit(
      jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    )(params, rows)
    chex.assert_tree_all_finite((value, grads))
    self.assertFalse(weights["history"].any())

  def test_the_weight_of_an_event_depends_on_the_target(self):
    method, batch = load(), toy.make_batch()
    params, tables = oracles.random_variables(method)
    full = jnp.ones_like(batch.id_mask["history"])
    batch = _replace(batch, batch.ids["history"], full)
    items = (batch.ids["item_id"] + 1) % 40
    other = batch.replace(ids=batch.ids | {"item_id": items})
    users = (batch.ids["user_id"] + 1) % 50
    stranger = batch.replace(ids=batch.ids | {"user_id": users})
    first, second, third = (
      forward(method, params, tables, b)[1]["weights"]["history"]
      for b in (batch, other, stranger)
    )
    self.assertGreater(float(jnp.abs(first - second).min()), 0)
    np.testing.assert_array_equal(first, third)

  def test_unnormalised_weights_keep_the_intensity(self):
    """An event seen twice counts twice; under softmax it counts once."""
    mask = jnp.ones((1, 2), bool)
    scores, events = jnp.full((1, 2), 0.7), jnp.ones((1, 2, 3))
    for normalization, expected in (("none", 1.4), ("softmax", 1.0)):
      weights = din.event_weights(scores, mask, normalization)
      pooled = din.weighted_sum(weights, events)
      np.testing.assert_allclose(pooled, np.full((1, 3), expected), rtol=1e-6)

  def test_prelu_and_dice_of_extreme_inputs(self):
    alpha = {"params": {"alpha": jnp.asarray([0.5, 0.5])}}
    s = jnp.asarray([[-4.0, 4.0]])
    prelu = din.Rectifier("prelu").apply(alpha, s)
    np.testing.assert_allclose(prelu, [[-2.0, 4.0]], rtol=1e-6)
    # Normalised these are -1 and 1, so the sigmoid gives both channels weight.
    p = 1 / (1 + np.exp(1))
    dice = din.Rectifier("dice").apply(alpha, s)
    expected = [[-4 * p - 2 * (1 - p), 4 * (1 - p) + 2 * p]]
    np.testing.assert_allclose(dice, expected, rtol=1e-5)
    chex.assert_tree_all_finite(
      jax.grad(lambda x: din.Rectifier("dice").apply(alpha, x).sum())(0 * s)
    )

  def test_one_as_slope_makes_a_rectifier_the_identity(self):
    alpha = {"params": {"alpha": jnp.ones(5)}}
    s = jax.random.normal(jax.random.key(0), (3, 5))
    for kind in ("prelu", "dice"):
      actual = din.Rectifier(kind).apply(alpha, s)
      np.testing.assert_allclose(actual, s, rtol=1e-5, atol=1e-6)

  def test_targets_are_found_by_vocabulary(self):
    schema = Schema(
      features=(
        Feature("seen", "sequence", vocabulary="item", max_len=3),
        Feature("last_item", "sparse", vocabulary="item"),
        Feature("item", "sparse"),
        Feature("words", "sparse", multi=True, max_len=2),
        Feature("said", "sequence", vocabulary="words", max_len=3),
        Feature("friend", "sparse", vocabulary="people"),
        Feature("other", "sparse", vocabulary="people"),
        Feature("people", "sparse", multi=True, max_len=2),
        Feature("met", "sequence", vocabulary="people", max_len=3),
        Feature("alone", "sequence", max_len=3),
      ),
      labels=(),
    )
    # Its owner first, else the first that shares it; sets are no target.
    expected = {"seen": "item", "met": "friend"}
    self.assertEqual(din.targets(schema), expected)

  def test_a_sequence_without_a_target_is_pooled_by_its_mean(self):
    features = tuple(
      dataclasses.replace(f, vocabulary="tags") if f.name == "history" else f
      for f in toy.SCHEMA.features
    )
    method = load(dataclasses.replace(toy.SCHEMA, features=features))
    batch = toy.make_batch(size=4)
    batch = _replace(batch, batch.ids["history"] % 7, batch.id_mask["history"])
    params, tables = oracles.random_variables(method)
    self.assertNotIn("attend_history", params)
    predictions, aux = forward(method, params, tables, batch)
    self.assertEqual(aux["weights"], {})
    params, tables = oracles.to_float64((params, tables))
    rows = oracles.feature_rows(
      method.tables["embedding"], tables["embedding"], batch
    )
    x = oracles.concat_features(method.schema, batch, rows)
    for i in range(2):
      alpha = params[f"rectify_{i}"]["alpha"]
      s = _dense(params[f"mlp_{i}"], x)
      x = np.stack([rectify("dice", row, alpha) for row in s])
    expected = _dense(params["heads"]["click"], x)[:, 0]
    np.testing.assert_allclose(
      predictions["click"], expected, rtol=1e-3, atol=1e-3
    )

  def test_every_sequence_has_its_own_unit(self):
    second = Feature("likes", "sequence", vocabulary="item_id", max_len=2)
    schema = dataclasses.replace(
      toy.SCHEMA, features=(*toy.SCHEMA.features, second)
    )
    params, _ = jax.eval_shape(load(schema).init, jax.random.key(0))
    for name in ("attend_history", "attend_likes"):
      self.assertEqual(params[name]["kernel"].shape, (4 * 4, 6))

  @parameterized.parameters(
    ({"activation": "relu"}, "activation 'relu'"),
    ({"normalization": "sum"}, "normalization 'sum'"),
    ({"attention_dims": []}, "attention_dims must name at least one"),
    ({"attention_dims": [0]}, "attention_dims must be at least 1"),
  )
  def test_mistakes_are_user_errors(self, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      load(**overrides)


def _replace(batch, ids, mask):
  return batch.replace(
    ids=batch.ids | {"history": ids},
    id_mask=batch.id_mask | {"history": mask},
  )


if __name__ == "__main__":
  absltest.main()
