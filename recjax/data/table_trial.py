"""The trial columns of a table: treatments, responses, costs, propensities.

They are streamed once for what the training part holds (`TrialReader.prepared`)
and again, block by block, with the other columns. A missing or impossible value
is an error that names its row: a trial is only as good as its records.
"""

import collections
import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.batch import TrialRows
from recjax.data.moments import Moments
from recjax.data.table_columns import group_keys, without_nan
from recjax.data.table_source import Rows, Source, is_string
from recjax.data.vocabulary import VocabularyBuilder
from recjax.errors import UserError
from recjax.schema import SPLITS, Schema
from recjax.trial import Trial


class TrialReader:
  """Reads the rows of a trial.

  Args:
    schema: As the schema file has it, with a trial.
    source: The table.
    splitter: The part of each row of a block.

  Attributes:
    prepared: The trial with what the training part holds.

  Raises:
    UserError: If a value is missing or impossible, the training part has no
      control or no other treatment, or a treatment has no stated cost.
  """

  def __init__(self, schema: Schema, source: Source, splitter):
    self._trial = trial = schema.trial
    needed = list(trial.columns)
    if schema.split.by != "random":
      needed.append(schema.split.column)
    counts = collections.Counter()
    moments, is_binary = Moments(2), True
    clusters = VocabularyBuilder(pa.int64())
    for rows in source.read(needed):
      names = _treatment_names(rows, trial.treatment)
      response = self._numbers(rows, trial.response, "a response is finite")
      cost = self._costs(rows, names)
      is_binary &= bool(np.isin(response, (0, 1)).all())
      in_train = splitter(rows) == SPLITS.index("train")
      kept = names.filter(pa.array(in_train))
      for entry in kept.value_counts().to_pylist():
        counts[entry["values"]] += entry["counts"]
      moments.update(np.stack([response, cost], axis=1)[in_train])
      if trial.cluster is not None:
        clusters.add(group_keys(rows, trial.cluster))
    treatments = _order(trial, counts, source.files[0])
    total = sum(counts.values())
    std = np.sqrt(moments.squares / total)
    std[moments.low >= moments.high] = 0
    self._clusters = clusters.finish()
    self.prepared = dataclasses.replace(
      trial,
      treatments=treatments,
      propensities=tuple(counts[name] / total for name in treatments),
      is_binary=is_binary,
      response_mean=float(moments.mean[0]),
      response_std=float(std[0]),
      cost_std=float(std[1]),
    )

  def read(self, rows: Rows) -> TrialRows:
    """What a block holds."""
    trial = self.prepared
    names = _treatment_names(rows, trial.treatment)
    number = pc.index_in(names, pa.array(trial.treatments)).fill_null(-1)
    number = number.to_numpy(zero_copy_only=False)
    rows.require(
      trial.treatment,
      number >= 0,
      lambda row: (
        f"treatment {names[row].as_py()!r} is not in the training part, which "
        f"has {', '.join(trial.treatments)}; drop the row or split otherwise"
      ),
    )
    propensity = np.asarray(trial.propensities)[number]
    if trial.propensity is not None:
      propensity = rows.floats(trial.propensity)
      rows.require(
        trial.propensity,
        (propensity > 0) & (propensity <= 1),
        lambda row: (
          f"{propensity[row]:g} is no propensity: the chance of the treatment "
          "that the row got is above 0 and at most 1"
        ),
      )
    cluster = rows.first_in_table + np.arange(len(rows))
    if trial.cluster is not None:
      cluster = self._clusters.lookup(group_keys(rows, trial.cluster))
    response = self._numbers(rows, trial.response, "a response is finite")
    return TrialRows(
      treatment=number.astype(np.int32),
      response=response.astype(np.float32),
      cost=self._costs(rows, names).astype(np.float32),
      propensity=propensity.astype(np.float32),
      cluster=cluster.astype(np.int32),
    )

  def _costs(self, rows: Rows, names: pa.Array):
    trial = self._trial
    if trial.cost is not None:
      cost = self._numbers(rows, trial.cost, "a cost is finite, at least 0")
      rows.require(
        trial.cost,
        cost >= 0,
        lambda row: f"{cost[row]:g} is no cost; it must be at least 0",
      )
      return cost
    known = list(trial.arm_cost)
    number = pc.index_in(names, pa.array(known)).fill_null(-1)
    number = number.to_numpy(zero_copy_only=False)
    rows.require(
      trial.treatment,
      number >= 0,
      lambda row: (
        f"treatment {names[row].as_py()!r} has no cost in arm_cost, which has "
        f"{', '.join(known)}"
      ),
    )
    return np.asarray(list(trial.arm_cost.values()))[number]

  def _numbers(self, rows: Rows, column: str, rule: str):
    numbers = rows.floats(column)
    rows.require(
      column,
      np.isfinite(numbers),
      lambda row: (
        f"{rows.column(column)[row].as_py()}, but {rule}; fill it or drop the "
        "row"
      ),
    )
    return numbers


def _treatment_names(rows: Rows, column: str) -> pa.Array:
  """The treatment of each row as a string; whole numbers as such."""
  array = without_nan(rows.column(column))
  rows.require(
    column,
    pc.is_valid(array).to_numpy(zero_copy_only=False),
    lambda row: "the treatment is missing; fill it or drop the row",
  )
  if not is_string(array.type):
    array = rows.cast(column, array, pa.int64())
  return array.cast(pa.string())


def _order(trial: Trial, counts, path) -> tuple[str, ...]:
  """All treatments, the control first."""
  if trial.control not in counts:
    raise UserError(
      f"{path}: column {trial.treatment!r}: no row of the training part has "
      f"the control {trial.control!r}; it has "
      f"{', '.join(sorted(counts)) or 'no rows'}"
    )
  if len(counts) < 2:
    raise UserError(
      f"{path}: column {trial.treatment!r}: the training part has the control "
      f"{trial.control!r} alone; a trial needs another treatment"
    )
  wanted = trial.treatments or trial.arm_cost
  if wanted is None:
    wanted = sorted(counts, key=_by_value)
  for name in wanted:
    if not counts[name]:
      raise UserError(
        f"{path}: column {trial.treatment!r}: no row of the training part has "
        f"the treatment {name!r}; leave it out of the schema"
      )
  for name in counts:
    if name not in wanted:
      raise UserError(
        f"{path}: column {trial.treatment!r}: treatment {name!r} is not among "
        f"the treatments of the schema, {', '.join(wanted)}"
      )
  others = [name for name in wanted if name != trial.control]
  return (trial.control, *others)


def _by_value(name: str):
  """Numbers by value, then names by letter."""
  try:
    return (0, int(name), name)
  except ValueError:
    return (1, 0, name)
