"""Compares finished runs: one table, its tests, pictures and a report.

A run is a workdir as `experiments.run` leaves it, or a bare result file such
as those under `experiments/results/`. Read are, where present:

* `result.json`: `{"model", "dataset", "seed", "steps", "metrics": {name:
  value}, "params": {"dense", "sparse", "active"}, "flops_per_example",
  "examples_per_sec"}`; null where a quantity does not exist (trees have no
  FLOPs). Without it a run is not finished and not compared.
* `config.json`: the resolved config, with `commit`.
* `metrics.jsonl`: learning curves.
* `diagnostics.json`: `{"reliability": {task: {"count", "sum_probs",
  "sum_labels"}}, "slot_usage": {layer: reads of each slot}}`, each a list;
  and what `recjax.cells` shows of scenarios and tasks.
* `predictions.npz`: `<task>/score`, `<task>/label` (NaN: not observed) and
  `group` (the user) of the test rows, for the bootstrap.

A folder of results (`recjax.published`) stands for all runs in it, and brings
the bootstraps that need predictions too large to keep.

What a run lacks is named in the report. Runs of one model on one dataset that
differ in the seed form one row. The same runs give the same Markdown, byte for
byte, in whatever order they come.
"""

import dataclasses
import glob
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console

from recjax import cells, comparison, control, figures, published, writer
from recjax.comparison import Table
from recjax.errors import UserError

_NUMBER = (int, float)
_RESULT_TYPES = {
  "model": str,
  "dataset": str,
  "seed": int,
  "steps": int,
  "metrics": Mapping,
  "params": Mapping,
  "flops_per_example": (*_NUMBER, type(None)),
  "examples_per_sec": (*_NUMBER, type(None)),
}
_PARTS = ("config.json", "metrics.jsonl", "diagnostics.json", "predictions.npz")
_MAIN_METRICS = ("auc", "gauc", "logloss")
_OPENING = re.compile("<!-- table: ([A-Za-z0-9_]+) -->")
_CLOSING = "<!-- /table -->"


def write_report(
  runs: Sequence[comparison.Run],
  directory: str | os.PathLike,
  *,
  baseline: str | None = None,
  title: str = "Comparison of models",
  metrics: Sequence[str] | None = None,
  notes: Sequence[str] = (),
  console: rich.console.Console | None = None,
) -> pathlib.Path:
  """Writes `report.md` and its pictures under `figures/`.

  Args:
    runs: From `load_runs`; each dataset becomes a section.
    directory: Where to write; made where missing.
    baseline: Model that the others are compared with; None for no tests.
    title: Headline.
    metrics: Columns; None means AUC, GAUC and log loss of each task on the
      test part, or all of its metrics where a dataset has none of these.
    notes: Sentences below each table of results.
    console: Where to print the table of each dataset as well.

  Returns:
    Path of `report.md`.

  Raises:
    UserError: If there are no runs, or the baseline or a metric is unknown.
  """
  if not runs:
    raise UserError("no runs to report; name at least one workdir")
  directory = pathlib.Path(directory)
  (directory / "figures").mkdir(parents=True, exist_ok=True)
  parts = [f"# {title}"]
  for dataset in sorted({run.dataset for run in runs}):
    part = [run for run in runs if run.dataset == dataset]
    part.sort(key=lambda run: (run.model != baseline, run.model, run.seed))
    names = main_metrics(part) if metrics is None else tuple(metrics)
    stored = published.stored_of(part, baseline)
    # Runs chosen by hand may be others than those of a published table.
    main, *others = comparison.tables(
      part, names, baseline, stored=stored, strict=False
    )
    main = dataclasses.replace(main, notes=(*main.notes, *notes))
    parts.append(f"## {dataset}")
    parts += [table.to_markdown() for table in (main, *others)]
    if console is not None:
      console.print(main.to_rich())
    parts += _pictures(part, names, directory, _slug(dataset))
    parts += cells.sections(part, directory, _slug(dataset))
    parts += ["### Runs", _configurations(part), "### Missing", _missing(part)]
  path = directory / "report.md"
  path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
  return path


