"""One device, meshes and `pmap` give the same training."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from recjax import method as method_lib
from recjax import optimizer, parallel, train_state
from recjax.errors import UserError
from tests import toy

PLACEMENTS = {
  "1x8": parallel.Config(data=1, model=8),
  "2x4": parallel.Config(data=2, model=4),
  "8x1": parallel.Config(data=8, model=1),
  "pmap": parallel.Config(mode="pmap", data=8),
}
ONE = parallel.Config()
NAMED = [
  {"testcase_name": f"_{name}", "config": config}
  for name, config in PLACEMENTS.items()
]
TINY = {
  "tasks": ["click", "play_time"],
  "embed_dim": 4,
  "num_tokens": 2,
  "token_dim": 8,
  "num_layers": 1,
}
MEMORY = {
  "memory_layers": [0],
  "memory": {"num_keys": 8, "key_dim": 4, "top_k": 3},
}
# A step of SGD at rate 1 moves everything by its gradient.
PLAIN = optimizer.Config(
  name="sgd",
  learning_rate=1.0,
  clip_norm=None,
  sparse=optimizer.SparseConfig(name="sgd", learning_rate=1.0),
)
USUAL = optimizer.Config(
  learning_rate=0.003,
  weight_decay=0.01,
  warmup_steps=5,
  schedule="cosine",
  ema_decay=0.9,
)


@functools.cache
def step_config(name, stage=None):
  overrides = TINY | (MEMORY if name == "msn" else {})
  return train_state.StepConfig(
    method_lib.load(name, overrides, toy.SCHEMA),
    stage or method_lib.Stage(),
    PLAIN if name == "msn" else USUAL,
    num_steps=20,
    first_step=0 if stage is None else 20,
  )


@functools.cache
def initial(name):
  """The initial state on the host."""
  init = functools.partial(train_state.init_state, config=step_config(name))
  return jax.device_get(jax.jit(init)(jax.random.key(0)))


def put(placement, state):
  """A host's state in its place, as after a restore."""
  if isinstance(placement, parallel.PmapPlacement):
    return placement.from_canonical(state)
  placed = jax.device_put(state, placement.shardings(state))
  return placement.from_canonical(placed)


@functools.cache
def train(name, config, num_steps):
  """(state, scalars) on the host after some steps in a place."""
  placement = parallel.place(config)
  state, history = put(placement, initial(name)), []
  step = placement.compile_step(
    functools.partial(train_state.train_step, config=step_config(name)), state
  )
  for i in range(num_steps):
    batch = toy.make_batch(i % 3, num_padding=i % 4)
    state, scalars = step(state, placement.put_batch(batch))
    history.append(placement.scalars(scalars))
  if config.mode == "mesh":
    check_sharding(state)
    assert step._cache_size() == 1, "compiled more than once"
  return jax.device_get(placement.canonical(state)), history


