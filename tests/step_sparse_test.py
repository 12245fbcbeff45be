"""The step's promise: it costs, moves and keeps what it touches, no more."""

import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import toy
from absl.testing import absltest, parameterized

import pallas_kernels
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import train_state
from recjax.sparse import in_model
from recjax.sparse import table as table_lib
from tests import sparse_oracle

# A table must dwarf everything else that a step holds.
NUM_USERS = 1_000_000
LARGE_SIZES = {**toy.SCHEMA.vocab_sizes, "user_id": NUM_USERS}
LARGE_KEYS = 512

_TOKENS = dict(num_tokens=2, token_dim=16, num_layers=1, embed_dim=16)
_MEMORY = dict(num_keys=4, key_dim=4, top_k=3)
_MSN = dict(_TOKENS, memory_layers=(0,), memory=_MEMORY)
MODELS = {
  "dlrm_mlp": ("dlrm_mlp", dict(mlp_dims=(4,))),
  "dcnv2": (
    "dcnv2",
    dict(mlp_dims=(4,), low_rank=3, memory_layers=(0,), memory=_MEMORY),
  ),
  "din": ("din", dict(mlp_dims=(4,), attention_dims=(4,))),
  "wukong": (
    "wukong",
    dict(
      mlp_dims=(4,),
      fm_mlp_dims=(4,),
      num_fm=3,
      num_linear=2,
      dense_mlp_dims=(4,),
    ),
  ),
  "rankmixer": ("rankmixer", _TOKENS),
  "msn": ("msn", dict(_MSN, memory=dict(_MEMORY, num_heads=2))),
  "msn_per_sample": (
    "msn",
    dict(
      _MSN,
      memory=dict(
        _MEMORY,
        query_scope="per_sample",
        value_scope="per_token",
        value_dtype="bfloat16",
      ),
    ),
  ),
}
OPTIMIZER = optimizer_lib.Config(
  # The decay moves each row that is touched, also where its gradient is zero.
  sparse=optimizer_lib.SparseConfig(learning_rate=0.1, weight_decay=0.3)
)


def _config(name, large=False):
  """A step of the model `name`, with tables of a million rows if `large`."""
  schema, (model, config) = toy.SCHEMA, MODELS[name]
  if large:
    schema = dataclasses.replace(schema, vocab_sizes=LARGE_SIZES)
    if "memory" in config:
      config = dict(config, memory=dict(config["memory"], num_keys=LARGE_KEYS))
  method = method_lib.load(model, config, schema)
  return train_state.StepConfig(method, method.stages[0], OPTIMIZER, 10)


