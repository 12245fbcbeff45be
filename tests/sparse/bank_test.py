"""Banks: rows that a model reads as constants and a step overwrites."""

import dataclasses
import functools
import re
import tempfile
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import toy
from absl.testing import absltest, parameterized

import pallas_kernels
from recjax import evaluate, flops, parallel, run_files, train_state
from recjax import optimizer as optimizer_lib
from recjax.checkpoint import Checkpoints
from recjax.losses import task_losses
from recjax.method import Method
from recjax.sparse.table import Table, embedding_table
from recjax.sparse.update import Writes, apply_writes

DIM = 4


class Model(nn.Module):
  """Adds what the bank holds of a history, and writes the item's vector."""

  config: types.SimpleNamespace
  schema: object

  @nn.compact
  def __call__(self, batch, rows, *, train):
    del train
    items = nn.Dense(DIM, name="encode")(rows["embedding"]["item_id"])
    mask = batch.id_mask["history"][..., None]
    stale = jnp.where(mask, rows["bank"]["history"], 0.0).sum(axis=1)
    age = rows["bank_step"]["item_id"]
    x = jnp.concatenate([items, stale, 0.01 * age], axis=-1)
    ids = batch.ids["item_id"]
    first = ids[:, None] == ids[None]
    is_first = jnp.argmax(first, axis=1) == jnp.arange(len(ids))
    ids = jnp.where(is_first & batch.example_mask, ids, -1)
    writes = {"bank": Writes(ids, items)}
    return {"click": nn.Dense(1, name="head")(x)[:, 0]}, {"writes": writes}


def tables(config, schema):
  num_rows = schema.vocab_sizes["item_id"]
  bank = Table(
    num_rows,
    DIM,
    first_row={"history": 0, "item_id": 0},
    init_scale=0.0,
    trained=False,
    dtype=config.dtype,
  )
  return {
    "embedding": embedding_table(schema, DIM),
    "bank": bank,
    "bank_step": dataclasses.replace(
      bank, dim=1, dtype="float32", stamps="bank"
    ),
  }


MODULE = types.SimpleNamespace(
  Model=Model,
  tables=tables,
  loss_fn=lambda predictions, aux, batch, config: task_losses(
    predictions, batch
  ),
)
OPTIMIZER = optimizer_lib.Config(
  sparse=optimizer_lib.SparseConfig(learning_rate=0.1)
)


def make_config(num_items=40, dtype="bfloat16", num_users=50):
  sizes = {**toy.SCHEMA.vocab_sizes, "item_id": num_items, "user_id": num_users}
  schema = dataclasses.replace(toy.SCHEMA, vocab_sizes=sizes)
  config = types.SimpleNamespace(tasks=("click",), dtype=dtype)
  method = Method("fake", MODULE, config, schema)
  return train_state.StepConfig(method, method.stages[0], OPTIMIZER, 10)


@functools.cache
def case(dtype="bfloat16"):
  config = make_config(dtype=dtype)
  state = jax.jit(lambda rng: train_state.init_state(rng, config))(
    jax.random.key(0)
  )
  step = jax.jit(functools.partial(train_state.train_step, config=config))
  return config, state, step


def bits(array):
  return np.ascontiguousarray(array).view(np.uint8)


