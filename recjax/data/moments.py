"""Mean and standard deviation of columns that are read once."""

import numpy as np
from jaxtyping import Float


class Moments:
  """Running mean and standard deviation of columns, in float64."""

  def __init__(self, num_columns: int):
    self.count = 0
    self.mean = np.zeros(num_columns)
    self.squares = np.zeros(num_columns)
    self.low = np.full(num_columns, np.inf)
    self.high = np.full(num_columns, -np.inf)

  def update(self, values: Float[np.ndarray, "n columns"]):
    if not len(values):
      return
    values = values.astype(np.float64)
    mean = values.mean(axis=0)
    delta = mean - self.mean
    total = self.count + len(values)
    # Chan, Golub and LeVeque, The American Statistician 37 (1983), eq. 2.1.
    self.squares += ((values - mean) ** 2).sum(axis=0)
    self.squares += delta**2 * (self.count * len(values) / total)
    self.mean += delta * (len(values) / total)
    self.count = total
    self.low = np.minimum(self.low, values.min(axis=0))
    self.high = np.maximum(self.high, values.max(axis=0))

  def result(self):
    std = np.sqrt(self.squares / max(self.count, 1)).astype(np.float32)
    # Rounding leaves a constant column a tiny deviation: compare its ends.
    constant = (self.low >= self.high) | (std == 0)
    return self.mean, np.where(constant, np.float32(1), std)
