"""Does what a `recjax.sweep.Sweep` says, and publishes what comes out.

A sweep's folder holds `plan.json`, `trials/<label>-<trial>-<rung>/` and
`runs/<label>-<seed>/`, workdirs as of any run, `logs/` and `programs/`, what
was compiled. It may be killed at any time: run again, finished runs are kept
and stopped ones go on from their checkpoints, so that the results are those of
a sweep never stopped.
"""

import contextlib
import fcntl
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from recjax import published, report, sweep, workers
from recjax.errors import UserError
from recjax.sweep import Model, Sweep
from recjax.workers import Job
from recjax.writer import write_json

# Marks a run that ended without a result; kept, since it would end so again.
DIVERGED_FILE = "diverged.json"

# Runs jobs and yields them as they end; `workers.Workers.run` is one.
Execute = Callable[[Sequence[Job]], Iterator[workers.Outcome]]


class Trial(NamedTuple):
  """Settings that were tried.

  Attributes:
    words: Word -> value.
    scores: Validation metric in each rung reached; None where it failed.
    failed: Why it failed; None if it did not.
  """

  words: dict[str, Any]
  scores: tuple[float | None, ...] = ()
  failed: str | None = None


def run_sweep(
  plan: Sweep,
  workdir: pathlib.Path,
  results: pathlib.Path,
  *,
  num_processes: int = 1,
  execute: Execute | None = None,
  tell: Callable[[str], None] = print,
) -> published.Comparison:
  """Tunes, runs the final seeds and writes a folder of results.

  Args:
    plan: What to compare.
    workdir: Folder of the sweep.
    results: Where the small files to publish go; see `recjax.published`.
    num_processes: Runs at a time; of no influence on the results.
    execute: Runs the jobs; None for `num_processes` workers.
    tell: Takes lines on how far it is.

  Returns:
    What `comparison.json` holds.

  Raises:
    UserError: For a mistake in a run, after its name; a folder that holds
      another sweep or is in use; results that are not of this sweep; or a
      model of which all trials or runs diverged.
    workers.Stopped: If a signal ended a run early.
  """
  _check_results(plan, results)
  shares = workers.core_shares(num_processes)
  with contextlib.ExitStack() as stack:
    stack.enter_context(_claim(workdir, plan))
    if execute is None:
      pool = workers.Workers(shares, workdir)
      execute = stack.enter_context(pool).run
    runs = _Runs(plan, workdir, execute, tell, num_processes)
    trials = _tune(plan, runs)
    chosen = {label: _best(plan, label, trials[label]) for label in trials}
    for label, words in chosen.items():
      if words:
        tell(f"{label}: chosen {_text(words)}")
    diverged = _final(plan, runs, chosen)
  return _publish(plan, workdir, results, trials, chosen, diverged)


def _tune(plan: Sweep, runs: "_Runs") -> dict[str, list[Trial]]:
  """Trials of each model, with the halving of each rung."""
  trials = {
    model.label: [Trial(words) for words in sweep.trial_words(plan, model)]
    for model in plan.models
  }
  alive = {label: list(range(len(found))) for label, found in trials.items()}
  for rung, shorter in enumerate(plan.rungs):
    jobs = {}
    for model in plan.models:
      for i in alive[model.label]:
        words = {**trials[model.label][i].words, **shorter}
        jobs[model.label, i] = runs.trial_job(model, i, rung, words)
    ended = runs.finish(list(jobs.values()), plan.metric)
    for (label, i), job in jobs.items():
      words, scores, _ = trials[label][i]
      score, failed = ended[job.workdir]
      trials[label][i] = Trial(words, (*scores, score), failed)
    for label, found in trials.items():
      here = [i for i in alive[label] if found[i].failed is None]
      order = sweep.rank([found[i].scores for i in here], plan.metric)
      half = math.ceil(len(alive[label]) / 2)
      alive[label] = [here[i] for i in order[:half]]
  return trials


def _best(plan: Sweep, label: str, trials: Sequence[Trial]) -> dict[str, Any]:
  if not trials:
    return {}
  best = trials[sweep.rank([t.scores for t in trials], plan.metric)[0]]
  if best.failed is not None:
    raise UserError(
      f"{label}: every trial failed ({best.failed}); give it another space"
    )
  return best.words


