"""Tunes and compares the models of a sweep file, and writes their results.

    python -m experiments.sweep --sweep=experiments/sweeps/kuairand_base.py \\
        --workdir=runs/kuairand_base --num_processes=2 \\
        --results=experiments/results/kuairand_base

The same command again goes on where it was stopped. What the runs print is in
`logs/` of the workdir.
"""

import contextlib
import functools
import pathlib
import runpy
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence

import rich.console
from absl import flags

from experiments import door
from recjax import report, tuning
from recjax.errors import UserError
from recjax.sweep import Sweep
from recjax.workers import Stopped

_SWEEP = flags.DEFINE_string(
  "sweep", None, "Sweep file, as experiments/sweeps/kuairand_base.py."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")
_RESULTS = flags.DEFINE_string(
  "results", None, "Folder of results; results/ in the workdir by default."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  1,
  "Runs at a time, of one thread each; the number changes no result.",
  lower_bound=1,
)


def main(argv: Sequence[str]) -> None:
  """Runs the sweep that the flags name and prints its table."""
  del argv
  if not _SWEEP.value or not _WORKDIR.value:
    raise UserError(
      "--sweep and --workdir are needed, for example "
      "--sweep=experiments/sweeps/kuairand_base.py "
      "--workdir=runs/kuairand_base"
    )
  plan = load_sweep(_SWEEP.value)
  workdir = pathlib.Path(_WORKDIR.value).expanduser()
  results = pathlib.Path(_RESULTS.value or workdir / "results").expanduser()
  try:
    with _interruptible():
      tuning.run_sweep(
        plan,
        workdir,
        results,
        num_processes=_NUM_PROCESSES.value,
        tell=functools.partial(print, flush=True),
      )
  except (KeyboardInterrupt, Stopped):
    sys.exit("stopped; run the same command again to go on")
  # A pipe has no width of its own; 80 columns would fold the numbers.
  width = None if sys.stdout.isatty() else 160
  console = rich.console.Console(width=width)
  for table in report.published_tables(results):
    console.print(table.to_rich())
  print(f"Results: {results}")


def load_sweep(path: str) -> Sweep:
  """What `get_sweep()` of a sweep file returns.

  Raises:
    UserError: For a file that is none, or a mistake in it.
  """
  if not pathlib.Path(path).is_file():
    raise UserError(
      f"--sweep: {path}: no such file; give one such as "
      "experiments/sweeps/kuairand_base.py"
    )
  try:
    content = runpy.run_path(path)
    if "get_sweep" not in content:
      raise UserError("defines no get_sweep()")
    plan = content["get_sweep"]()
    if not isinstance(plan, Sweep):
      raise UserError(f"get_sweep() must return a Sweep, got {plan!r}")
  except UserError as error:
    raise UserError(f"--sweep: {path}: {error}") from error
  except Exception as error:  # A program: anything may come of it.
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError):
      lines.append(error.lineno)
    where = f", line {lines[-1]}" if lines else ""
    raise UserError(
      f"--sweep: {path}{where}: {type(error).__name__}: {error}; correct the "
      "sweep file"
    ) from error
  return plan


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
  """SIGTERM ends the block as Ctrl-C does."""

  def interrupt(*_):
    raise KeyboardInterrupt

  previous = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
  door.run(main)
