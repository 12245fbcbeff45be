"""MDL's forward pass in float64 NumPy, and what its tokens may not see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax.errors import UserError
from recjax.layers import domain_attention
from recjax.models import mdl
from tests import multi_task_oracles, oracles, toy

TINY = {
  "tasks": ["click", "like", "play_time"],
  "embed_dim": 4,
  "num_tokens": 2,
  "token_dim": 8,
  "num_layers": 2,
  "num_heads": 2,
  "domain_dim": 3,
}
MSN = {"body": "msn", "memory": {"num_keys": 6, "key_dim": 4, "top_k": 3}}
PRIORS = {
  "scenario_priors": [
    {"token": "1", "features": ["age", "tags"]},
    {"token": "global", "features": ["content"]},
  ],
  "task_priors": [
    {"token": "like", "features": ["history"]},
    {"token": "all", "features": ["price"]},
  ],
}


def load(**overrides):
  return method_lib.load("mdl", TINY | overrides, toy.SCHEMA)


def forward(method, params, tables, batch):
  @jax.jit
  def run(params, tables, batch):
    rows = method.read(tables, batch)
    return method.apply(params, tables, rows, batch, train=False)[:2]

  return run(params, tables, batch)


class MdlTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("layerwise", {}),
    ("msn", MSN),
    ("priors", PRIORS | {"important_features": ["tab", "item_id"]}),
    ("one_shot", {"mode": "one_shot"}),
    ("final_tower", {"mode": "final_tower", "head_dim": 5}),
    ("film", {"mode": "film"}),
    ("input_concat", {"mode": "input_concat"}),
    ("no_task_tokens", {"task_tokens": False}),
    ("no_scenario_tokens", {"scenario_tokens": False}),
    ("no_global_token", {"global_token": False}),
    ("no_scenario_attention", {"scenario_attention": False}),
    ("mixing", {"task_attention": "rankmixer", "output_projection": "shared"}),
    ("no_ffn_residual", {"ffn_residual": False}),
    (
      "as_reported",
      {
        "ffn_residual": False,
        "pre_norm": False,
        "final_norm": False,
        "output_projection": "none",
      },
    ),
  )
  def test_equals_the_equations(self, overrides):
    method, batch = load(**overrides), toy.make_batch(size=6)
    self.assertContainsSubset([0, 1, 2], np.asarray(batch.scenario))
    params, tables = oracles.random_variables(method)
    actual = forward(method, params, tables, batch)[0]
    expected = multi_task_oracles.Mdl(method, params, tables, batch).logits()
    self.assertCountEqual(actual, TINY["tasks"])
    for task, logits in expected.items():
      np.testing.assert_allclose(actual[task], logits, rtol=2e-4, atol=2e-4)

  def test_features_do_not_see_the_domains(self):
    """No feature token moves with the extra embeddings; every logit does."""
    method, batch = load(), toy.make_batch()
    params, tables = oracles.random_variables(method)

    @jax.jit
    def outputs(extra):
      rows = method.read(tables | {"domain_embedding": extra}, batch)
      logits, aux, _ = method.apply(params, tables, rows, batch, train=False)
      return jnp.sum(jnp.square(aux["tokens"])), jnp.stack([*logits.values()])

    extra = tables["domain_embedding"]
    grad = jax.grad(lambda e: outputs(e)[0])(extra)
    self.assertFalse(bool(jnp.any(grad)))
    moved = outputs(extra)[1] != outputs(extra + 0.1)[1]
    self.assertTrue(bool(moved.all()))

  def test_a_scenario_has_gradients_of_its_own_examples_alone(self):
    method, batch = load(), toy.make_batch()
    params, tables = oracles.random_variables(method)

    @jax.jit
    def grads(scenario):
      def total(params):
        rows = method.read(tables, batch)
        logits, *_ = method.apply(params, tables, rows, batch, train=False)
        own = batch.scenario == scenario
        return sum(jnp.sum(jnp.where(own, v, 0.0)) for v in logits.values())

      return jax.grad(total)(params)

    for scenario in (0, 1, 2):
      own = grads(scenario)
      leaves = [own["initial"]["specific"]]
      leaves += [own[f"domain_{i}"]["specific_attention"] for i in (0, 1)]
      leaves += [own["domain_0"]["specific_ffn"]]
      for leaf in jax.tree.leaves(leaves):
        if leaf.shape[0] != 2:
          continue  # The norm of queries, which all scenarios share.
        for other in (1, 2):
          moved = bool(jnp.any(leaf[other - 1] != 0))
          self.assertEqual(moved, other == scenario)
      self.assertTrue(bool(jnp.any(own["initial"]["everywhere"]["up"]["bias"])))
      self.assertTrue(bool(jnp.any(own["heads"]["logit"]["kernel"])))

  def test_a_task_has_gradients_of_its_own_loss_alone(self):
    method, batch = load(), toy.make_batch()
    params, tables = oracles.random_variables(method)

    @jax.jit
    def grads(params):
      rows = method.read(tables, batch)
      return jax.grad(
        lambda p: method.apply(p, tables, rows, batch, train=False)[0][
          "like"
        ].sum()
      )(params)

    own = grads(params)
    for leaf in jax.tree.leaves(
      [own["initial"]["tasks"], own["domain_0"]["tasks_ffn"], own["heads"]]
    ):
      moved = [bool(jnp.any(leaf[t] != 0)) for t in range(3)]
      self.assertEqual(moved, [False, True, False])

  def test_priors_of_other_scenarios_change_nothing(self):
    method, batch = load(**PRIORS), toy.make_batch()
    module = mdl.InitialTokens(
      toy.SCHEMA,
      method.config.tasks,
      (),
      method.config.scenario_priors,
      method.config.task_priors,
      8,
    )
    params, tables = oracles.random_variables(method)
    rows = method._split(method.read(tables, batch), batch)
    blocks = mdl.sort_into_blocks(jnp.maximum(batch.scenario - 1, 0), 2)

    @jax.jit
    def tokens(batch):
      specific, everywhere, tasks = module.apply(
        {"params": params["initial"]}, batch, rows, blocks, train=False
      )
      return blocks.unpack(specific), everywhere[0], tasks

    first = tokens(batch)
    # Age is a prior of scenario 1 alone, price one of every task.
    changed = batch.replace(dense=batch.dense + jnp.array([[1.0, 0.0]]))
    second = tokens(changed)
    moved = jnp.any(first[0] != second[0], axis=-1)
    own = np.asarray(batch.scenario) <= 1  # 0 lies in the first one's blocks.
    np.testing.assert_array_equal(moved[~own], False)
    self.assertTrue(moved[own].any())
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(first[2], second[2])
    third = tokens(batch.replace(dense=batch.dense + jnp.array([[0.0, 1.0]])))
    np.testing.assert_array_equal(first[0], third[0])
    self.assertTrue(bool(jnp.any(first[2] != third[2], axis=(1, 2)).all()))

  def test_data_without_scenarios_has_the_global_token(self):
    roles = dataclasses.replace(toy.SCHEMA.roles, scenario=None)
    schema = dataclasses.replace(toy.SCHEMA, roles=roles)
    method = method_lib.load("mdl", TINY, schema)
    params, tables = oracles.random_variables(method)
    self.assertNotIn("specific", params["initial"])
    batch = toy.make_batch()
    none = batch.replace(scenario=jnp.zeros_like(batch.scenario))
    expected = forward(method, params, tables, none)[0]
    # The same as examples of an unknown scenario in data that has some.
    known = load()
    both, _ = oracles.random_variables(known)
    both = _overwrite(both, params)
    actual = forward(known, both, tables, none)[0]
    for task in TINY["tasks"]:
      np.testing.assert_allclose(
        actual[task], expected[task], rtol=1e-5, atol=1e-5
      )

  def test_attention_is_counted_by_token(self):
    method, batch = load(), toy.make_batch(num_padding=4)
    params, tables = oracles.random_variables(method)
    aux = jax.device_get(forward(method, params, tables, batch)[1])
    sums = aux["counters"]["attention_1"]
    scenario = np.asarray(batch.scenario)[:12]
    np.testing.assert_allclose(
      sums["specific"]["examples"], np.bincount(scenario, minlength=3)[1:]
    )
    for family, num in (("specific", 2), ("everywhere", 1), ("tasks", 3)):
      weights = domain_attention.mean_weights(sums[family])
      self.assertEqual(weights.shape, (num, 2))
      np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    numbers = mdl.diagnostics(aux["counters"])
    self.assertBetween(numbers["attention_0/tasks_spread"], 1.0, 2.0)

  @parameterized.parameters(
    ({"mode": "late"}, "model.mode must be one of layerwise, "),
    ({"num_heads": 3}, "token_dim .8. must be a multiple of model.num_heads"),
    ({"mode": "film", "task_tokens": False}, "mode=film is made of task tok"),
    ({"body": "msn", "memory_layers": [5]}, "memory_layers"),
    ({"ffn": "relu_moe"}, "two paths"),
    ({"balance": {"kind": "gradnorm"}}, "use none or uncertainty"),
    ({"balance": {"task_weights": [1.0]}}, "one number a task .3."),
    ({"domain_dim": 0}, "domain_dim must be at least 1"),
  )
  def test_a_wrong_choice_is_a_user_error(self, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      load(**overrides)

  @parameterized.parameters(
    ({"important_features": ["age"]}, "'age' is no id feature"),
    (
      {"task_priors": [{"token": "lik", "features": ["age"]}]},
      "the token 'lik'; did you mean 'like'",
    ),
    (
      {"scenario_priors": [{"token": "all", "features": ["agee"]}]},
      "'agee', which is no input; did you mean 'age'",
    ),
  )
  def test_a_prior_that_is_not_there_is_a_user_error(self, overrides, message):
    with self.assertRaisesRegex(UserError, message):
      method = load(**overrides)
      jax.eval_shape(method.init, jax.random.key(0))


def _overwrite(tree, part):
  """`tree` with the leaves of `part` in place of its own."""
  merged = dict(tree)
  for key, value in part.items():
    merged[key] = (
      _overwrite(tree[key], value) if isinstance(value, dict) else value
    )
  return merged


if __name__ == "__main__":
  absltest.main()
