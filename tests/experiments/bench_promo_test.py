"""The benchmark of PROMO runs and says what it measured."""

import json

from absl.testing import absltest

from tests import command_case


class BenchPromoTest(command_case.CommandTestCase):
  def test_prints_steps_ratio_and_items(self):
    outcome = self.run_command(
      "experiments.bench_promo",
      "--batch_size=8",
      "--repeats=2",
      "--num_rows=50",
    )
    *_, last = outcome.stdout.splitlines()
    result = json.loads(last)
    for name in ("two_towers_secs", "promo_secs", "new_items_per_sec"):
      self.assertGreater(result[name], 0)
    self.assertEqual(outcome.code, int(result["ratio"] > 1.5))


if __name__ == "__main__":
  absltest.main()
