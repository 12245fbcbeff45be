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
from recjax.data.columns import Columns
from recjax.data.pipeline import make_loader
from recjax.method import Method
from recjax.metrics import calibration, summary
from recjax.train_state import TrainState

# Batches computed at a time. XLA runs parts of a program, its top-k among
# them, on one core of a CPU; a second program fills the others.
IN_FLIGHT = 2


@dataclasses.dataclass
class Evaluation:
  """What one pass over a split gives.

  Attributes:
    metrics: `<split>/<task>/<metric>` -> value, and the method's diagnostics
      as `<split>/<name>`.
    examples: Task -> {"score", "label"}, NaN where a label is missing; and
      `group` -> ids. One entry an example, in the order of the rows.
    counters: The method's sums; see `recjax.method`.
  """

  metrics: dict[str, float]
  examples: dict[str, Any]
  counters: dict[str, Any]


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
  tasks = tuple(predictions)
  return {
    "predictions": predictions,
    "labels": {task: batch.labels[task] for task in tasks},
    "label_mask": {task: batch.label_mask[task] for task in tasks},
    "groups": dict(batch.groups),
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
  """
  loader = make_loader(
    columns,
    split,
    batch_size=batch_size,
    shuffle=False,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  parts, counters = [], None
  for output in _outputs(predict, state, map(put_batch, loader)):
    counters = _add(counters, output.pop("counters"))
    valid = output.pop("example_mask")
    parts.append(jax.tree.map(lambda x, keep=valid: x[keep], output))
  output = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

  real = frozenset(v.name for v in columns.schema.labels if v.kind == "real")
  metrics, examples = {}, {}
  for task, scores in output["predictions"].items():
    labels, mask = output["labels"][task], output["label_mask"][task]
    if task in real:
      scores = np.asarray(losses.symexp(jnp.asarray(scores)))
      values = summary.summarize_real(scores, labels, mask=mask)
    else:
      values = summary.summarize(
        scores, labels, mask=mask, groups=output["groups"]
      )
    metrics |= {f"{split}/{task}/{k}": float(v) for k, v in values.items()}
    examples[task] = {"score": scores, "label": np.where(mask, labels, np.nan)}
  if "group" in output["groups"]:
    examples["group"] = output["groups"]["group"]
  summarize = getattr(method.module, "diagnostics", None)
  if summarize is not None:
    values = summarize(counters)
    metrics |= {f"{split}/{k}": float(v) for k, v in values.items()}
  return Evaluation(metrics, examples, counters)


def metric_names(method: Method, split: str) -> list[str]:
  """Names that `evaluate` will measure, but for the method's diagnostics."""
  pair, roles = np.array([0.0, 1.0]), method.schema.roles
  columns = {"group": roles.group or roles.user, "query": roles.query}
  groups = {k: np.zeros(2, np.int32) for k, column in columns.items() if column}
  names = {
    "binary": summary.summarize(pair, pair, groups=groups),
    "real": summary.summarize_real(pair, pair),
  }
  return [
    f"{split}/{task}/{name}"
    for task in method.config.tasks
    for name in names[method.schema.label(task).kind]
  ]


def diagnostics(evaluation: Evaluation, method: Method) -> dict[str, Any]:
  """What `report` draws: reliability per task, hits per memory slot."""
  reliability = {}
  for task in method.config.tasks:
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
  return {"reliability": reliability, "slot_usage": usage}


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
