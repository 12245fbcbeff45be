"""Whether a planted gain is gone where nothing is planted."""

import math

import numpy as np
from absl.testing import absltest, parameterized

from recjax import comparison, control
from recjax.statistics import Estimate

PLANTED = Estimate(0.05, 0.04, 0.06, 0.001)


class ControlTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("gone", PLANTED, (-0.003, 0.0099), "gone"),
    ("a_fifth_may_be_left", PLANTED, (-0.003, 0.0101), "not gone"),
    ("still_there", PLANTED, (0.001, 0.002), "not gone"),
    ("turned_into_a_loss", PLANTED, (-0.004, -0.001), "not gone"),
    ("nothing_planted", Estimate(0.05, -0.01, 0.1, 0.2), (-0.1, 0.001),
     "no planted gain"),
    ("worse", Estimate(-0.05, -0.06, -0.04, 0.01), (-0.01, 0.001),
     "no planted gain"),
    ("one_seed", Estimate(0.05, math.nan, math.nan, math.nan), (-0.1, 0.001),
     "open: needs two common seeds"),
    ("one_seed_of_control", PLANTED, (math.nan, math.nan),
     "open: needs two common seeds"),
  )  # fmt: skip
  def test_verdict(self, planted, ends, verdict):
    low, high = ends
    other = Estimate((low + high) / 2, low, high, 0.5)
    result = control.control_verdict(planted, other)
    np.testing.assert_equal(
      tuple(result), (planted.difference, low, high, verdict)
    )
    # A loss that falls by as much is the same gain.
    planted, other = (
      Estimate(-e.difference, -e.high, -e.low, e.p_value)
      for e in (planted, other)
    )
    mirrored = control.control_verdict(planted, other, lower_is_better=True)
    np.testing.assert_equal(tuple(mirrored), tuple(result))

  def test_table_signs_gains_by_the_metric(self):
    def difference(metric, estimate):
      return comparison.Difference(
        "msn", metric, (0, 1), estimate, 0.0, None, math.nan, ""
      )

    loss = Estimate(-0.05, -0.06, -0.04, 0.001)
    small = Estimate(0.001, -0.002, 0.004, 0.5)
    names = ("test/click/auc", "test/click/logloss", "test/click/gauc")
    table = control.control_table(
      [difference(n, e) for n, e in zip(names, (PLANTED, loss, loss))],  # noqa: B905
      [difference(name, small) for name in names[:2]],
      "rankmixer",
    )
    self.assertEqual(
      [row[1:] for row in table.rows],
      [
        (names[0], "+0.0500", "[-0.0020, +0.0040]", "gone"),
        (names[1], "+0.0500", "[-0.0040, +0.0020]", "gone"),
        (names[2], "–", "–", "open: lacks common seeds"),
      ],
    )


if __name__ == "__main__":
  absltest.main()
