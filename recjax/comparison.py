"""The table that compares models, and the tests behind its marks.

A difference to the baseline counts as significant when both a paired t-test
over the seeds and a bootstrap over the users give p < 0.05 after Holm's
correction over the table.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.markup
import rich.table

from recjax import resampling, schema, statistics
from recjax.errors import UserError

LEVEL = 0.05
# Differences of stored samples and of results agree at least so well.
_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Run:
  """One finished run.

  Attributes:
    path: Where it was read.
    model: Row of the table.
    dataset: Only runs on one dataset are compared.
    seed: Pairs runs of different models.
    steps: Optimizer updates.
    metrics: Printed name to value; NaN and infinities are possible.
    params: `dense`, `sparse` and `active` numbers of parameters, None where
      the model has no such thing.
    flops_per_example: Of the forward pass; None where unknown.
    examples_per_sec: Training speed; None where unknown.
    config: Resolved config, None where not stored.
    lines: Entries of `metrics.jsonl`.
    diagnostics: Contents of `diagnostics.json`, None where not stored.
    predictions: Path of `predictions.npz`, None where not stored.
    missing: Names of the files that are not there.
  """

  path: pathlib.Path
  model: str
  dataset: str
  seed: int
  steps: int
  metrics: Mapping[str, float]
  params: Mapping[str, int | float | None]
  flops_per_example: int | float | None
  examples_per_sec: int | float | None
  config: Mapping[str, Any] | None = None
  lines: Sequence[Mapping[str, Any]] = ()
  diagnostics: Mapping[str, Any] | None = None
  predictions: pathlib.Path | None = None
  missing: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Table:
  """Text in rows and columns, for Markdown and for the terminal.

  Example:
    >>> print(Table("", ("Model", "AUC"), (("msn", "0.7"),), ()).to_markdown())
    | Model | AUC |
    | --- | ---: |
    | msn | 0.7 |
  """

  title: str
  columns: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  notes: tuple[str, ...]

  def to_markdown(self) -> str:
    """Title, table and notes; the same text for the same table."""
    rule = ("---",) + ("---:",) * (len(self.columns) - 1)
    lines = [
      "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
      for row in (self.columns, rule, *self.rows)
    ]
    parts = [f"### {self.title}"] if self.title else []
    parts += ["\n".join(lines), *self.notes]
    return "\n\n".join(parts)

  def to_rich(self) -> rich.table.Table:
    """The same table for `rich.console.Console.print`."""
    table = rich.table.Table(
      title=rich.markup.escape(self.title) or None,
      caption=rich.markup.escape("\n".join(self.notes)) or None,
      caption_justify="left",
      box=rich.box.SIMPLE_HEAD,
      show_edge=False,
      padding=(0, 1, 0, 0),
    )
    for i, column in enumerate(self.columns):
      # Names may break at their slashes, and no number is cut to an ellipsis.
      table.add_column(
        rich.markup.escape(column.replace("/", "/\n")),
        justify="right" if i else "left",
        overflow="fold",
      )
    for row in self.rows:
      table.add_row(*(rich.markup.escape(cell) for cell in row))
    return table


class Difference(NamedTuple):
  """One model against the baseline in one metric.

  Attributes:
    model: The model; differences are model minus baseline.
    metric: Printed name.
    seeds: Seeds that both have.
    t_test: Over the seeds; None without a common seed.
    t_test_p: Its p-value after Holm's correction; NaN where not made.
    bootstrap: Over the users; None where it could not be made.
    bootstrap_p: Its p-value after Holm's correction; NaN where not made.
    reason: Why there is no bootstrap.
  """

  model: str
  metric: str
  seeds: tuple[int, ...]
  t_test: statistics.Estimate | None
  t_test_p: float
  bootstrap: statistics.Estimate | None
  bootstrap_p: float
  reason: str

  @property
  def verdict(self) -> str:
    """`yes`, `no`, or what is missing for a yes."""
    if math.isnan(self.t_test_p):
      return "open: needs two common seeds"
    if self.t_test_p >= LEVEL:
      return "no"
    if math.isnan(self.bootstrap_p):
      return "open: t-test only"
    return "yes" if self.bootstrap_p < LEVEL else "no"


class StoredBootstrap(NamedTuple):
  """A bootstrap made while the predictions were there.

  Attributes:
    seeds: Seeds over which it is averaged.
    estimate: Model minus baseline.
  """

  seeds: tuple[int, ...]
  estimate: statistics.Estimate


# (model, metric) -> what is stored of its difference to the baseline.
Stored = Mapping[tuple[str, str], StoredBootstrap]


def comparison_table(
  runs: Sequence[Run],
  metrics: Sequence[str],
  baseline: str | None = None,
) -> Table:
  """Mean and spread of each model, and its difference to the baseline.

  Args:
    runs: Runs on one dataset.
    metrics: Printed names, one column each.
    baseline: Model to compare with; None for no comparison.

  Returns:
    One row a model, the baseline first, the others by name.

  Raises:
    UserError: If the runs have several datasets, or the baseline or a metric
      is in none of them.
  """
  return tables(runs, metrics, baseline)[0]


def tables(
  runs: Sequence[Run],
  metrics: Sequence[str],
  baseline: str | None = None,
  *,
  stored: Stored | None = None,
  strict: bool = True,
) -> tuple[Table, ...]:
  """`comparison_table` and, with a baseline, all numbers of its tests.

  `stored` and `strict` are those of `compare`.
  """
  differences = ()
  _check(runs, metrics, baseline)
  if baseline is not None:
    differences = compare(runs, metrics, baseline, stored=stored, strict=strict)
  main = _main_table(runs, metrics, baseline, differences)
  if not differences:
    return (main,)
  return main, _difference_table(baseline, differences)


def compare(
  runs: Sequence[Run],
  metrics: Sequence[str],
  baseline: str,
  *,
  num_samples: int = resampling.NUM_SAMPLES,
  stored: Stored | None = None,
  strict: bool = True,
) -> tuple[Difference, ...]:
  """Tests every other model against the baseline in every metric.

  The bootstrap draws the users of `predictions.npz` and is made for AUC, GAUC
  and log loss on the test part, averaged over the common seeds.

  Args:
    runs: Runs on one dataset.
    metrics: Printed names.
    baseline: Model to compare with.
    num_samples: Draws of the bootstrap.
    stored: Bootstraps for runs whose predictions are not there.
    strict: Whether one that is of other runs is an error, or left out.

  Returns:
    Differences by model, then in the order of `metrics`. Holm's correction
    goes over all of them, for each of the two tests apart.

  Raises:
    UserError: As `comparison_table`, and if predictions are malformed or
      what is stored is of other runs.
  """
  _check(runs, metrics, baseline)
  samples = resampling.Samples(num_samples)
  models = _by_model(runs, baseline)
  found = []
  for model in list(models)[1:]:
    for metric in metrics:
      pairs = [
        (models[model][seed], models[baseline][seed])
        for seed in sorted(models[model].keys() & models[baseline].keys())
        if metric in models[model][seed].metrics
        and metric in models[baseline][seed].metrics
      ]
      t_test = _t_test(pairs, metric) if pairs else None
      bootstrap, reason = samples.difference(pairs, metric)
      seeds = tuple(run.seed for run, _ in pairs)
      kept = (stored or {}).get((model, metric))
      if bootstrap is None and kept is not None:
        problem = _of_other_runs(kept, model, metric, seeds, t_test)
        if problem and strict:
          raise UserError(f"{problem}; run the sweep again")
        if problem:
          reason = problem
        else:
          bootstrap, reason = kept.estimate, ""
      found.append(
        Difference(model, metric, seeds, t_test, 0.0, bootstrap, 0.0, reason)
      )
  t_test_p = statistics.holm(_p_values(d.t_test for d in found))
  bootstrap_p = statistics.holm(_p_values(d.bootstrap for d in found))
  return tuple(
    d._replace(t_test_p=float(t), bootstrap_p=float(b))
    for d, t, b in zip(found, t_test_p, bootstrap_p, strict=True)
  )


def _of_other_runs(kept, model, metric, seeds, t_test) -> str:
  """Why a stored bootstrap is not of these runs; empty if it is."""
  found = t_test.difference if t_test else math.inf
  # What a run does not define is no number in both.
  same = abs(kept.estimate.difference - found) < _TOLERANCE or (
    math.isnan(kept.estimate.difference) and math.isnan(found)
  )
  if tuple(kept.seeds) == seeds and same:
    return ""
  return (
    f"the stored bootstrap of {model} in {metric} is of other runs (seeds"
    f" {list(kept.seeds)}, difference {kept.estimate.difference:+.4f}) than"
    f" the results (seeds {list(seeds)}"
    + (f", difference {t_test.difference:+.4f})" if t_test else ")")
  )


def _check(runs, metrics, baseline) -> None:
  datasets = sorted({run.dataset for run in runs})
  if len(datasets) != 1:
    raise UserError(
      f"a table compares runs on one dataset, got {len(datasets)}:"
      f" {', '.join(datasets)}"
    )
  models = sorted({run.model for run in runs})
  if baseline is not None and baseline not in models:
    raise UserError(
      f"no run of the baseline {baseline!r} on {datasets[0]}"
      + schema.suggest(baseline, models)
    )
  if not metrics:
    raise UserError(f"the runs on {datasets[0]} hold no metrics to compare")
  known = sorted({name for run in runs for name in run.metrics})
  for metric in metrics:
    if metric not in known:
      raise UserError(
        f"no run on {datasets[0]} has the metric {metric!r}"
        + schema.suggest(metric, known)
      )


def _by_model(runs, baseline) -> dict[str, dict[int, Run]]:
  """Model -> seed -> run; the baseline first, the others by name."""
  models = {}
  for run in sorted(
    runs, key=lambda run: (run.model != baseline, run.model, run.seed)
  ):
    models.setdefault(run.model, {})[run.seed] = run
  return models


def _t_test(pairs, metric) -> statistics.Estimate:
  a, b = (
    np.array([pair[side].metrics[metric] for pair in pairs]) for side in (0, 1)
  )
  return statistics.paired_t_test(a, b)


def _p_values(estimates) -> np.ndarray:
  return np.array(
    [math.nan if e is None else e.p_value for e in estimates], np.float64
  )


def _main_table(runs, metrics, baseline, differences) -> Table:
  found = {(d.model, d.metric): d for d in differences}
  columns = ["Model", "Seeds"]
  for metric in metrics:
    columns += [metric] + (["Δ"] if baseline is not None else [])
  columns += ["Params active/total", "FLOPs/example", "Examples/s"]
  rows = []
  for model, seeds in _by_model(runs, baseline).items():
    own = list(seeds.values())
    row = [
      f"{model} (baseline)" if model == baseline else model,
      str(len(own)),
    ]
    for metric in metrics:
      row.append(_mean_and_spread(own, metric))
      if baseline is not None:
        row.append(_mark(found.get((model, metric))))
    total = [_sum(run.params["dense"], run.params["sparse"]) for run in own]
    active = _size([run.params["active"] for run in own])
    row += [
      f"{active} / {_size(total)}",
      _size([run.flops_per_example for run in own]),
      _size([run.examples_per_sec for run in own]),
    ]
    rows.append(tuple(row))
  notes = ["Mean ± sample standard deviation over seeds."]
  if baseline is not None:
    notes.append(
      f"Δ: mean difference to {baseline} over the seeds that both have."
      f" *: p < {LEVEL} in the paired t-test over seeds and in the"
      " user-clustered bootstrap, both after Holm's correction over the"
      " table. °: p <"
      f" {LEVEL} in the t-test, no bootstrap to confirm it."
    )
  return Table("Results", tuple(columns), tuple(rows), tuple(notes))


def _difference_table(baseline, differences) -> Table:
  columns = (
    "Model",
    "Metric",
    "Seeds",
    "Difference",
    "95 % over seeds",
    "p t-test (Holm)",
    "95 % over users",
    "p bootstrap (Holm)",
    "Significant",
  )
  rows = []
  for d in differences:
    rows.append(
      (
        d.model,
        d.metric,
        str(len(d.seeds)),
        "–" if d.t_test is None else f"{d.t_test.difference:+.4f}",
        interval_text(d.t_test),
        _p_text(d.t_test, d.t_test_p),
        interval_text(d.bootstrap),
        _p_text(d.bootstrap, d.bootstrap_p),
        d.verdict,
      )
    )
  reasons = {}
  for d in differences:
    if d.reason:
      reasons.setdefault(d.reason, []).append(f"{d.model} {d.metric}")
  notes = tuple(
    f"No bootstrap ({reason}): {', '.join(names)}."
    for reason, names in reasons.items()
  )
  title = f"Differences to {baseline}"
  return Table(title, columns, tuple(rows), notes)


def _mean_and_spread(runs, metric) -> str:
  values = [run.metrics[metric] for run in runs if metric in run.metrics]
  if not values:
    return "missing"
  text = f"{np.mean(values):.4f}"
  if len(values) > 1 and np.isfinite(values).all():
    text += f" ± {np.std(values, ddof=1):.4f}"
  if len(values) < len(runs):
    text += f" ({len(values)} of {len(runs)} seeds)"
  return text


def _mark(difference) -> str:
  if difference is None or difference.t_test is None:
    return "–"
  mark = {"yes": " *", "open: t-test only": " °"}.get(difference.verdict, "")
  return f"{difference.t_test.difference:+.4f}{mark}"


def interval_text(estimate: statistics.Estimate | None) -> str:
  """Both ends with four digits; a dash where there is none."""
  if estimate is None or math.isnan(estimate.low):
    return "–"
  return f"[{estimate.low:+.4f}, {estimate.high:+.4f}]"


def _p_text(estimate, corrected) -> str:
  if estimate is None or math.isnan(estimate.p_value):
    return "–"
  return f"{estimate.p_value:.2g} ({corrected:.2g})"


def _sum(*values):
  return None if None in values else sum(values)


def _size(values) -> str:
  """Mean with three figures and a unit prefix: 1.23M."""
  if None in values:
    return "–"
  value = float(np.mean(values))
  for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    # What rounds up to the next prefix belongs there: 999,600 is 1.00M.
    if abs(value) >= 0.9995 * scale:
      return f"{value / scale:#.3g}".rstrip(".") + prefix
  return f"{value:.3g}"