def check_sharding(state):
  """Rows lie over `model`; everything else is on every device."""
  for leaf in jax.tree.leaves((state.tables, state.table_states)):
    assert leaf.sharding.spec == P("model"), leaf.sharding
    num_parts = leaf.sharding.mesh.shape["model"]
    rows = {part.data.shape[0] for part in leaf.addressable_shards}
    assert rows == {len(leaf) // num_parts}, rows
  for leaf in jax.tree.leaves((state.params, state.opt_state)):
    assert leaf.sharding.is_fully_replicated, leaf.sharding


class PlacementTest(parameterized.TestCase):
  @parameterized.named_parameters(NAMED)
  def test_20_steps_equal_those_of_one_device(self, config):
    expected, expected_scalars = train("rankmixer", ONE, 20)
    actual, scalars = train("rankmixer", config, 20)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(scalars, expected_scalars, rtol=1e-5, atol=1e-5)
    self.assertLess(scalars[-1]["loss"][0], scalars[0]["loss"][0])

  @parameterized.named_parameters(NAMED)
  def test_first_gradients_of_msn_equal_those_of_one_device(self, config):
    expected, _ = train("msn", ONE, 1)
    actual, _ = train("msn", config, 1)
    start = initial("msn")
    for part in ("params", "tables"):
      gradient = jax.tree.map(
        np.subtract, getattr(start, part), getattr(expected, part)
      )
      for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        self.assertGreater(np.abs(leaf).max(), 1e-6, path)
      chex.assert_trees_all_close(
        jax.tree.map(np.subtract, getattr(start, part), getattr(actual, part)),
        gradient,
        rtol=1e-5,
        atol=1e-5,
      )

  def test_a_state_is_born_sharded(self):
    placement = parallel.place(PLACEMENTS["2x4"])
    start = initial("msn")
    state = placement.init(
      lambda zero: jax.tree.map(lambda x: x + zero.astype(x.dtype), start),
      jnp.float32(0),
    )
    check_sharding(state)
    chex.assert_trees_all_equal(jax.device_get(state), start)

  def test_a_batch_is_split_over_data(self):
    for name, spec in (("2x4", P("data")), ("8x1", P("data"))):
      placement = parallel.place(PLACEMENTS[name])
      batch = placement.put_batch(toy.make_batch())
      for leaf in jax.tree.leaves(batch):
        self.assertEqual(leaf.sharding.spec, spec)
        parts = {part.data.shape[0] for part in leaf.addressable_shards}
        self.assertEqual(parts, {16 // placement.num_data})

  @parameterized.product(
    source=("one", *PLACEMENTS), target=("one", *PLACEMENTS)
  )
  def test_a_state_moves_between_places(self, source, target):
    source, target = (
      parallel.place(PLACEMENTS.get(name, ONE)) for name in (source, target)
    )
    start = initial("rankmixer")
    held = source.canonical(put(source, start))
    chex.assert_trees_all_equal(jax.device_get(held), start)
    shapes = target.restore_target(put(target, start))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, start)
    restored = jax.tree.map(
      lambda x, s: jax.device_put(np.asarray(x), s.sharding), held, shapes
    )
    placed = target.from_canonical(restored)
    chex.assert_trees_all_equal(jax.device_get(target.canonical(placed)), start)

  @parameterized.parameters("2x4", "pmap")
  def test_the_next_stage_starts_in_place(self, name):
    placement = parallel.place(PLACEMENTS[name])
    stage = method_lib.Stage("heads", trainable=("heads/.*",))
    config = step_config("rankmixer", stage)
    trained, _ = train("rankmixer", PLACEMENTS[name], 20)
    state = placement.transform(
      functools.partial(train_state.start_stage, config=config),
      put(placement, trained),
    )
    if name != "pmap":
      self.assertEqual(state.tables["embedding"].sharding.spec, P("model"))
    state = jax.device_get(placement.canonical(state))
    for part in ("step", "params", "tables", "table_states", "ema_params"):
      chex.assert_trees_all_equal(getattr(state, part), getattr(trained, part))
    fresh = config.dense_optimizer(state.params).init(state.params)
    chex.assert_trees_all_equal(state.opt_state, jax.device_get(fresh))

  @parameterized.named_parameters(
    {"testcase_name": "_one", "config": ONE}, *NAMED
  )
  def test_evaluation_sees_the_whole_batch(self, config):
    placement = parallel.place(config)
    state = put(placement, initial("rankmixer"))
    batch = toy.make_batch()

    def summarize(state, batch):
      table = state.tables["embedding"]
      return {"labels": batch.labels["play_time"], "sum": table.sum()}

    out = placement.compile_eval(summarize)(
      placement.eval_state(state), placement.put_batch(batch)
    )
    np.testing.assert_array_equal(out["labels"], batch.labels["play_time"])
    np.testing.assert_allclose(
      out["sum"], initial("rankmixer").tables["embedding"].sum(), rtol=1e-4
    )


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"mode": "jit"}, "parallel.mode must be.*'jit'"),
    ({"mode": "pmap", "model": 2}, "parallel.model must be 1, got 2"),
    ({"data": 3, "model": 3}, "needs 9 devices, 8 are there"),
    ({"data": 0, "model": 9}, "devices, 8 are there"),
    ({"data": -1}, "parallel.data=-1"),
    ({"model": 0}, "parallel.model=0"),
  )
  def test_a_mistake_is_a_user_error(self, values, message):
    with self.assertRaisesRegex(UserError, message):
      parallel.Config(**values)

  def test_zero_takes_all_devices(self):
    mesh = parallel.make_mesh(parallel.Config(data=0, model=2))
    self.assertEqual(dict(mesh.shape), {"data": 4, "model": 2})
    placement = parallel.place(parallel.Config(mode="pmap", data=0))
    self.assertEqual(placement.num_data, 8)


if __name__ == "__main__":
  absltest.main()