def load_runs(paths: Iterable[str | os.PathLike]) -> list[comparison.Run]:
  """Reads finished runs.

  Args:
    paths: Workdirs, folders of results, result files, or patterns
      (`runs/msn-*`) of them.

  Returns:
    The runs, sorted by dataset, model and seed.

  Raises:
    UserError: If a path holds no run, a file is malformed, or two runs have
      dataset, model and seed in common.
  """
  found = []
  for pattern in map(os.fspath, paths):
    matches = (
      sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    )
    if not matches:
      raise UserError(f"{pattern}: nothing matches; give workdirs of runs")
    for match in map(pathlib.Path, matches):
      found += published.result_files(match) or [match]
  if not found:
    raise UserError("no runs given; name at least one workdir or result.json")
  runs = {}
  for run in map(_load_run, dict.fromkeys(found)):
    key = (run.dataset, run.model, run.seed)
    if key in runs:
      raise UserError(
        f"{runs[key].path} and {run.path}: both are {run.model} on"
        f" {run.dataset} with seed {run.seed}; leave one out or give a"
        " variant its own model name"
      )
    runs[key] = run
  return [runs[key] for key in sorted(runs)]


def published_tables(directory: pathlib.Path) -> tuple[Table, ...]:
  """The tables of a folder of results, without titles.

  Args:
    directory: As `experiments.sweep` writes it; if its `comparison.json` names
      a control, the second table says which gains are gone there.

  Raises:
    UserError: If the folder or its control is malformed, or results and
      `comparison.json` are not of the same runs.
  """
  plan = published.read_comparison(directory)
  runs = load_runs([directory])
  main = comparison.tables(
    runs, plan.metrics, plan.baseline, stored=plan.stored
  )[0]
  if plan.diverged:
    note = f"Diverged and left out: {'; '.join(plan.diverged)}."
    main = dataclasses.replace(main, notes=(*main.notes, note))
  found = [main]
  beside = directory.parent / (plan.control or "")
  if plan.control is not None and not beside.is_dir():
    note = f"Whether a gain is gone in the control is open: no {plan.control}/."
    found[0] = dataclasses.replace(main, notes=(*main.notes, note))
  elif plan.control is not None:
    other = published.read_comparison(beside)
    differences = [
      comparison.compare(load_runs([d]), plan.metrics, plan.baseline, stored=s)
      for d, s in ((directory, plan.stored), (beside, other.stored))
    ]
    found.append(control.control_table(*differences, plan.baseline))
  return tuple(dataclasses.replace(table, title="") for table in found)


def update_tables(path: pathlib.Path, results: pathlib.Path) -> bool:
  """Writes the published tables into a Markdown file.

  Replaces what stands between `<!-- table: NAME -->` and `<!-- /table -->`,
  each on a line of its own, by the tables of `results/NAME`.

  Args:
    path: The Markdown file.
    results: Folder of the folders of results.

  Returns:
    Whether the file had to be changed.

  Raises:
    UserError: If the file is missing, its marks do not pair or there are none,
      or a folder of results is missing or malformed.
  """
  try:
    text = path.read_text(encoding="utf-8")
  except OSError as error:
    raise UserError(
      f"{path}: cannot be read ({error.strerror}); give a Markdown file"
    ) from error
  lines, name = [], None
  for number, line in enumerate(text.splitlines(), start=1):
    opening = _OPENING.fullmatch(line)
    if (name is None and line == _CLOSING) or (name is not None and opening):
      raise UserError(
        f"{path}, line {number}: {line} is out of place; each"
        f" <!-- table: NAME --> must be followed by one {_CLOSING}"
      )
    if opening:
      name = opening[1]
      tables = published_tables(results / name)
      body = "\n\n".join(table.to_markdown() for table in tables)
      lines += [line, "", *body.splitlines(), "", _CLOSING]
    elif line == _CLOSING:
      name = None
    elif name is None:
      lines.append(line)
  if name is not None:
    raise UserError(f"{path}: the table {name!r} has no {_CLOSING} after it")
  if _CLOSING not in lines:
    raise UserError(
      f"{path}: holds no <!-- table: NAME --> line; add one and {_CLOSING}"
      " after it where the table of experiments/results/NAME belongs"
    )
  new = "\n".join(lines) + "\n"
  if new != text:
    path.write_text(new, encoding="utf-8")
  return new != text


