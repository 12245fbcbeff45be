"""What a run writes while it works: scalars, histograms, JSON and progress.

`metrics.jsonl` is the truth and feeds the report; the TensorBoard event files
beside it are a view. One line is one JSON object:

```json
{"step": 200, "valid/click/auc": 0.7312, "valid/click/logloss": 0.4402}
```

JSON has no NaN and no infinity: they are written as the strings "nan", "inf"
and "-inf", which `float()` reads back. In a run of several processes only the
first one opens a `Writer`.
"""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import rich.console
import rich.progress
from jaxtyping import Shaped

from recjax.errors import UserError

METRICS_FILE = "metrics.jsonl"


class Writer:
  """Writes the scalars and histograms of one run into its workdir.

  `start_step` is the step of the restored checkpoint, 0 for a run that starts
  afresh. What an interrupted run wrote after that step is cut from
  `metrics.jsonl` (and hidden in TensorBoard), since the resumed run writes it
  again: so the file ends as if nothing had happened. For this to hold, write
  all scalars of a step before saving the checkpoint of that step.

  Args:
    workdir: Local folder of the run; made where missing.
    start_step: Last step whose lines stay; 0 drops all lines.

  Raises:
    UserError: If a line of `metrics.jsonl` other than a torn last one is not
      an object with a whole number under `step`.

  Example:
    >>> import tempfile
    >>> workdir = tempfile.mkdtemp()
    >>> with Writer(workdir) as writer:
    ...   writer.write_scalars(1, {"train/loss": float("nan")})
    >>> (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    '{"step": 1, "train/loss": "nan"}\\n'
  """

  def __init__(self, workdir: str | os.PathLike, *, start_step: int = 0):
    # Imported here: it takes a second that reports and exports need not pay.
    import tensorboardX

    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / METRICS_FILE
    _cut(path, start_step)
    self._file = path.open("a", encoding="utf-8")
    self._events = tensorboardX.SummaryWriter(
      str(workdir), purge_step=start_step + 1 if start_step else 0
    )

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Appends one line, complete on disk when the call returns.

    Args:
      step: Optimizer updates so far.
      scalars: Printed name (`valid/click/auc`) to a number or a zero-rank
        array. Order is kept.

    Raises:
      ValueError: If a value is not a scalar, or a name is `step`.
    """
    if "step" in scalars:
      raise ValueError("a scalar must not be called 'step'; rename it.")
    values = {name: _scalar(name, value) for name, value in scalars.items()}
    line = json.dumps(_plain({"step": step, **values}), allow_nan=False)
    self._file.write(line + "\n")
    self._file.flush()
    for name, value in values.items():
      # A gap in the curve says the same as a NaN, without a warning a step.
      if math.isfinite(value):
        self._events.add_scalar(name, value, step)

  def write_histogram(
    self, step: int, name: str, values: Shaped[Any, "..."]
  ) -> None:
    """Writes the distribution of `values` for TensorBoard.

    Non-finite values fit no bin: they are left out and counted under
    `<name>/num_nonfinite`.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    finite = values[np.isfinite(values)]
    if finite.size < values.size:
      self._events.add_scalar(
        f"{name}/num_nonfinite", values.size - finite.size, step
      )
    if finite.size:
      self._events.add_histogram(name, finite, step)

  def flush(self) -> None:
    """Brings the event files to disk; `metrics.jsonl` is there already."""
    self._events.flush()

  def close(self) -> None:
    """Ends both files. The writer cannot be used afterwards."""
    self._file.close()
    self._events.close()

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *unused_error) -> None:
    self.close()


