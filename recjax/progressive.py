"""Day by day: each day is evaluated, and then trained on.

`train_by_days(config, workdir, num_days)` is how a model that learns online is
measured (progressive validation; Blum, Kalai and Langford, COLT 1999): what is
predicted of a day comes from a model that has seen the days before, and no row
is looked at twice. Any method takes part. The first day is trained from the
start, in all stages of the method; each later one goes on from where the day
before ended: parameters, tables, their optimiser state, banks. Of a method in
stages only the last is repeated, so what an earlier one trained stays frozen.

The dense optimiser and its schedule begin anew each day, and a day is one pass
over its rows; our choice. Vocabularies and the moments of dense columns are
those of the training part, as the data set was prepared.

`workdir` holds a folder for each day, a run like any other whose test part is
the next day, and `progressive.json`. The same call again goes on where it was
stopped. Of checkpoints only those of the last day are kept.
"""

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from recjax import method as method_lib
from recjax import run_files, train, train_state
from recjax.checkpoint import Checkpoints
from recjax.data.days import Day
from recjax.data.pipeline import open_dataset
from recjax.errors import UserError
from recjax.writer import write_json

FILE = "progressive.json"


def train_by_days(
  config: Mapping[str, Any],
  workdir: str,
  num_days: int,
  *,
  commit: str | None = None,
) -> dict[str, Any] | None:
  """Trains on one day after the other, evaluating each before.

  Args:
    config: As of `train_and_evaluate`. How long a day is trained is not its
      to say: epochs, steps, evaluations and early stop are left out.
    workdir: Folder of all days.
    num_days: Days that the rows are cut into; see `recjax.data.days`.
    commit: As of `train_and_evaluate`.

  Returns:
    What `progressive.json` holds: `days`, a list of {"day", "num_rows",
    "metrics"} from the second day on, and `metrics`, their means weighted by
    rows; None if a signal ended the run early.

  Raises:
    UserError: For a mistake in config or data, or a method of a trial.

  Example:
    >>> train_by_days(config, "runs/days", 10)["metrics"]   # doctest: +SKIP
    {'click/auc': 0.712, ...}
  """
  config = _of_a_day(config)
  folder = pathlib.Path(workdir).expanduser()
  days, before = [], None
  for day in range(num_days - 1):
    run = DayTrainer(
      config, folder, day, num_days=num_days, before=before, commit=commit
    )
    result = run.run()
    if result is None:
      return None
    if before is not None:
      shutil.rmtree(before / "checkpoints", ignore_errors=True)
    before = run.workdir
    metrics = _own_names(result["metrics"])
    num_rows = run.columns.num_rows["test"]
    days.append({"day": day + 1, "num_rows": num_rows, "metrics": metrics})
    logging.info("Day %d of %d is trained.", day + 1, num_days)
  summary = {
    "model": result["model"],
    "dataset": result["dataset"],
    "seed": result["seed"],
    "num_days": num_days,
    "metrics": _means(days),
    "days": days,
  }
  if jax.process_index() == 0:
    write_json(folder / FILE, summary)
  return summary


class DayTrainer(train.Trainer):
  """The run of one day.

  Args:
    config: Of every day.
    workdir: Folder of all days.
    day: From 0.
    num_days: Days in all.
    before: Folder of the day before; None for the first.
    commit: Version of the code.
  """

  def __init__(
    self,
    config: Mapping[str, Any],
    workdir: pathlib.Path,
    day: int,
    *,
    num_days: int,
    before: pathlib.Path | None,
    commit: str | None = None,
  ):
    self._day, self._num_days, self._before = day, num_days, before
    name = f"day_{day:03}_of_{num_days}"
    super().__init__(config, str(workdir / name), commit=commit)
    if before is not None:
      self.stages = (
        dataclasses.replace(
          self.stages[-1], initialize_from="previous", empty_banks=False
        ),
      )

  def _open_data(self) -> Day:
    columns = open_dataset(self.config["data"])
    return Day(columns, self._day, self._num_days)

  def _warm_start(self, state):
    """The state in which the day before ended."""
    if self._before is None:
      return state
    checkpoints = Checkpoints(self._before)
    try:
      step = checkpoints.latest_step
      if step is None:
        raise UserError(
          f"{self._before}: its checkpoint is gone; use another --workdir"
        )
      state = self._restore(checkpoints, step, state)
    finally:
      checkpoints.close()
    self.history.stage_start = step
    config = self._step_config()
    return self.placement.transform(
      lambda state: train_state.start_stage(state, config), state
    )


def _of_a_day(config: Mapping[str, Any]) -> dict[str, Any]:
  """`config` with one pass, evaluated at its end and at no other time."""
  config = run_files.check_blocks(config)
  method = method_lib.find_module(config["model_name"])
  if not any(f.name == "tasks" for f in dataclasses.fields(method.Config)):
    raise UserError(
      f"{config['model_name']} learns from a trial, whose rows have no days; "
      "train it by experiments.run"
    )
  # The next day must choose nothing: neither a checkpoint nor an end.
  words = {
    "num_epochs": 1,
    "num_train_steps": 0,
    "eval_every_steps": sys.maxsize,
    "early_stop_patience": 0,
    "keep_checkpoints": 1,
  }
  return config | {"train": config["train"] | words}


def _own_names(metrics: Mapping[str, float]) -> dict[str, float]:
  return {
    name.removeprefix("test/"): value
    for name, value in metrics.items()
    if name.startswith("test/")
  }


def _means(days) -> dict[str, float]:
  """Means over days by their rows; those of the days that have the metric."""
  names = dict.fromkeys(name for day in days for name in day["metrics"])
  means = {}
  for name in names:
    held = [
      day for day in days if np.isfinite(day["metrics"].get(name, np.nan))
    ]
    if held:
      values = [day["metrics"][name] for day in held]
      weights = [day["num_rows"] for day in held]
      means[name] = float(np.average(values, weights=weights))
  return means