def _final(plan: Sweep, runs: "_Runs", chosen) -> tuple[str, ...]:
  """Runs the final seeds; names those that diverged."""
  jobs = {
    (model.label, seed): runs.final_job(model, seed, chosen[model.label])
    for model in plan.models
    for seed in plan.seeds
  }
  ended = runs.finish(list(jobs.values()), plan.metric)
  diverged = [key for key, job in jobs.items() if ended[job.workdir][1]]
  for model in plan.models:
    if all((model.label, seed) in diverged for seed in plan.seeds):
      reason = ended[jobs[model.label, plan.seeds[0]].workdir][1]
      raise UserError(f"{model.label}: every run failed ({reason})")
  return tuple(f"{label}, seed {seed}" for label, seed in diverged)


class _Runs:
  """Names jobs, runs those that are not done, and tells how far it is."""

  def __init__(self, plan, workdir, execute, tell, num_processes):
    self._plan, self._workdir = plan, workdir
    self._execute, self._tell = execute, tell
    self._num_processes = num_processes
    self._done, self._secs = 0, []
    # A rung halves what the one before it was given.
    sizes = itertools.accumulate(
      plan.rungs, lambda n, _: math.ceil(n / 2), initial=plan.num_trials
    )
    tuning = sum(list(sizes)[: len(plan.rungs)])
    self._total = len(plan.models) * (tuning + len(plan.seeds))

  def trial_job(self, model: Model, i: int, rung: int, words) -> Job:
    name = f"{model.label}, trial {i + 1} of {self._plan.num_trials}"
    if len(self._plan.rungs) > 1:
      name += f", rung {rung + 1} of {len(self._plan.rungs)}"
    folder = self._workdir / "trials" / f"{model.label}-{i}-{rung}"
    return self._job(model, name, folder, words, self._plan.tuning_seed)

  def final_job(self, model: Model, seed: int, words) -> Job:
    folder = self._workdir / "runs" / f"{model.label}-{seed}"
    return self._job(model, f"{model.label}, seed {seed}", folder, words, seed)

  def finish(self, jobs: Sequence[Job], metric: str):
    """Workdir -> (validation metric or None, why it failed or None)."""
    kept = [job for job in jobs if _is_done(job)]
    if kept:
      self._done += len(kept)
      self._tell(f"{self._where()} {len(kept)} runs kept, done before")
    waiting = [job for job in jobs if not _is_done(job)]
    for job, diverged, secs in self._execute(waiting):
      if diverged is not None:
        path = pathlib.Path(job.workdir) / DIVERGED_FILE
        write_json(path, {"reason": diverged})
      self._done += 1
      self._secs.append(secs)
      score, failed = _score(job, metric)
      what = f"failed: {failed}" if failed else f"{metric} {score:.5f}"
      self._tell(
        f"{self._where()} {job.name}: {what} in {secs:.0f} s{self._left()}"
      )
    return {job.workdir: _score(job, metric) for job in jobs}

  def _job(self, model, name, folder, words, seed) -> Job:
    config = sweep.run_config(self._plan, model, words, seed)
    plain = json.loads(json.dumps(config))
    return Job(name, model.trainer, plain, str(folder))

  def _where(self) -> str:
    return f"[{self._done}/{self._total}]"

  def _left(self) -> str:
    """Runs that failed early leave fewer than counted: it is an estimate."""
    secs = sum(self._secs) / len(self._secs) / self._num_processes
    left = secs * (self._total - self._done)
    return f", about {math.ceil(left / 60)} min left" if left > 0 else ""


def _is_done(job: Job) -> bool:
  names = ("result.json", DIVERGED_FILE)
  return any((pathlib.Path(job.workdir) / name).exists() for name in names)


def _score(job: Job, metric: str) -> tuple[float | None, str | None]:
  """Validation metric of a run that is done, or why it has none."""
  workdir = pathlib.Path(job.workdir)
  if (workdir / DIVERGED_FILE).exists():
    return None, _read(workdir / DIVERGED_FILE)["reason"]
  value = float(_read(workdir / "result.json")["metrics"].get(metric, "nan"))
  if not math.isfinite(value):
    return None, f"{metric} is not defined"
  return value, None


