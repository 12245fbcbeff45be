import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from absl.testing import absltest, parameterized

from recjax import losses
from recjax import method as method_lib
from recjax.errors import UserError
from recjax.layers import task_balance
from tests import toy

TASKS = ("click", "like", "play_time")


def random_grads(seed=0, shape=(3, 5, 4)):
  rng = np.random.default_rng(seed)
  scale = np.array([1.0, 10.0, 0.1]).reshape(3, *[1] * (len(shape) - 1))
  return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)


class TaskBalanceTest(parameterized.TestCase):
  def test_min_norm_point_is_that_of_a_quadratic_program(self):
    for seed in range(5):
      g = np.asarray(random_grads(seed)).reshape(3, -1)
      unit = g / np.linalg.norm(g, axis=1, keepdims=True)
      products = unit @ unit.T
      found = scipy.optimize.minimize(
        lambda w, m=products: w @ m @ w,
        np.full(3, 1 / 3),
        jac=lambda w, m=products: 2 * m @ w,
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14},
      )
      weights = jax.jit(task_balance.min_norm_weights)(jnp.asarray(products))
      self.assertAlmostEqual(float(weights.sum()), 1.0, places=5)
      value = np.asarray(weights) @ products @ np.asarray(weights)
      self.assertAlmostEqual(float(value), found.fun, delta=2e-3)

  def test_min_norm_direction_hurts_no_task_and_ignores_scale(self):
    g = random_grads()
    _, back = jax.vjp(
      lambda x: task_balance.min_norm_copies(x, 3), jnp.zeros((5, 4))
    )
    (combined,) = back(g)
    along = jnp.einsum("bd,tbd->t", combined, g)
    self.assertTrue(bool((along > 0).all()))
    equal = jnp.stack([g[0], g[0], g[0]])
    (same,) = back(equal)
    np.testing.assert_allclose(same, equal.sum(0), rtol=1e-4)
    (silent,) = back(g.at[1].set(0.0))
    self.assertTrue(bool(jnp.isfinite(silent).all()))
    # A louder task changes the length only.
    (louder,) = back(g * jnp.array([1.0, 7.0, 1.0]).reshape(3, 1, 1))
    cosine = jnp.vdot(louder, combined) / jnp.linalg.norm(louder)
    self.assertAlmostEqual(
      float(cosine / jnp.linalg.norm(combined)), 1.0, places=4
    )

  def test_gradnorm_equals_its_loss(self):
    """The weights' gradient is that of sum |w G - mean(w G) r ** alpha|."""
    g, alpha = random_grads(), 1.5
    rates = jnp.array([0.5, 1.0, 1.5])
    weights = jnp.array([0.7, 1.1, 1.2])

    def loss(shared, weights):
      copies, probe = task_balance.weighted_copies(shared, weights, alpha)
      return jnp.sum(copies * g) + jnp.vdot(probe, rates)

    actual = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.zeros((5, 4)), weights)
    norms = np.array([np.linalg.norm(np.asarray(v, np.float64)) for v in g])
    target = (np.asarray(weights) * norms).mean() * np.asarray(rates) ** alpha
    np.testing.assert_allclose(
      actual[0], np.einsum("t,tbd->bd", weights, g), rtol=1e-5, atol=1e-5
    )
    expected = [
      _slope(lambda w, t=t: abs(w * norms[t] - target[t]), float(weights[t]))
      for t in range(3)
    ]
    np.testing.assert_allclose(actual[1], expected, rtol=1e-4)
    zero, probe = task_balance.weighted_copies(jnp.zeros((5, 4)), weights, 1.0)
    self.assertFalse(bool(jnp.any(probe)) or bool(jnp.any(zero)))

  def test_uncertainty_equals_its_formula(self):
    config = method_lib.load(
      "shared_bottom",
      {
        "tasks": TASKS,
        "balance": {"kind": "uncertainty", "task_weights": [1.0, 2.0, 3.0]},
      },
      toy.SCHEMA,
    ).config
    batch = toy.make_batch(num_padding=3)
    rng = np.random.default_rng(0)
    predictions = {t: jnp.asarray(rng.normal(size=16)) for t in TASKS}
    s = jnp.array([0.3, -0.4, 0.8])
    terms = losses.task_losses(predictions, batch)
    added = task_balance.balance_terms(
      terms, {"log_variance": s}, batch, config
    )
    total = sum(v / w for v, w in (terms | added).values())
    expected = float(s.sum()) / 2
    for task, log_variance, weight, half in zip(
      TASKS, s, (1.0, 2.0, 3.0), (1.0, 1.0, 0.5), strict=True
    ):
      value, count = terms[task]
      expected += weight * half * np.exp(-log_variance) * value / count
    self.assertAlmostEqual(float(total), float(expected), places=4)

  def test_rates_are_measured_against_knowing_nothing(self):
    config = method_lib.load(
      "shared_bottom",
      {"tasks": TASKS, "balance": {"kind": "gradnorm"}},
      toy.SCHEMA,
    ).config
    batch = toy.make_batch(num_padding=3)
    nothing = {task: jnp.zeros(16) for task in TASKS}
    terms = losses.task_losses(nothing, batch)

    def added(probe):
      more = task_balance.balance_terms(terms, {"rates": probe}, batch, config)
      return more["balance"][0]

    np.testing.assert_allclose(
      jax.grad(added)(jnp.zeros(3)), np.ones(3), rtol=1e-5
    )

  @parameterized.parameters("none", "uncertainty", "gradnorm", "multibalance")
  def test_heads_train_on_their_own_loss(self, kind):
    """The balance moves the trunk's gradient and leaves each head's alone."""
    words = {"tasks": TASKS, "embed_dim": 4, "num_tokens": 2, "token_dim": 8}
    words |= {"num_layers": 1, "balance": {"kind": kind}}
    method = method_lib.load("shared_bottom", words, toy.SCHEMA)
    batch = toy.make_batch()
    params, tables = jax.jit(method.init)(jax.random.key(0))

    @jax.jit
    def grads(params, tables):
      def loss(params):
        rows = method.read(tables, batch)
        predictions, aux, _ = method.apply(
          params, tables, rows, batch, train=False
        )
        terms = method.module.loss_fn(predictions, aux, batch, method.config)
        return sum(v / jnp.maximum(w, 1.0) for v, w in terms.values())

      return jax.grad(loss)(params)

    own = grads(params, tables)
    heads = np.asarray(own["heads"]["logit"]["bias"]).ravel()
    # At equal logs of variance, a real label weighs half.
    rows = method.read(tables, batch)
    predictions = method.apply(params, tables, rows, batch, train=False)[0]
    for t, task in enumerate(TASKS):

      def loss(shift, task=task):
        moved = {task: predictions[task] + shift}
        value, weight = losses.task_losses(moved, batch)[task]
        return value / weight

      expected = jax.grad(loss)(0.0)
      if kind == "uncertainty" and task == "play_time":
        expected = expected / 2
      np.testing.assert_allclose(heads[t], expected, rtol=1e-4, atol=1e-6)

  @parameterized.parameters(
    ({"kind": "magic"}, "balance.kind must be one of none, "),
    ({"task_weights": (1.0,)}, "one number a task .3."),
    ({"task_weights": (1.0, 0.0, 1.0)}, "above 0 and finite"),
  )
  def test_mistakes(self, words, message):
    with self.assertRaisesRegex(UserError, message):
      task_balance.BalanceConfig(**words).check(TASKS)


def _slope(f, x, step=1e-4):
  return (f(x + step) - f(x - step)) / (2 * step)


if __name__ == "__main__":
  absltest.main()
