"""Runs end as they should: whole, cut off and resumed, staged or stopped."""

import math
import random
import signal
import time
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import sklearn.metrics
from absl.testing import absltest, parameterized

from recjax import losses, run_files, train
from recjax import method as method_lib
from recjax.checkpoint import Checkpoints
from recjax.data.pipeline import open_dataset
from recjax.errors import UserError
from recjax.method import Stage
from tests import run_case

# Overfits from the first evaluation, so that the best step is an old one and
# patience runs out; lines of training scalars fall beside the checkpoints.
RESUMED = dict(
  num_train_steps=40,
  eval_every_steps=4,
  log_every_steps=5,
  keep_checkpoints=1,
  early_stop_patience=3,
  monitor="valid/click/logloss",
)


def resumed_config():
  return run_case.changed(
    run_case.make_config(),
    train=RESUMED,
    optimizer={"learning_rate": 0.1, "ema_decay": 0.5},
  )


class ResumeTest(run_case.RunTestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    workdir = run_case.shared_directory() / "undisturbed"
    cls.expected = train.train_and_evaluate(resumed_config(), str(workdir))

  def check(self, config):
    """The run in `run` ended as the undisturbed one."""
    result = self.run_once(config)
    for key in ("steps", "best_step", "metrics"):
      self.assertEqual(result[key], self.expected[key], key)
    undisturbed = run_case.shared_directory() / "undisturbed"
    self.assertEqual(self.lines(), self.lines(undisturbed))
    self.assertEqual(self.steps_kept(), self.steps_kept(undisturbed))
    for step in self.steps_kept():
      chex.assert_trees_all_equal(
        self.state(step, config), self.state(step, config, undisturbed)
      )

  def test_the_undisturbed_run_stops_early_after_its_best_step(self):
    self.assertEqual(self.expected["steps"], self.expected["best_step"] + 3 * 4)
    self.assertLess(self.expected["steps"], 40)
    self.assertEqual(
      self.steps_kept(run_case.shared_directory() / "undisturbed"),
      [self.expected["best_step"], self.expected["steps"]],
    )

  def test_a_run_that_was_told_to_end_goes_on_as_if_it_had_not(self):
    config = resumed_config()
    # An evaluation after the best one, and beside all lines of scalars.
    step = self.expected["best_step"] + 6
    step += step % RESUMED["log_every_steps"] == 0
    child = run_case.start_child(
      config,
      self.directory / "run",
      setup=f"""
update = train.Progress.update
def update_and_stop(progress, now, **kwargs):
  update(progress, now, **kwargs)
  if now == {step}:
    os.kill(os.getpid(), 15)
train.Progress.update = update_and_stop
""",
    )
    self.assertEqual(
      child.wait(100), 0, (self.directory / "run.log").read_text()
    )
    self.assertFalse((self.directory / "run" / "result.json").exists())
    self.assertIn(step, self.steps_kept())
    self.check(config)

  def test_a_killed_run_goes_on_as_if_it_had_not_been(self):
    config = resumed_config()
    child = run_case.start_child(
      config,
      self.directory / "run",
      setup="""
update = train.Progress.update
def update_slowly(progress, now, **kwargs):
  update(progress, now, **kwargs)
  time.sleep(0.05)
train.Progress.update = update_slowly
""",
    )
    checkpoints = self.directory / "run" / "checkpoints"
    deadline = time.monotonic() + 100
    while not (checkpoints / "4").exists():
      self.assertIsNone(child.poll(), "ended before its first checkpoint")
      self.assertLess(time.monotonic(), deadline)
      time.sleep(0.01)
    pause = random.uniform(0.0, 0.6)
    time.sleep(pause)
    child.kill()
    code = child.wait(10)
    with self.subTest(f"killed {pause:.3f} s after the first checkpoint"):
      self.assertEqual(code, -signal.SIGKILL)
      self.check(config)

  @parameterized.parameters("before a checkpoint", "before the result")
  def test_nothing_is_written_twice_after_a_crash(self, moment):
    config, save = resumed_config(), Checkpoints.save

    def save_or_crash(checkpoints, step, *args, **kwargs):
      if step == 8:
        raise RuntimeError("crash")
      save(checkpoints, step, *args, **kwargs)

    def crash(*unused, **unused_too):
      raise RuntimeError("crash")

    patch = (
      mock.patch.object(Checkpoints, "save", save_or_crash)
      if moment == "before a checkpoint"
      else mock.patch.object(run_files, "write_result", crash)
    )
    with patch, self.assertRaisesRegex(RuntimeError, "crash"):
      self.run_once(config)
    self.check(config)


def click_and_penalty(predictions, aux, batch, config):
  del aux, config
  terms = losses.task_losses(predictions, batch)
  return terms | {"penalty": (jnp.sum(predictions["click"] ** 2), 16.0)}


BODY = Stage("body", trainable=("embedding", "inputs/.*", "hidden/.*"))
HEAD = Stage("head", trainable=("heads/.*",), loss_fn=click_and_penalty)
AFRESH = Stage("head", trainable=("heads/.*",), initialize_from="scratch")
SGD = dict(
  name="sgd",
  learning_rate=0.25,
  clip_norm=None,
  sparse={"name": "sgd", "learning_rate": 0.5},
)


def double_gradient(loss, variables):
  value, grads = jax.value_and_grad(loss, has_aux=True)(variables)
  return value, jax.tree.map(lambda g: 2 * g, grads)


class StagesTest(run_case.RunTestCase):
  @property
  def whole(self):
    """Where the run of BODY and HEAD lies that several tests read."""
    return run_case.shared_directory() / "staged"

  def staged_config(self, *stages, **parts):
    """12 steps in two halves; all checkpoints stay."""
    self.module = run_case.make_method(STAGES=stages, **parts)
    self.use_method(self.module)
    return run_case.changed(
      run_case.make_config("toy"),
      train={"keep_checkpoints": 20, "log_every_steps": 1},
      optimizer={"ema_decay": 0.5},
    )

  def initial(self, config, rng):
    columns = open_dataset(config["data"])
    method = method_lib.load("toy", config["model"], columns.schema)
    return jax.device_get(jax.jit(method.init)(rng))

  def test_what_is_frozen_stays_and_the_rest_moves(self):
    config = self.staged_config(BODY, HEAD)
    self.run_once(config, self.whole)
    params, tables = self.initial(config, jax.random.key(config["seed"]))
    for step in (4, 6):
      state = self.state(step, config, self.whole, stage=0)
      chex.assert_trees_all_equal(state.params["heads"], params["heads"])
      self.assert_all_moved(state.params["hidden"], params["hidden"])
      self.assert_all_moved(state.tables, tables)
    border = state
    for step in (8, 12):
      state = self.state(step, config, self.whole, stage=1)
      chex.assert_trees_all_equal(
        state.params["hidden"], border.params["hidden"]
      )
      chex.assert_trees_all_equal(state.tables, border.tables)
      chex.assert_trees_all_equal(state.table_states, border.table_states)
      self.assert_all_moved(state.params["heads"], border.params["heads"])

  def assert_all_moved(self, new, old):
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
      self.assertFalse(np.array_equal(a, b))

  def test_each_stage_has_its_own_loss_and_evaluations(self):
    result = self.run_once(self.staged_config(BODY, HEAD), self.whole)
    self.assertEqual(result["steps"], 12)
    self.assertGreater(result["best_step"], 6)
    lines = self.lines(self.whole)
    own = [line["step"] for line in lines if "train/penalty" in line]
    self.assertEqual(own, list(range(7, 13)))
    evaluated = [line["step"] for line in lines if "valid/click/auc" in line]
    self.assertEqual(evaluated, [4, 6, 8, 12])

  def test_a_stage_from_scratch_forgets_everything_but_the_step(self):
    config = self.staged_config(BODY, AFRESH)
    self.run_once(config)
    rng = jax.random.fold_in(jax.random.key(config["seed"]), 6)
    params, tables = self.initial(config, rng)
    state = self.state(12, config, stage=1)
    self.assertEqual(state.step, 12)
    chex.assert_trees_all_equal(state.params["hidden"], params["hidden"])
    chex.assert_trees_all_equal(state.tables, tables)
    for moments in jax.tree.leaves(state.table_states):
      np.testing.assert_array_equal(moments, np.zeros_like(moments))

  def test_a_run_goes_on_in_its_stage(self):
    config = self.staged_config(BODY, HEAD)
    expected = self.run_once(config, self.whole)
    last = self.state(12, config, self.whole, stage=1)
    # At the border of the stages and in the second.
    for step in (6, 9):
      with self.subTest(step):
        workdir = f"until_{step}"
        self.run_until(step, config, workdir)
        result = self.run_once(config, workdir)
        self.assertEqual(result["metrics"], expected["metrics"])
        self.assertEqual(self.lines(workdir), self.lines(self.whole))
        chex.assert_trees_all_equal(
          self.state(12, config, workdir, stage=1), last
        )

  def test_a_method_shapes_its_own_gradient(self):
    config = run_case.changed(
      self.staged_config(Stage()), optimizer=SGD, train={"num_train_steps": 4}
    )
    twice = {
      "learning_rate": 0.5,
      "sparse": {"name": "sgd", "learning_rate": 1.0},
    }
    self.run_once(run_case.changed(config, optimizer=twice), "faster")
    self.module.gradient_fn = double_gradient
    self.run_once(config, "doubled")
    faster, doubled = (
      self.state(4, config, name) for name in ("faster", "doubled")
    )
    chex.assert_trees_all_equal(doubled.params, faster.params)
    chex.assert_trees_all_equal(doubled.tables, faster.tables)


def break_on_partial_batch(predictions, aux, batch, config):
  """Divides by zero at step 8, the last of an epoch."""
  del aux, config
  is_whole = jnp.all(batch.example_mask).astype(jnp.float32)
  terms = losses.task_losses(predictions, batch)
  return {name: (total / is_whole, w) for name, (total, w) in terms.items()}


class NonFiniteTest(run_case.RunTestCase):
  def broken_config(self, **values):
    self.use_method(run_case.make_method(loss_fn=break_on_partial_batch))
    return run_case.changed(
      run_case.make_config("toy"),
      train=values,
      optimizer={"ema_decay": 0.5, "weight_decay": 0.1},
    )

  @parameterized.named_parameters(("beside", 3, 6), ("at", 4, 4))
  def test_stops_and_keeps_the_last_good_checkpoint(self, every, good):
    config = self.broken_config(eval_every_steps=every)
    for _ in range(2):
      with self.assertRaisesRegex(UserError, "not finite at step 8;"):
        self.run_once(config)
      self.assertEqual(self.steps_kept()[-1], good)
    state = self.state(good, config)
    self.assertEqual(state.step, good)
    chex.assert_tree_all_finite(state)

  def test_skips_and_counts(self):
    config = self.broken_config(
      non_finite="skip",
      num_train_steps=9,
      checkpoint_every_steps=1,
      log_every_steps=1,
      keep_checkpoints=20,
    )
    self.assertEqual(self.run_once(config)["steps"], 9)
    skipped = {
      line["step"]: line["train/skipped"]
      for line in self.lines()
      if "train/skipped" in line
    }
    self.assertEqual(skipped, {n: float(n == 8) for n in range(1, 10)})
    before, after, last = (self.state(n, config) for n in (7, 8, 9))
    self.assertEqual([after.step, after.num_skipped], [8, 1])
    self.assertEqual([last.step, last.num_skipped], [9, 1])
    chex.assert_trees_all_equal(
      before.replace(step=after.step, num_skipped=after.num_skipped), after
    )
    chex.assert_tree_all_finite(last)
    self.assertFalse(
      np.array_equal(after.tables["embedding"], last.tables["embedding"])
    )


NAN = math.nan


class BestStepTest(run_case.RunTestCase):
  def scripted_config(self, scores, name="score", **values):
    """A run whose monitor takes the given values, at steps 2, 4, 6, ..."""
    scores = iter([*scores, *[NAN] * 9])
    self.use_method(
      run_case.make_method(
        diagnostics=lambda counters: {name: next(scores)},
        STAGES=values.pop("stages", (Stage(),)),
      )
    )
    values = {"eval_every_steps": 2, "monitor": f"valid/{name}"} | values
    return run_case.changed(run_case.make_config("toy"), train=values)

  @parameterized.named_parameters(
    ("highest", "score", [-2, -1, -3, -4, -5, -6], 4, [4, 10, 12]),
    ("lowest_log_loss", "x/logloss", [5, 1, 3, 4, 5, 6], 4, [4, 10, 12]),
    ("lowest_rmse", "x/rmse", [5, 4, 3, 4, 0, 6], 10, [10, 12]),
    ("first_of_equals", "score", [0, 7, 7, 7, 7, 7], 4, [4, 10, 12]),
    ("defined", "score", [NAN, 2, NAN, 1, NAN, NAN], 4, [4, 10, 12]),
  )
  def test_keeps_the_newest_and_the(self, name, scores, best, kept):
    config = self.scripted_config(scores, name)
    result = self.run_once(config)
    self.assertEqual(result["best_step"], best)
    self.assertEqual(result["metrics"][f"valid/{name}"], scores[best // 2 - 1])
    self.assertEqual(self.steps_kept(), kept)

  def test_an_undefined_monitor_leaves_the_last_step(self):
    result = self.run_once(self.scripted_config([]))
    self.assertIsNone(result["best_step"])
    self.assertNotIn("valid/score", result["metrics"])
    self.assertIn("test/click/auc", result["metrics"])

  def test_a_resumed_run_remembers_the_best(self):
    config = self.scripted_config([2, 9, 3, 4, 5, 6])
    self.run_until(7, config)
    self.assertEqual(self.steps_kept(), [4, 6, 7])
    self.assertEqual(self.run_once(config)["best_step"], 4)
    self.assertEqual(self.steps_kept(), [4, 10, 12])

  def test_the_best_of_the_last_stage_counts(self):
    config = self.scripted_config(
      [7, 8, 9, 3, 2, 1], stages=(BODY, HEAD), keep_checkpoints=1
    )
    result = self.run_once(config)
    self.assertEqual(result["best_step"], 8)
    self.assertEqual(result["metrics"]["valid/score"], 3)
    self.assertEqual(self.steps_kept(), [8, 12])

  @parameterized.parameters(
    ([1, 3, 2, 3, 9, 9], 2, 8),
    ([1, 3, 2, 4, 3, 9], 2, 12),
    ([5, 4, 3, 2, 1, 0], 0, 12),
    ([NAN, NAN, 1, 1, 1, 1], 2, 4),
  )
  def test_ends_when_patience_does(self, scores, patience, end):
    config = self.scripted_config(scores, early_stop_patience=patience)
    self.assertEqual(self.run_once(config)["steps"], end)

  def test_an_early_stop_ends_its_stage_only(self):
    config = self.scripted_config(
      [2, 1, 5, 6, 7, 8], stages=(BODY, HEAD), early_stop_patience=1
    )
    result = self.run_once(config)
    # Six steps of the second stage follow four of the first.
    self.assertEqual([result["steps"], result["best_step"]], [10, 10])

  def test_an_unknown_monitor_is_a_user_error(self):
    config = run_case.make_config(train__monitor="valid/click/acu")
    with self.assertRaisesRegex(UserError, "monitor.*did you.*click/auc"):
      self.run_once(config)


class EvaluatedStateTest(run_case.RunTestCase):
  """Test metrics come from the right parameters."""

  def logloss(self, config, step, workdir, *, params):
    """AUC on the test part, from a checkpoint and scikit-learn."""
    columns = open_dataset(config["data"])
    method = method_lib.load("dlrm_mlp", config["model"], columns.schema)
    state = jax.tree.map(jnp.asarray, self.state(step, config, workdir))
    rows = np.arange(run_case.ROWS["test"])
    batch = jax.tree.map(jnp.asarray, columns.read("test", rows))
    scores, *_ = method.apply(
      getattr(state, params),
      state.tables,
      method.read(state.tables, batch),
      batch,
      train=False,
    )
    return sklearn.metrics.log_loss(
      batch.labels["click"], jax.nn.sigmoid(scores["click"])
    )

  def test_test_metrics_are_those_of_the_average_at_the_best_step(self):
    config = resumed_config()
    workdir = run_case.shared_directory() / "undisturbed"
    result = self.run_once(config, workdir)
    actual = result["metrics"]["test/click/logloss"]
    best, last = result["best_step"], result["steps"]
    self.assertLess(best, last)
    self.assertAlmostEqual(
      actual, self.logloss(config, best, workdir, params="ema_params"), places=6
    )
    for step, params in ((last, "ema_params"), (best, "params")):
      other = self.logloss(config, step, workdir, params=params)
      self.assertNotAlmostEqual(actual, other, places=4)

  def test_the_average_follows_its_recurrence(self):
    config = run_case.make_config(
      optimizer__ema_decay=0.4,
      train__num_train_steps=6,
      train__checkpoint_every_steps=1,
      train__keep_checkpoints=20,
    )
    self.run_once(config)
    average = self.state(1, config).ema_params
    for step in range(2, 7):
      state = self.state(step, config)
      decay = min(0.4, step / (9 + step))
      average = jax.tree.map(
        lambda a, p, d=decay: d * a + (1 - d) * p, average, state.params
      )
    chex.assert_trees_all_close(state.ema_params, average, rtol=1e-5, atol=1e-6)

  def test_bfloat16_comes_near_float32(self):
    config = run_case.make_config(
      model__dropout_rate=0.0, train__num_train_steps=4
    )
    exact = self.run_once(config, "float32")
    config = run_case.changed(config, model={"dtype": "bfloat16"})
    result = self.run_once(config, "bfloat16")
    name = "test/click/logloss"
    self.assertNotEqual(result["metrics"][name], exact["metrics"][name])
    self.assertAlmostEqual(
      result["metrics"][name], exact["metrics"][name], delta=0.01
    )
    with np.load(self.directory / "bfloat16" / "predictions.npz") as file:
      self.assertEqual(file["click/score"].dtype, np.float32)
    state = self.state(4, config, "bfloat16")
    for leaf in jax.tree.leaves(state.params):
      self.assertEqual(leaf.dtype, np.float32)


class ConfigTest(run_case.RunTestCase):
  @parameterized.parameters(
    ({"non_finite": "go"}, "non_finite must be 'stop' or 'skip', got 'go'"),
    ({"batch_size": 0}, "train.batch_size must be at least 1"),
    ({"eval_batch_size": 0}, "train.eval_batch_size must be at least 1"),
    ({"log_every_steps": 0}, "train.log_every_steps must be at least 1"),
    ({"keep_checkpoints": 0}, "train.keep_checkpoints must be at least 1"),
    ({"num_epochs": 0}, "num_epochs and train.num_train_steps are both 0"),
    ({"eval_every_steps": -1}, "train.eval_every_steps must be at least 0"),
  )
  def test_mistakes_are_user_errors(self, values, message):
    with self.assertRaisesRegex(UserError, message):
      train.Config(**values)

  def test_a_batch_must_divide_among_the_devices(self):
    config = run_case.make_config(parallel__data=3)
    with self.assertRaisesRegex(UserError, r"batch_size \(16\).* 3 devices"):
      train.Trainer(config, str(self.directory / "run"))


if __name__ == "__main__":
  absltest.main()
