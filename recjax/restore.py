"""A finished run, opened again: its data, method and a checkpoint."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax

from recjax import config as config_lib
from recjax import evaluate as evaluate_lib
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import parallel, run_files, train, train_state
from recjax.checkpoint import Checkpoints
from recjax.data.columns import Columns
from recjax.data.pipeline import open_dataset
from recjax.errors import UserError
from recjax.method import Method
from recjax.schema import SPLITS, suggest
from recjax.train_state import TrainState

CHECKPOINTS = ("best", "last")


@dataclasses.dataclass(frozen=True)
class Run:
  """What a finished run is made of.

  Attributes:
    workdir: Its folder.
    config: What `config.json` holds.
    result: What `result.json` holds.
    columns: Its data.
    method: Its model.
    placement: Where `state` lives.
    state: The state of the chosen checkpoint.
    step: Updates that the state has seen.
  """

  workdir: pathlib.Path
  config: dict[str, Any]
  result: dict[str, Any]
  columns: Columns
  method: Method
  placement: parallel.MeshPlacement
  state: TrainState
  step: int


def open_run(
  workdir: str, *, checkpoint: str = "best", one_device: bool = False
) -> Run:
  """Opens a finished run at one of its checkpoints.

  Args:
    workdir: Folder of the run.
    checkpoint: `best`, which the run's result is of, or `last`.
    one_device: True: on one device, however many the run had.

  Raises:
    UserError: If there is no finished run, or its data or checkpoint is gone.

  Example:
    >>> run = open_run("runs/msn")                      # doctest: +SKIP
    >>> run.method.name, run.step
    ('msn', 480)
  """
  if checkpoint not in CHECKPOINTS:
    raise UserError(
      f"unknown checkpoint {checkpoint!r}" + suggest(checkpoint, CHECKPOINTS)
    )
  path = pathlib.Path(workdir).expanduser()
  config, result = _read_files(path)
  placement = _place(config, one_device)
  columns = open_dataset(config["data"])
  method = method_lib.load(
    config["model_name"], config["model"], columns.schema
  )
  state, step = _restore(path, config, result, method, placement, checkpoint)
  return Run(
    workdir=path,
    config=config,
    result=result,
    columns=columns,
    method=method,
    placement=placement,
    state=state,
    step=step,
  )


def evaluate_run(run: Run, split: str = "test") -> dict[str, float]:
  """Metrics of a run on one part of its data, as `result.json` has them.

  Args:
    run: From `open_run`.
    split: `train`, `valid` or `test`.

  Returns:
    `<split>/<task>/<metric>` -> value; those of `test` at the best checkpoint
    are the run's own.

  Example:
    >>> evaluate_run(open_run("runs/msn"), "valid")     # doctest: +SKIP
    {'valid/click/auc': 0.74, ...}
  """
  if split not in SPLITS:
    raise UserError(f"unknown split {split!r}" + suggest(split, SPLITS))
  predict = run.placement.compile_eval(
    functools.partial(evaluate_lib.forward, method=run.method)
  )
  options = config_lib.build(train.Config, run.config["train"], "config.train")
  return evaluate_lib.evaluate(
    predict,
    run.placement.eval_state(run.state),
    run.method,
    run.columns,
    split,
    batch_size=options.eval_batch_size,
    put_batch=run.placement.put_batch,
    length_buckets=options.length_buckets,
  ).metrics


def _read_files(
  workdir: pathlib.Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Config and result of a finished run."""
  path = workdir / "config.json"
  if not path.is_file():
    raise UserError(
      f"{workdir}: holds no run (no config.json); give the --workdir of a "
      "finished experiments.run"
    )
  result = run_files.read_result(workdir)
  if result is None:
    raise UserError(
      f"{workdir}: the run is not finished (no result.json); give its command "
      "of experiments.run again to go on"
    )
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("commit", None)
  except (ValueError, AttributeError) as error:
    raise UserError(
      f"{path}: is damaged ({error}); train the run again in another --workdir"
    ) from error
  if config.get("model_name") == "lightgbm":
    raise UserError(
      f"{workdir}: is a run of LightGBM, which keeps no checkpoint; give one "
      "of experiments.run"
    )
  return run_files.check_blocks(config), result


def _place(config: dict[str, Any], one_device: bool) -> parallel.MeshPlacement:
  """Where the state lives; evaluation under `pmap` runs on one device."""
  kind = parallel.Config()
  if not one_device:
    kind = config_lib.build(
      parallel.Config, config["parallel"], "config.parallel"
    )
  return parallel.place(parallel.Config() if kind.mode == "pmap" else kind)


def _restore(
  workdir: pathlib.Path,
  config: dict[str, Any],
  result: dict[str, Any],
  method: Method,
  placement: parallel.MeshPlacement,
  checkpoint: str,
) -> tuple[TrainState, int]:
  """The state of a checkpoint and its step; nothing is initialised."""
  # A finished run is in its last stage, and its checkpoints are of that.
  step_config = train_state.StepConfig(
    method=method,
    stage=method.stages[-1],
    optimizer=config_lib.build(
      optimizer_lib.Config, config["optimizer"], "config.optimizer"
    ),
    num_steps=1,
  )
  shapes = jax.eval_shape(
    functools.partial(train_state.init_state, config=step_config),
    jax.random.key(0),
  )
  folder = workdir / "checkpoints"
  # Opening a folder that is not there would make it.
  if not folder.is_dir():
    raise UserError(
      f"{folder}: no such folder; the run's checkpoints are gone, so train it "
      "again in another --workdir"
    )
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    step = checkpoints.latest_step
    if checkpoint == "best" and result.get("best_step") is not None:
      step = result["best_step"]
    if step is None or not (folder / str(step)).is_dir():
      raise UserError(
        f"{folder}: holds no checkpoint of step {step}; train the run again in "
        "another --workdir"
      )
    return checkpoints.restore(step, placement.restore_target(shapes)), step
