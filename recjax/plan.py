"""From a finished run on a trial to a spend plan for a population.

The run's model predicts response and cost of every treatment for each person;
`recjax.allocation` chooses under the budget, with a certificate. What the plan
will bring is then said twice: by the model, and by the held-out part of the
trial, whose people get the treatment that the same price would give them: the
mean over those who happened to have it, weighted by one over the propensity
(Hajek). Intervals are of a bootstrap over the units that were drawn.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from recjax import allocation, export, figures, restore
from recjax.batch import TrialRows
from recjax.data.pipeline import make_loader
from recjax.data.table_source import Source
from recjax.errors import UserError
from recjax.metrics.uplift import eom
from recjax.restore import Run
from recjax.scorer import Encoder, InputError

ADDED = ("treatment", "expected_response", "expected_cost")
NUM_BUDGETS = 16  # Points of the curve of value against budget.
_BATCH_SIZE = 8192


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What something brings a head, with a 95 % interval."""

  value: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Plan:
  """Who gets what, and what it will bring.

  Attributes:
    people: The population's own columns that are no features, then `ADDED`;
      one row a person, in the order of the input.
    summary: What is printed: numbers for the whole population, by name.
    curve: Budgets (totals) and, at each, the value by the model and by the
      held-out trial with its interval.
  """

  people: pa.Table
  summary: dict[str, float]
  curve: dict[str, Float[np.ndarray, " budgets"]]


def make_plan(
  workdir: str,
  population: str,
  budget: float,
  *,
  num_bootstrap: int = 1000,
  seed: int = 0,
) -> Plan:
  """The best plan of `budget` for the people of a table.

  Args:
    workdir: Folder of a finished run of a trial method.
    population: Parquet or CSV file with the columns of the run's features.
    budget: What may be spent in all, in the unit of the trial's cost.
    num_bootstrap: Draws of the bootstrap.
    seed: Of the bootstrap.

  Raises:
    UserError: If the run is of no trial, or the table or budget is wrong.

  Example:
    >>> plan = make_plan("runs/budget", "people.parquet", 5e4)  # doctest: +SKIP
    >>> plan.people["treatment"][0].as_py()
    'mail'
  """
  if not 0 <= budget < math.inf:
    raise UserError(f"--budget must be a finite number from 0, got {budget}")
  run = restore.open_run(workdir, one_device=True)
  if not run.method.is_trial:
    raise UserError(
      f"{workdir}: is a run of {run.method.name}, which predicts no "
      "treatments; give one of a trial method such as budget_allocation"
    )
  people, features = read_population(population, run)
  tables = predict_population(run, features)
  held_out, trial = predict_part(run, "test")
  plan = allocation.allocate(tables["response"], tables["cost"], budget)
  totals = np.linspace(0.0, _dearest(tables), NUM_BUDGETS)
  many = allocation.allocate(tables["response"], tables["cost"], totals)
  rng = np.random.default_rng(seed)
  weights = bootstrap_weights(trial.cluster, num_bootstrap, rng)

  count = len(plan.choice)
  base = _estimate(np.zeros(len(trial.cost), int), trial, "response", weights)
  summary = {
    "people": float(count),
    "budget": float(budget),
    "expected_value": float(plan.value),
    "expected_spend": float(plan.spend),
    "upper_bound": float(plan.upper_bound),
    "gap": float(plan.upper_bound - plan.value),
    "multiplier": float(plan.multiplier),
    "value_of_none": float(np.sum(tables["response"][:, 0])),
    "held_out_value_of_none": count * base.value,
  }
  choice = _choose(held_out, float(plan.multiplier))
  for name, outcome in (("value", "response"), ("spend", "cost")):
    found = _estimate(choice, trial, outcome, weights)
    summary |= {
      f"held_out_{name}": count * found.value,
      f"held_out_{name}_low": count * found.low,
      f"held_out_{name}_high": count * found.high,
    }
  points = [
    _estimate(_choose(held_out, price), trial, "response", weights)
    for price in many.multiplier
  ]
  curve = {
    "budget": totals,
    "value": np.asarray(many.value),
    "held_out": count * np.array([p.value for p in points]),
    "low": count * np.array([p.low for p in points]),
    "high": count * np.array([p.high for p in points]),
  }
  names = np.asarray(run.method.schema.trial.treatments)
  rows = np.arange(count)
  columns = (
    pa.array(names[plan.choice].tolist(), pa.string()),
    pa.array(tables["response"][rows, plan.choice]),
    pa.array(tables["cost"][rows, plan.choice]),
  )
  for name, column in zip(ADDED, columns, strict=True):
    people = people.append_column(name, column)
  return Plan(people, summary, curve)