class BankTest(parameterized.TestCase):
  @parameterized.parameters("float32", "bfloat16")
  def test_a_step_writes_what_the_model_gave_and_its_number(self, dtype):
    config, state, step = case(dtype)
    batch = toy.make_batch(num_padding=3)
    given = train_state.loss_and_gradients(state, batch, config)[1]["writes"]
    after, _ = step(state, batch)
    expected = np.zeros(after.tables["bank"].shape, np.float32)
    stamps = np.zeros(len(expected), np.float32)
    for item, row in zip(*map(np.asarray, given["bank"]), strict=True):
      if item >= 0:
        expected[item], stamps[item] = row, 1
    actual = np.asarray(after.tables["bank"])
    if dtype == "bfloat16":
      expected = np.asarray(jnp.asarray(expected).astype(jnp.bfloat16))
      actual = actual.view(expected.dtype)
    np.testing.assert_array_equal(actual, expected)
    self.assertGreater(np.abs(expected.astype(np.float32)).max(), 0)
    np.testing.assert_array_equal(after.tables["bank_step"][:, 0], stamps)
    seen = np.unique(np.asarray(batch.ids["item_id"])[:-3])
    np.testing.assert_array_equal(np.flatnonzero(stamps), seen)

  def test_the_next_step_reads_it_and_rows_not_written_stay(self):
    config, state, step = case()
    first, second = toy.make_batch(0), toy.make_batch(1)
    middle, _ = step(state, first)
    after, _ = step(middle, second)
    stamps = np.asarray(after.tables["bank_step"][:, 0])
    written = np.isin(np.arange(len(stamps)), second.ids["item_id"])
    np.testing.assert_array_equal(stamps[written], 2)
    for name in ("bank", "bank_step"):
      np.testing.assert_array_equal(
        bits(middle.tables[name])[~written], bits(after.tables[name])[~written]
      )
    rows = config.method.read(middle.tables, second)
    fresh = config.method.read(state.tables, second)
    predict = lambda rows: config.method.apply(  # noqa: E731
      state.params, state.tables, rows, second, train=False
    )[0]["click"]
    self.assertTrue(jnp.any(predict(rows) != predict(fresh)))

  def test_evaluation_reads_and_changes_nothing(self):
    config, state, step = case()
    state, _ = step(state, toy.make_batch())
    before = jax.tree.map(bits, state.tables)
    # Neither what the batch holds besides, nor its order, moves a prediction.
    batch = toy.make_batch(1)
    whole = evaluate.forward(state, batch, config.method)["predictions"]
    part = jax.tree.map(lambda x: x[:5], batch)
    alone = evaluate.forward(state, part, config.method)["predictions"]
    chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[:5], whole), alone, rtol=1e-6
    )
    chex.assert_trees_all_equal(before, jax.tree.map(bits, state.tables))

  def test_a_batch_that_is_not_finite_writes_nothing(self):
    _, state, step = case()
    state, _ = step(state, toy.make_batch())
    batch = toy.make_batch(1)
    bad = batch.replace(
      labels={"click": batch.labels["click"].at[0].set(jnp.inf)}
    )
    after, scalars = step(state, bad)
    self.assertEqual(scalars["skipped"][0], 1)
    chex.assert_trees_all_equal(
      jax.tree.map(bits, state.tables), jax.tree.map(bits, after.tables)
    )

  def test_it_is_no_parameter(self):
    config, state, _ = case()
    self.assertEqual(list(state.table_states), ["embedding"])
    grads = train_state.loss_and_gradients(state, toy.make_batch(), config)[1]
    self.assertEqual(list(grads["row_grads"]), ["embedding"])
    sparse = DIM * config.method.tables["embedding"].num_rows
    self.assertEqual(run_files.count_params(config.method)["sparse"], sparse)
    self.assertNotIn("bank", flops.count_params(config.method))

  def test_a_checkpoint_holds_it(self):
    _, state, step = case()
    state, _ = step(state, toy.make_batch())
    folder = self.enter_context(tempfile.TemporaryDirectory())
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state, {})
    checkpoints.close()
    target = parallel.place(parallel.Config()).restore_target(state)
    reader = Checkpoints(folder)
    chex.assert_trees_all_equal(reader.restore(1, target), state)
    reader.close()

  @parameterized.parameters(("mesh", 4, 2), ("pmap", 2, 1))
  def test_devices_write_what_one_writes(self, mode, data, model):
    config, state, step = case("float32")
    batch = toy.make_batch(num_padding=3)
    expected, _ = step(state, batch)
    placement = parallel.place(
      parallel.Config(mode=mode, data=data, model=model)
    )
    there = placement.init(lambda: jax.tree.map(jnp.asarray, state))
    run = placement.compile_step(
      lambda s, b, **kwargs: train_state.train_step(s, b, config, **kwargs),
      there,
    )
    actual = placement.canonical(run(there, placement.put_batch(batch))[0])
    for name in ("bank", "bank_step"):
      chex.assert_trees_all_close(
        np.asarray(actual.tables[name]), expected.tables[name], rtol=1e-5
      )

  def test_the_step_costs_what_it_writes_and_not_what_the_bank_holds(self):
    costs = []
    for num_items in (10_000, 10_000_000):
      config = make_config(num_items)
      state = jax.eval_shape(
        functools.partial(train_state.init_state, config=config),
        jax.random.key(0),
      )
      step = jax.jit(
        functools.partial(train_state.train_step, config=config),
        donate_argnums=0,
      )
      with pallas_kernels.use("xla"):
        compiled = step.lower(state, toy.make_batch()).compile()
      for name in ("bank", "bank_step"):
        self._check_no_copy(compiled.as_text(), state.tables[name])
      memory = compiled.memory_analysis()
      held = sum(x.size * x.dtype.itemsize for x in state.tables.values())
      self.assertGreaterEqual(memory.alias_size_in_bytes, held)
      costs.append((memory.temp_size_in_bytes, compiled.cost_analysis()))
    (small, few), (large, many) = costs
    self.assertLess(large, 1.1 * small)
    self.assertLess(many["flops"], 1.1 * few["flops"])

  def _check_no_copy(self, text, array):
    kind = {"float32": "f32", "uint16": "u16"}[array.dtype.name]
    shape = re.escape(f"{kind}[{','.join(str(n) for n in array.shape)}]")
    made = set(re.findall(rf"= {shape}\S* ([\w-]+)\(", text))
    self.assertContainsSubset(["parameter"], made)
    allowed = {"parameter", "scatter", "fusion", "get-tuple-element", "bitcast"}
    self.assertEqual(made - allowed, set())

  def test_a_write_to_what_is_no_bank_is_refused(self):
    config, state, _ = case()
    write = Writes(jnp.zeros(1, jnp.int32), jnp.zeros((1, DIM)))
    for name in ("embedding", "bank_step", "other"):
      with self.assertRaisesRegex(ValueError, f"{name}.*trained=False"):
        apply_writes(
          state.tables,
          {name: write},
          tables=config.method.tables,
          step=jnp.int32(1),
          keep=jnp.bool_(True),
        )

  def test_declarations_that_make_no_sense_are_refused(self):
    with self.assertRaisesRegex(ValueError, "only a bank stamps"):
      Table(4, 1, first_row={"a": 0}, stamps="bank")
    with self.assertRaisesRegex(ValueError, "read by features"):
      Table(4, 2, in_model=True, trained=False)
    with self.assertRaisesRegex(ValueError, "one column"):
      Table(4, 2, first_row={"a": 0}, trained=False, stamps="bank")


if __name__ == "__main__":
  absltest.main()