def main_metrics(runs: Sequence[comparison.Run]) -> tuple[str, ...]:
  """AUC, GAUC and log loss on the test part, else all that is there."""
  names = sorted({name for run in runs for name in run.metrics})
  test = [name for name in names if name.startswith("test/")] or names
  main = [name for name in test if name.split("/")[-1] in _MAIN_METRICS]
  main.sort(
    key=lambda name: (
      name.split("/")[:-1],
      _MAIN_METRICS.index(name.split("/")[-1]),
    )
  )
  return tuple(main or test)


def _load_run(path: pathlib.Path) -> comparison.Run:
  if not path.exists():
    raise UserError(f"{path}: no such run; give a workdir or a result.json")
  workdir = path if path.is_dir() else None
  if path.name == "result.json":
    workdir = path.parent
  file = path / "result.json" if path.is_dir() else path
  if not file.exists():
    raise UserError(
      f"{path}: holds no result.json, so this is no finished run; run it to"
      " its end or leave it out"
    )
  result = _read_json(file)
  _check_result(result, file)
  present = tuple(
    part for part in _PARTS if workdir and (workdir / part).exists()
  )
  config = diagnostics = None
  lines = []
  if "config.json" in present:
    config = _read_json(workdir / "config.json")
  if "diagnostics.json" in present:
    diagnostics = _read_json(workdir / "diagnostics.json")
  if "metrics.jsonl" in present:
    lines = writer.read_lines(workdir / "metrics.jsonl")
  return comparison.Run(
    path=path,
    model=result["model"],
    dataset=result["dataset"],
    seed=result["seed"],
    steps=result["steps"],
    metrics={k: float(v) for k, v in result["metrics"].items()},
    params=dict(result["params"]),
    flops_per_example=result["flops_per_example"],
    examples_per_sec=result["examples_per_sec"],
    config=config,
    lines=lines,
    diagnostics=diagnostics,
    predictions=(
      workdir / "predictions.npz" if "predictions.npz" in present else None
    ),
    missing=tuple(part for part in _PARTS if part not in present),
  )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    data = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path}: not valid JSON ({error})") from error
  if not isinstance(data, dict):
    raise UserError(f"{path}: must hold a JSON object")
  return data


def _check_result(result: Mapping[str, Any], path: pathlib.Path) -> None:
  for key, kind in _RESULT_TYPES.items():
    if key not in result:
      raise UserError(f"{path}: {key!r} is missing; write the file anew")
    if not isinstance(result[key], kind) or isinstance(result[key], bool):
      raise UserError(f"{path}: {key!r} has the wrong type: {result[key]!r}")
  for name, value in result["metrics"].items():
    is_special = value in ("nan", "inf", "-inf")
    if isinstance(value, bool) or not (
      isinstance(value, _NUMBER) or is_special
    ):
      raise UserError(f"{path}: metric {name!r} is no number: {value!r}")
  for key in ("dense", "sparse", "active"):
    if not isinstance(result["params"].get(key, ""), (*_NUMBER, type(None))):
      raise UserError(f"{path}: params: {key!r} must be a number or null")


class _Picture(NamedTuple):
  """One picture of a section and the sentence where it cannot be drawn."""

  title: str
  stem: str
  draw: Any
  panels: Mapping[str, Sequence[figures.Line]]
  absent: str


def _pictures(runs, metrics, directory, slug) -> list[str]:
  """Draws what the runs allow and names what they do not."""
  pictures = (
    _Picture(
      "Learning curves",
      "learning_curves",
      figures.learning_curves,
      _curve_panels(runs, metrics),
      "no metrics.jsonl holds a validation metric of the table",
    ),
    _Picture(
      "Reliability",
      "reliability",
      figures.reliability_diagram,
      _reliability_panels(runs),
      "no diagnostics.json holds counts of predicted probabilities",
    ),
    _Picture(
      "Memory slots",
      "slot_usage",
      figures.slot_usage,
      _slot_panels(runs),
      "no diagnostics.json names a memory layer",
    ),
  )
  models = list(dict.fromkeys(run.model for run in runs))
  parts = []
  for title, stem, draw, panels, absent in pictures:
    parts.append(f"### {title}")
    name = f"figures/{slug}-{stem}.png"
    if panels:
      # Without the version of matplotlib equal runs give equal files.
      fig = draw(panels, models)
      fig.savefig(directory / name, metadata={"Software": None})
      parts.append(f"![{title}]({name})")
    else:
      (directory / name).unlink(missing_ok=True)  # Of an earlier report.
      parts.append(f"Not drawn: {absent}.")
  return parts