class Progress:
  """Shows how far a run is: step, examples per second, loss, time left.

  A live bar where the stream is a terminal; elsewhere a plain line about
  every ten seconds and one at the end, without escape sequences.

  Args:
    num_steps: Step at which the run ends.
    start_step: Step at which it starts; later than 0 in a resumed run.
    description: Word in front, such as the model's name.
    stream: Text stream to show it on; None means standard error.
    secs_between_lines: Pause between two plain lines.
    clock: Seconds, never going back.

  Example:
    >>> with Progress(1, stream=sys.stdout, clock=lambda: 0.0) as progress:
    ...   progress.update(1, num_examples=512, loss=0.69)
    train: step 1/1 | - examples/s | loss 0.6900 | - left
  """

  def __init__(
    self,
    num_steps: int,
    *,
    start_step: int = 0,
    description: str = "train",
    stream: Any = None,
    secs_between_lines: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._num_steps = num_steps
    self._description = description
    self._stream = sys.stderr if stream is None else stream
    self._window_secs = secs_between_lines
    self._clock = clock
    self._step = start_step
    self._shown_step = -1
    self._loss = math.nan
    self._num_examples = 0
    self._speed = "-"
    self._secs_per_step = math.nan
    self._mark_time, self._mark_step = clock(), start_step
    self._bar = None
    # Not rich's own test of a terminal: FORCE_COLOR turns that on in pipes.
    if self._stream.isatty():
      self._window_secs = 2.0
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn(
          "step {task.completed:.0f}/{task.total:.0f} |"
          " {task.fields[speed]} examples/s | loss {task.fields[loss]} |"
        ),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(file=self._stream),
      )
      self._task = self._bar.add_task(
        description,
        total=num_steps,
        completed=start_step,
        speed="-",
        loss="-",
      )

  def update(
    self, step: int, *, num_examples: int = 0, loss: float | None = None
  ) -> None:
    """Notes that `step` is done.

    Args:
      step: Optimizer updates so far.
      num_examples: Examples seen since the last call.
      loss: Mean loss, kept until the next one comes. A Python float, so that
        showing it never waits for a device.
    """
    self._step = step
    self._num_examples += num_examples
    if loss is not None:
      self._loss = loss
    is_due = self._clock() - self._mark_time >= self._window_secs
    if is_due:
      self._measure()
    if self._bar is not None:
      self._bar.update(
        self._task,
        completed=step,
        speed=self._speed,
        loss=self._loss_text(),
      )
    elif is_due:
      self._print_line()

  def __enter__(self) -> "Progress":
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *unused_error) -> None:
    if self._bar is not None:
      self._bar.stop()
    elif self._step != self._shown_step:
      self._measure()
      self._print_line()

  def _measure(self) -> None:
    """Speed since the last mark, so that compilation is soon forgotten."""
    now = self._clock()
    elapsed, num_steps = now - self._mark_time, self._step - self._mark_step
    if elapsed > 0 and num_steps > 0:
      self._speed = f"{self._num_examples / elapsed:,.0f}"
      self._secs_per_step = elapsed / num_steps
      self._num_examples = 0
      self._mark_time, self._mark_step = now, self._step

  def _print_line(self) -> None:
    left = "-"
    if not math.isnan(self._secs_per_step):
      secs = round(self._secs_per_step * (self._num_steps - self._step))
      left = f"{secs // 3600}:{secs // 60 % 60:02}:{secs % 60:02}"
    print(
      f"{self._description}: step {self._step}/{self._num_steps} |"
      f" {self._speed} examples/s | loss {self._loss_text()} | {left} left",
      file=self._stream,
      flush=True,
    )
    self._shown_step = self._step

  def _loss_text(self) -> str:
    return "-" if math.isnan(self._loss) else f"{self._loss:.4f}"


def write_json(path: str | os.PathLike, data: Any) -> None:
  """Writes `data` as JSON; a reader sees the old file or the whole new one.

  Args:
    path: File to write; its folder is made where missing.
    data: Mappings, lists, tuples, strings, numbers, booleans, None, paths and
      NumPy or JAX arrays, nested at will. Non-finite numbers become strings.

  Raises:
    TypeError: If a value is of another type.

  Example:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "result.json"
    >>> write_json(path, {"auc": np.float32(0.5), "ne": math.inf})
    >>> json.loads(path.read_text())
    {'auc': 0.5, 'ne': 'inf'}
  """
  text = json.dumps(_plain(data), indent=2, allow_nan=False)
  _replace(pathlib.Path(path), text + "\n")


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads a `metrics.jsonl`; a torn last line (a killed run) is left out.

  Raises:
    UserError: If another line is not an object with a whole `step`.
  """
  # A kill can tear a line inside a character.
  text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
  lines = text.splitlines()
  entries = []
  for number, line in enumerate(lines, start=1):
    try:
      entry = json.loads(line)
      whole = type(entry["step"]) is int
    except (ValueError, TypeError, KeyError):
      whole = False
    if whole:
      entries.append(entry)
    elif number < len(lines):
      raise UserError(
        f"{path}, line {number}: not a JSON object with a whole number under"
        ' "step"; repair or delete the line, or take a new workdir'
      )
  return entries


def _cut(path: pathlib.Path, start_step: int) -> None:
  """Drops what was written after the restored step."""
  if not path.exists():
    return
  kept = []
  if start_step > 0:
    kept = [e for e in read_lines(path) if e["step"] <= start_step]
  text = "".join(json.dumps(entry) + "\n" for entry in kept)
  _replace(path, text)


def _replace(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with temporary.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      # Without it a power cut can leave the new name on an empty file.
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _scalar(name: str, value: Any) -> int | float:
  array = np.asarray(value)
  if array.dtype.kind == "V":  # bfloat16 and its kin.
    array = array.astype(np.float32)
  if array.ndim or array.dtype.kind not in "biuf":
    raise ValueError(
      f"scalar {name!r} must be one number, got {value!r}; use"
      " write_histogram for arrays."
    )
  return int(array) if array.dtype.kind == "b" else array.item()


def _plain(data: Any) -> Any:
  """The same data in types that JSON knows."""
  if data is None or isinstance(data, str | bool | int):
    return data
  if isinstance(data, float):
    return data if math.isfinite(data) else str(data)
  if isinstance(data, Mapping):
    return {str(key): _plain(value) for key, value in data.items()}
  if isinstance(data, list | tuple):
    return [_plain(value) for value in data]
  if isinstance(data, os.PathLike):
    return os.fspath(data)
  if hasattr(data, "__array__"):
    array = np.asarray(data)
    if array.dtype.kind == "V":  # bfloat16 and its kin.
      array = array.astype(np.float32)
    if array.dtype.kind in "biufU":
      return _plain(array.tolist())
  raise TypeError(f"JSON cannot hold {data!r} of type {type(data).__name__}.")
