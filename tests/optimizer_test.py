"""Schedules, freezing, decay, clipping and averages of the optimisers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import config as config_lib
from recjax import method as method_lib
from recjax import optimizer, train_state
from recjax.errors import UserError
from tests import toy

PARAMS = {
  "body": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full((3,), 4.0)},
  "heads": {"click": {"kernel": jnp.full((3, 1), 5.0)}},
}
GRADS = jax.tree.map(lambda p: jnp.ones_like(p), PARAMS)
ALL = (".*",)


def updates_of(config, trainable=ALL, grads=None, num_updates=1, num_steps=10):
  """The updates of the last of `num_updates` equal gradients."""
  transform = optimizer.make_dense_optimizer(
    config, PARAMS, trainable, num_steps
  )
  state = transform.init(PARAMS)
  for _ in range(num_updates):
    updates, state = transform.update(grads or GRADS, state, PARAMS)
  return updates


class ScheduleTest(parameterized.TestCase):
  def test_warm_up_rises_in_a_line_from_a_thousandth(self):
    config = optimizer.Config(warmup_steps=50_000)
    factor = optimizer.factor(config, 10**6)
    for step, expected in (
      (0, 0.001),
      (25_000, 0.5005),
      (49_999, 1 - 0.999 / 50_000),
      (50_000, 1.0),
      (900_000, 1.0),
    ):
      self.assertAlmostEqual(float(factor(jnp.int32(step))), expected, places=6)

  def test_cosine_falls_to_zero_at_the_end_of_the_stage(self):
    factor = optimizer.factor(optimizer.Config(schedule="cosine"), 200)
    steps = np.arange(0, 201, 20)
    actual = [float(factor(jnp.int32(step))) for step in steps]
    expected = 0.5 * (1 + np.cos(np.pi * steps / 200))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    self.assertAlmostEqual(float(factor(jnp.int32(500))), 0.0)

  def test_warm_up_multiplies_the_cosine(self):
    config = optimizer.Config(
      schedule="cosine", warmup_steps=4, warmup_from=0.2
    )
    expected = 0.5 * (1 + np.cos(np.pi * 0.1)) * (0.2 + 0.8 * 0.5)
    actual = optimizer.factor(config, 20)(jnp.int32(2))
    self.assertAlmostEqual(float(actual), expected, places=6)

  def test_dense_updates_follow_the_factor(self):
    config = optimizer.Config(
      name="sgd", learning_rate=0.1, clip_norm=None, warmup_steps=4
    )
    factor = optimizer.factor(config, 10)
    for num in (1, 2, 4, 6):
      update = updates_of(config, num_updates=num)["body"]["bias"]
      np.testing.assert_allclose(
        update, -0.1 * factor(jnp.int32(num - 1)), rtol=1e-6
      )


class DenseOptimizerTest(parameterized.TestCase):
  @parameterized.product(name=optimizer.DENSE, clip_norm=(None, 0.5))
  def test_frozen_paths_get_no_update_at_all(self, name, clip_norm):
    config = optimizer.Config(name=name, weight_decay=0.3, clip_norm=clip_norm)
    updates = updates_of(config, trainable=("heads/.*",), num_updates=2)
    for leaf in jax.tree.leaves(updates["body"]):
      np.testing.assert_array_equal(leaf, 0)
    self.assertTrue((updates["heads"]["click"]["kernel"] != 0).all())
    config = optimizer.Config(
      name=name, weight_decay=0.3, clip_norm=clip_norm,
      scale_rules=("body/.*=0",),
    )  # fmt: skip
    chex.assert_trees_all_equal(updates, updates_of(config, num_updates=2))

  def test_clipping_ignores_what_is_frozen(self):
    config = optimizer.Config(name="sgd", learning_rate=1.0, clip_norm=1.0)
    grads = jax.tree.map(lambda g: g, GRADS)
    grads["body"]["kernel"] = jnp.full((2, 3), 1e6)
    trainable = ("body/bias", "heads/.*")
    updates = updates_of(config, trainable, grads)
    norm = np.sqrt(3 + 3)
    np.testing.assert_allclose(updates["body"]["bias"], -1 / norm, rtol=1e-6)
    np.testing.assert_array_equal(updates["body"]["kernel"], 0)
    small = jax.tree.map(lambda g: 0.1 * g, GRADS)
    np.testing.assert_allclose(
      updates_of(config, trainable, small)["body"]["bias"], -0.1, rtol=1e-6
    )

  @parameterized.parameters(*optimizer.DENSE)
  def test_decay_pulls_matrices_only(self, name):
    config = optimizer.Config(
      name=name, learning_rate=0.1, weight_decay=0.5, clip_norm=None
    )
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates = updates_of(config, grads=zero)
    np.testing.assert_array_equal(updates["body"]["bias"], 0)
    self.assertTrue((updates["body"]["kernel"] < 0).all())
    if name in ("adamw", "sgd"):
      np.testing.assert_allclose(
        updates["body"]["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6
      )

  def test_the_first_matching_rule_scales_the_rate(self):
    config = optimizer.Config(
      name="sgd", learning_rate=1.0, clip_norm=None,
      scale_rules=("body/bias=0.1", "body/.*=3", "emb=2"),
    )  # fmt: skip
    updates = updates_of(config)
    np.testing.assert_allclose(updates["body"]["bias"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["body"]["kernel"], -3.0)
    np.testing.assert_allclose(updates["heads"]["click"]["kernel"], -1.0)
    scale = functools.partial(optimizer.learning_rate_scale, config)
    self.assertEqual(scale("emb", ALL), 2.0)
    self.assertEqual(scale("embedding", ALL), 1.0)
    self.assertEqual(scale("emb", ("body/.*",)), 0.0)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"name": "adam"}, "optimizer.name 'adam'.*'adamw'"),
    ({"schedule": "cos"}, "optimizer.schedule 'cos'"),
    ({"ema_decay": 1.0}, r"optimizer.ema_decay.*\[0, 1\).*1.0"),
    ({"learning_rate": 0.0}, "optimizer.learning_rate must be above 0"),
    ({"learning_rate": float("nan")}, "optimizer.learning_rate must"),
    ({"sparse": {"learning_rate": -1.0}}, "optimizer.sparse.learning_rate"),
    ({"sparse": {"name": "adagard"}}, "'adagard'.*'adagrad'"),
    ({"sparse": {"rate": 1.0}}, "optimizer.sparse.rate"),
    ({"scale_rules": ["heads"]}, "scale_rules: 'heads' is not of the form"),
    ({"scale_rules": ["(=1"]}, r"scale_rules: '\(=1'"),
    ({"scale_rules": ["a=x"]}, "scale_rules: 'a=x'"),
    ({"scale_rules": ["a=-1"]}, "scale_rules: 'a=-1'"),
    ({"scale_rules": ["a=nan"]}, "scale_rules: 'a=nan'"),
    ({"warmup": 3}, "optimizer.warmup; did you mean 'warmup_"),
  )
  def test_a_mistake_is_a_user_error(self, values, message):
    with self.assertRaisesRegex(UserError, message):
      config_lib.build(optimizer.Config, values, "optimizer")


@functools.cache
def make_case():
  """A tiny method with an average of its parameters, and its step."""
  config = {"tasks": ["click"], "embed_dim": 2, "mlp_dims": [3]}
  config = train_state.StepConfig(
    method_lib.load("dlrm_mlp", config, toy.SCHEMA),
    method_lib.Stage(),
    optimizer.Config(
      learning_rate=0.01,
      warmup_steps=3,
      ema_decay=0.3,
      sparse=optimizer.SparseConfig(name="sgd", learning_rate=0.5),
    ),
    num_steps=10,
  )
  step = jax.jit(lambda s, b: train_state.train_step(s, b, config))
  init = jax.jit(lambda rng: train_state.init_state(rng, config))
  return config, init(jax.random.key(0)), step


class StepTest(absltest.TestCase):
  def test_the_average_is_its_definition(self):
    _, state, step = make_case()
    average = jax.tree.map(np.float64, state.params)
    chex.assert_trees_all_equal(state.eval_params, state.params)
    for i in range(5):
      state, _ = step(state, toy.make_batch(i))
      decay = min(0.3, (1 + i) / (10 + i))
      average = jax.tree.map(
        lambda a, p, d=decay: d * a + (1 - d) * np.float64(p),
        average,
        state.params,
      )
    chex.assert_trees_all_close(
      jax.tree.map(np.float64, state.eval_params), average, rtol=1e-5
    )

  def test_a_batch_that_is_not_finite_changes_only_the_counts(self):
    _, state, step = make_case()
    state, _ = step(state, toy.make_batch())
    batch = toy.make_batch(1)
    after, scalars = step(state, batch.replace(dense=batch.dense * jnp.nan))
    self.assertEqual(float(scalars["skipped"][0]), 1.0)
    self.assertEqual((int(after.step), int(after.num_skipped)), (2, 1))
    chex.assert_trees_all_equal(
      after.replace(step=state.step, num_skipped=state.num_skipped), state
    )

  def test_rows_move_by_the_warm_up(self):
    config, state, step = make_case()
    batch = toy.make_batch()
    grads = jax.jit(
      lambda s, b: train_state.loss_and_gradients(s, b, config)[1]
    )
    for i in range(2):
      ids, rows, _ = grads(state, batch)["row_grads"]["embedding"]
      expected = np.float64(state.tables["embedding"])
      valid = np.asarray(ids) < len(expected)
      rate = 0.5 * (0.001 + 0.999 * i / 3)
      ids, rows = np.asarray(ids)[valid], np.asarray(rows)[valid]
      np.subtract.at(expected, ids, rate * rows)
      state, _ = step(state, batch)
      np.testing.assert_allclose(
        state.tables["embedding"], expected, rtol=1e-5, atol=1e-7
      )


if __name__ == "__main__":
  absltest.main()
