"""Does a trial look randomised? What was known before must not tell the arms.

Whatever was drawn at random has, on average, the same features in every arm.
For each dense column, and each frequent value of a single-valued sparse one,
the means of the arms are compared: with one over the propensity as weight, and
with errors that count what was drawn together once. One p-value a feature is
corrected for their number (Bonferroni); a trial of a million rows shows the
smallest fault, so the standardised difference is told beside it.

Source: Austin, Balance diagnostics, Statistics in Medicine 28 (2009), for the
standardised difference; the joint test is Wald's, with cluster-robust errors.
"""

from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, Int

from recjax.data.columns import Columns

MAX_ROWS = 200_000  # Of the training part, evenly spaced.
MAX_VALUES = 20  # Of a sparse feature, the most frequent first.
MIN_COUNT = 100  # A value of fewer rows has no mean to speak of.
ALARM = 1e-3


class Balance(NamedTuple):
  """The feature that differs most between the arms.

  Attributes:
    feature: Its name, with the vocabulary row of a sparse one's value.
    treatment: The treatment that differs most from the control.
    difference: Of their means, in standard deviations of the feature.
    p_value: Corrected for all features; 1 if there are none.
    num_tests: Their number.
  """

  feature: str
  treatment: str
  difference: float
  p_value: float
  num_tests: int


def check(columns: Columns) -> Balance:
  """Compares the arms of a trial by what was known before it.

  Args:
    columns: A prepared trial.

  Returns:
    What differs most, by the p-value.
  """
  num_rows = columns.num_rows["train"]
  rows = np.arange(0, num_rows, -(-num_rows // MAX_ROWS))
  batch, trial = columns.read("train", rows), columns.schema.trial
  tests = []
  for name, values in _values(columns, batch):
    differences, p_value = compare(
      values,
      batch.trial.treatment,
      1 / batch.trial.propensity.astype(np.float64),
      batch.trial.cluster,
      trial.num_treatments,
    )
    arm = int(np.abs(differences).argmax())
    tests.append((p_value, name, arm, differences[arm]))
  if not tests:
    return Balance("", "", 0.0, 1.0, 0)
  p_value, name, arm, difference = min(tests)
  return Balance(
    name,
    trial.treatments[arm],
    float(difference),
    min(1.0, len(tests) * p_value),
    len(tests),
  )


def warn(columns: Columns) -> None:
  """Logs a warning if a trial does not look randomised."""
  found = check(columns)
  if found.p_value < ALARM:
    logging.warning(
      "The trial does not look randomised: %s differs between treatment %r and "
      "the control by %.3f standard deviations (p = %.1e after correction for "
      "%d features). Check how it was drawn; name the column of the chance, if "
      'it depended on the row, as "propensity", and that of the groups, if '
      'groups were drawn, as "cluster". Metrics of this data may be biased.',
      found.feature,
      found.treatment,
      found.difference,
      found.p_value,
      found.num_tests,
    )


def compare(
  values: Float[np.ndarray, " rows"],
  treatment: Int[np.ndarray, " rows"],
  weight: Float[np.ndarray, " rows"],
  cluster: Int[np.ndarray, " rows"],
  num_treatments: int,
) -> tuple[Float[np.ndarray, " treatments"], float]:
  """Compares one feature's means between arms.

  Returns:
    Difference of each arm to the control in standard deviations, and the
    p-value of all arms having one mean.
  """
  values = values.astype(np.float64)
  _, unit = np.unique(cluster, return_inverse=True)
  mean, variance = np.zeros(num_treatments), np.zeros(num_treatments)
  for arm in range(num_treatments):
    own = treatment == arm
    total = weight[own].sum()
    if total == 0:
      mean[arm], variance[arm] = np.nan, np.inf
      continue
    mean[arm] = (weight[own] * values[own]).sum() / total
    error = weight[own] * (values[own] - mean[arm])
    by_unit = np.bincount(unit[own], error)
    variance[arm] = np.square(by_unit).sum() / total**2
  spread = values.std()
  if spread == 0 or not (variance > 0).all():
    return np.zeros(num_treatments), 1.0
  precision = 1 / variance
  mean = np.where(precision > 0, mean, 0.0)
  common = (precision * mean).sum() / precision.sum()
  statistic = (precision * np.square(mean - common)).sum()
  freedom = int((precision > 0).sum()) - 1
  p_value = jax.scipy.special.gammaincc(freedom / 2, statistic / 2)
  return (mean - mean[0]) / spread, float(p_value)


def _values(columns: Columns, batch):
  """Name and numbers of each feature; a sparse value is 1 where it is."""
  for i, feature in enumerate(columns.schema.dense_features):
    yield feature.name, batch.dense[:, i]
  for feature in columns.schema.id_features:
    if feature.is_list:
      continue
    ids = batch.ids[feature.name]
    known, counts = np.unique(ids, return_counts=True)
    frequent = np.argsort(-counts, kind="stable")[:MAX_VALUES]
    for i in frequent[counts[frequent] >= MIN_COUNT]:
      indicator = (ids == known[i]).astype(np.float64)
      yield f"{feature.name} (row {known[i]})", indicator
