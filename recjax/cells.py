"""The part of a report on scenarios and tasks: tables of cells, attention.

A run's `diagnostics.json` may hold `"cells"`: {task: [the fields of
`recjax.metrics.slices.Cell`]}, and `"attention"`: {layer/family: {"tokens":
numbers, "weights": [tokens x feature tokens]}}.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from recjax import figures
from recjax.comparison import Run, Table
from recjax.errors import UserError

_BINARY = ("auc", "gauc", "logloss", "pcoc", "ece")
_REAL = ("mae", "rmse")


def sections(
  runs: Sequence[Run], directory: pathlib.Path, slug: str
) -> list[str]:
  """Markdown of the runs' cells and attention; empty where there are none.

  Args:
    runs: Of one dataset.
    directory: Where the report and its folder `figures` are.
    slug: Begins the names of pictures.

  Raises:
    UserError: If a diagnostics file is malformed.
  """
  parts = []
  tables = cell_tables(runs)
  if tables:
    parts.append("### Scenarios and tasks")
    parts += [table.to_markdown() for table in tables]
  models = dict.fromkeys(
    run.model for run in runs if (run.diagnostics or {}).get("attention")
  )
  for model in models:
    run = next(
      r
      for r in runs
      if r.model == model and (r.diagnostics or {}).get("attention")
    )
    weights, tokens = _attention(run)
    name = f"figures/{slug}-{model}-attention.png"
    fig = figures.attention_maps(weights, tokens)
    fig.savefig(directory / name, metadata={"Software": None})
    parts += [
      f"### Attention of {model}, seed {run.seed}",
      f"![Attention of {model}]({name})",
    ]
  return parts


def cell_tables(runs: Sequence[Run]) -> list[Table]:
  """Two tables a task: the counted cells, and those too small to count.

  Each row is a model and a scenario; numbers are means over the seeds.
  """
  tasks = dict.fromkeys(
    task for run in runs for task in (run.diagnostics or {}).get("cells", {})
  )
  tables = []
  for task in tasks:
    own = [
      (run.model, cell)
      for run in runs
      for cell in (run.diagnostics or {}).get("cells", {}).get(task, [])
    ]
    for title, counted in ((task, True), (f"{task}, small cells", False)):
      chosen = [v for v in own if _field(v[1], "is_counted", task) is counted]
      if chosen:
        tables.append(_table(title, chosen, task))
  return tables


def _table(title: str, cells, task: str) -> Table:
  names = [
    name
    for name in (*_BINARY, *_REAL)
    if name in _field(cells[0][1], "metrics", task)
  ]
  columns = ("Scenario", "Model", "Examples", "Positives", "Two-class users")
  keys = sorted({(cell["scenario"], model) for model, cell in cells})
  rows = []
  for scenario, model in keys:
    own = [c for m, c in cells if (m, c["scenario"]) == (model, scenario)]
    counts = [
      _count(own[0], name)
      for name in ("num_examples", "num_positives", "num_two_class_groups")
    ]
    # NaN is written as a string, since JSON has none.
    values = [
      np.mean([float(c["metrics"].get(name, "nan")) for c in own])
      for name in names
    ]
    numbers = [f"{value:.4f}" for value in values]
    rows.append((str(scenario), model, *counts, *numbers))
  return Table(title, (*columns, *names), tuple(rows), ())


def _count(cell, name: str) -> str:
  value = cell.get(name)
  return "" if value is None else f"{value:,}"


def _field(cell, name: str, task: str):
  if not isinstance(cell, dict) or name not in cell:
    raise UserError(
      f"diagnostics.json: a cell of {task!r} lacks {name!r}; evaluate the run "
      "anew"
    )
  return cell[name]


def _attention(run: Run):
  """Weights and names of tokens, by layer and family."""
  weights, names = {}, {}
  tasks = (run.config or {}).get("model", {}).get("tasks", ())
  for name, entry in run.diagnostics["attention"].items():
    try:
      weights[name] = np.array(entry["weights"], np.float64)
      tokens = [int(token) for token in entry["tokens"]]
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(
        f"{run.path}/diagnostics.json: attention of {name!r} is malformed "
        f"({error}); evaluate the run anew"
      ) from error
    family = name.rsplit("/")[-1]
    if family == "tasks" and len(tasks) > max(tokens):
      names[name] = [tasks[token] for token in tokens]
    elif family == "everywhere":
      names[name] = ["all scenarios"]
    else:
      # The token of scenario k is the one before: scenario 0 is none.
      names[name] = [f"{family} {token + 1}" for token in tokens]
  return weights, names
