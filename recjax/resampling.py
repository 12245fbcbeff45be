"""The bootstrap over users of the runs of a table.

It needs the predictions of every test row, which are far too large to keep
beside published numbers. What it gives is small: `experiments.sweep` makes it
once and keeps it as `comparison.json`.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from recjax import statistics
from recjax.batch import TrialRows
from recjax.errors import UserError
from recjax.metrics import trial

METRICS = ("auc", "gauc", "logloss")
TRIAL = "trial"  # In place of a task, for what `trial.resample` draws.
NUM_SAMPLES = 2000
# A metric of other predictions than those scored differs by more than this.
_TOLERANCE = 1e-5


class UserBootstrap(NamedTuple):
  """A difference between two models with users drawn anew.

  Attributes:
    estimate: Mean over the seeds; None where it could not be made.
    reason: Why it could not.
  """

  estimate: statistics.Estimate | None
  reason: str = ""


class Samples:
  """Bootstrap samples of each run and metric, drawn once.

  Args:
    num_samples: Draws of the users.
  """

  def __init__(self, num_samples: int = NUM_SAMPLES):
    self._num_samples = num_samples
    self._found = {}

  def difference(
    self, pairs: Sequence[tuple[Any, Any]], metric: str
  ) -> UserBootstrap:
    """First minus second model of `pairs`, averaged over the pairs.

    Args:
      pairs: Two `comparison.Run` of one seed each.
      metric: Printed name; `test/<task>/` and one of `METRICS`.

    Raises:
      UserError: If predictions are malformed or not those of the result.
    """
    split, *task, name = metric.split("/")
    known = trial.RESAMPLED if task == [TRIAL] else METRICS
    if split != "test" or len(task) != 1 or name not in known:
      return UserBootstrap(None, f"made for test {', '.join(known)} only")
    if not pairs:
      return UserBootstrap(None, "no common seed")
    for run in (run for pair in pairs for run in pair):
      if not run.predictions:
        reason = f"no predictions.npz of {run.model}, seed {run.seed}"
        return UserBootstrap(None, reason)
    found = [[self._read(run, task[0], name) for run in pair] for pair in pairs]
    if None in [entry for pair in found for entry in pair]:
      reason = f"predictions.npz lacks {task[0]} or one of its classes"
      return UserBootstrap(None, reason)
    rows = [{entry[0] for entry in pair} for pair in found]
    # People of a trial are drawn by their rows: folds are drawn each by itself.
    rows = rows if task == [TRIAL] else [set.union(*rows)]
    if max(map(len, rows)) > 1:
      return UserBootstrap(None, "predictions are not of the same rows")
    (value_a, value_b), (samples_a, samples_b) = (
      [np.array([pair[side][i] for pair in found]) for side in (0, 1)]
      for i in (1, 2)
    )
    return UserBootstrap(
      statistics.estimate_difference(value_a, value_b, samples_a, samples_b)
    )

  def _read(self, run, task, name):
    """Fingerprint of the rows, value and samples; None where absent."""
    key = (run.predictions, task, name)
    if key not in self._found:
      self._found[key] = self._draw(run, task, name)
    return self._found[key]

  def _draw(self, run, task, name):
    if task == TRIAL:
      return self._draw_trial(run, name)
    rows = _load(run.predictions, task)
    if rows is None:
      return None
    scores, labels, group = rows
    try:
      value, samples = self._resample(name, scores, labels, group)
    except ValueError as error:
      raise UserError(f"{run.predictions}: {task}: {error}") from error
    _check_stated(run, task, name, value)
    digest = hashlib.sha256(labels.tobytes() + b"|" + str(group.dtype).encode())
    digest.update(np.ascontiguousarray(group).tobytes())
    return digest.digest(), value, samples

  def _draw_trial(self, run, name):
    """All metrics at once: one pass over the draws gives them."""
    loaded = _load_trial(run.predictions)
    if loaded is None:
      return None
    response, cost, rows = loaded
    digest = hashlib.sha256()
    for field in dataclasses.fields(rows):
      digest.update(np.ascontiguousarray(getattr(rows, field.name)).tobytes())
    values = trial.summarize(response, cost, rows)
    samples = trial.resample(
      response,
      cost,
      rows,
      num_samples=self._num_samples,
      seed=list(digest.digest()),
    )
    for metric, drawn in samples.items():
      _check_stated(run, TRIAL, metric, values[metric])
      found = (digest.digest(), values[metric], drawn)
      self._found[run.predictions, TRIAL, metric] = found
    return self._found[run.predictions, TRIAL, name]

  def _resample(self, name, scores, labels, group):
    if name == "auc":
      value, samples = statistics.bootstrap_auc(
        scores, labels, group, num_samples=self._num_samples
      )
      return float(value), samples
    if np.isnan(scores).any():
      raise ValueError("scores must not be NaN; see which examples gave it.")
    _, user = np.unique(group, return_inverse=True)
    weights = np.bincount(user).astype(np.float64)
    if name == "logloss":
      # Scores are log odds: -log P(label) is log(1 + exp(-+score)).
      loss = np.logaddexp(0, np.where(labels == 1, -scores, scores))
      total = np.bincount(user, loss)
    else:
      aucs = statistics.auc_of_clusters(scores, labels, group)
      weights[np.isnan(aucs)] = 0
      total = weights * np.nan_to_num(aucs)
    return statistics.bootstrap_ratio(
      total, weights, num_samples=self._num_samples
    )


def _check_stated(run, task: str, name: str, value: float) -> None:
  """Raises if the predictions are of another run than the result."""
  stated = run.metrics[f"test/{task}/{name}"]
  if not np.isclose(stated, value, rtol=0, atol=_TOLERANCE, equal_nan=True):
    raise UserError(
      f"{run.predictions}: {name} of {task} is {value:.4f}, but"
      f" {stated:.4f} in result.json; evaluate the run anew"
    )


def _read(path: pathlib.Path, names) -> list[np.ndarray] | None:
  """Arrays of an archive, or None if one is not there."""
  try:
    with np.load(path, allow_pickle=False) as file:
      if any(name not in file for name in names):
        return None
      return [file[name] for name in names]
  except (ValueError, OSError, EOFError, KeyError) as error:
    raise UserError(
      f"{path}: not a NumPy archive ({error}); evaluate anew"
    ) from error


def _load_trial(path: pathlib.Path):
  """Predicted response and cost, and what was drawn and seen; or None."""
  names = ("response", "cost", "treatment", "seen_response", "seen_cost")
  names += ("propensity", "cluster")
  arrays = _read(path, [f"{TRIAL}/{name}" for name in names])
  if arrays is None:
    return None
  response, cost, *seen = arrays
  return response, cost, TrialRows(*seen)


def _load(path: pathlib.Path, task: str):
  """Scores, labels and users of the rows with an outcome, or None."""
  names = (f"{task}/score", f"{task}/label", "group")
  arrays = _read(path, names)
  if arrays is None:
    return None
  scores, labels, group = arrays
  if not scores.shape == labels.shape == group.shape or scores.ndim != 1:
    raise UserError(
      f"{path}: {names} must be vectors of one length, got"
      f" {scores.shape}, {labels.shape}, {group.shape}; evaluate anew"
    )
  labels = labels.astype(np.float64)
  observed = ~np.isnan(labels)
  scores = scores[observed].astype(np.float64)
  labels, group = labels[observed], group[observed]
  if np.unique(labels).size < 2:
    return None
  return scores, labels, group
