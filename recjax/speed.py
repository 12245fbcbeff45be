"""How fast a run trains."""

import math
import time
from typing import Any

import jax


class Speed:
  """Examples per second of training steps, compilation and breaks left out."""

  def __init__(self):
    self._secs, self._num_examples, self._mark = 0.0, 0, None
    self._since_mark = 0

  @property
  def examples_per_sec(self) -> float:
    """NaN before the second step."""
    secs, num_examples = self._secs, self._num_examples
    if self._mark is not None:
      secs += time.monotonic() - self._mark
      num_examples += self._since_mark
    return num_examples / secs if num_examples else math.nan

  def add(self, num_examples: int, scalars: Any):
    """Counts one step; the first after a break only starts the clock."""
    if self._mark is None:
      jax.block_until_ready(scalars)
      self._mark = time.monotonic()
    else:
      self._since_mark += num_examples

  def stop(self):
    """Begins a break, when the scalars of the last step have been fetched."""
    if self._mark is not None:
      self._secs += time.monotonic() - self._mark
      self._num_examples += self._since_mark
    self._mark, self._since_mark = None, 0
