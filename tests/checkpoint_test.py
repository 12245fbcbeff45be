"""Checkpoints hold a state exactly and fit every placement."""

import functools
import json

import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized

from recjax import method as method_lib
from recjax import optimizer, parallel, train_state
from recjax.checkpoint import Checkpoints
from recjax.errors import UserError
from tests import run_case, toy

PLACES = {
  "one": parallel.Config(),
  "mesh": parallel.Config(data=2, model=4),
  "pmap": parallel.Config(mode="pmap", data=8),
}


def init(config, seed=0, **model):
  """A state in its place, with moments and averages."""
  model = {"embed_dim": 4, "mlp_dims": [8]} | model
  step_config = train_state.StepConfig(
    method_lib.load("dlrm_mlp", model, toy.SCHEMA),
    method_lib.Stage(),
    optimizer.Config(ema_decay=0.9),
    num_steps=1,
  )
  return parallel.place(config).init(
    functools.partial(train_state.init_state, config=step_config),
    jax.random.key(seed),
  )


class CheckpointsTest(run_case.RunTestCase):
  def open(self, **kwargs):
    checkpoints = Checkpoints(self.directory, **kwargs)
    self.addCleanup(checkpoints.close)
    return checkpoints

  @parameterized.parameters(
    ("mesh", "one"), ("one", "mesh"), ("mesh", "pmap"), ("pmap", "mesh")
  )
  def test_a_state_moves_between_places(self, source, target):
    source_config, target_config = PLACES[source], PLACES[target]
    source, target = map(parallel.place, (source_config, target_config))
    state = init(source_config)
    held = jax.device_get(source.canonical(state))
    checkpoints = self.open()
    checkpoints.save(3, source.canonical(state), {"loader": {"next": 1}})
    checkpoints.close()

    checkpoints = self.open()
    self.assertEqual(checkpoints.latest_step, 3)
    self.assertEqual(checkpoints.record(3), {"loader": {"next": 1}})
    other = init(target_config, seed=1)
    restored = target.from_canonical(
      checkpoints.restore(3, target.restore_target(other))
    )
    chex.assert_trees_all_equal(
      jax.device_get(target.canonical(restored)), held
    )
    for leaf, wanted in zip(
      jax.tree.leaves(restored), jax.tree.leaves(other), strict=True
    ):
      self.assertTrue(
        leaf.sharding.is_equivalent_to(wanted.sharding, wanted.ndim)
      )

  def test_a_save_is_not_disturbed_by_later_steps(self):
    state = init(PLACES["one"])
    held = jax.tree.map(np.array, jax.device_get(state))
    checkpoints = self.open()
    checkpoints.save(1, state, {})
    zero = jax.jit(
      lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0
    )
    jax.block_until_ready(zero(state))
    target = parallel.place(PLACES["one"]).restore_target(init(PLACES["one"]))
    checkpoints.close()
    restored = self.open().restore(1, target)
    chex.assert_trees_all_equal(jax.device_get(restored), held)

  def test_keeps_the_newest_and_the_best(self):
    checkpoints = self.open(keep=2)
    state = {"x": np.zeros(2)}
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2), (6, 5)):
      checkpoints.save(step, state, {}, best_step=best)
    checkpoints.close()
    self.assertEqual(self.steps_kept("."), [5, 6])
    checkpoints = self.open(keep=2)
    for step, best in ((7, 5), (8, 5), (9, None)):
      checkpoints.save(step, state, {}, best_step=best)
      checkpoints.close()
      self.assertEqual(
        self.steps_kept("."), {7: [5, 6, 7], 8: [5, 7, 8], 9: [8, 9]}[step]
      )
      checkpoints = self.open(keep=2)

  def test_a_saved_step_is_left_alone(self):
    checkpoints = self.open()
    checkpoints.save(1, {"x": np.zeros(2)}, {"first": True})
    checkpoints.save(1, {"x": np.ones(2)}, {"first": False})
    self.assertEqual(checkpoints.record(1), {"first": True})

  def test_records_keep_numbers_exactly(self):
    record = {"window": {"b": [0.1 + 0.2, 3.0], "a": [1 / 3, 1e-300]}}
    checkpoints = self.open()
    checkpoints.save(1, {"x": np.zeros(2)}, record)
    restored = checkpoints.record(1)
    self.assertEqual(json.dumps(restored), json.dumps(record))

  def test_what_is_no_whole_checkpoint_is_not_seen(self):
    checkpoints = self.open()
    self.assertIsNone(checkpoints.latest_step)
    checkpoints.save(1, {"x": np.zeros(2)}, {})
    checkpoints.close()
    (self.directory / "checkpoints" / "2.orbax-checkpoint-tmp-7").mkdir()
    self.assertEqual(self.open().latest_step, 1)

  @parameterized.parameters(
    (
      {"embed_dim": 8},
      r"\(.*kernel.*: float32\[25, 8\] there, float32\[45, 8\]",
    ),
    ({"mlp_dims": [8, 8]}, r"\(.*mlp_1.*: None there, float32"),
    ({"mlp_dims": []}, r"\(.*: float32.* there, .* asked for"),
  )
  def test_another_model_is_a_user_error(self, model, message):
    checkpoints = self.open()
    checkpoints.save(1, init(PLACES["one"]), {})
    target = parallel.place(PLACES["one"]).restore_target(
      init(PLACES["one"], **model)
    )
    with self.assertRaisesRegex(
      UserError, f"checkpoints/1: .*{message}.*--workdir"
    ) as caught:
      checkpoints.restore(1, target)
    self.assertNotIn("\n", str(caught.exception))


class MovedRunTest(run_case.RunTestCase):
  def test_a_run_goes_on_in_another_place(self):
    config = run_case.make_config(model__dropout_rate=0.0)
    expected = self.run_once(config, "whole")
    places = ({"data": 2, "model": 4}, {"mode": "pmap", "data": 2}, {})
    for step, place in zip((3, 7, None), places, strict=True):
      config["parallel"] = place
      if step is None:
        result = self.run_once(config)
      else:
        self.run_until(step, config)
    self.assertEqual(result["best_step"], expected["best_step"])
    for name, value in expected["metrics"].items():
      self.assertAlmostEqual(result["metrics"][name], value, places=3, msg=name)
    chex.assert_trees_all_close(
      self.state(12, config), self.state(12, config, "whole"), atol=1e-4
    )
    for line, other in zip(self.lines(), self.lines("whole"), strict=True):
      self.assertEqual(list(line), list(other))


if __name__ == "__main__":
  absltest.main()
