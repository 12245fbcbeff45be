"""The multi-task and multi-scenario baselines in float64 NumPy loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax.baselines import star
from recjax.errors import UserError
from tests import multi_task_oracles as mt
from tests import oracles, toy

TASKS = ["click", "like", "play_time"]
TINY = {
  "tasks": TASKS,
  "embed_dim": 4,
  "num_tokens": 2,
  "token_dim": 8,
  "num_layers": 1,
}
NO_SCENARIO = dataclasses.replace(
  toy.SCHEMA, roles=dataclasses.replace(toy.SCHEMA.roles, scenario=None)
)


def load(name, schema=toy.SCHEMA, **overrides):
  return method_lib.load(name, TINY | overrides, schema)


def forward(method, params, tables, batch):
  @jax.jit
  def run(params, tables, batch):
    rows = method.read(tables, batch)
    return method.apply(params, tables, rows, batch, train=False)[:2]

  return run(params, tables, batch)


def experts(params, x, num):
  """`[experts, batch, dim]`, one expert at a time."""
  hidden = oracles.gelu(mt.dense(params["up"], x))
  return np.stack(np.split(hidden, num, axis=-1))


def shared_bottom(method, params, rows, batch):
  z = mt.trunk(method.config, params["trunk"], rows, batch)
  return mt.towers(params["heads"], np.stack([z] * len(TASKS)))


def mmoe(method, params, rows, batch):
  config = method.config
  z = mt.trunk(config, params["trunk"], rows, batch)
  outputs = experts(params["experts"], z, config.num_experts)
  mixed = np.zeros((len(TASKS), len(z), config.expert_dim))
  for b, t in np.ndindex(len(z), len(TASKS)):
    if "scenario_gate" in params:
      own, s = params["scenario_gate"], int(batch.scenario[b])
      logits = z[b] @ own["kernel"][s] + own["bias"][s, 0]
    else:
      logits = mt.dense(params["gate"], z[b])
    part = logits[t * config.num_experts : (t + 1) * config.num_experts]
    for gate, output in zip(oracles.softmax(part), outputs, strict=True):
      mixed[t, b] += gate * output[b]
  return mt.towers(params["heads"], mixed)


def ple(method, params, rows, batch):
  config = method.config
  z = mt.trunk(config, params["trunk"], rows, batch)
  tasks, shared = [z] * len(TASKS), z
  for i in range(config.num_levels):
    level = params[f"level_{i}"]
    common = experts(level["shared_experts"], shared, config.num_shared_experts)
    own = []
    for t, x in enumerate(tasks):
      up = level["task_experts"]
      hidden = oracles.gelu(x @ up["kernel"][t] + up["bias"][t, 0])
      own.append(np.split(hidden, config.num_task_experts, axis=-1))
    mixed = []
    for t, x in enumerate(tasks):
      gate = level["task_gate"]
      logits = x @ gate["kernel"][t] + gate["bias"][t, 0]
      mixed.append(_mix(logits, [*own[t], *common]))
    if i < config.num_levels - 1:
      every = [e for experts_of in own for e in experts_of] + list(common)
      shared = _mix(mt.dense(level["shared_gate"], shared), every)
    tasks = mixed
  return mt.towers(params["heads"], np.stack(tasks))


def _mix(logits, outputs):
  rows = [
    sum(g * o[b] for g, o in zip(oracles.softmax(row), outputs, strict=True))
    for b, row in enumerate(logits)
  ]
  return np.stack(rows)


def star_net(method, params, rows, batch):
  config = method.config
  z = mt.trunk(config, params["trunk"], rows, batch)
  own = params["norm"]
  logits = np.zeros((len(TASKS), len(z)))
  for b, t in np.ndindex(len(z), len(TASKS)):
    s = int(batch.scenario[b])
    variance = np.maximum(own["variance"][s], 0)
    x = (z[b] - own["mean"][s]) / np.sqrt(variance + 1e-5)
    x = x * own["scale"][0] * (1 + own["scale_offset"][s])
    x = x + own["bias"][0] + own["bias_offset"][s]
    num = len(config.tower_dims)
    for i in range(num + 1):
      layer = params[f"layer_{i}"]
      kernel = layer["kernel"][t] * layer["own_kernel"][s, t]
      x = x @ kernel + layer["bias"][t] + layer["own_bias"][s, t]
      x = oracles.gelu(x) if i < num else x
    inputs = np.concatenate([rows["tab"][b], z[b]])
    hidden = oracles.gelu(mt.dense(params["auxiliary_hidden"], inputs))
    logits[t, b] = x[0] + mt.dense(params["auxiliary"], hidden)[t]
  return logits


def hmoe(method, params, rows, batch):
  config, num = method.config, 3
  z = mt.trunk(config, params["trunk"], rows, batch)
  outputs = experts(params["experts"], z, config.num_experts)
  logits = np.zeros((len(TASKS), len(z)))
  for b in range(len(z)):
    gates = mt.dense(params["gate"], z[b]).reshape(num, -1)
    own = params["trust"]
    trust = z[b] @ own["kernel"][int(batch.scenario[b])]
    trust = oracles.softmax(trust + own["bias"][int(batch.scenario[b]), 0])
    for t, s in np.ndindex(len(TASKS), num):
      x = sum(
        g * o[b]
        for g, o in zip(oracles.softmax(gates[s]), outputs, strict=True)
      )
      hidden = x @ params["tower_hidden_kernel"][t, s]
      hidden = oracles.gelu(hidden + params["tower_hidden_bias"][t, s, 0])
      logit = hidden @ params["tower_kernel"][t, s]
      logits[t, b] += trust[s] * (logit + params["tower_bias"][t, s, 0])[0]
  return logits


def pepnet(method, params, rows, batch):
  config = method.config
  e = mt.inputs(rows, batch)

  def gate(own, x):
    hidden = np.maximum(mt.dense(own["up"], x), 0)
    return 2 * oracles.sigmoid(mt.dense(own["down"], hidden))

  e = e * gate(params["epnet"], np.concatenate([rows["tab"], e], axis=-1))
  width = -(-e.shape[-1] // config.num_tokens)
  e = np.pad(e, ((0, 0), (0, width * config.num_tokens - e.shape[-1])))
  tokens = oracles.per_token_dense(
    params["project"], np.stack(np.split(e, config.num_tokens, axis=-1))
  )
  z = mt.trunk(config, params["trunk"], rows, batch, tokens)
  prior = np.concatenate([rows["user_id"], rows["item_id"], z], axis=-1)
  logits = []
  for t in range(len(TASKS)):
    x = z
    for i in range(len(config.tower_dims) + 1):
      delta = np.split(gate(params[f"ppnet_{i}"], prior), len(TASKS), axis=-1)
      layer = params[f"layer_{i}"]
      x = (x * delta[t]) @ layer["kernel"][t] + layer["bias"][t, 0]
      x = oracles.gelu(x) if i < len(config.tower_dims) else x
    logits.append(x[:, 0])
  return np.stack(logits)


CASES = (
  ("shared_bottom", "shared_bottom", shared_bottom, {"head_dim": 5}),
  ("mmoe", "mmoe", mmoe, {"num_experts": 3, "expert_dim": 5}),
  ("mmoe_tasks", "mmoe", mmoe, {"scenario_gates": False, "expert_dim": 5}),
  ("ple", "ple", ple, {"expert_dim": 5, "num_task_experts": 2, "head_dim": 4}),
  ("cgc", "ple", ple, {"expert_dim": 5, "num_levels": 1}),
  ("star", "star", star_net, {"tower_dims": [5], "auxiliary_dim": 3}),
  ("hmoe", "hmoe", hmoe, {"head_dim": 5, "expert_dim": 4}),
  ("pepnet", "pepnet", pepnet, {"tower_dims": [5], "gate_dim": 3}),
)


class MultiTaskTest(parameterized.TestCase):
  @parameterized.named_parameters(*CASES)
  def test_equals_the_equations(self, name, oracle, overrides):
    method, batch = load(name, **overrides), toy.make_batch(size=6)
    params, tables = oracles.random_variables(method)
    actual, _ = forward(method, params, tables, batch)
    values, _, rows = mt.prepare(method, params, tables, batch)
    expected = oracle(method, values, rows["embedding"], batch)
    self.assertCountEqual(actual, TASKS)
    for task, logits in zip(TASKS, expected, strict=True):
      np.testing.assert_allclose(actual[task], logits, rtol=2e-4, atol=2e-4)

  @parameterized.parameters("mmoe", "star", "hmoe", "pepnet")
  def test_works_without_scenarios(self, name):
    method, batch = load(name, NO_SCENARIO, head_dim=4), toy.make_batch(size=6)
    batch = batch.replace(scenario=jnp.zeros_like(batch.scenario))
    params, tables = oracles.random_variables(method)
    actual, _ = forward(method, params, tables, batch)
    for logits in actual.values():
      self.assertGreater(float(jnp.std(logits)), 0.0)

  def test_star_keeps_scenarios_apart(self):
    method, batch = load("star"), toy.make_batch()
    params, tables = oracles.random_variables(method)

    @jax.jit
    def grads(params):
      def loss(params):
        rows = method.read(tables, batch)
        logits, aux, _ = method.apply(params, tables, rows, batch, train=False)
        total, _ = aux["moments"]
        own = batch.scenario == 2
        return total + jnp.sum(jnp.where(own, logits["click"], 0.0))

      return jax.grad(loss)(params)

    own = grads(params)
    for leaf in (own["layer_0"]["own_kernel"], own["norm"]["scale_offset"]):
      moved = [bool(jnp.any(part != 0)) for part in leaf]
      self.assertEqual(moved, [False, False, True])
    # The moments are pulled to those of the rows of each scenario.
    pooled = _pooled(method, params, tables, batch)
    for s in range(3):
      rows = pooled[np.asarray(batch.scenario) == s]
      expected = (np.asarray(params["norm"]["mean"][s]) - rows).sum(0) / 8
      np.testing.assert_allclose(
        own["norm"]["mean"][s], expected, rtol=1e-3, atol=1e-4
      )

  def test_moments_of_a_scenario_are_the_least_loss(self):
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(2.0, 3.0, (64, 4)), jnp.float32)
    module = star.PartitionedNorm(2)
    scenario, mask = jnp.arange(64) % 2, jnp.ones(64, bool)
    params = module.init(jax.random.key(0), z, scenario, mask)["params"]
    for s in range(2):
      part = z[s::2]
      params["mean"] = params["mean"].at[s].set(part.mean(0))
      params["variance"] = params["variance"].at[s].set(part.var(0))

    @jax.jit
    def run(params):
      return module.apply({"params": params}, z, scenario, mask)

    grads = jax.grad(lambda p: run(p)[1][0])(params)
    for name in ("mean", "variance"):
      np.testing.assert_allclose(grads[name], 0.0, atol=2e-3)
    normed = run(params)[0]
    for s in range(2):
      np.testing.assert_allclose(normed[s::2].mean(0), 0.0, atol=1e-5)
      np.testing.assert_allclose(normed[s::2].std(0), 1.0, atol=1e-3)

  def test_hmoe_trains_the_tower_of_the_own_scenario(self):
    for stop in (True, False):
      method, batch = load("hmoe", stop_others=stop), toy.make_batch()
      params, tables = oracles.random_variables(method)

      @jax.jit
      def grads(params, method=method, tables=tables, batch=batch):
        def total(params):
          rows = method.read(tables, batch)
          logits, *_ = method.apply(params, tables, rows, batch, train=False)
          own = batch.scenario == 1
          return jnp.sum(jnp.where(own, logits["click"], 0.0))

        return jax.grad(total)(params)

      leaf = grads(params)["tower_kernel"]
      moved = [bool(jnp.any(leaf[0, s] != 0)) for s in range(3)]
      self.assertEqual(moved, [not stop, True, not stop])

  def test_pepnet_gates_do_not_train_what_they_stop(self):
    """With both networks' own paths cut, only priors reach the tables."""
    method, batch = load("pepnet", NO_SCENARIO), toy.make_batch()
    params, tables = oracles.random_variables(method)
    # A gate of one everywhere: its input has no effect on the gradient.
    for name in ("epnet", "ppnet_0", "ppnet_1"):
      params[name]["down"] = jax.tree.map(jnp.zeros_like, params[name]["down"])
    opened = jax.tree.map(jnp.array, params)
    opened["epnet"]["up"]["kernel"] += 1.0

    @jax.jit
    def grads(params):
      def total(tables):
        rows = method.read(tables, batch)
        return method.apply(params, tables, rows, batch, train=False)[0][
          "click"
        ].sum()

      return jax.grad(total)(tables)["embedding"]

    np.testing.assert_allclose(
      grads(params), grads(opened), rtol=1e-5, atol=1e-6
    )

  @parameterized.parameters(
    ("mmoe", {"num_experts": 0}, "num_experts must be at least 1"),
    ("ple", {"num_levels": 0}, "num_levels must be at least 1"),
    ("ple", {"balance": {"kind": "gradnorm"}}, "shared experts mix them"),
    ("star", {"tower_dims": [0]}, "tower_dims must be at least 1"),
    ("pepnet", {"gate_dim": 0}, "gate_dim must be at least 1"),
    ("shared_bottom", {"ffn": "relu_moe"}, "two paths"),
    ("hmoe", {"balance": {"kind": "magic"}}, "balance.kind must be one of"),
  )
  def test_a_wrong_choice_is_a_user_error(self, name, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      load(name, **overrides)


def _pooled(method, params, tables, batch):
  values, _, rows = mt.prepare(method, params, tables, batch)
  return mt.trunk(method.config, values["trunk"], rows["embedding"], batch)


if __name__ == "__main__":
  absltest.main()
