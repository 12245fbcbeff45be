"""What must hold for every file in `recjax.models` and `recjax.baselines`.

Under a second Python only what needs one program a model is run.
"""

import dataclasses
import functools
import re
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import parallel, serve, train_state
from recjax.sparse import in_model
from recjax.sparse import table as table_lib
from tests import toy, toy_trial
from tests.model_cases import TASKS, TINY, VARIANTS

OPTIMIZER = optimizer_lib.Config(
  learning_rate=0.01,
  weight_decay=0.01,
  sparse=optimizer_lib.SparseConfig(learning_rate=0.1),
)
PADDING = 4


class Case:
  """One tiny method, and its step and evaluation compiled once."""

  def __init__(self, name, **overrides):
    self.name = name
    method, variant = VARIANTS.get(name, (name, {}))
    config = {**TINY.get(method, {}), **variant, **overrides}
    self.is_trial = toy_trial.is_trial(method)
    # What it predicts, and the loss terms that must be there.
    self.outputs = ("response", "cost") if self.is_trial else TASKS
    if self.is_trial:
      self.method = method_lib.load(method, config, toy_trial.SCHEMA)
    else:
      config["tasks"] = TASKS
      self.method = method_lib.load(method, config, toy.SCHEMA)
    # All of a model at once, so that each contract holds for all of it; what
    # its stages freeze is for its own test. Methods on trials, whose stages
    # have losses of their own, go through them one by one.
    self.stages = self.method.stages if self.is_trial else (method_lib.Stage(),)
    self.make_batch = (toy_trial if self.is_trial else toy).make_batch
    self.config = self.step_config()
    self.init = jax.jit(lambda rng: train_state.init_state(rng, self.config))
    self.step = jax.jit(lambda s, b: train_state.train_step(s, b, self.config))
    self.evaluate = jax.jit(self.evaluate_eagerly)
    self.predict = jax.jit(self.predict_eagerly)

  @functools.cached_property
  def state(self):
    return self.init(jax.random.key(0))

  def step_config(self, stage=None):
    return train_state.StepConfig(
      self.method, stage or self.stages[0], OPTIMIZER, num_steps=30
    )

  def predict_eagerly(self, state, batch):
    rows = self.method.read(state.tables, batch)
    return self.method.apply(
      state.params, state.tables, rows, batch, train=False
    )[0]

  def evaluate_eagerly(self, state, batch):
    """Predictions, loss terms, and gradients of parameters and whole tables."""
    terms, grads = train_state.loss_and_gradients(state, batch, self.config)
    return {
      "predictions": self.predict_eagerly(state, batch),
      "terms": terms,
      "params": grads["params"],
      "tables": {
        name: _scatter(read, self.method.tables[name])
        for name, read in grads["row_grads"].items()
      },
    }

  def paths(self, stage):
    """Parameter paths and table names that a stage trains."""
    leaves = jax.tree_util.tree_leaves_with_path(self.state.params)
    names = [optimizer_lib.path_name(path) for path, _ in leaves]
    chosen = lambda name: any(re.fullmatch(r, name) for r in stage.trainable)  # noqa: E731
    tables = sorted(filter(chosen, self.trained))
    return list(filter(chosen, names)), tables

  def num_counted(self, batch, term):
    """Examples that a loss term is a mean over."""
    if self.is_trial:
      return batch.example_mask.sum()
    return batch.label_mask[term].sum()

  @property
  def trained(self):
    """The tables that are no bank."""
    return {n: t for n, t in self.method.tables.items() if t.trained}


make_case = functools.cache(Case)
MODELS = [{"testcase_name": f"_{n}", "name": n} for n in method_lib.names()]
RANKERS = [m for m in MODELS if not toy_trial.is_trial(m["name"])]
# What a variant can break. Its other promises are those of its method's code.
OTHERS = [{"testcase_name": f"_{name}", "name": name} for name in VARIANTS]
ALL = MODELS + OTHERS
ALL_RANKERS = RANKERS + [
  m for m in OTHERS if not toy_trial.is_trial(VARIANTS[m["name"]][0])
]


def case_batch(name, *args, **kwargs):
  """A batch of the kind that a method takes."""
  return make_case(name).make_batch(*args, **kwargs)


def _scatter(read, table):
  grads = read.grads
  if read.weights is not None:
    grads = read.weights[..., None] * grads[..., None, :]
  dense = jnp.zeros(table.shape)
  return dense.at[read.ids.reshape(-1)].add(
    grads.reshape(-1, table.dim), mode="drop"
  )


