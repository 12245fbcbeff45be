r"""Times the operators against the libraries that do the same.

    python -m pallas_kernels.bench [--threads=1,2] [--only=top_k] [--json=FILE]

Both sides of a row run in turns in one process of so many threads, on the same
inputs, after their results have been compared. Shown are medians of `--repeats`
rounds after two of warming up, in milliseconds; how many times as long a peer
takes, beside the bar that this must reach; the least bytes that the operation
must move, by the time taken, as a share of the machine's own copying. With
`--check` a missed bar ends with code 1. The peers are the extra `bench`.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import app, flags

_THREADS = flags.DEFINE_list("threads", ["1", "2"], "Numbers of threads.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed rounds.", lower_bound=1)
_ONLY = flags.DEFINE_string("only", "", "Cases whose name holds this.")
_JSON = flags.DEFINE_string("json", "", "File for the rows as JSON.")
_CHECK = flags.DEFINE_bool("check", False, "Whether a missed bar is an error.")
# A child measures in so many threads and prints JSON; set by the parent.
_CHILD = flags.DEFINE_integer("child", 0, "For internal use.")

_PAUSE_SECS = 0.02
OPERATORS = ("top_k", "product_key_topk", "sparse_gather", "row_update")
PEERS = ("torch", "product_key_memory", "fbgemm_gpu")


@dataclasses.dataclass(frozen=True)
class Case:
  """One operation on one set of inputs.

  Attributes:
    name: Operation and sizes.
    sides: Label -> what runs it to its end and returns the results; `ours` is
      the first.
    check: Raises unless the results of all sides agree.
    num_bytes: The least that must be read and written.
    bars: Label of a peer -> how many times as long it must take; a mapping
      where that depends on the threads.
  """

  name: str
  sides: Mapping[str, Callable[[], Any]]
  check: Callable[[Mapping[str, Any]], None]
  num_bytes: float
  bars: Mapping[str, float | Mapping[int, float]]


# What an operator's `bench.py` offers as `cases`: names and their makers, so
# that only one case's inputs are in memory.
Makers = Mapping[str, Callable[[], Case]]


def main(argv) -> None:
  """Runs the benchmark."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  if _CHILD.value:
    for row in _measure_all(_CHILD.value):
      print(json.dumps(row), flush=True)
    return
  missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
  if missing:
    print(
      f"error: {', '.join(missing)} not found; install the peers with "
      "'make bench' or pip install -e '.[bench]' (CONTRIBUTING.md)",
      file=sys.stderr,
    )
    sys.exit(2)
  rows = []
  for threads in map(int, _THREADS.value):
    print(_header(threads))
    for row in _run_child(threads):
      rows.append(row)
      print(_text(row), flush=True)
  if _JSON.value:
    with open(_JSON.value, "w", encoding="utf-8") as file:
      json.dump(rows, file, indent=1)
  missed = [row for row in rows if not row["is_met"]]
  print(f"{len(rows) - len(missed)} of {len(rows)} bars met")
  sys.exit(int(_CHECK.value and bool(missed)))


def _run_child(threads: int) -> Iterator[dict[str, Any]]:
  """Rows from a process of so many threads, whose pools have that size."""
  arguments = [f"--child={threads}", f"--repeats={_REPEATS.value}"]
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "pallas_kernels.bench"),
      *arguments,
      f"--only={_ONLY.value}",
    ],
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "PJRT_NPROC": str(threads),
      "OMP_NUM_THREADS": str(threads),
    },
    stdout=subprocess.PIPE,
    text=True,
  )
  for line in process.stdout:
    if line.startswith("{"):
      yield json.loads(line)
  if process.wait():
    sys.exit(f"the benchmark in {threads} threads ended with an error")


def _measure_all(threads: int) -> Iterator[dict[str, Any]]:
  import torch

  torch.set_num_threads(threads)
  bandwidth = _copy_bandwidth(threads)
  for operator in OPERATORS:
    makers = importlib.import_module(f"pallas_kernels.{operator}.bench").cases
    for name, make in makers.items():
      if _ONLY.value in f"{operator} {name}":
        yield from _measure(make(), threads, bandwidth)


def _measure(case: Case, threads: int, bandwidth: float):
  """A row for each peer of a case."""
  case.check({label: run() for label, run in case.sides.items()})
  secs = {label: [] for label in case.sides}
  for i in range(_REPEATS.value + 1):
    # The order turns, so that none always follows the same.
    for label in list(case.sides)[:: 1 if i % 2 else -1]:
      # The threads of the one before may still spin, waiting for more.
      time.sleep(_PAUSE_SECS)
      start = time.perf_counter()
      case.sides[label]()
      secs[label].append(time.perf_counter() - start)
  medians = {n: statistics.median(values[1:]) for n, values in secs.items()}
  ours, *peers = medians
  for peer in peers:
    bar = case.bars.get(peer)
    bar = bar.get(threads) if isinstance(bar, Mapping) else bar
    ratio = medians[peer] / medians[ours]
    yield {
      "case": case.name,
      "threads": threads,
      "peer": peer,
      "secs": medians[ours],
      "peer_secs": medians[peer],
      "ratio": ratio,
      "bar": bar,
      "is_met": bar is None or ratio >= bar,
      "bandwidth_share": case.num_bytes / medians[ours] / bandwidth,
    }


def _copy_bandwidth(threads: int) -> float:
  """Bytes a second, read and written, of copying what no cache holds."""
  import torch

  del threads  # Torch copies in as many.
  source = torch.from_numpy(np.ones(2**26, np.float32))
  target = torch.empty_like(source)
  secs = []
  for _ in range(5):
    start = time.perf_counter()
    target.copy_(source)
    secs.append(time.perf_counter() - start)
  return 2 * source.nbytes / min(secs)


def _header(threads: int) -> str:
  columns = f"{'ours ms':>10}{'peer ms':>10}{'ratio':>8}{'bar':>6}"
  return (
    f"\n{f'{threads} thread(s)':<44}{'peer':<22}{columns}{'copy speed':>12}"
  )


def _text(row: Mapping[str, Any]) -> str:
  bar = "" if row["bar"] is None else f"{row['bar']:g}"
  verdict = "" if row["is_met"] else "  missed"
  return (
    f"{row['case']:<44}{row['peer']:<22}{1e3 * row['secs']:>10.2f}"
    f"{1e3 * row['peer_secs']:>10.2f}{row['ratio']:>8.2f}{bar:>6}"
    f"{row['bandwidth_share']:>12.0%}{verdict}"
  )


if __name__ == "__main__":
  app.run(main)
