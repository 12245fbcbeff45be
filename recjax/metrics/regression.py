"""Errors of real-valued predictions, in the unit of the label."""

from jaxtyping import Array, Bool, Float, Real

from recjax.metrics import arrays
from recjax.metrics.arrays import AnyArray


def mae(
  predictions: Float[AnyArray, " examples"],
  labels: Real[AnyArray, " examples"],
  *,
  mask: Bool[AnyArray, " examples"] | None = None,
) -> Float[Array, ""] | float:
  """Mean absolute error.

  Args:
    predictions: Predicted values.
    labels: Observed values in the same unit.
    mask: Examples that count. None means all.

  Returns:
    Value of at least 0, in the unit of the label; NaN without examples.

  Example:
    >>> import numpy as np
    >>> float(mae(np.array([1.0, 2.0]), np.array([4.0, 3.0])))
    2.0
  """
  xp = arrays.namespace(predictions, labels, mask)
  errors = xp.abs(_errors(predictions, labels, mask, xp))
  return arrays.mean(errors, mask, xp)


def rmse(
  predictions: Float[AnyArray, " examples"],
  labels: Real[AnyArray, " examples"],
  *,
  mask: Bool[AnyArray, " examples"] | None = None,
) -> Float[Array, ""] | float:
  """Root of the mean squared error.

  Args:
    predictions: Predicted values.
    labels: Observed values in the same unit.
    mask: Examples that count. None means all.

  Returns:
    Value of at least 0, in the unit of the label; NaN without examples.

  Example:
    >>> import numpy as np
    >>> float(rmse(np.array([1.0, 2.0]), np.array([4.0, 5.0])))
    3.0
  """
  xp = arrays.namespace(predictions, labels, mask)
  squares = xp.square(_errors(predictions, labels, mask, xp))
  return xp.sqrt(arrays.mean(squares, mask, xp))


def _errors(predictions, labels, mask, xp):
  mask = arrays.as_mask(mask, predictions, xp)
  predictions = xp.where(mask, arrays.as_float(predictions, xp), 0)
  return predictions - xp.where(mask, arrays.as_float(labels, xp), 0)
