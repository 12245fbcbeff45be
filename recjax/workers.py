"""Runs in processes of their own, one or several at a time.

A worker imports JAX once and takes one run after the other. Of several workers
each is bound to its share of the cores before JAX counts them. XLA splits sums
by the threads that it has, which changes their last digits; so each worker
computes in one thread, and a run gives the same numbers however many there
are. A worker ends with the process that started it, even one that was killed:
no run is ever continued by two.

`python -m recjax.workers` is the worker itself. It reads jobs as JSON lines
from standard input and answers each with one line on standard output.
"""

import contextlib
import importlib
import json
import os
import pathlib
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from recjax import host_memory
from recjax.errors import DivergedError, UserError

# Size of the thread pool of XLA on a CPU; of no meaning on other devices.
_ONE_THREAD = {"PJRT_NPROC": "1"}
# Where compiled programs are kept, unless the user has set another place.
_PROGRAMS = "JAX_COMPILATION_CACHE_DIR"


class Job(NamedTuple):
  """One run.

  Attributes:
    name: What it is called in messages.
    trainer: `module:function`; `function(config, workdir)` returns what
      `result.json` holds, or None if a signal ended it early.
    config: Plain mappings.
    workdir: Folder of the run.
  """

  name: str
  trainer: str
  config: Mapping[str, Any]
  workdir: str


class Outcome(NamedTuple):
  """How a job ended.

  Attributes:
    job: Which.
    diverged: What was not finite; None for a run that came to its end.
    secs: How long it took.
  """

  job: Job
  diverged: str | None
  secs: float


class Stopped(Exception):
  """A signal has stopped the work; what is saved goes on when run again."""


def core_shares(num_processes: int) -> list[set[int] | None]:
  """Cores of each of so many workers; None where it may use them all.

  Raises:
    UserError: If there are fewer cores than processes.
  """
  if num_processes < 1:
    raise UserError(f"num_processes must be at least 1, got {num_processes}")
  if num_processes == 1:
    return [None]
  if not hasattr(os, "sched_getaffinity"):  # Not on macOS.
    return [None] * num_processes
  cores = sorted(os.sched_getaffinity(0))
  if num_processes > len(cores):
    raise UserError(
      f"num_processes is {num_processes}, but there are {len(cores)} cores;"
      " take at most so many"
    )
  return [set(cores[i::num_processes]) for i in range(num_processes)]


