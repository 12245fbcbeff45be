"""All metrics of one task, under their printed names."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Integer, Real

from recjax.metrics import arrays
from recjax.metrics.auc import auc, grouped_auc_parts
from recjax.metrics.calibration import (
  base_rate_entropy,
  ece,
  log_loss_with_logits,
  pcoc,
)
from recjax.metrics.regression import mae, rmse

# Role in the schema -> printed name and how its groups are averaged.
GROUPED_AUCS = {"group": ("gauc", "examples"), "query": ("qauc", "uniform")}


def summarize(
  logits: Float[np.ndarray, " examples"],
  labels: Real[np.ndarray, " examples"],
  *,
  mask: Bool[np.ndarray, " examples"] | None = None,
  groups: Mapping[str, Integer[np.ndarray, " examples"]] | None = None,
) -> dict[str, float]:
  """Metrics of a binary label, computed on the host in float64.

  Args:
    logits: Log odds of label 1.
    labels: 0 or 1.
    mask: Examples that count. None means all.
    groups: `"group"` adds `gauc`, `"query"` adds `qauc`; group of each
      example, as in `Batch.groups`.

  Returns:
    `auc`, `logloss`, `ne`, `pcoc`, `ece`; for each entry of `groups` also the
    grouped AUC and, as `gauc_one_class_groups`, the number of groups that it
    leaves out. NaN where the examples define no value.

  Raises:
    ValueError: If a name in `groups` is neither group nor query, or a counted
      label is neither 0 nor 1.

  Example:
    >>> import numpy as np
    >>> logits = np.array([-1.0, 2.0, 0.5, 0.1])
    >>> labels = np.array([0, 1, 0, 1])
    >>> users = np.array([1, 1, 2, 3])
    >>> metrics = summarize(logits, labels, groups={"group": users})
    >>> metrics["auc"], metrics["gauc"], metrics["gauc_one_class_groups"]
    (0.75, 1.0, 2.0)
  """
  probs = _sigmoid(logits)
  loss = log_loss_with_logits(logits, labels, mask=mask)
  metrics = {
    "auc": auc(logits, labels, mask=mask),
    "logloss": loss,
    "ne": arrays.ratio(loss, base_rate_entropy(labels, mask=mask), np),
    "pcoc": pcoc(probs, labels, mask=mask),
    "ece": ece(probs, labels, mask=mask),
  }
  for role, group_id in (groups or {}).items():
    if role not in GROUPED_AUCS:
      raise ValueError(
        f"unknown group {role!r}; use one of {tuple(GROUPED_AUCS)}"
      )
    name, weighting = GROUPED_AUCS[role]
    parts = grouped_auc_parts(
      logits, labels, group_id, mask=mask, weighting=weighting
    )
    metrics[name] = parts.value
    metrics[f"{name}_one_class_groups"] = parts.num_one_class_groups
  return {name: float(value) for name, value in metrics.items()}


def summarize_real(
  predictions: Float[np.ndarray, " examples"],
  labels: Real[np.ndarray, " examples"],
  *,
  mask: Bool[np.ndarray, " examples"] | None = None,
) -> dict[str, float]:
  """Metrics of a real-valued label, computed on the host in float64.

  Args:
    predictions: Predicted values.
    labels: Observed values in the same unit.
    mask: Examples that count. None means all.

  Returns:
    `mae` and `rmse` in the unit of the label; NaN without examples.

  Example:
    >>> import numpy as np
    >>> summarize_real(np.array([1.0, 2.0]), np.array([2.0, 1.0]))
    {'mae': 1.0, 'rmse': 1.0}
  """
  return {
    "mae": float(mae(predictions, labels, mask=mask)),
    "rmse": float(rmse(predictions, labels, mask=mask)),
  }


def _sigmoid(logits):
  logits = np.asarray(logits, np.float64)
  # exp of a number of at most 0 never overflows.
  small = np.exp(-np.abs(logits))
  return np.where(logits >= 0, 1, small) / (1 + small)