def _state(config):
  """A state of random numbers; spares the compilation of an initialiser."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(
    functools.partial(train_state.init_state, config=config), jax.random.key(0)
  )
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

  def random(x):
    return rng.standard_normal(x.shape, np.float32) * np.float32(0.5)

  tables = {
    table_name: np.asarray(
      table_lib.to_storage(jnp.asarray(random(values)), table)
    )
    for table_name, table in config.method.tables.items()
    for values in [shapes.tables[table_name]]
  }
  state = zeros.replace(
    params=jax.tree.map(random, zeros.params),
    tables=tables,
    table_states=jax.tree.map(lambda x: np.abs(random(x)), zeros.table_states),
  )
  return jax.tree.map(jnp.asarray, state)


def _batch():
  """Two of eight examples are padding; no valid position names row 0."""
  batch = toy.make_batch(seed=1, size=8, num_padding=2)
  ids = {}
  for name, values in batch.ids.items():
    mask = batch.id_mask.get(name, batch.example_mask)
    ids[name] = jnp.where(mask & (values == 0), 1, values)
  return batch.replace(ids=ids)


def _read_ids(config, state, batch):
  """Table -> the set of rows that valid examples read."""
  method, found = config.method, {}
  for name, table in method.tables.items():
    if table.in_model:
      continue
    found[name] = set()
    for feature, first_row in table.first_row.items():
      mask = batch.id_mask.get(feature, batch.example_mask)
      ids = np.asarray(batch.ids[feature])[np.asarray(mask)]
      found[name] |= set((ids + first_row).tolist())
  rows = method.read(state.tables, batch)
  reads = method.apply(state.params, state.tables, rows, batch, train=False)[2]
  for name, read in reads.items():
    ids = np.asarray(read["ids"])[:, np.asarray(batch.example_mask)]
    found[name] = set(ids.reshape(-1).tolist())
  return found


def _dense_read(values, ids, weights, tap=None):
  """The reference of an in-model read: indexing that autodiff sees through."""
  del tap
  if values.dtype == jnp.uint16:
    values = jax.lax.bitcast_convert_type(values, jnp.bfloat16)
  return jnp.einsum(
    "...k,...kd->...d", weights, values.at[ids].get(mode="clip")
  )


def _dense_loss(tables, params, batch, config):
  """The whole loss with plain float tables indexed inside it."""
  method, rows = config.method, {}
  for name, table in method.tables.items():
    if not table.in_model:
      # Row 0 stands in where a mask hides the position from the model.
      parts = [
        tables[name][batch.ids[feature] + first_row].reshape(-1, table.dim)
        for feature, first_row in table.first_row.items()
      ]
      rows[name] = jnp.concatenate(parts)
  with mock.patch.object(in_model, "weighted_gather", _dense_read):
    predictions, aux, _ = method.apply(
      params, tables, rows, batch, train=True, rng=jax.random.key(0)
    )
  terms = method.module.loss_fn(predictions, aux, batch, method.config)
  return sum(total / weight for total, weight in terms.values())


class StepTest(parameterized.TestCase):
  @parameterized.parameters(*MODELS)
  def test_gradients_equal_the_dense_reference(self, name):
    config, batch = _config(name), _batch()
    state = _state(config)

    def both(state, batch):
      _, sparse = train_state.loss_and_gradients(state, batch, config)
      tables = {
        name: table_lib.from_storage(values, config.method.tables[name])
        for name, values in state.tables.items()
      }
      dense = jax.grad(_dense_loss, argnums=(0, 1))(
        tables, state.params, batch, config
      )
      return (sparse["row_grads"], sparse["params"]), dense

    (reads, params), (dense_tables, dense_params) = jax.jit(both)(state, batch)
    self.assertEqual(set(reads), set(config.method.tables))
    for name, read in reads.items():
      total = sparse_oracle.dense_gradient(read, dense_tables[name].shape)
      expected = np.asarray(dense_tables[name])
      self.assertGreater(np.abs(expected).max(), 1e-4)
      np.testing.assert_allclose(
        total, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max()
      )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
      params,
      dense_params,
    )

  @parameterized.product(name=tuple(MODELS), is_bad=(False, True))
  def test_only_rows_that_were_read_change(self, name, is_bad):
    config, batch = _config(name), _batch()
    state = _state(config)
    if is_bad:
      batch = batch.replace(dense=batch.dense.at[0, 0].set(jnp.nan))
    new, scalars = _small_step(name)(state, batch)
    self.assertEqual(float(scalars["skipped"][0]), is_bad)
    self.assertEqual(int(new.step), 1)
    read = _read_ids(config, state, batch)
    for name, before in state.tables.items():
      expected = set() if is_bad else read[name]
      self.assertNotIn(0, expected if name == "embedding" else ())
      self.assertEqual(_changed(before, new.tables[name]), expected)
      for key, values in state.table_states[name].items():
        self.assertEqual(
          _changed(values, new.table_states[name][key]), expected
        )

  @parameterized.product(
    name=("rankmixer", "msn", "msn_per_sample", "dcnv2", "din", "wukong"),
    implementation=("xla", "cpu"),
  )
  def test_compiled_step_has_no_copy_of_a_table(self, name, implementation):
    config = _config(name, large=True)
    state = jax.eval_shape(
      functools.partial(train_state.init_state, config=config),
      jax.random.key(0),
    )
    with pallas_kernels.use(implementation):
      compiled = _step(config).lower(state, _batch()).compile()
    writer = {"xla": "scatter", "cpu": "get-tuple-element"}[implementation]
    text, memory = compiled.as_text(), compiled.memory_analysis()
    held = jax.tree.leaves((state.tables, state.table_states))
    for leaf in held:
      self._check_no_copy(text, leaf, writer)
    smallest = min(_num_bytes(table) for table in state.tables.values())
    self.assertLess(memory.temp_size_in_bytes, smallest)
    self.assertGreaterEqual(
      memory.alias_size_in_bytes, sum(_num_bytes(leaf) for leaf in held)
    )

  def _check_no_copy(self, text, leaf, writer):
    kind = {"float32": "f32", "uint16": "u16"}[leaf.dtype.name]
    shape = re.escape(f"{kind}[{','.join(str(n) for n in leaf.shape)}]")
    made = re.findall(rf"= {shape}\S* ([\w-]+)\(", text)
    # The pattern must fit the text that this compiler writes.
    self.assertContainsSubset(["parameter", writer], made)
    # Anything else (copy, select, convert, broadcast) would sweep the table.
    allowed = {"parameter", "scatter", "fusion", "get-tuple-element", "bitcast"}
    self.assertEqual(set(made) - allowed, set())

  def test_the_check_sees_a_choice_between_two_tables(self):
    config = _config("rankmixer", large=True)
    table = jax.ShapeDtypeStruct(config.method.tables["embedding"].shape, "f4")

    def step(values, ids, ok):
      return jnp.where(ok, values.at[ids].add(1.0), values)

    compiled = (
      jax.jit(step, donate_argnums=0)
      .lower(table, jnp.arange(8), jnp.bool_(True))
      .compile()
    )
    with self.assertRaises(AssertionError):
      self._check_no_copy(compiled.as_text(), table, "scatter")


def _step(config):
  return jax.jit(
    functools.partial(train_state.train_step, config=config), donate_argnums=0
  )


@functools.cache
def _small_step(name):
  return jax.jit(
    functools.partial(train_state.train_step, config=_config(name))
  )


def _changed(before, after):
  """Rows with any bit changed."""
  before, after = np.asarray(before), np.asarray(after)
  differs = before.view(np.uint8) != after.view(np.uint8)
  rows = differs.reshape(len(before), -1).any(axis=-1)
  return set(np.flatnonzero(rows).tolist())


def _num_bytes(array):
  return array.size * array.dtype.itemsize


if __name__ == "__main__":
  absltest.main()
