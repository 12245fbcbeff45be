import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from recjax import losses, task_gradients, train_state
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax.errors import UserError
from tests import run_case, toy

TASKS = ("click", "like", "play_time")
TINY = {
  "tasks": TASKS,
  "embed_dim": 4,
  "num_tokens": 2,
  "token_dim": 8,
  "num_layers": 1,
}


def make(name, **words):
  method = method_lib.load(name, TINY | words, toy.SCHEMA)
  config = train_state.StepConfig(
    method, method.stages[0], optimizer_lib.Config(), num_steps=1
  )
  init = jax.jit(lambda rng: train_state.init_state(rng, config))
  return method, init(jax.random.key(0))


class TaskGradientsTest(parameterized.TestCase):
  def test_equal_those_of_each_loss_alone(self):
    """Of a linear head they are the residuals times the head's weights."""
    method, state = make("shared_bottom")
    batch = toy.make_batch(num_padding=3)
    products = jax.jit(lambda s, b: task_gradients.gram(s, b, method))(
      state, batch
    )
    rows = method.read(state.tables, batch)
    predictions = jax.jit(
      lambda: method.apply(
        state.params, state.tables, rows, batch, train=False
      )[0]
    )()
    kernel = np.asarray(state.params["heads"]["logit"]["kernel"], np.float64)
    grads = []
    for t, task in enumerate(TASKS):
      mask = np.asarray(batch.label_mask[task] & batch.example_mask)
      label = np.asarray(batch.labels[task], np.float64)
      value = np.asarray(predictions[task], np.float64)
      if task == "play_time":
        error = 2 * (value - np.asarray(losses.symlog(batch.labels[task])))
      else:
        error = 1 / (1 + np.exp(-value)) - label
      error = np.where(mask, error, 0) / mask.sum()
      grads.append(np.outer(error, kernel[t, :, 0]).ravel())
    grads = np.stack(grads)
    np.testing.assert_allclose(products, grads @ grads.T, rtol=1e-3, atol=1e-6)
    values = task_gradients.norms_and_cosines(np.asarray(products), TASKS)
    self.assertAlmostEqual(
      values["like/gradient_norm"], np.linalg.norm(grads[1]), places=4
    )
    cosine = grads[0] @ grads[2]
    cosine /= np.linalg.norm(grads[0]) * np.linalg.norm(grads[2])
    self.assertAlmostEqual(
      values["click/play_time/gradient_cosine"], cosine, places=3
    )

  def test_mdl_hands_out_the_features_of_its_last_layer(self):
    method, state = make("mdl", num_heads=2)
    batch = toy.make_batch()
    shapes = method.perturbation_shapes(state.params, state.tables, batch)
    (leaf,) = jax.tree.leaves(shapes)
    self.assertEqual(leaf.shape, (3, 16, 2, 8))
    products = jax.jit(lambda s, b: task_gradients.gram(s, b, method))(
      state, batch
    )
    self.assertTrue(bool(jnp.all(jnp.diagonal(products) > 0)))
    # A task without labels pulls at nothing.
    nobody = batch.replace(
      label_mask=batch.label_mask | {"like": jnp.zeros(16, bool)}
    )
    products = jax.jit(lambda s, b: task_gradients.gram(s, b, method))(
      state, nobody
    )
    self.assertEqual(float(products[1, 1]), 0.0)

  def test_a_method_that_hands_out_nothing_is_a_mistake(self):
    method, state = make("rankmixer")
    with self.assertRaisesRegex(UserError, "'rankmixer' hands no copy"):
      task_gradients.gram(state, toy.make_batch(), method)


class LoggedTest(run_case.RunTestCase):
  def config(self, name="shared_bottom", **overrides):
    model = {**TINY, "tasks": ["click", "secs"]}
    config = run_case.make_config(name, model=model, **overrides)
    config["train"] |= {"num_train_steps": 6, "log_every_steps": 3}
    return config

  def test_the_loop_logs_them_and_trains_the_same(self):
    logged = self.run_once(self.config(train__log_task_gradients=True), "on")
    plain = self.run_once(self.config(), "off")
    self.assertEqual(logged["metrics"], plain["metrics"])
    lines = [line for line in self.lines("on") if "train/loss" in line]
    self.assertEqual([line["step"] for line in lines], [3, 4, 6])
    for line in lines:
      self.assertGreater(line["train/click/gradient_norm"], 0.0)
      self.assertGreater(line["train/secs/gradient_norm"], 0.0)
      self.assertBetween(line["train/click/secs/gradient_cosine"], -1.0, 1.0)
    self.assertFalse(
      any("gradient" in k for line in self.lines("off") for k in line)
    )

  def test_a_method_that_hands_out_nothing_ends_before_the_data_is_read(self):
    config = self.config("rankmixer", train__log_task_gradients=True)
    with self.assertRaisesRegex(UserError, "'rankmixer' hands no copy"):
      self.run_once(config)
    self.assertFalse((self.directory / "run").exists())


if __name__ == "__main__":
  absltest.main()
