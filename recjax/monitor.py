"""The metric that picks the best checkpoint, and what the loop remembers."""

import dataclasses
import math

from recjax import evaluate
from recjax.errors import UserError
from recjax.method import Method
from recjax.schema import suggest

# Metrics of which less is better; of all others more is.
LOWER_IS_BETTER = (
  "logloss",
  "ne",
  "ece",
  "mae",
  "rmse",
  "loss",
  "regret",
  "response_rmse",
  "cost_rmse",
)


@dataclasses.dataclass
class History:
  """What the loop must remember beside the state; saved as JSON.

  Attributes:
    stage: Index of the current stage.
    stage_start: Step at which it began.
    stage_done: Whether it has ended, by its length or an early stop.
    best_value: Best value of the monitored metric in this stage.
    best_step: Its step.
    bad_evals: Evaluations since.
    window: Training scalars since the last line: name -> [sum, weight].
  """

  stage: int = 0
  stage_start: int = 0
  stage_done: bool = False
  best_value: float | None = None
  best_step: int | None = None
  bad_evals: int = 0
  window: dict[str, list[float]] = dataclasses.field(default_factory=dict)

  def take(self, value: float, step: int, *, is_better: bool, patience: int):
    """Notes one evaluation; ends the stage when it has stalled.

    Args:
      value: The monitored metric.
      step: When it was measured.
      is_better: See `is_better`.
      patience: Evaluations without a better value that end the stage; 0: never.
    """
    if is_better:
      self.best_value, self.best_step, self.bad_evals = value, step, 0
    else:
      self.bad_evals += 1
    self.stage_done = 0 < patience <= self.bad_evals


def is_better(monitor: str, value: float, best: float | None) -> bool:
  """Whether `value` of the metric `monitor` beats `best`; None: nothing yet."""
  sign = -1.0 if monitor.rsplit("/")[-1] in LOWER_IS_BETTER else 1.0
  # Comparisons with NaN are false: a value that is not defined never wins.
  return sign * value > (-math.inf if best is None else sign * best)


def resolve(monitor: str, method: Method) -> str:
  """`monitor`, or the default for `method` if it is empty.

  Raises:
    UserError: If no evaluation can measure it, as far as is known by now.
  """
  if not monitor and method.is_trial:
    monitor = "valid/trial/eom"
  if not monitor:
    task = method.tasks[0]
    is_real = method.schema.label(task).kind == "real"
    monitor = f"valid/{task}/" + ("rmse" if is_real else "auc")
  names = evaluate.metric_names(method, "valid")
  split, _, name = monitor.partition("/")
  # A method's own diagnostics are known once they are measured.
  may_be_own = (
    hasattr(method.module, "diagnostics")
    and split == "valid"
    and name.partition("/")[0] not in method.tasks
  )
  if monitor not in names and not may_be_own:
    raise UserError(
      f"train.monitor {monitor!r} is not measured" + suggest(monitor, names)
    )
  return monitor