class Workers:
  """Processes that wait for jobs; use it in a `with` block.

  Args:
    shares: From `core_shares`; one process each.
    folder: Holds `logs/`, what the runs print, one file a run, and
      `programs/`, what they compile: runs that differ in their seed share it.
  """

  def __init__(self, shares: Sequence[set[int] | None], folder: pathlib.Path):
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    self._logs = logs
    self._workers = []
    options = {_PROGRAMS: str((folder / "programs").resolve()), **os.environ}
    with contextlib.ExitStack() as stack:
      stack.callback(self._end)
      for share in shares:
        self._workers.append(_start(share, options))
      stack.pop_all()

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is not None:
      self._stop()
    self._end()

  def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Runs all jobs and yields them as they end.

    Raises:
      UserError: A mistake in a job, after its name; the others are stopped
        when the `with` block ends, and save what they have.
      Stopped: If a worker was told to end.
      RuntimeError: A bug, with the worker's own stack trace.
    """
    waiting = list(reversed(jobs))
    with selectors.DefaultSelector() as selector:
      for worker in self._workers:
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
      while waiting or any(worker.job for worker in self._workers):
        for worker in self._workers:
          if waiting and worker.job is None:
            self._give(worker, waiting.pop())
        for key, _ in selector.select():
          yield _take(key.data)

  def _give(self, worker, job):
    worker.job, worker.start = job, time.monotonic()
    log = self._logs / f"{pathlib.Path(job.workdir).name}.log"
    line = json.dumps({**job._asdict(), "log": str(log)})
    with contextlib.suppress(BrokenPipeError):  # Its end is seen by `_take`.
      worker.process.stdin.write(line + "\n")
      worker.process.stdin.flush()

  def _stop(self):
    """Lets the runs under way save themselves."""
    busy = [worker for worker in self._workers if worker.job]
    for worker in busy:
      worker.process.send_signal(signal.SIGTERM)
    for worker in busy:
      worker.process.stdout.readline()

  def _end(self):
    for worker in self._workers:
      with contextlib.suppress(BrokenPipeError):
        worker.process.stdin.close()
      worker.process.wait()
      worker.process.stdout.close()


class _Worker:
  """A process and the job that it has."""

  def __init__(self, process: subprocess.Popen):
    self.process = process
    self.job: Job | None = None
    self.start = 0.0


def _start(share: set[int] | None, options: Mapping[str, str]) -> _Worker:
  # Inherited by the child and thus by every thread that its imports start.
  before = os.sched_getaffinity(0) if share else None
  try:
    if share:
      os.sched_setaffinity(0, share)
    process = subprocess.Popen(
      [sys.executable, "-m", __name__],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**options, **_ONE_THREAD},
    )
  finally:
    if before:
      os.sched_setaffinity(0, before)
  return _Worker(process)


def _take(worker: _Worker) -> Outcome:
  """Reads one answer."""
  line, job = worker.process.stdout.readline(), worker.job
  worker.job = None
  if not line:
    code = worker.process.wait()
    if job is None or code == -signal.SIGTERM:
      raise Stopped()
    raise UserError(
      f"{job.name}: its process ended with code {code}, as when memory runs"
      " out; free some, or run the same command again with fewer processes"
    )
  answer = json.loads(line)
  status, message = answer["status"], answer["message"]
  if status == "stopped":
    raise Stopped()
  if status == "mistake":
    raise UserError(f"{job.name}: {message}")
  if status == "refusal":
    number, text, file = message
    raise OSError(number, text, file)
  if status == "bug":
    raise RuntimeError(f"{job.name}:\n{message}")
  secs = time.monotonic() - worker.start
  return Outcome(job, message if status == "diverged" else None, secs)


def _work() -> None:
  """The worker: runs what it is given until its input ends."""
  # Ctrl-C reaches the whole group; whoever started this one decides.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  host_memory.keep_freed_memory()
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_is_told)
  answers = os.fdopen(os.dup(1), "w")
  jobs = queue.SimpleQueue()
  threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
  while True:
    job = jobs.get()
    with open(job["log"], "a", encoding="utf-8") as log:
      for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    status, message = _run(job)
    sys.stdout.flush()
    sys.stderr.flush()
    answer = {"status": status, "message": message}
    print(json.dumps(answer), file=answers, flush=True)


def _is_told(record) -> bool:
  """True for warnings and our own notes; libraries note each file they open."""
  is_own = pathlib.Path(record.pathname).parent == pathlib.Path(__file__).parent
  return is_own or record.levelno >= logging.converter.STANDARD_WARNING


def _listen(jobs: queue.SimpleQueue) -> None:
  for line in sys.stdin:
    jobs.put(json.loads(line))
  # No more jobs, or nobody is left to give any: the run under way must not
  # go on beside the one that continues it.
  os._exit(0)


def _run(job: Mapping[str, Any]) -> tuple[str, Any]:
  """Status and message of one job."""
  module, _, function = job["trainer"].partition(":")
  try:
    train = getattr(importlib.import_module(module), function)
    result = train(job["config"], job["workdir"])
  except UserError as error:
    kind = "diverged" if isinstance(error, DivergedError) else "mistake"
    return kind, " ".join(str(error).split())
  except OSError as error:
    traceback.print_exc()  # Into the log: what is no refusal is a bug.
    return "refusal", (error.errno, error.strerror, error.filename)
  except Exception:
    return "bug", traceback.format_exc()
  return "stopped" if result is None else "done", None


if __name__ == "__main__":
  _work()
