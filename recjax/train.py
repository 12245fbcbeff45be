"""The one training loop: stages, evaluation, early stop, resume.

`train_and_evaluate(config, workdir)` trains the method that `config` names and
writes into `workdir`: `config.json`, `metrics.jsonl`, `checkpoints/`, event
files, `predictions.npz`, `diagnostics.json`, `tokenizer.json` where the data
has text, and, at the end, `result.json`.
Run again with the same config it goes on from the newest checkpoint, and ends
as if it had never stopped, timings apart.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import signal
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from recjax import config as config_lib
from recjax import evaluate as evaluate_lib
from recjax import method as method_lib
from recjax import monitor, parallel, run_files, task_gradients, train_state
from recjax import optimizer as optimizer_lib
from recjax.checkpoint import Checkpoints
from recjax.data import text
from recjax.data.columns import Columns
from recjax.data.length_buckets import LengthBuckets, masked_share
from recjax.data.pipeline import make_loader, open_dataset
from recjax.errors import DivergedError, UserError
from recjax.monitor import History
from recjax.schema import suggest
from recjax.speed import Speed
from recjax.writer import METRICS_FILE, Progress, Writer, read_lines


@dataclasses.dataclass(frozen=True)
class Config:
  """The loop.

  Attributes:
    batch_size: Examples a step, over all devices.
    eval_batch_size: Examples a step of an evaluation.
    num_epochs: Passes over the training part.
    num_train_steps: Steps instead of epochs; 0 to count epochs.
    eval_every_steps: Steps between evaluations on the validation part; 0 for
      one an epoch. The last step always evaluates.
    log_every_steps: Steps between lines of training scalars.
    log_task_gradients: Whether these hold, of the last batch, the norm of each
      task's gradient and the cosine of each pair; see `task_gradients`.
    checkpoint_every_steps: Steps between checkpoints; 0 for one an evaluation.
    keep_checkpoints: How many of the newest to keep beside the best.
    monitor: The metric that the best checkpoint has the best value of; empty
      for the AUC of the first task (or `rmse`, for a real label), and for
      `valid/trial/eom` of a trial.
    early_stop_patience: Evaluations without a better value that end the
      stage; 0 for never.
    non_finite: On a loss or gradient that is not finite: `stop`, or `skip`
      the batch and count it.
    length_buckets: Lengths that batches are grouped by, such as `(16, 64)`,
      so that less of long sequences is padding; empty for batches of all
      lengths. See `recjax.data.length_buckets`.
  """

  batch_size: int = 512
  eval_batch_size: int = 4096
  num_epochs: int = 1
  num_train_steps: int = 0
  eval_every_steps: int = 0
  log_every_steps: int = 50
  log_task_gradients: bool = False
  checkpoint_every_steps: int = 0
  keep_checkpoints: int = 2
  monitor: str = ""
  early_stop_patience: int = 0
  non_finite: str = "stop"
  length_buckets: tuple[int, ...] = ()

  def __post_init__(self):
    if self.non_finite not in ("stop", "skip"):
      raise UserError(
        f"train.non_finite must be 'stop' or 'skip', got {self.non_finite!r}"
      )
    for name in (
      "batch_size",
      "eval_batch_size",
      "log_every_steps",
      "keep_checkpoints",
    ):
      if getattr(self, name) < 1:
        raise UserError(f"train.{name} must be at least 1")
    for name in (
      "num_epochs",
      "num_train_steps",
      "eval_every_steps",
      "checkpoint_every_steps",
      "early_stop_patience",
    ):
      if getattr(self, name) < 0:
        raise UserError(f"train.{name} must be at least 0")
    if self.num_epochs < 1 and self.num_train_steps < 1:
      raise UserError(
        "train.num_epochs and train.num_train_steps are both 0; set one"
      )


def train_and_evaluate(
  config: Mapping[str, Any], workdir: str, *, commit: str | None = None
) -> dict[str, Any] | None:
  """Trains, evaluates on the test part and writes the result.

  Args:
    config: `model_name`, `seed` and the blocks `model`, `data`, `optimizer`,
      `train`, `parallel`; plain mappings.
    workdir: Folder of the run.
    commit: Version of the code, for `config.json`; None asks git.

  Returns:
    What `result.json` holds; None if a signal ended the run early.

  Raises:
    UserError: For a mistake in config or data, or a loss that is not finite.
  """
  return Trainer(config, workdir, commit=commit).run()


class Trainer:
  """One run; see `train_and_evaluate`."""

  def __init__(self, config, workdir: str, *, commit: str | None = None):
    self.config = run_files.check_blocks(config)
    self.workdir = pathlib.Path(workdir).expanduser()
    self.train = self._block("train", Config)
    self.optimizer = self._block("optimizer", optimizer_lib.Config)
    self.placement = parallel.place(self._block("parallel", parallel.Config))
    for name in ("batch_size", "eval_batch_size"):
      if getattr(self.train, name) % self.placement.num_data:
        raise UserError(
          f"train.{name} ({getattr(self.train, name)}) must be a multiple of "
          f"the {self.placement.num_data} devices of parallel.data"
        )
    run_files.check_workdir(self.workdir, self.config)
    # Before the data, which may take minutes to prepare.
    method_lib.load_config(self.config["model_name"], self.config["model"])
    self.columns = self._open_data()
    self.method = method_lib.load(
      self.config["model_name"], self.config["model"], self.columns.schema
    )
    self.stages = self.method.stages
    self.task_gradients = None
    if self.train.log_task_gradients:
      self.task_gradients = task_gradients.compiled(self.method, self.placement)
    self.seed = self.config["seed"]
    self.monitor = monitor.resolve(self.train.monitor, self.method)
    # Not before all else is right: a mistake must not take the workdir.
    run_files.claim_workdir(self.workdir, self.config, commit)
    if jax.process_index() == 0:
      text.copy_tokenizer(self.columns.directory, self.workdir)
    self.history = History()
    self.speed = Speed()

  def run(self) -> dict[str, Any] | None:
    """Trains from the newest checkpoint, or the start, to the result."""
    result = run_files.read_result(self.workdir)
    if result is not None:
      logging.info("%s is complete; nothing to do.", self.workdir)
      return result
    checkpoints = Checkpoints(self.workdir, keep=self.train.keep_checkpoints)
    with contextlib.closing(checkpoints), _termination() as terminated:
      state, loader = self._start(checkpoints)
      with Writer(self.workdir, start_step=_step_of(state)) as writer:
        while True:
          state = self._run_stage(
            state, loader, checkpoints, writer, terminated
          )
          if not self.history.stage_done:
            return None
          if self.history.stage + 1 == len(self.stages):
            return self._finish(state, checkpoints, writer)
          state = self._next_stage(state, checkpoints)

  def _start(self, checkpoints: Checkpoints):
    """The newest checkpoint and its place in the data, or a fresh start."""
    loader = iter(
      make_loader(
        self.columns,
        "train",
        batch_size=self.train.batch_size,
        shuffle=True,
        seed=self.seed,
        num_epochs=None,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        length_buckets=self.train.length_buckets,
      )
    )
    self._log_padding()
    step = checkpoints.latest_step
    record = None if step is None else checkpoints.record(step)
    if record is not None:
      self.history = History(**record["history"])
    state = self.placement.init(
      functools.partial(train_state.init_state, config=self._step_config()),
      jax.random.key(self.seed),
    )
    if record is None:
      return self._warm_start(state), loader
    state = self._restore(checkpoints, step, state)
    loader.set_state(record["loader"])
    logging.info("Continuing %s from step %d.", self.workdir, step)
    return state, loader

  def _open_data(self) -> Columns:
    return open_dataset(self.config["data"])

  def _warm_start(self, state):
    """What a run without a checkpoint of its own begins with."""
    return state

  def _run_stage(self, state, loader, checkpoints, writer, terminated):
    """Trains one stage to its end, an early stop or a signal."""
    train, config = self.train, self._step_config()
    end = config.first_step + config.num_steps
    run_step = self.placement.compile_step(
      functools.partial(train_state.train_step, config=config), state
    )
    step, pending = _step_of(state), None
    with Progress(
      end, start_step=step, description=self.method.name
    ) as progress:
      self.speed.stop()
      shapes = set()
      while not self.history.stage_done and not terminated.is_set():
        batch = next(loader)
        shape = tuple(ids.shape for ids in batch.ids.values())
        if shape not in shapes:  # Its program is compiled first.
          self._take(pending, step)
          pending = None
          self.speed.stop()
          shapes.add(shape)
        placed = self.placement.put_batch(batch)
        state, scalars = run_step(state, placed)
        step += 1
        # One step late, so that the device never waits for the host.
        self._take(pending, step - 1)
        pending = scalars
        num_examples = int(batch.example_mask.sum()) * jax.process_count()
        self.speed.add(num_examples, scalars)
        progress.update(
          step, num_examples=num_examples, loss=self._mean("loss")
        )
        at_eval = step == end or step % self._eval_every == 0
        at_save = at_eval or _is_due(step, train.checkpoint_every_steps)
        if at_save or _is_due(step, train.log_every_steps):
          self._take(pending, step)
          pending = None
          self._log(writer, step, state, placed)
        if at_eval:
          self.speed.stop()
          value = self._validate(state, writer, step)
          history = self.history
          history.take(
            value,
            step,
            is_better=monitor.is_better(
              self.monitor, value, history.best_value
            ),
            patience=train.early_stop_patience,
          )
          history.stage_done |= step == end
        if at_save:
          self._save(checkpoints, step, state, loader)
    self._take(pending, step)
    if not self.history.stage_done:
      self._save(checkpoints, step, state, loader)
      logging.info("Stopped by a signal at step %d; run again to go on.", step)
    return state

  def _log_padding(self):
    """How much of the sequences is padding, without and with buckets."""
    if not self.columns.schema.sequences:
      return
    limits = self.train.length_buckets
    cut = masked_share(self.columns, "train", limits)
    logging.info(
      "%.1f%% of sequence positions are padding%s.",
      100 * masked_share(self.columns, "train"),
      f"; {cut:.1%} in buckets of {limits}" if limits else "",
    )

  def _next_stage(self, state, checkpoints: Checkpoints):
    step, best_step = _step_of(state), self.history.best_step
    self.history = History(stage=self.history.stage + 1, stage_start=step)
    from_best = self._stage.initialize_from == "best"
    if from_best and best_step not in (None, step):
      state = self._restore(checkpoints, best_step, state)
    return self.placement.transform(
      functools.partial(train_state.start_stage, config=self._step_config()),
      state,
    )

  def _finish(self, state, checkpoints: Checkpoints, writer: Writer):
    """Evaluates the best state on the test part and writes the result."""
    last_step, best_step = _step_of(state), self.history.best_step
    if best_step is not None and best_step != last_step:
      state = self._restore(checkpoints, best_step, state)
    evaluation = self._evaluate(state, "test")
    # A run that was killed just here has written this line before.
    lines = read_lines(self.workdir / METRICS_FILE)
    if not any(k.startswith("test/") for line in lines[-1:] for k in line):
      writer.write_scalars(last_step, evaluation.metrics)
    metrics = dict(evaluation.metrics)
    if self.history.best_value is not None:
      metrics[self.monitor] = self.history.best_value
    return run_files.write_result(
      self.workdir,
      self.method,
      evaluation,
      result={
        "model": self.config.get("label") or self.method.name,
        "dataset": self.config["data"]["name"],
        "seed": self.seed,
        "steps": last_step,
        "best_step": best_step,
        "metrics": metrics,
        "examples_per_sec": self.speed.examples_per_sec,
      },
    )

  def _validate(self, state, writer: Writer, step: int) -> float:
    metrics = self._evaluate(state, "valid").metrics
    writer.write_scalars(step, metrics)
    if self.monitor not in metrics:
      raise UserError(
        f"train.monitor {self.monitor!r} is not measured"
        + suggest(self.monitor, metrics)
      )
    return metrics[self.monitor]

  def _evaluate(self, state, split: str) -> evaluate_lib.Evaluation:
    return evaluate_lib.evaluate(
      self._predict(self._stage.predictions),
      self.placement.eval_state(state),
      self.method,
      self.columns,
      split,
      batch_size=self.train.eval_batch_size,
      put_batch=self.placement.put_batch,
      length_buckets=self.train.length_buckets,
    )

  def _take(self, scalars, step: int):
    """Adds the scalars of one step to the window; stops on a bad one."""
    if scalars is None:
      return
    scalars = self.placement.scalars(scalars)
    if scalars["skipped"][0] and self.train.non_finite == "stop":
      raise DivergedError(
        f"the loss or its gradient is not finite at step {step}; the last "
        f"good checkpoint is kept in {self.workdir / 'checkpoints'}; lower "
        "the learning rates, or set train.non_finite=skip to leave such "
        "batches out"
      )
    for name, (total, weight) in scalars.items():
      if scalars["skipped"][0] and name != "skipped":
        continue
      sums = self.history.window.setdefault(name, [0.0, 0.0])
      sums[0] += float(total)
      sums[1] += float(weight)

  def _mean(self, name: str) -> float | None:
    total, weight = self.history.window.get(name, (0.0, 0.0))
    return total / weight if weight else None

  def _log(self, writer: Writer, step: int, state, placed):
    values = {f"train/{name}": self._mean(name) for name in self.history.window}
    values["train/examples_per_sec"] = self.speed.examples_per_sec
    if self.task_gradients:
      self.speed.stop()
      found = self.task_gradients(state, placed)
      values |= {f"train/{name}": value for name, value in found.items()}
    writer.write_scalars(
      step, {k: math.nan if v is None else v for k, v in values.items()}
    )
    self.history.window = {}

  def _save(self, checkpoints: Checkpoints, step: int, state, loader):
    self.speed.stop()
    record = {
      "history": dataclasses.asdict(self.history),
      "loader": loader.get_state(),
    }
    checkpoints.save(
      step,
      self.placement.canonical(state),
      record,
      best_step=self.history.best_step,
    )

  def _restore(self, checkpoints: Checkpoints, step: int, state):
    target = self.placement.restore_target(state)
    del state  # Two copies of the tables may not fit.
    return self.placement.from_canonical(checkpoints.restore(step, target))

  def _step_config(self) -> train_state.StepConfig:
    """What a step of the current stage is made of."""
    history = self.history
    share = self._stage.share / sum(s.share for s in self.stages)
    return train_state.StepConfig(
      method=self.method,
      stage=self._stage,
      optimizer=self.optimizer,
      num_steps=max(1, round(share * self._total_steps)),
      first_step=history.stage_start,
    )

  @functools.cached_property
  def _predict(self):
    """Name of the predictions -> compiled forward pass, each compiled once."""
    return functools.cache(
      lambda output: self.placement.compile_eval(
        functools.partial(
          evaluate_lib.forward, method=self.method, output=output
        )
      )
    )

  @property
  def _stage(self) -> method_lib.Stage:
    return self.stages[self.history.stage]

  @functools.cached_property
  def _steps_per_epoch(self) -> int:
    return LengthBuckets(
      self.columns, "train", self.train.batch_size, self.train.length_buckets
    ).num_steps

  @property
  def _total_steps(self) -> int:
    return (
      self.train.num_train_steps
      or self.train.num_epochs * self._steps_per_epoch
    )

  @property
  def _eval_every(self) -> int:
    return self.train.eval_every_steps or self._steps_per_epoch

  def _block(self, name: str, kind):
    return config_lib.build(kind, self.config[name], f"config.{name}")


@contextlib.contextmanager
def _termination():
  """An event that SIGTERM sets, so that the loop can save and end."""
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield event  # Only the main thread may handle signals.
    return
  previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
  try:
    yield event
  finally:
    signal.signal(signal.SIGTERM, previous)


def _step_of(state) -> int:
  return int(np.asarray(jax.device_get(state.step)).reshape(-1)[0])


def _is_due(step: int, every: int) -> bool:
  return bool(every) and step % every == 0
