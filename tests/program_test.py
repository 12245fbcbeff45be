"""What a compiled program depends on."""

import functools

import jax
import numpy as np
from absl.testing import absltest

from recjax import train, train_state
from recjax.data.pipeline import make_loader
from tests import run_case


class ProgramTest(run_case.RunTestCase):
  def test_seeds_share_one_program_and_differ_in_what_they_do(self):
    texts, keys = [], []
    for seed in (0, 1):
      config = run_case.make_config() | {"seed": seed}
      trainer = train.Trainer(config, str(self.directory / f"seed{seed}"))
      init = functools.partial(
        train_state.init_state, config=trainer._step_config()
      )
      state = jax.jit(init)(jax.random.key(seed))
      batch = next(
        iter(
          make_loader(
            trainer.columns, "train", batch_size=16, shuffle=True, seed=seed
          )
        )
      )
      step = trainer.placement.compile_step(
        functools.partial(
          train_state.train_step, config=trainer._step_config()
        ),
        state,
      )
      texts.append(step.lower(state, batch).as_text())
      keys.append(np.asarray(state.rng))
    self.assertEqual(texts[0], texts[1])
    self.assertTrue((keys[0] != keys[1]).any())


if __name__ == "__main__":
  absltest.main()
