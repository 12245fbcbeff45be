"""Predictions of a whole split and their metrics."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recjax import losses
from recjax.batch import Batch
from recjax.data import feedback
from recjax.data.columns import Columns
from recjax.data.length_buckets import LengthBuckets
from recjax.data.pipeline import make_loader
from recjax.layers import domain_attention
from recjax.method import Method
from recjax.metrics import calibration, ranking, slices, summary, trial
from recjax.train_state import TrainState

# Batches computed at a time. XLA runs parts of a program, its top-k among
# them, on one core of a CPU; a second program fills the others.
IN_FLIGHT = 2


@dataclasses.dataclass
class Evaluation:
  """What one pass over a split gives.

  Attributes:
    metrics: `<split>/<task>/<metric>` -> value (`<split>/trial/<metric>` for a
      method of a trial), and the method's diagnostics as `<split>/<name>`. Data
      with scenarios also has means over them, by task and, of all binary tasks,
      as `<split>/macro_<metric>`.
    examples: Task -> {"score", "label"}, NaN where a label is missing; and
      `group` -> ids. Of a trial: `trial` -> predicted tables, and what was
      drawn and seen. One entry an example, in the order of the rows.
    counters: The method's sums; see `recjax.method`.
    cells: Task -> its cells by scenario; empty where the data has none.
  """

  metrics: dict[str, float]
  examples: dict[str, Any]
  counters: dict[str, Any]
  cells: dict[str, list[slices.Cell]] = dataclasses.field(default_factory=dict)


def forward(
  state: TrainState, batch: Batch, method: Method, output: str = ""
) -> dict[str, Any]:
  """Predictions of one batch beside what metrics need; jit it.

  `output` names an entry of `aux` to take for the predictions; see `Stage`.
  Labels and masks come back too, so that under a mesh every process holds
  those of the global batch.
  """
  rows = method.read(state.tables, batch)
  predictions, aux, _ = method.apply(
    state.eval_params, state.tables, rows, batch, train=False
  )
  predictions = aux[output] if output else predictions
  tasks = () if method.is_trial else tuple(predictions)
  return {
    "predictions": predictions,
    "labels": {task: batch.labels[task] for task in tasks},
    "label_mask": {task: batch.label_mask[task] for task in tasks},
    "groups": dict(batch.groups),
    "trial": batch.trial if method.is_trial else None,
    "scenario": batch.scenario,
    "popularity": batch.ids.get(method.schema.roles.popularity),
    "example_mask": batch.example_mask,
    "counters": aux.get("counters", {}),
  }


def evaluate(
  predict: Callable[[TrainState, Batch], dict[str, Any]],
  state: TrainState,
  method: Method,
  columns: Columns,
  split: str,
  *,
  batch_size: int,
  put_batch: Callable[[Batch], Batch],
  length_buckets: tuple[int, ...] = (),
) -> Evaluation:
  """Runs `predict`, a compiled `forward`, over `split`.

  Args:
    predict: From `Placement.compile_eval`.
    state: Parameters and tables.
    method: What is evaluated.
    columns: The data.
    split: `valid` or `test`.
    batch_size: Examples a step.
    put_batch: From the placement.
    length_buckets: Groups the rows by length, to pad less.
  """
  loader = make_loader(
    columns,
    split,
    batch_size=batch_size,
    shuffle=False,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    length_buckets=length_buckets,
  )
  parts, counters = [], None
  for output in _outputs(predict, state, map(put_batch, loader)):
    counters = _add(counters, output.pop("counters"))
    valid = output.pop("example_mask")
    parts.append(jax.tree.map(lambda x, keep=valid: x[keep], output))
  output = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
  if length_buckets:
    buckets = LengthBuckets(columns, split, batch_size, length_buckets)
    place = np.argsort(buckets.order)
    output = jax.tree.map(lambda x: x[place], output)

  run = _evaluate_trial if method.is_trial else _evaluate_tasks
  metrics, examples, cells = run(output, columns, split)
  summarize = getattr(method.module, "diagnostics", None)
  if summarize is not None:
    values = summarize(counters)
    metrics |= {f"{split}/{k}": float(v) for k, v in values.items()}
  return Evaluation(metrics, examples, counters, cells)


def _evaluate_tasks(output, columns: Columns, split: str):
  """Metrics and examples of each predicted label, and cells by scenario."""
  real = frozenset(v.name for v in columns.schema.labels if v.kind == "real")
  metrics, examples, cells = {}, {}, {}
  for task, scores in output["predictions"].items():
    labels, mask = output["labels"][task], output["label_mask"][task]
    if task in real:
      scores = np.asarray(losses.symexp(jnp.asarray(scores)))
      values = summary.summarize_real(scores, labels, mask=mask)
    else:
      values = summary.summarize(
        scores, labels, mask=mask, groups=output["groups"]
      )
      if output["popularity"] is not None:
        values |= slices.summarize_by_slice(
          scores, labels, item_slices(output["popularity"]), mask=mask
        )
    metrics |= {f"{split}/{task}/{k}": float(v) for k, v in values.items()}
    if columns.schema.roles.scenario is not None:
      cells[task] = slices.summarize_by_scenario(
        np.asarray(scores, np.float64),
        labels,
        output["scenario"],
        mask=mask,
        groups=output["groups"],
        is_real=task in real,
      )
    examples[task] = {"score": scores, "label": np.where(mask, labels, np.nan)}
  metrics |= scenario_means(cells, real, split)
  if "group" in output["groups"]:
    examples["group"] = output["groups"]["group"]
  return metrics, examples, cells


def _evaluate_trial(output, columns: Columns, split: str):
  """Metrics of the decisions, all tables as examples, and no cells."""
  predictions, rows = output["predictions"], output["trial"]
  values = trial.summarize(
    predictions["response"],
    predictions["cost"],
    rows,
    truth=true_outcomes(columns, split),
  )
  metrics = {f"{split}/trial/{k}": v for k, v in values.items()}
  seen = dataclasses.asdict(rows)
  seen = {f"seen_{k}" if k in predictions else k: v for k, v in seen.items()}
  return metrics, {"trial": {**predictions, **seen}}, {}


def scenario_means(
  cells: Mapping[str, list[slices.Cell]], real: frozenset[str], split: str
) -> dict[str, float]:
  """Means over scenarios of each task, and over all binary tasks' cells.

  Args:
    cells: Those of each task.
    real: The tasks with a real label.
    split: Begins the names; of the test part there is the AUC of every cell.
  """
  metrics = {}
  for task, own in cells.items():
    if split == "test":
      metrics |= {
        f"{split}/{task}/scenario_{cell.scenario}/auc": cell.metrics["auc"]
        for cell in own
        if cell.is_counted and task not in real
      }
    values = slices.means(own, is_real=task in real)
    metrics |= {f"{split}/{task}/{k}": v for k, v in values.items()}
  binary = [c for task, own in cells.items() if task not in real for c in own]
  if binary:
    values = slices.means(binary)
    metrics |= {f"{split}/{k}": v for k, v in values.items()}
  return metrics


def true_outcomes(columns: Columns, split: str):
  """Response and cost of every treatment, where the data is planted."""
  path = columns.directory / f"truth_{split}.npz"
  if not path.exists():
    return None
  with np.load(path) as arrays:
    return dict(arrays)


def item_slices(popularity: np.ndarray) -> dict[str, np.ndarray]:
  """Cold and warm items' examples, and those of each bucket.

  `popularity` holds each example's row of the feature with that role.
  """
  names = [f"positives_{name}" for name in feedback.BUCKET_NAMES]
  return ranking.bucket_slices(popularity - 1, names, feedback.WARM_FROM)


def metric_names(method: Method, split: str) -> list[str]:
  """Names that `evaluate` will measure, but for the method's diagnostics."""
  if method.is_trial:
    return [f"{split}/trial/{name}" for name in trial.metric_names()]
  pair, roles = np.array([0.0, 1.0]), method.schema.roles
  columns = {"group": roles.group or roles.user, "query": roles.query}
  groups = {k: np.zeros(2, np.int32) for k, column in columns.items() if column}
  names = {
    "binary": summary.summarize(pair, pair, groups=groups),
    "real": summary.summarize_real(pair, pair),
  }
  if roles.popularity is not None:
    names["binary"] |= slices.summarize_by_slice(
      pair, pair, item_slices(np.zeros(2, np.int32))
    )
  kinds = {task: method.schema.label(task).kind for task in method.tasks}
  found = [
    f"{split}/{task}/{name}"
    for task, kind in kinds.items()
    for name in names[kind]
  ]
  if roles.scenario is not None:
    zeros = np.zeros(2, np.int32)
    cells = {
      task: slices.summarize_by_scenario(
        pair, pair, zeros, groups=groups, is_real=kind == "real"
      )
      for task, kind in kinds.items()
    }
    real = frozenset(task for task, kind in kinds.items() if kind == "real")
    found += scenario_means(cells, real, split)
  return found


