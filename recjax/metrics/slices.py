"""Metrics by scenario, and their means over the scenarios large enough.

A cell is one task on the examples of one scenario. Cells with few users of
both classes are noise: they are listed, and left out of the means.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer, Real

from recjax.metrics.summary import summarize, summarize_real

# Groups (users) with both classes that a cell needs to count in a mean.
MIN_TWO_CLASS_GROUPS = 200
# Metrics of which means over cells are printed.
_MEANS = {"binary": ("auc", "gauc", "qauc", "logloss"), "real": ("mae", "rmse")}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One task on the examples of one scenario.

  Attributes:
    scenario: Its number, as in `Batch.scenario`.
    num_examples: Examples whose label is known.
    num_positives: Those with label 1; None for a real label.
    num_groups: Groups (users) of them; None where the data has none.
    num_two_class_groups: Groups with both classes; None likewise, or for a
      real label.
    metrics: As in `summary`, calibration among them.
    is_counted: Whether the means hold it.
  """

  scenario: int
  num_examples: int
  num_positives: int | None
  num_groups: int | None
  num_two_class_groups: int | None
  metrics: dict[str, float]
  is_counted: bool


def summarize_by_scenario(
  scores: Float[np.ndarray, " examples"],
  labels: Real[np.ndarray, " examples"],
  scenario: Integer[np.ndarray, " examples"],
  *,
  mask: Bool[np.ndarray, " examples"] | None = None,
  groups: Mapping[str, Integer[np.ndarray, " examples"]] | None = None,
  is_real: bool = False,
) -> list[Cell]:
  """The metrics of one task on each scenario that has known labels.

  Args:
    scores: Log odds of label 1, or predicted values of a real label.
    labels: Observed outcomes.
    scenario: Scenario of each example.
    mask: Examples that count. None means all.
    groups: As in `summary.summarize`.
    is_real: Whether the label is real-valued.

  Returns:
    The cells, by number of the scenario. A cell is counted with at least
    `MIN_TWO_CLASS_GROUPS` groups of both classes; for a real label, or where
    the data has no groups, with so many groups or examples.

  Example:
    >>> cells = summarize_by_scenario(
    ...     np.array([0.0, 1.0, 2.0]), np.array([0, 1, 1]), np.array([1, 1, 2]))
    >>> [(cell.scenario, cell.num_examples) for cell in cells]
    [(1, 2), (2, 1)]
  """
  valid = np.ones(len(labels), bool) if mask is None else mask
  groups = groups or {}
  cells = []
  for number in np.unique(scenario[valid]):
    rows = np.flatnonzero(valid & (scenario == number))
    own = {role: ids[rows] for role, ids in groups.items()}
    if is_real:
      metrics = summarize_real(scores[rows], labels[rows])
    else:
      metrics = summarize(scores[rows], labels[rows], groups=own)
    num_groups = two_class = positives = None
    if not is_real:
      positives = int(np.sum(labels[rows] == 1))
    if "group" in own:
      _, group = np.unique(own["group"], return_inverse=True)
      num_groups = int(group.max()) + 1
      if not is_real:
        rate = np.bincount(group, weights=labels[rows]) / np.bincount(group)
        two_class = int(np.sum((rate > 0) & (rate < 1)))
    size = next(n for n in (two_class, num_groups, len(rows)) if n is not None)
    cells.append(
      Cell(
        scenario=int(number),
        num_examples=len(rows),
        num_positives=positives,
        num_groups=num_groups,
        num_two_class_groups=two_class,
        metrics=metrics,
        is_counted=size >= MIN_TWO_CLASS_GROUPS,
      )
    )
  return cells


def summarize_by_slice(
  scores: Float[np.ndarray, " examples"],
  labels: Real[np.ndarray, " examples"],
  slices: Mapping[str, Bool[np.ndarray, " examples"]],
  *,
  mask: Bool[np.ndarray, " examples"] | None = None,
) -> dict[str, float]:
  """AUC, log loss and size of parts of the examples, for a binary label.

  Args:
    scores: Log odds of label 1.
    labels: 0 or 1.
    slices: Name -> its examples, such as `ranking.bucket_slices` gives.
    mask: Examples that count. None means all.

  Returns:
    `<slice>/auc`, `<slice>/logloss`, `<slice>/examples`; the first two are NaN
    where a slice has no example, the AUC also where it has one class alone.

  Example:
    >>> values = summarize_by_slice(
    ...     np.array([0.0, 1.0, 2.0]), np.array([0, 1, 1]),
    ...     {"cold": np.array([True, True, False])})
    >>> values["cold/auc"], values["cold/examples"]
    (1.0, 2.0)
  """
  metrics = {}
  for name, rows in slices.items():
    rows = rows if mask is None else rows & mask
    values = {"auc": float("nan"), "logloss": float("nan")}
    if rows.any():
      values = summarize(scores[rows], labels[rows])
    for metric in ("auc", "logloss"):
      metrics[f"{name}/{metric}"] = float(values[metric])
    metrics[f"{name}/examples"] = float(np.sum(rows))
  return metrics


def means(cells: Sequence[Cell], *, is_real: bool = False) -> dict[str, float]:
  """Means of the counted cells' metrics.

  Returns:
    `macro_<metric>`: plain; `micro_<metric>`: weighted by examples; `cells`
    and `small_cells`: how many are counted and left out. A metric that a
    counted cell does not define is left out of that cell; NaN where none does.
  """
  counted = [cell for cell in cells if cell.is_counted]
  result = {}
  for name in _MEANS["real" if is_real else "binary"]:
    if cells and name not in cells[0].metrics:
      continue
    pairs = [
      (cell.metrics[name], cell.num_examples)
      for cell in counted
      if np.isfinite(cell.metrics[name])
    ]
    values, weights = np.array(pairs).T if pairs else (np.zeros(0),) * 2
    nothing = float("nan")
    result[f"macro_{name}"] = float(values.mean()) if pairs else nothing
    result[f"micro_{name}"] = (
      float(values @ weights / weights.sum()) if pairs else nothing
    )
  result["cells"] = float(len(counted))
  result["small_cells"] = float(len(cells) - len(counted))
  return result
