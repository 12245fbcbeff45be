"""Row optimisers in float64, row by row, as their definitions read."""

import numpy as np


def dense_gradient(read, shape):
  """`RowGradients` as the gradient of the whole table, in float64."""
  total = np.zeros(shape)
  grads = np.asarray(read.grads, np.float64)
  if read.weights is not None:
    grads = np.asarray(read.weights)[..., None] * grads[..., None, :]
  ids = np.ravel(read.ids)
  inside = (ids >= 0) & (ids < shape[0])
  np.add.at(total, ids[inside], grads.reshape(-1, shape[1])[inside])
  return total


class RowOracle:
  """One of `sgd`, `rowwise_adagrad`, `adagrad`, `lazy_adam`."""

  def __init__(self, name, *, eps=1e-8, weight_decay=0.0, clip_norm=None):
    self.name, self.eps = name, eps
    self.weight_decay, self.clip_norm = weight_decay, clip_norm

  def init(self, num_rows, dim):
    shapes = {
      "sgd": {},
      "rowwise_adagrad": {"sum": (num_rows,)},
      "adagrad": {"sum": (num_rows, dim)},
      "lazy_adam": {"mu": (num_rows, dim), "nu": (num_rows, dim)},
    }
    return {k: np.zeros(shape) for k, shape in shapes[self.name].items()}

  def delta(self, state, row, grad, rate, step):
    """What to subtract from `row`; moves `state` in place."""
    if self.name == "sgd":
      return rate * grad
    if self.name == "lazy_adam":
      state["mu"][row] = 0.9 * state["mu"][row] + 0.1 * grad
      state["nu"][row] = 0.999 * state["nu"][row] + 0.001 * grad**2
      mean = state["mu"][row] / (1 - 0.9**step)
      square = state["nu"][row] / (1 - 0.999**step)
      return rate * mean / (np.sqrt(square) + self.eps)
    square = grad**2
    state["sum"][row] += square.mean() if "row" in self.name else square
    return rate * grad / (np.sqrt(state["sum"][row]) + self.eps)

  def step(self, values, state, ids, grads, rate, step):
    """Sums duplicates, then updates each row of `values` that `ids` names."""
    for row in sorted(set(ids.tolist())):
      if not 0 <= row < len(values):
        continue
      grad = grads[ids == row].sum(axis=0) + self.weight_decay * values[row]
      norm = np.linalg.norm(grad)
      if self.clip_norm is not None and norm > self.clip_norm:
        grad = grad * self.clip_norm / norm
      values[row] -= self.delta(state, row, grad, rate, step)