def write_plan(plan: Plan, path: pathlib.Path) -> None:
  """Writes the table, and the picture of its curve beside it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(plan.people, path)
  picture = figures.value_curve(plan.curve, plan.summary)
  picture.savefig(path.with_suffix(".png"), metadata={"Software": None})


def read_population(
  path: str, run: Run
) -> tuple[pa.Table, dict[str, np.ndarray]]:
  """The columns that are no features, and the model's input arrays."""
  source = Source(path)
  names = [feature.name for feature in run.method.schema.features]
  source.check_columns(names)
  kept = [n for n in source.schema(source.files[0]).names if n not in names]
  for name in ADDED:
    if name in kept:
      raise UserError(
        f"{path}: the column {name!r} is one that the plan adds; rename it"
      )
  source.check_columns(kept)
  encoder = Encoder(*export.describe_data(run.columns))
  extra, parts = [], []
  for rows in source.read([*names, *kept]):
    columns = {name: _values(rows.column(name)) for name in names}
    try:
      parts.append(encoder.encode(columns))
    except InputError as error:
      raise UserError(
        f"{rows.path}, rows from {rows.first + 1} on: {error}"
      ) from error
    extra.append(rows.data.select(kept))
  if not parts:
    raise UserError(f"{path}: holds no people; give a table with rows")
  arrays = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
  # Without kept columns a table has no rows to append to.
  return pa.Table.from_batches(extra) if kept else pa.table({}), arrays


def predict_population(
  run: Run, arrays: Mapping[str, np.ndarray]
) -> dict[str, Float[np.ndarray, "people treatments"]]:
  """Response and cost of every treatment, in float64."""

  @jax.jit
  def predict(state, arrays):
    batch = export.batch_of(arrays, run.method)
    rows = run.method.read(state.tables, batch)
    return run.method.apply(
      state.eval_params, state.tables, rows, batch, train=False
    )[0]

  count, parts = len(arrays["example_mask"]), []
  size = min(_BATCH_SIZE, count)
  for start in range(0, count, size):
    chunk = {k: v[start : start + size] for k, v in arrays.items()}
    missing = size - len(chunk["example_mask"])
    chunk = {
      k: np.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1))
      for k, v in chunk.items()
    }
    output = jax.device_get(predict(run.state, chunk))
    parts.append({k: v[: size - missing] for k, v in output.items()})
  return {
    name: np.concatenate([part[name] for part in parts]).astype(np.float64)
    for name in ("response", "cost")
  }


def predict_part(
  run: Run, split: str
) -> tuple[dict[str, Float[np.ndarray, "people treatments"]], TrialRows]:
  """The predictions for a part of the trial, and what was seen in it."""
  loader = make_loader(
    run.columns, split, batch_size=_BATCH_SIZE, shuffle=False
  )

  @jax.jit
  def predict(state, batch):
    rows = run.method.read(state.tables, batch)
    return run.method.apply(
      state.eval_params, state.tables, rows, batch, train=False
    )[0]

  tables, seen = [], []
  for batch in loader:
    keep = np.asarray(batch.example_mask)
    output = jax.device_get(predict(run.state, batch))
    tables.append({k: v[keep].astype(np.float64) for k, v in output.items()})
    seen.append(jax.tree.map(lambda x, k=keep: np.asarray(x)[k], batch.trial))
  join = lambda *parts: np.concatenate(parts)  # noqa: E731
  return jax.tree.map(join, *tables), jax.tree.map(join, *seen)


def bootstrap_weights(
  cluster: Int[np.ndarray, " people"],
  num_draws: int,
  rng: np.random.Generator,
) -> tuple[Int[np.ndarray, " people"], Int[np.ndarray, "draws clusters"]]:
  """Cluster of each person by number, and how often each draw takes it."""
  found, cluster = np.unique(cluster, return_inverse=True)
  chances = np.full(len(found), 1 / len(found))
  counts = rng.multinomial(len(found), chances, size=num_draws)
  return cluster, counts


def _estimate(choice, trial: TrialRows, outcome: str, weights) -> Estimate:
  """Hajek's mean over those whose treatment is the chosen one."""
  cluster, counts = weights
  seen = np.float64(getattr(trial, outcome))
  weight = (choice == trial.treatment) / np.float64(trial.propensity)
  size = counts.shape[1]
  top = counts @ np.bincount(cluster, weight * seen, size)
  bottom = counts @ np.bincount(cluster, weight, size)
  with np.errstate(invalid="ignore", divide="ignore"):
    draws = top / bottom
  if not np.isfinite(draws).any():
    return Estimate(math.nan, math.nan, math.nan)
  low, high = np.nanquantile(draws, (0.025, 0.975))
  value = eom(choice, trial.treatment, seen, trial.propensity)
  return Estimate(value, float(low), float(high))


def _choose(tables, multiplier: float) -> Int[np.ndarray, " people"]:
  return np.argmax(tables["response"] - multiplier * tables["cost"], axis=1)


def _dearest(tables) -> float:
  """What everybody's best response costs."""
  best = np.argmax(tables["response"], axis=1)
  return float(tables["cost"][np.arange(len(best)), best].sum())


def _values(array: pa.Array) -> Any:
  """A column as the encoder takes it: numbers as arrays, else as a list."""
  if array.null_count == 0 and (
    pa.types.is_floating(array.type) or pa.types.is_integer(array.type)
  ):
    return array.to_numpy(zero_copy_only=False)
  return array.to_pylist()