@contextlib.contextmanager
def _claim(workdir: pathlib.Path, plan: Sweep) -> Iterator[None]:
  """Holds the sweep's folder, if it is of the same sweep."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"{workdir}: cannot be made ({error.strerror}); use another --workdir"
    ) from error
  with (workdir / "lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f"{workdir}: another sweep is at work here; wait for its end or use"
        " another --workdir"
      ) from error
    _check_plan(workdir / "plan.json", plan)
    yield


def _check_plan(path: pathlib.Path, plan: Sweep) -> None:
  """Writes what the trials depend on, or compares with what is there.

  Models may be added or left out, and the table be another one.
  """
  new = {
    "search": {
      "num_trials": plan.num_trials,
      "search": plan.search,
      "rungs": [dict(rung) for rung in plan.rungs],
      "metric": plan.metric,
      "tuning_seed": plan.tuning_seed,
      # Only where there are any: folders of before know of none.
      **({"seed_words": plan.seed_words} if plan.seed_words else {}),
    },
    # The trials themselves: their order is that of the words of the space.
    "models": {
      m.label: {**_describe(m), "space": sweep.trial_words(plan, m)}
      for m in plan.models
    },
  }
  new = json.loads(json.dumps(new))
  old = _read(path) if path.exists() else {"search": new["search"]}
  models = old.get("models", {})
  changed = [
    f"{key} was {old['search'].get(key)!r}, is {value!r}"
    for key, value in new["search"].items()
    if old["search"].get(key) != value
  ]
  changed += [
    f"{label} has another {key}"
    for label, entry in new["models"].items()
    for key, value in entry.items()
    if label in models and models[label].get(key) != value
  ]
  if changed:
    raise UserError(
      f"{path.parent}: holds another sweep ({'; '.join(changed[:3])}); use"
      " another --workdir"
    )
  new["models"] = {**models, **new["models"]}
  write_json(path, new)


def _check_results(plan: Sweep, results: pathlib.Path) -> None:
  """Raises if the folder holds what this sweep would not write anew."""
  if results.exists() and not results.is_dir():
    raise UserError(f"{results}: is a file; give a folder for the results")
  own = {published.COMPARISON_FILE, published.SWEEP_FILE}
  own |= {f"{m.label}-{seed}.json" for m in plan.models for seed in plan.seeds}
  others = [p for p in sorted(results.glob("*.json")) if p.name not in own]
  if others:
    raise UserError(
      f"{others[0]}: is not of this sweep and would stand in its table; delete"
      " it or give another --results"
    )


def _publish(plan, workdir, results, trials, chosen, diverged):
  folders = [
    workdir / "runs" / f"{model.label}-{seed}"
    for model in plan.models
    for seed in plan.seeds
    if f"{model.label}, seed {seed}" not in diverged
  ]
  runs = report.load_runs(folders)
  results.mkdir(parents=True, exist_ok=True)
  kept = {f"{folder.name}.json" for folder in folders}
  for model in plan.models:
    for seed in plan.seeds:
      if f"{model.label}-{seed}.json" not in kept:  # Of an earlier sweep.
        (results / f"{model.label}-{seed}.json").unlink(missing_ok=True)
  for folder in folders:
    # Runs beside others: their speed says nothing.
    result = {**_read(folder / "result.json"), "examples_per_sec": None}
    write_json(results / f"{folder.name}.json", result)
  commits = sorted({run.config["commit"] for run in runs})
  models = {
    model.label: {
      "chosen": chosen[model.label],
      "space": _describe(model)["space"],
      "trials": [trial._asdict() for trial in trials[model.label]],
    }
    for model in plan.models
  }
  write_json(
    results / published.SWEEP_FILE,
    {
      "commits": commits,
      "search": plan.search,
      "num_trials": plan.num_trials,
      "rungs": [dict(rung) for rung in plan.rungs],
      "metric": plan.metric,
      "tuning_seed": plan.tuning_seed,
      "seeds": list(plan.seeds),
      "seed_words": list(plan.seed_words),
      "models": models,
    },
  )
  comparison = published.Comparison(
    plan.baseline, tuple(plan.table_metrics), plan.control, diverged
  )
  return published.write_comparison(results, runs, comparison)


def _describe(model: Model) -> dict[str, Any]:
  space = {
    word: str(values) if isinstance(values, sweep.Interval) else list(values)
    for word, values in model.space.items()
  }
  config = dict(model.config)
  return {"config": config, "space": space, "trainer": model.trainer}


def _read(path: pathlib.Path) -> Mapping[str, Any]:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(
      f"{path}: not valid JSON ({error}); delete it and run the sweep again"
    ) from error


def _text(words: Mapping[str, Any]) -> str:
  return ", ".join(f"{word} {value}" for word, value in words.items())