def _curve_panels(runs, metrics):
  panels = {}
  for metric in metrics:
    name = re.sub("^test/", "valid/", metric)
    lines = []
    for run in runs:
      entries = [entry for entry in run.lines if name in entry]
      if not entries:
        continue
      try:
        values = np.array([float(entry[name]) for entry in entries])
      except (TypeError, ValueError) as error:
        raise UserError(
          f"{run.path}/metrics.jsonl: {name!r} must be numbers ({error})"
        ) from error
      steps = np.array([entry["step"] for entry in entries])
      lines.append(figures.Line(run.model, steps, values))
    if lines:
      panels[name] = lines
  return panels


def _reliability_panels(runs):
  sums = {}
  for run in runs:
    tasks = (run.diagnostics or {}).get("reliability", {})
    for task, bins in tasks.items():
      columns = [bins.get(k) for k in ("count", "sum_probs", "sum_labels")]
      values = _columns(run, f"reliability of {task!r}", columns)
      models = sums.setdefault(task, {})
      if run.model in models and models[run.model].shape != values.shape:
        raise UserError(
          f"{run.path}/diagnostics.json: reliability of {task!r} has other"
          f" bins than the other seeds of {run.model}; evaluate them alike"
        )
      models[run.model] = models.get(run.model, 0) + values
  panels = {}
  for task in sorted(sums):
    panels[task] = []
    for model, (count, sum_probs, sum_labels) in sums[task].items():
      some = count > 0
      x, y = sum_probs[some] / count[some], sum_labels[some] / count[some]
      panels[task].append(figures.Line(model, x, y))
  return panels


def _slot_panels(runs):
  panels = {}
  for run in runs:
    layers = (run.diagnostics or {}).get("slot_usage", {})
    for layer, reads in layers.items():
      (hits,) = _columns(run, f"slot usage of {layer!r}", [reads])
      line = figures.Line(run.model, np.arange(hits.size), hits)
      panels.setdefault(layer, []).append(line)
  return dict(sorted(panels.items()))


def _columns(run, what, columns) -> np.ndarray:
  """Equally long lists of non-negative numbers as rows of one array."""
  try:
    values = np.array(columns, dtype=np.float64)
  except (TypeError, ValueError):
    values = np.array(math.nan)
  if values.ndim != 2 or not values.size or not np.all(values >= 0):
    raise UserError(
      f"{run.path}/diagnostics.json: {what} must be equally long lists of"
      " non-negative numbers; evaluate the run anew"
    )
  return values


def _configurations(runs) -> str:
  """What was run, one row a model."""
  rows = []
  for model in dict.fromkeys(run.model for run in runs):
    seeds = [run for run in runs if run.model == model]
    commits = sorted(
      {str((run.config or {}).get("commit", "missing")) for run in seeds}
    )
    rows.append(
      (
        model,
        ", ".join(str(run.seed) for run in seeds),
        ", ".join(str(n) for n in sorted({run.steps for run in seeds})),
        ", ".join(commits),
      )
    )
  columns = ("Model", "Seeds", "Steps", "Commit")
  return Table("", columns, tuple(rows), ()).to_markdown()


def _missing(runs) -> str:
  """What the runs lack, one line a file."""
  lines = []
  for part in _PARTS:
    lacking = [run for run in runs if part in run.missing]
    models = []
    for model in dict.fromkeys(run.model for run in lacking):
      seeds = [str(run.seed) for run in lacking if run.model == model]
      models.append(f"{model} (seed {', '.join(seeds)})")
    if models:
      lines.append(f"- `{part}`: {'; '.join(models)}")
  return "\n".join(lines) or "Nothing."


def _slug(name: str) -> str:
  return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
