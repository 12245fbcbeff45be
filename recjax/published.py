"""A folder of published results: small files that are committed.

One `result.json` a run, named `<model>-<seed>.json`; `comparison.json`, which
says how they are compared and keeps what can only be computed while the
predictions are there; and `sweep.json`, how the runs came about.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from recjax import comparison, resampling, statistics
from recjax.errors import UserError
from recjax.writer import write_json

COMPARISON_FILE = "comparison.json"
SWEEP_FILE = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Comparison:
  """How the runs of a folder are compared.

  Attributes:
    baseline: Model that the others are compared with.
    metrics: Printed names, the columns of the table.
    control: Name of the folder beside this one that holds the same models on
      data without the planted structure; None if there is none.
    diverged: Runs without a result, such as `msn, seed 3`.
    stored: Bootstraps over users, made while the predictions were there.
  """

  baseline: str
  metrics: tuple[str, ...]
  control: str | None = None
  diverged: tuple[str, ...] = ()
  stored: comparison.Stored = dataclasses.field(default_factory=dict)


def result_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The files of runs in a folder of results, sorted; empty if it is none."""
  if not (directory / COMPARISON_FILE).is_file():
    return []
  others = (COMPARISON_FILE, SWEEP_FILE)
  return [p for p in sorted(directory.glob("*.json")) if p.name not in others]


def write_comparison(
  directory: pathlib.Path,
  runs: Sequence[comparison.Run],
  plan: Comparison,
  *,
  num_samples: int = resampling.NUM_SAMPLES,
) -> Comparison:
  """Makes the bootstraps of `runs` and writes `comparison.json`.

  Args:
    directory: Folder of results.
    runs: Workdirs with their predictions; where they lack, no bootstrap is
      made.
    plan: Baseline, metrics and the rest; `stored` is made anew.
    num_samples: Draws of the users.

  Returns:
    What was written.

  Raises:
    UserError: As `comparison.compare`.
  """
  differences = comparison.compare(
    runs, plan.metrics, plan.baseline, num_samples=num_samples
  )
  entries = [
    {
      "model": d.model,
      "metric": d.metric,
      "seeds": list(d.seeds),
      **d.bootstrap._asdict(),
    }
    for d in differences
    if d.bootstrap is not None
  ]
  content = {
    "baseline": plan.baseline,
    "metrics": list(plan.metrics),
    "control": plan.control,
    "diverged": list(plan.diverged),
    "num_samples": num_samples,
    "bootstrap": entries,
  }
  write_json(directory / COMPARISON_FILE, content)
  return read_comparison(directory)


def read_comparison(directory: pathlib.Path) -> Comparison:
  """Reads `comparison.json`.

  Raises:
    UserError: If it is not there or malformed.
  """
  path = directory / COMPARISON_FILE
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    return Comparison(
      baseline=_of_type(content["baseline"], str),
      metrics=tuple(_of_type(name, str) for name in content["metrics"]),
      control=_of_type(content.get("control"), str | None),
      diverged=tuple(content.get("diverged", ())),
      stored=dict(_stored(entry) for entry in content["bootstrap"]),
    )
  except FileNotFoundError as error:
    raise UserError(
      f"{path}: no such file; a folder of results is what experiments.sweep "
      "writes with --results"
    ) from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path}: is no comparison of results ({type(error).__name__}: {error});"
      " run the sweep again"
    ) from error


def stored_of(
  runs: Sequence[comparison.Run], baseline: str | None
) -> comparison.Stored:
  """Bootstraps kept beside the files of `runs` for this baseline."""
  found = {}
  for folder in sorted({run.path.parent for run in runs if run.path.is_file()}):
    if (folder / COMPARISON_FILE).is_file():
      kept = read_comparison(folder)
      if kept.baseline == baseline:
        found |= kept.stored
  return found


def _stored(entry: Any) -> tuple[tuple[str, str], comparison.StoredBootstrap]:
  numbers = [float(entry[name]) for name in statistics.Estimate._fields]
  key = _of_type(entry["model"], str), _of_type(entry["metric"], str)
  seeds = tuple(_of_type(seed, int) for seed in entry["seeds"])
  estimate = statistics.Estimate(*numbers)
  return key, comparison.StoredBootstrap(seeds, estimate)


def _of_type(value, kind):
  if not isinstance(value, kind):
    raise TypeError(f"{value!r} has the wrong type")
  return value
