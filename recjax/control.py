"""Planted data: is a gain gone where its cause is taken away?

A model that gains where a structure is planted shows its mechanism only if
the gain vanishes on a control, the same data without that structure.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from recjax import statistics
from recjax.comparison import Difference, Table, interval_text
from recjax.monitor import LOWER_IS_BETTER

# A gain is gone in the control if less than this share of it may be left.
CONTROL_SHARE = 0.2


class ControlVerdict(NamedTuple):
  """Whether a gain on planted data is gone where nothing is planted.

  Attributes:
    gain: Planted difference, above 0 where the model is better.
    low: Lower end of the control's 95 % interval, signed alike.
    high: Its upper end.
    verdict: `gone`, `not gone`, `no planted gain` (its own interval reaches
      0) or `open: needs two common seeds`.
  """

  gain: float
  low: float
  high: float
  verdict: str


def control_verdict(
  planted: statistics.Estimate,
  control: statistics.Estimate,
  *,
  lower_is_better: bool = False,
) -> ControlVerdict:
  """Is the gain that a planted structure gives gone in the control?

  Gone means that the control's 95 % interval holds 0 and ends below a fifth
  of the planted gain: it must be small, not just badly measured.

  Args:
    planted: Model minus baseline where the structure is planted.
    control: The same difference where it is removed.
    lower_is_better: For a loss, of which a negative difference is a gain.

  Example:
    >>> planted = statistics.Estimate(0.05, 0.04, 0.06, 0.001)
    >>> control = statistics.Estimate(0.001, -0.002, 0.004, 0.5)
    >>> control_verdict(planted, control).verdict
    'gone'
  """
  sides = [(e.low, e.high) for e in (planted, control)]
  if lower_is_better:
    sides = [(-high, -low) for low, high in sides]
  (planted_low, _), (low, high) = sides
  gain = -planted.difference if lower_is_better else planted.difference
  if math.isnan(planted_low) or math.isnan(low):
    verdict = "open: needs two common seeds"
  elif planted_low <= 0:
    verdict = "no planted gain"
  else:
    is_gone = low <= 0 <= high and high < CONTROL_SHARE * gain
    verdict = "gone" if is_gone else "not gone"
  return ControlVerdict(gain, low, high, verdict)


def control_table(
  planted: Sequence[Difference],
  control: Sequence[Difference],
  baseline: str,
) -> Table:
  """`control_verdict` of each difference that both have, over the seeds.

  Args:
    planted: From `compare` on runs with the planted structure.
    control: From `compare` on runs without it.
    baseline: Model of both comparisons.
  """
  found = {(d.model, d.metric): d.t_test for d in control}
  rows = []
  for d in planted:
    other = found.get((d.model, d.metric))
    if d.t_test is None or other is None:
      rows.append((d.model, d.metric, "–", "–", "open: lacks common seeds"))
      continue
    is_lower = d.metric.rsplit("/")[-1] in LOWER_IS_BETTER
    result = control_verdict(d.t_test, other, lower_is_better=is_lower)
    interval = interval_text(other._replace(low=result.low, high=result.high))
    gain = f"{result.gain:+.4f}"
    rows.append((d.model, d.metric, gain, interval, result.verdict))
  columns = ("Model", "Metric", "Planted gain", "95 % in control", "Verdict")
  note = (
    f"Gain: over {baseline}, above 0 where the model is better. Gone: the 95 %"
    " interval over the control's seeds holds 0 and ends below a fifth of the"
    " planted gain."
  )
  return Table("Gone in the control?", columns, tuple(rows), (note,))
