"""Forward passes and losses of the trial methods, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax.baselines import cfrnet, drnet, drp, x_learner
from recjax.errors import UserError
from tests import oracles, toy_trial

TINY = {"embed_dim": 4, "mlp_dims": [6], "head_dims": [5]}
PRICES = (0.2, 0.9)
VALID = slice(20)  # The rest only pads the batch.


def load(name, schema=toy_trial.SCHEMA, **overrides):
  return method_lib.load(name, TINY | overrides, schema)


@functools.cache
def _batch(binary=False):
  return toy_trial.make_batch(3, size=24, num_padding=4, binary=binary)


def run(method, batch, *, seed=0):
  """Predictions, aux, loss terms and float64 parameters at random values."""
  params, tables = oracles.random_variables(method, seed)
  rows = method.read(tables, batch)
  predictions, aux, _ = method.apply(
    params, tables, rows, batch, train=True, rng=jax.random.key(5)
  )
  wide, wide_tables = oracles.to_float64((params, tables))
  vectors = oracles.feature_rows(
    method.tables["embedding"], wide_tables["embedding"], batch
  )
  inputs = oracles.concat_features(method.schema, batch, vectors)
  return predictions, aux, wide, inputs


def means(terms):
  return {
    name: float(total / weight) for name, (total, weight) in terms.items()
  }


def dense(params, x):
  return x @ params["kernel"] + params["bias"]


def relu(x):
  return np.maximum(x, 0)


def softplus(x):
  return np.log1p(np.exp(-abs(x))) + np.maximum(x, 0)


def trunk(params, x):
  for i in range(len([k for k in params if k.startswith("mlp_")])):
    x = relu(dense(params[f"mlp_{i}"], x))
  return x


def network(params, x, learner, num_treatments):
  """Raw outcomes `[batch, treatments, outcomes]`, one treatment at a time."""
  outs = []
  x = trunk(params, x)
  layers = len([k for k in params if k.startswith("head_")])
  for t in range(num_treatments):
    h = x
    if learner == "s":
      one_hot = np.eye(num_treatments)[t]
      h = np.concatenate([x, np.tile(one_hot, (len(x), 1))], axis=1)
    for name in [*(f"head_{i}" for i in range(layers)), "outcomes"]:
      kernel, bias = params[name]["kernel"], params[name]["bias"]
      if learner != "s":
        kernel, bias = kernel[t], bias[t, 0]
      h = h @ kernel + bias
      h = h if name == "outcomes" else relu(h)
    outs.append(h)
  if learner == "monotone":
    for t in range(1, num_treatments):
      outs[t] = outs[t - 1] + outs[t] ** 2
  return np.stack(outs, axis=1)


def natural(raw, trial):
  """Response and cost in the units of the data."""
  if trial.is_binary:
    base = np.log(trial.response_mean / (1 - trial.response_mean))
    response = oracles.sigmoid(raw[..., 0] + base)
  else:
    response = trial.response_mean + trial.response_std * raw[..., 0]
  if trial.known_cost is not None:
    cost = np.tile(trial.known_cost, (len(raw), 1))
  else:
    cost = trial.cost_std * (softplus(raw[..., 1]) + 1e-6)
    cost[:, 0] = 0
  return response, cost


def people(batch):
  """One row a person who counts: index, treatment, weight, response, cost."""
  trial = jax.tree.map(np.asarray, batch.trial)
  for i in np.flatnonzero(np.asarray(batch.example_mask)):
    yield (
      i,
      int(trial.treatment[i]),
      1 / float(trial.propensity[i]),
      float(trial.response[i]),
      float(trial.cost[i]),
    )


def prediction_losses(raw, batch, trial):
  """The factual losses, person by person."""
  num, count = raw.shape[1], int(batch.example_mask.sum())
  response, cost = natural(raw, trial)
  out = {"response": 0.0, "cost": 0.0}
  for i, t, w, y, z in people(batch):
    if trial.is_binary:
      p = response[i, t]
      out["response"] -= w * (y * np.log(p) + (1 - y) * np.log(1 - p))
    else:
      out["response"] += w * ((y - response[i, t]) / trial.response_std) ** 2
    # The raw prediction: that of the control is not put to 0.
    c = softplus(raw[i, t, 1]) + 1e-6 if raw.shape[-1] > 1 else 0
    out["cost"] += w * (c - z / trial.cost_std) ** 2
  if trial.known_cost is not None:
    del out["cost"]
  del cost
  return {name: total / num / count for name, total in out.items()}


def assert_close(actual, expected):
  np.testing.assert_allclose(
    np.asarray(actual)[VALID], expected[VALID], rtol=1e-3, atol=1e-3
  )


def assert_terms(terms, expected, rtol=2e-4):
  actual = means(terms)
  assert sorted(actual) == sorted(expected), (actual, expected)
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name], value, rtol=rtol, atol=1e-6)


class TwoStageTest(parameterized.TestCase):
  @parameterized.parameters(
    ("s", toy_trial.SCHEMA),
    ("t", toy_trial.SCHEMA),
    ("shared", toy_trial.SCHEMA),
    ("monotone", toy_trial.SCHEMA),
    ("shared", toy_trial.BINARY),
    ("shared", toy_trial.KNOWN_COST),
  )
  def test_equals_numpy(self, learner, schema):
    method = load("two_stage", schema, learner=learner)
    batch = _batch(schema.trial.is_binary)
    predictions, aux, params, x = run(method, batch)
    raw = network(params["network"], trunk(params, x), learner, 3)
    response, cost = natural(raw, schema.trial)
    assert_close(predictions["response"], response)
    assert_close(predictions["cost"], cost)
    terms = method.module.loss_fn(predictions, aux, batch, method.config)
    assert_terms(terms, prediction_losses(raw, batch, schema.trial))

  def test_monotone_outcomes_never_fall(self):
    predictions, *_ = run(load("two_stage", learner="monotone"), _batch())
    for value in predictions.values():
      self.assertGreaterEqual(float(np.diff(np.asarray(value)).min()), -1e-5)


class DfclTest(parameterized.TestCase):
  @parameterized.parameters("pl", "mer")
  def test_decision_loss_equals_numpy(self, loss):
    method = load("dfcl", loss=loss, prices=list(PRICES), alpha=0.5)
    batch, trial = _batch(), method.schema.trial
    predictions, aux, params, x = run(method, batch)
    raw = network(params["network"], x, "shared", 3)
    response, cost = natural(raw, trial)
    tau, total = 3.0 if loss == "mer" else 1.0, 0.0
    for price in PRICES:
      s = response / trial.response_std - price * cost / trial.cost_std
      for i, t, w, y, z in people(batch):
        gain = w * (y / trial.response_std - price * z / trial.cost_std)
        total -= gain * oracles.softmax(s[i] / tau)[t]
    expected = prediction_losses(raw, batch, trial)
    expected = {k: 0.5 * v for k, v in expected.items()}
    expected["decision"] = total / len(PRICES) / 20
    terms = method.module.loss_fn(predictions, aux, batch, method.config)
    assert_terms(terms, expected)

  def test_finite_differences_are_the_gradient_of_the_scores(self):
    method = load("dfcl", loss="ifd")
    batch = _batch()
    scores = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
    gain = np.random.default_rng(1).normal(size=24).astype(np.float32)
    gain *= np.asarray(batch.example_mask)
    value, slope = jax.value_and_grad(method.module.policy_value)(
      jnp.asarray(scores), jnp.asarray(gain), batch, method.config
    )
    treatment = np.asarray(batch.trial.treatment)
    matched = scores.argmax(1) == treatment
    np.testing.assert_allclose(value, gain[matched].sum(), rtol=1e-5)
    i = int(np.flatnonzero(matched & (gain != 0))[0])
    rest = np.delete(scores[i], treatment[i])
    gap = max(scores[i, treatment[i]] - rest.max(), method.config.min_gap)
    np.testing.assert_allclose(slope[i, treatment[i]], gain[i] / gap, rtol=1e-4)

  def test_the_warm_up_has_no_decision(self):
    method = load("dfcl", warmup_share=0.25)
    self.assertEqual([s.share for s in method.stages], [0.25, 0.75])
    self.assertLen(load("dfcl", warmup_share=0.0).stages, 1)


class XLearnerTest(parameterized.TestCase):
  def test_equals_numpy(self):
    method = load("x_learner")
    batch, trial = _batch(), method.schema.trial
    predictions, aux, params, x = run(method, batch)
    raw = network(params["base"], x, "t", 3)
    mu_y, mu_z = natural(raw, trial)
    tau_1 = network(params["effect_treated"], x, "t", 2)
    tau_0 = network(params["effect_control"], x, "t", 2)
    p = np.asarray(trial.propensities)
    for j in (1, 2):
      g = p[j] / (p[0] + p[j])
      tau = g * tau_0[:, j - 1] + (1 - g) * tau_1[:, j - 1]
      assert_close(
        predictions["response"][:, j],
        mu_y[:, 0] + trial.response_std * tau[:, 0],
      )
      assert_close(
        predictions["cost"][:, j], np.maximum(trial.cost_std * tau[:, 1], 0)
      )
    expected = {"response_effect": 0.0, "cost_effect": 0.0}
    for i, t, w, y, z in people(batch):
      for k, (name, mu, seen, std) in enumerate(
        (
          ("response_effect", mu_y, y, trial.response_std),
          ("cost_effect", mu_z, z, trial.cost_std),
        )
      ):
        if t:
          error = (tau_1[i, t - 1, k] - (seen - mu[i, 0]) / std) ** 2
        else:
          error = np.mean(
            [
              (tau_0[i, j - 1, k] - (mu[i, j] - seen) / std) ** 2
              for j in (1, 2)
            ]
          )
        expected[name] += w * error / 3 / 20
    terms = method.module.loss_fn(predictions, aux, batch, method.config)
    assert_terms(terms, expected)
    base = x_learner.base_loss(predictions, aux, batch, method.config)
    assert_terms(base, prediction_losses(raw, batch, trial))

  def test_each_stage_trains_its_own_networks(self):
    base, effect = load("x_learner").stages
    self.assertIn("base/.*", base.trainable)
    self.assertEqual(effect.trainable, ("effect_.*",))
    with self.assertRaisesRegex(UserError, "must be 't'"):
      load("x_learner", learner="s")


class CfrnetTest(parameterized.TestCase):
  @parameterized.parameters("mmd_linear", "mmd_rbf")
  def test_equals_numpy(self, ipm):
    method = load("cfrnet", ipm=ipm, balance=0.7, rbf_sigma=2.0)
    batch, trial = _batch(), method.schema.trial
    predictions, aux, params, x = run(method, batch)
    phi = trunk(params, x)
    raw = network(params["heads"], phi, "t", 3)
    groups = {t: [] for t in range(3)}
    for i, t, *_ in people(batch):
      groups[t].append(phi[i])
    k = lambda a, b: np.exp(-((a - b) ** 2).sum() / (2 * 2.0**2))  # noqa: E731
    mean_k = lambda p, q: np.mean([[k(a, b) for b in q] for a in p])  # noqa: E731
    total = 0.0
    for t in (1, 2):
      p, q = groups[t], groups[0]
      if ipm == "mmd_linear":
        total += ((np.mean(p, 0) - np.mean(q, 0)) ** 2).sum()
      else:
        total += mean_k(p, p) + mean_k(q, q) - 2 * mean_k(p, q)
    expected = prediction_losses(raw, batch, trial)
    expected["balance"] = 0.7 * total / 2
    terms = method.module.loss_fn(predictions, aux, batch, method.config)
    assert_terms(terms, expected, rtol=1e-3)
    self.assertNotIn(
      "balance",
      cfrnet.loss_fn(
        predictions, aux, batch, load("cfrnet", balance=0.0).config
      ),
    )


class DrnetTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3)
  def test_equals_numpy(self, num_strata):
    method = load("drnet", num_strata=num_strata)
    batch = _batch()
    predictions, _, params, x = run(method, batch)
    h0, outs = trunk(params, x), []
    # Dosages 0, 1/2 and 1, and the stratum of each.
    places = {1: (0, 0, 0), 2: (0, 1, 1), 3: (0, 1, 2)}[num_strata]
    for dosage, place in zip((0.0, 0.5, 1.0), places, strict=True):
      h = h0
      for name in ("head_0", "outcomes"):
        h = np.concatenate([h, np.full((len(h), 1), dosage)], axis=1)
        h = h @ params[name]["kernel"][place] + params[name]["bias"][place, 0]
        h = h if name == "outcomes" else relu(h)
      outs.append(h)
    response, cost = natural(np.stack(outs, axis=1), method.schema.trial)
    assert_close(predictions["response"], response)
    assert_close(predictions["cost"], cost)

  def test_a_stratum_without_a_level_has_no_weights(self):
    used, place = drnet.strata(drnet.dosages(2), 5)
    self.assertEqual((used, place.tolist()), (2, [0, 1]))


class DrpTest(parameterized.TestCase):
  def test_equals_numpy(self):
    method = load("drp")
    batch, trial = _batch(), method.schema.trial
    predictions, aux, params, x = run(method, batch)
    h = trunk(params, x)
    first, second = dense(params["ratios"], h).T
    logits = np.stack([first, first - softplus(second)], axis=1)
    control = dense(params["control"], h)[:, 0]
    raw_cost = dense(params["cost"], h)
    cost = trial.cost_std * (softplus(raw_cost) + 1e-6)
    cost[:, 0] = 0
    response = trial.response_mean + trial.response_std * control
    columns = [response]
    for j in (1, 2):
      ratio = 4.0 * oracles.sigmoid(logits[:, j - 1])
      worth = ratio * trial.response_std / trial.cost_std
      columns.append(columns[-1] + worth * (cost[:, j] - cost[:, j - 1]))
    assert_close(predictions["response"], np.stack(columns, 1))
    expected = {"ratio": 0.0, "response": 0.0, "cost": 0.0}
    for i, t, w, y, z in people(batch):
      y, z = y / trial.response_std, z / trial.cost_std
      for j in (1, 2):
        s = logits[i, j - 1]
        value = y / 4.0 * s + z * np.log(1 - oracles.sigmoid(s))
        sign = {j: 1, j - 1: -1}.get(t, 0)
        expected["ratio"] -= w * sign * value / 20
      if t == 0:
        mean = trial.response_mean / trial.response_std
        expected["response"] += w * (control[i] - (y - mean)) ** 2 / 20
      error = softplus(raw_cost[i, t]) + 1e-6 - z
      expected["cost"] += w * error**2 / 3 / 20
    terms = method.module.loss_fn(predictions, aux, batch, method.config)
    assert_terms(terms, expected)

  def test_the_loss_is_stationary_at_the_ratio(self):
    rng = np.random.default_rng(0)
    size = 4000
    treatment = rng.integers(2, size=size)
    y = rng.normal(1.0 + 0.6 * treatment)
    z = rng.exponential(0.1 + 0.9 * treatment)
    base = toy_trial.make_batch(0, size)
    batch = base.replace(
      trial=base.trial.replace(
        treatment=jnp.asarray(treatment, jnp.int32),
        response=jnp.asarray(y, jnp.float32),
        cost=jnp.asarray(z, jnp.float32),
        propensity=jnp.full(size, 0.5),
      )
    )
    units = toy_trial.units(response_std=1.0, cost_std=1.0)

    def loss(s):
      return drp.ratio_term(jnp.full((size, 1), s), batch, units, 2.0)[0]

    # Weighted sums over both groups, as the loss has them.
    dy = (y * (2 * treatment - 1)).sum()
    dz = (z * (2 * treatment - 1)).sum()
    best = np.log(dy / 2 / dz / (1 - dy / 2 / dz))
    slope = jax.grad(loss)
    self.assertLess(abs(float(slope(best))) / size, 1e-4)
    self.assertLess(float(slope(best - 0.5)), 0)
    self.assertGreater(float(slope(best + 0.5)), 0)


class E3irTest(parameterized.TestCase):
  def test_equals_numpy(self):
    method = load("e3ir", alpha=0.2, beta=0.5, budgets=[0.4])
    batch, trial = _batch(), method.schema.trial
    predictions, aux, params, x = run(method, batch)
    layer = params["mlp_0"]
    bound = softplus(layer["bound"])
    sums = np.abs(layer["kernel"]).sum(0)
    self.assertTrue((sums > bound).any())
    kernel = layer["kernel"] * np.minimum(1, bound / sums)
    raw = network(
      params["heads"], relu(x @ kernel + layer["bias"]), "monotone", 3
    )
    response, cost = natural(raw, trial)
    assert_close(predictions["response"], response)
    assert_close(predictions["cost"], cost)
    expected = prediction_losses(raw, batch, trial)
    expected["smoothness"] = 0.2 * bound
    r, c = response / trial.response_std, cost / trial.cost_std
    means = c[VALID].mean(0)
    budget = means.min() + 0.4 * (means.max() - means.min())

    def spend(price):
      choice = (r - price * c)[VALID].argmax(1)
      return c[VALID][np.arange(20), choice].mean()

    low, high = 0.0, 1e3
    for _ in range(60):
      middle = (low + high) / 2
      low, high = (low, middle) if spend(middle) <= budget else (middle, high)
    price, total = (high if spend(0.0) > budget else 0.0), 0.0
    for i, t, w, y, z in people(batch):
      probs = oracles.softmax((r[i] - price * c[i]) / 0.3)
      gain = w * (y / trial.response_std - price * z / trial.cost_std)
      total += gain * probs[t]
    expected["allocation"] = -0.5 * total / 20
    terms = method.module.loss_fn(predictions, aux, batch, method.config)
    assert_terms(terms, expected, rtol=2e-3)

  def test_outcomes_never_fall_with_the_level(self):
    predictions, *_ = run(load("e3ir"), _batch())
    steps = np.diff(np.asarray(predictions["response"]))
    self.assertGreaterEqual(float(steps.min()), -1e-5)
    self.assertGreater(float(steps.max()), 0.1)


if __name__ == "__main__":
  absltest.main()
