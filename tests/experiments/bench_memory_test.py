import json

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from experiments import bench_memory
from tests import command_case


class BenchMemoryTest(command_case.CommandTestCase):
  def test_exponent_and_interval_of_a_known_law(self):
    rng = np.random.default_rng(0)
    sizes = 4.0 ** np.arange(6, 12)
    inside = 0
    for _ in range(200):
      costs = 3.0 * sizes**0.4 * np.exp(0.1 * rng.standard_normal(6))
      value, low, high = bench_memory.fit_exponent(sizes, costs)
      self.assertLess(abs(value - 0.4), 0.1)
      inside += low <= 0.4 <= high
    self.assertBetween(inside / 200, 0.9, 0.99)

  def test_retrieval_finds_the_best_of_all_slots(self):
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((2, 3, 2, 1, 4)).astype(np.float32)
    keys = rng.standard_normal((2, 1, 5, 4)).astype(np.float32)
    weights, slots = bench_memory.retrieve(
      jnp.asarray(queries), jnp.asarray(keys), top_k=4
    )
    normal = [
      (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) / 4**0.25
      for x in (queries.astype(np.float64), keys.astype(np.float64))
    ]
    row, col = np.einsum("tbxhd,xhnd->xtbn", *normal)
    every = (row[..., :, None] + col[..., None, :]).reshape(2, 3, 25)
    best = np.sort(every)[..., ::-1][..., :4]
    expected = np.exp(best) / np.exp(best).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights[:, :, 0], expected, rtol=1e-4)
    found = np.take_along_axis(every, np.asarray(slots)[:, :, 0], axis=-1)
    np.testing.assert_allclose(found, best, rtol=1e-4)

  def test_command_prints_a_line_a_size(self):
    outcome = self.run_command(
      "experiments.bench_memory",
      "--num_keys=4,8,16",
      "--top_k=2",
      "--token_dim=8",
      "--key_dim=4",
      "--batch_size=8",
      "--repeats=2",
    )
    *_, last = outcome.stdout.splitlines()
    sizes = json.loads(last)["sizes"]
    self.assertEqual([row["num_slots"] for row in sizes], [16, 64, 256])
    growth = np.diff([row["params_total"] for row in sizes])
    # Values, and two sets of keys.
    values = np.diff([16, 64, 256]) * 8
    np.testing.assert_array_equal(growth, values + np.diff([4, 8, 16]) * 8)

  def test_too_few_keys_are_a_mistake(self):
    for value in ("--num_keys=16,31", "--num_keys=x"):
      outcome = self.run_command("experiments.bench_memory", value)
      self.assert_mistake(outcome, "at least --top_k .32., got .*write for")


if __name__ == "__main__":
  absltest.main()
