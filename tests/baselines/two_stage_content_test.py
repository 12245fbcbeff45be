"""Encoders that are trained first, then frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import toy
from absl.testing import absltest

from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import train_state
from recjax.errors import UserError
from tests import model_contract_test

OPTIMIZER = optimizer_lib.Config(learning_rate=0.01)
ENCODERS = ("token_embedding", "document_encoder", "query_encoder")


def make_method(**overrides):
  config = model_contract_test.TINY["two_stage_content"] | overrides
  return method_lib.load(
    "two_stage_content", {"tasks": ("click",), **config}, toy.SCHEMA
  )


def moved(before, after):
  return {
    name
    for name in before
    if any(
      bool(jnp.any(a != b))
      for a, b in zip(
        jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True
      )
    )
  }


class TwoStageTest(absltest.TestCase):
  def test_encoders_then_the_rest(self):
    method, batch = make_method(), toy.make_batch()
    first, second = (
      train_state.StepConfig(method, stage, OPTIMIZER, 10, first_step=step)
      for stage, step in zip(method.stages, (0, 2), strict=True)
    )
    shapes = jax.eval_shape(
      lambda rng: train_state.init_state(rng, first), jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    random = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    start = state.replace(params=jax.tree.map(random, state.params))

    @jax.jit
    def content(state):
      return train_state.train_step(state, batch, first)

    @jax.jit
    def rank(state):
      return train_state.train_step(
        train_state.start_stage(state, second), batch, second
      )

    middle, scalars = content(start)
    self.assertEqual(moved(start.params, middle.params), set(ENCODERS))
    self.assertFalse(moved(start.tables, middle.tables) & {"embedding"})
    self.assertIn("memory_bank", moved(start.tables, middle.tables))
    self.assertNotIn("click", scalars)

    end, scalars = rank(middle)
    self.assertFalse(moved(middle.params, end.params) & set(ENCODERS))
    self.assertContainsSubset(
      {"tokens", "heads", "decode_history_3"}, moved(middle.params, end.params)
    )
    self.assertIn("embedding", moved(middle.tables, end.tables))
    self.assertNotIn("sqdc", scalars)
    # Empty at first, the bank then holds what the frozen encoder gives.
    emptied = train_state.start_stage(middle, second)
    self.assertFalse(jnp.any(emptied.tables["memory_bank"]))
    self.assertTrue(jnp.any(end.tables["memory_bank"] != 0))

  def test_without_a_contrast_there_is_no_first_stage(self):
    with self.assertRaisesRegex(UserError, "contrast.weight must be above 0"):
      make_method(contrast={"weight": 0.0})


if __name__ == "__main__":
  absltest.main()