def diagnostics(evaluation: Evaluation, method: Method) -> dict[str, Any]:
  """What `report` draws and lists.

  Returns:
    Reliability by task, hits by memory slot; and where there are such, the
    cells by task and scenario and, by layer and family of tokens, how much of
    its attention a token gives to each feature token.
  """
  reliability = {}
  for task in method.tasks:
    if method.schema.label(task).kind == "binary":
      example = evaluation.examples[task]
      seen = np.isfinite(example["label"])
      curve = calibration.reliability_curve(
        _sigmoid(example["score"]), np.nan_to_num(example["label"]), mask=seen
      )
      reliability[task] = {
        "count": curve.count.tolist(),
        "sum_probs": curve.prob_sum.tolist(),
        "sum_labels": curve.label_sum.tolist(),
      }
  usage = {
    name: np.asarray(counts["hits"]).tolist()
    for name, counts in evaluation.counters.items()
    if isinstance(counts, Mapping) and "hits" in counts
  }
  found = {"reliability": reliability, "slot_usage": usage}
  if evaluation.cells:
    found["cells"] = {
      task: [dataclasses.asdict(cell) for cell in cells]
      for task, cells in evaluation.cells.items()
    }
  attention = {
    f"{layer}/{family}": {
      "tokens": np.flatnonzero(sums["examples"]).tolist(),
      "weights": domain_attention.mean_weights(sums).tolist(),
    }
    for layer, families in evaluation.counters.items()
    if layer.startswith("attention_")
    for family, sums in families.items()
  }
  return found | ({"attention": attention} if attention else {})


def _outputs(
  predict: Callable[[TrainState, Batch], dict[str, Any]],
  state: TrainState,
  batches: Iterable[Batch],
) -> Iterator[dict[str, Any]]:
  """Predictions on the host, in order; the next are computed meanwhile."""
  running = collections.deque()
  for batch in batches:
    running.append(predict(state, batch))
    if len(running) == IN_FLIGHT:
      yield jax.device_get(running.popleft())
  while running:
    yield jax.device_get(running.popleft())


def _add(total, new):
  """Sums on the host: wide, so that counts of a long pass stay exact."""
  wide = lambda x: x.astype(  # noqa: E731
    np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64
  )
  new = jax.tree.map(wide, new)
  return new if total is None else jax.tree.map(np.add, total, new)


def _sigmoid(x):
  return 0.5 * (1.0 + np.tanh(0.5 * x.astype(np.float64)))