def _permute(tree, order):
  return jax.tree.map(lambda x: x[order], tree)


class ModelContractTest(parameterized.TestCase):
  @parameterized.named_parameters(ALL)
  def test_builds_without_data(self, name):
    method = make_case(name).method
    params, tables = jax.eval_shape(method.init, jax.random.key(0))
    self.assertNotEmpty(jax.tree.leaves(params))
    for leaf in jax.tree.leaves(params):
      self.assertEqual(leaf.dtype, jnp.float32)
    self.assertEqual(
      {n: t.shape for n, t in tables.items()},
      {n: t.shape for n, t in method.tables.items()},
    )

  @parameterized.named_parameters(MODELS)
  @pytest.mark.slow
  def test_predicts_every_task_and_jit_changes_nothing(self, name):
    case, batch = make_case(name), case_batch(name)
    predictions = case.evaluate(case.state, batch)["predictions"]
    self.assertCountEqual(predictions, case.outputs)
    chex.assert_tree_all_finite(predictions)
    for value in predictions.values():
      shape = (16, 3) if case.is_trial else (16,)
      self.assertEqual((value.shape, value.dtype), (shape, jnp.float32))
    eager = case.predict_eagerly(case.state, batch)
    chex.assert_trees_all_close(predictions, eager, rtol=1e-5, atol=1e-5)

  @parameterized.named_parameters(ALL)
  @pytest.mark.slow
  def test_order_of_examples_does_not_matter(self, name):
    case, batch = make_case(name), case_batch(name, num_padding=PADDING)
    order = np.random.default_rng(0).permutation(batch.size)
    first = case.evaluate(case.state, batch)
    second = case.evaluate(case.state, _permute(batch, order))
    expected = first | {"predictions": _permute(first["predictions"], order)}
    chex.assert_trees_all_close(second, expected, rtol=1e-4, atol=1e-5)

  @parameterized.named_parameters(ALL)
  @pytest.mark.slow
  def test_what_padding_holds_changes_nothing(self, name):
    case, batch = make_case(name), case_batch(name, num_padding=PADDING)
    other, valid = case.make_batch(1), np.asarray(batch.example_mask)
    garbage = jax.tree.map(
      lambda a, b: jnp.where(valid.reshape(-1, *[1] * (a.ndim - 1)), a, b),
      batch,
      other,
    )
    garbage = garbage.replace(
      id_mask=batch.id_mask,
      labels={k: jnp.where(valid, v, jnp.nan) for k, v in batch.labels.items()},
      example_mask=batch.example_mask,
    )
    if case.is_trial:
      seen = ("response", "cost", "propensity")
      values = {k: getattr(batch.trial, k) for k in seen}
      garbage = garbage.replace(
        trial=garbage.trial.replace(
          **{k: jnp.where(valid, v, jnp.nan) for k, v in values.items()}
        )
      )
    first, second = (case.evaluate(case.state, b) for b in (batch, garbage))
    chex.assert_tree_all_finite(second)
    for out in (first, second):
      out["predictions"] = _permute(out["predictions"], valid)
    chex.assert_trees_all_close(first, second, rtol=1e-5, atol=1e-6)

  @parameterized.named_parameters(ALL)
  @pytest.mark.slow
  def test_padding_changes_no_prediction_of_the_valid(self, name):
    case, batch = make_case(name), case_batch(name, num_padding=PADDING)
    short = _permute(batch, slice(batch.size - PADDING))
    padded = case.evaluate(case.state, batch)
    expected = case.predict(case.state, short)
    chex.assert_trees_all_close(
      _permute(padded["predictions"], slice(short.size)),
      expected,
      rtol=1e-5,
      atol=1e-5,
    )
    for term, (_, weight) in padded["terms"].items():
      if term in case.outputs:
        self.assertEqual(weight, case.num_counted(short, term))

  @parameterized.named_parameters(ALL)
  @pytest.mark.slow
  def test_every_trained_path_has_a_gradient(self, name):
    case, batch = make_case(name), case_batch(name)
    gradients = [case.evaluate(case.state, batch)]
    for stage in case.stages[1:]:
      config = case.step_config(stage)
      run = lambda s, b, c=config: train_state.loss_and_gradients(s, b, c)[1]  # noqa: E731
      found = jax.jit(run)(case.state, batch)
      tables = {
        name: _scatter(read, case.method.tables[name])
        for name, read in found["row_grads"].items()
      }
      gradients.append({"params": found["params"], "tables": tables})
    seen = set()
    for stage, out in zip(case.stages, gradients, strict=True):
      chex.assert_tree_all_finite(out)
      params, tables = case.paths(stage)
      seen |= {*params, *tables}
      for path, grad in jax.tree_util.tree_leaves_with_path(out["params"]):
        path = optimizer_lib.path_name(path)
        self.assertEqual(bool(jnp.any(grad != 0)), path in params, path)
      self.assertCountEqual(out["tables"], tables)
      for table, grad in out["tables"].items():
        self.assertTrue(jnp.any(grad != 0), table)
    self.assertEqual(seen, {*sum(case.paths(method_lib.Stage()), [])})

  @parameterized.named_parameters(ALL)
  @pytest.mark.slow
  def test_row_gradients_equal_those_of_whole_tables(self, name):
    case, batch = make_case(name), case_batch(name)
    method, stage = case.method, case.stages[0]
    loss_fn = stage.loss_fn or method.module.loss_fn

    def loss(trained):
      tables = case.state.tables | trained
      rows = method.read(tables, batch)
      predictions, aux, _ = method.apply(
        case.state.params, tables, rows, batch, train=True, rng=rng
      )
      terms = loss_fn(predictions, aux, batch, method.config)
      return sum(total / weight for total, weight in terms.values())

    def dense_gather(values, ids, weights, tap):
      del tap
      return jnp.einsum("...k,...kd->...d", weights, values[ids])

    rng = jax.random.fold_in(jax.random.key(0), 0)
    with mock.patch.object(in_model, "weighted_gather", dense_gather):
      expected = jax.jit(jax.grad(loss))(
        {name: case.state.tables[name] for name in case.trained}
      )
    actual = case.evaluate(case.state, batch)["tables"]
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)

  @parameterized.named_parameters(MODELS)
  @pytest.mark.slow
  def test_frozen_paths_stay_bit_identical(self, name):
    case, batch = make_case(name), case_batch(name)
    stage = case.stages[0]
    params, tables = case.paths(stage)
    trained = params[1::2] + tables[1:]
    config = case.step_config(
      dataclasses.replace(stage, trainable=tuple(re.escape(p) for p in trained))
    )

    def gradients_and_step(state, batch):
      state = train_state.start_stage(state, config)
      grads = train_state.loss_and_gradients(state, batch, config)[1]
      return grads, train_state.train_step(state, batch, config)[0]

    grads, after = jax.jit(gradients_and_step)(case.state, batch)
    self.assertCountEqual(grads["row_grads"], tables[1:])
    flat = jax.tree_util.tree_leaves_with_path
    triples = zip(
      flat(grads["params"]),
      jax.tree.leaves(case.state.params),
      jax.tree.leaves(after.params),
      strict=True,
    )
    for (path, grad), old, new in triples:
      path = optimizer_lib.path_name(path)
      moved = path in trained
      self.assertEqual(bool(jnp.any(grad != 0)), moved, path)
      self.assertEqual(bool(jnp.any(old != new)), moved, path)
    for table in tables:
      same = bool(jnp.all(case.state.tables[table] == after.tables[table]))
      self.assertEqual(same, table not in trained, table)

  @parameterized.named_parameters(MODELS)
  @pytest.mark.slow
  def test_a_step_leaves_unread_rows_bit_identical(self, name):
    case, batch = make_case(name), case_batch(name, num_padding=PADDING)
    after, _ = case.step(case.state, batch)
    grads = case.evaluate(case.state, batch)["tables"]
    for table, grad in grads.items():
      touched = np.any(np.asarray(grad) != 0, axis=-1)
      moved = np.any(
        np.asarray(after.tables[table] != case.state.tables[table]), axis=-1
      )
      np.testing.assert_array_equal(moved, touched, table)
      self.assertFalse(moved[case.method.tables[table].num_rows :].any())

  @parameterized.named_parameters(ALL)
  def test_learns_toy_data_and_is_traced_once(self, name):
    case = make_case(name)
    batches = [case.make_batch(seed, num_padding=seed) for seed in range(3)]
    state, values = case.state, []
    for i in range(30):
      state, scalars = case.step(state, batches[i % 3])
      values.append(float(scalars["loss"][0]))
    self.assertLess(np.mean(values[-3:]), 0.7 * np.mean(values[:3]))
    self.assertEqual(int(state.step), 30)
    self.assertEqual(int(state.num_skipped), 0)
    self.assertEqual(case.step._cache_size(), 1)
    for term in case.outputs:
      self.assertIn(term, scalars)

  @parameterized.named_parameters(MODELS)
  @pytest.mark.slow
  def test_same_seed_gives_the_same_numbers(self, name):
    case, batch = make_case(name), case_batch(name)
    again = case.init(jax.random.key(0))
    chex.assert_trees_all_equal(case.state, again)
    chex.assert_trees_all_equal(
      case.step(case.state, batch), case.step(again, batch)
    )
    other = case.init(jax.random.key(1))
    for name, table in case.trained.items():
      same = case.state.tables[name] == other.tables[name]
      self.assertFalse(bool(jnp.any(same[: table.num_rows])), name)

  @parameterized.named_parameters(MODELS)
  @pytest.mark.slow
  def test_bfloat16_stays_near_float32(self, name):
    case, batch = make_case(name), case_batch(name)
    fields = dataclasses.fields(case.method.module.Config)
    self.assertIn("dtype", [field.name for field in fields])
    half = Case(name, dtype="bfloat16")
    state = jax.eval_shape(half.step, case.state, batch)[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(state, case.state)
    actual = half.predict(case.state, batch)
    expected = case.evaluate(case.state, batch)["predictions"]
    chex.assert_trees_all_close(actual, expected, atol=0.05)
    for task in case.outputs:
      self.assertEqual(actual[task].dtype, jnp.float32)
      self.assertTrue(bool(jnp.any(actual[task] != expected[task])))

  @parameterized.named_parameters(MODELS)
  @pytest.mark.slow
  def test_a_mesh_takes_the_same_step_as_one_device(self, name):
    case, batch = make_case(name), case_batch(name, num_padding=PADDING)
    expected = case.step(case.state, batch)
    placement = parallel.place(parallel.Config(data=4, model=2))
    # A copy: the step takes its state's memory.
    state = jax.device_put(
      jax.tree.map(np.array, case.state), placement.shardings(case.state)
    )
    step = placement.compile_step(
      lambda s, b: train_state.train_step(s, b, case.config), state
    )
    actual = jax.device_get(step(state, placement.put_batch(batch)))
    expected = jax.device_get(expected)
    # A key that is in every slot read has no gradient but its rounding, and
    # AdamW makes a whole step of that.
    grads = case.evaluate(case.state, batch)["params"]
    params = jax.tree.map(
      lambda new, old, grad: np.where(np.abs(grad) < 1e-7, old, new),
      actual[0].params,
      expected[0].params,
      grads,
    )
    actual = (actual[0].replace(params=params), actual[1])
    opt_state = expected[0].opt_state  # Sums of these gradients.
    chex.assert_trees_all_close(
      actual[0].opt_state, opt_state, rtol=1e-3, atol=1e-6
    )
    chex.assert_trees_all_close(
      (actual[0].replace(opt_state=opt_state), actual[1]),
      expected,
      rtol=1e-4,
      atol=1e-5,
    )

  @parameterized.named_parameters(ALL_RANKERS)
  @pytest.mark.slow
  def test_a_user_encoded_once_scores_as_every_pair_alone(self, name):
    case, candidates = make_case(name), toy.make_batch(3)
    user = _permute(toy.make_batch(4), slice(1))
    names = ("item_id", "tags", "price", "content", "title")
    ranker = serve.Ranker(case.method, names)
    state = case.state.replace(ema_params=None)
    user_state = ranker.encode_user(state, user)
    pairs = toy.pair(user, candidates, names)
    chex.assert_trees_all_close(
      ranker.score(state, user_state, candidates),
      case.predict(case.state, pairs),
      rtol=1e-5,
      atol=1e-5,
    )

  @parameterized.named_parameters(MODELS)
  def test_zero_taps_have_the_shape_of_the_reads(self, name):
    case, batch = make_case(name), case_batch(name)
    taps = case.method.zero_taps(case.state.params, case.state.tables, batch)
    tables = case.method.tables
    self.assertCountEqual(taps, [n for n, t in tables.items() if t.in_model])
    for table, tap in taps.items():
      self.assertEqual(tap.shape[-1], tables[table].dim)
      self.assertFalse(bool(jnp.any(tap)))
    for table in tables.values():
      self.assertIsInstance(table, table_lib.Table)


if __name__ == "__main__":
  absltest.main()
