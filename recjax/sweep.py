"""Tunes every model of a table alike, then runs the chosen settings.

A `Sweep` says what is compared. Each model gets the same number of trials from
a search space of the same size, at one seed; the trial that is best on the
validation part is run with the final seeds; and what is published is the test
part of these runs. `recjax.tuning` does it.

With `rungs` the trials are halved: Jamieson and Talwalkar, Non-stochastic Best
Arm Identification and Hyperparameter Optimization, AISTATS 2016. Each rung is
run from the start, since a schedule of another length is another run; the
paper continues them.
"""

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recjax import config as config_lib
from recjax import method, monitor, optimizer, parallel, run_files, train
from recjax.errors import UserError
from recjax.metrics import slices, summary
from recjax.metrics import trial as trial_metrics
from recjax.schema import suggest

MAX_TRIALS = 6
TRAINER = "recjax.train:train_and_evaluate"
_SEARCHES = ("grid", "random")


@dataclasses.dataclass(frozen=True)
class Interval:
  """Numbers to draw from, for a random search.

  Attributes:
    low: Least value.
    high: Largest value.
    log: Whether their logarithms are drawn evenly, or they themselves.
  """

  low: float
  high: float
  log: bool = True

  def __post_init__(self):
    if not (self.low < self.high < math.inf and (self.low > 0 or not self.log)):
      raise UserError(
        f"an interval must have finite ends, low < high, and above 0 where"
        f" log=True, got {self}"
      )


@dataclasses.dataclass(frozen=True)
class Model:
  """One row of the table.

  Attributes:
    label: Its name there.
    config: The config of its runs but for label and seed; plain mappings.
    space: Word such as `optimizer.learning_rate` -> its values, or an
      `Interval`.
    trainer: `module:function`, called as `function(config, workdir)`.
  """

  label: str
  config: Mapping[str, Any]
  space: Mapping[str, Sequence[Any] | Interval] = dataclasses.field(
    default_factory=dict
  )
  trainer: str = TRAINER


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A comparison at equal budgets.

  Attributes:
    models: Rows of the table.
    baseline: Label of the row that the others are compared with.
    num_trials: Settings tried for each model; 0 takes the configs as they are.
    search: `grid` tries all combinations of a space, `random` draws them.
    rungs: Words that shorten the trials of each rung, the last one empty;
      after a rung the better half goes on. One rung is no halving.
    metric: Of the validation part; picks checkpoint and trial.
    tuning_seed: Seed of the trials, and of the draws of a random search.
    seeds: Of the runs of the table.
    seed_words: Words that take the seed of a run too: with `data.seed` every
      seed draws planted data anew, with `data.fold` it is tested on a fold of
      its own.
    table_metrics: Columns of the table.
    control: Folder of results, beside this table's, in which the same models
      met data without the planted structure.

  Raises:
    UserError: For a mistake in any of it.
  """

  models: tuple[Model, ...]
  baseline: str
  num_trials: int = 0
  search: str = "grid"
  rungs: tuple[Mapping[str, Any], ...] = ({},)
  metric: str = "valid/click/auc"
  tuning_seed: int = 0
  seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
  seed_words: tuple[str, ...] = ()
  table_metrics: tuple[str, ...] = (
    "test/click/auc",
    "test/click/gauc",
    "test/click/logloss",
  )
  control: str | None = None

  def __post_init__(self):
    _check_table(self)
    _check_search(self)
    for model in self.models:
      try:
        _check_model(model, self)
      except UserError as error:
        raise UserError(f"{model.label}: {error}") from error


def trial_words(sweep: Sweep, model: Model) -> list[dict[str, Any]]:
  """The settings to try for a model, the same at every call.

  Random values do not depend on the label: models of the same space meet the
  same ones.
  """
  if not sweep.num_trials:
    return []
  words = list(model.space)
  intervals = [isinstance(v, Interval) for v in model.space.values()]
  if not any(intervals):
    grid = list(itertools.product(*model.space.values()))
    if sweep.search == "random":
      rng = np.random.default_rng(sweep.tuning_seed)
      order = rng.permutation(len(grid))[: sweep.num_trials]
      grid = [grid[i] for i in order]
    return [dict(zip(words, values, strict=True)) for values in grid]
  rng = np.random.default_rng(sweep.tuning_seed)
  return [
    {word: _draw(rng, values) for word, values in model.space.items()}
    for _ in range(sweep.num_trials)
  ]


def run_config(
  sweep: Sweep, model: Model, words: Mapping[str, Any], seed: int
) -> dict[str, Any]:
  """The config of one run of a model."""
  words = {**words, **dict.fromkeys(sweep.seed_words, seed)}
  config = with_words(model.config, words)
  config |= {"label": model.label, "seed": seed}
  config["train"] = {**config.get("train", {}), "monitor": sweep.metric}
  return config


def with_words(
  config: Mapping[str, Any], words: Mapping[str, Any]
) -> dict[str, Any]:
  """A copy of `config` with values set by words.

  Args:
    config: Plain mappings.
    words: Word such as `optimizer.learning_rate` -> value. All but its last
      part must be blocks of the config; whether the last part is an option is
      for the library to say.

  Raises:
    UserError: For a block that the config does not hold.

  Example:
    >>> with_words({"model": {"dim": 4}}, {"model.dim": 8, "seed": 1})
    {'model': {'dim': 8}, 'seed': 1}
  """
  config = copy.deepcopy(dict(config))
  for word, value in words.items():
    *blocks, key = word.split(".")
    inner, where = config, "config"
    for block in blocks:
      if not isinstance(inner.get(block), dict):
        known = [k for k, v in inner.items() if isinstance(v, dict)]
        raise UserError(
          f"unknown block {where}.{block} of the word {word!r}"
          + suggest(block, known)
        )
      inner, where = inner[block], f"{where}.{block}"
    inner[key] = copy.deepcopy(value)
  return config


def _draw(rng: np.random.Generator, values) -> Any:
  if not isinstance(values, Interval):
    return values[int(rng.integers(len(values)))]
  low, high = values.low, values.high
  if values.log:
    value = math.exp(rng.uniform(math.log(low), math.log(high)))
  else:
    value = rng.uniform(low, high)
  return float(f"{value:.3g}")  # More digits mean nothing and are hard to read.


def _check_table(sweep: Sweep) -> None:
  if not sweep.models:
    raise UserError("models is empty; name at least one")
  labels = [model.label for model in sweep.models]
  for label in labels:
    if not re.fullmatch("[A-Za-z0-9_]+", label):
      raise UserError(
        f"label {label!r} must be of letters, digits and _: it names files"
      )
    if labels.count(label) > 1:
      raise UserError(f"two models are labelled {label!r}; rename one")
  if sweep.baseline not in labels:
    raise UserError(
      f"baseline {sweep.baseline!r} is no label"
      + suggest(sweep.baseline, labels)
    )
  for name in ("seeds", "table_metrics", "rungs"):
    values = getattr(sweep, name)
    if not values:
      raise UserError(f"{name} is empty; give at least one")
    if any(values.count(value) > 1 for value in values):
      raise UserError(f"{name} holds a value twice: {values}")
  names = {"valid": (sweep.metric,), "test": sweep.table_metrics}
  for split, metrics in names.items():
    for metric in metrics:
      _check_metric(metric, split, sweep.models)


def _check_metric(metric: str, split: str, models: Sequence[Model]) -> None:
  pair = np.array([0.0, 1.0])
  groups = {role: np.zeros(2, np.int32) for role in summary.GROUPED_AUCS}
  names = [
    *summary.summarize(pair, pair, groups=groups),
    *summary.summarize_real(pair, pair),
  ]
  cells = slices.summarize_by_scenario(
    pair, pair, np.zeros(2, np.int32), groups=groups
  )
  means = list(slices.means(cells)) + list(slices.means([], is_real=True))
  # Whether the data has scenarios, and how many, is not known yet.
  names += means
  own = re.sub(r"/scenario_\d+/auc$", "/auc", metric)
  metric = own if split == "test" else metric
  for model in models:
    tasks = model.config.get("model", {}).get("tasks", ())
    known = [f"{split}/{task}/{name}" for task in tasks for name in names]
    known += [f"{split}/{name}" for name in means]
    if not tasks:
      trial = trial_metrics.metric_names(has_truth=True)
      known = [f"{split}/trial/{name}" for name in trial]
    if metric not in known and not _may_be_own(metric, split, model):
      raise UserError(
        f"unknown metric {metric!r} of {model.label}" + suggest(metric, known)
      )


def _may_be_own(metric: str, split: str, model: Model) -> bool:
  """Whether it may be a method's own diagnostic, known once measured."""
  start, _, name = metric.partition("/")
  return (
    model.trainer == TRAINER
    and start == split
    and name.partition("/")[0] not in model.config["model"].get("tasks", ())
    and hasattr(method.find_module(model.config["model_name"]), "diagnostics")
  )


def _check_search(sweep: Sweep) -> None:
  if sweep.search not in _SEARCHES:
    raise UserError(
      f"unknown search {sweep.search!r}" + suggest(sweep.search, _SEARCHES)
    )
  if not 0 <= sweep.num_trials <= MAX_TRIALS:
    raise UserError(
      f"num_trials must be from 0 to {MAX_TRIALS}, got {sweep.num_trials}"
    )
  if sweep.rungs[-1]:
    raise UserError(
      f"the last of the rungs must be empty, got {dict(sweep.rungs[-1])}:"
      " what is chosen among must be trained in full"
    )
  sizes = {model.label: _sizes(sweep, model) for model in sweep.models}
  first, *others = sizes
  for other in others:
    if sizes[other] != sizes[first]:
      raise UserError(
        f"the search space of {other} has {_in_words(sizes[other])}, that of"
        f" {first} {_in_words(sizes[first])}; they must be equal"
      )
  number = math.prod(sizes[first]) if sizes[first] else 0
  if sweep.search == "grid" and number != sweep.num_trials:
    raise UserError(
      f"a grid of {_in_words(sizes[first])} has {number:.0f} trials, but"
      f" num_trials is {sweep.num_trials}; make them equal"
    )
  if bool(number) != bool(sweep.num_trials) or number < sweep.num_trials:
    raise UserError(
      f"{sweep.num_trials} trials cannot be drawn from {number:.0f} settings;"
      " give as many, or no space where num_trials is 0"
    )


def _sizes(sweep: Sweep, model: Model) -> list[float]:
  """Choices of each word, the largest first; an interval has no end."""
  sizes = []
  for word, values in model.space.items():
    is_interval = isinstance(values, Interval)
    if is_interval and sweep.search == "grid":
      raise UserError(
        f"{model.label}: {word} is an interval, which a grid cannot try;"
        " list values or set search='random'"
      )
    if not is_interval and (isinstance(values, str) or not len(values)):
      raise UserError(
        f"{model.label}: {word} must have a list of values, got {values!r}"
      )
    sizes.append(math.inf if is_interval else float(len(values)))
  return sorted(sizes, reverse=True)


def _in_words(sizes: list[float]) -> str:
  texts = ["any" if size == math.inf else f"{size:.0f}" for size in sizes]
  return " x ".join(texts) + " values" if texts else "no words"


def _check_model(model: Model, sweep: Sweep) -> None:
  """Builds every setting that will be run, so that none fails after hours."""
  for word in model.space:
    if word in ("seed", "label", "train.monitor", *sweep.seed_words):
      raise UserError(f"{word} is set by the sweep; leave it out of the space")
  trials = trial_words(sweep, model) or [{}]
  for words, rung in itertools.product(trials, sweep.rungs):
    some = {**words, **rung}
    config = run_config(sweep, model, some, sweep.tuning_seed)
    if model.trainer == TRAINER:
      _check_config(config)
    else:
      _check_known(model.config, some)


def _check_config(config: Mapping[str, Any]) -> None:
  """What training checks before it opens the data."""
  config = run_files.check_blocks(config)
  method.load_config(config["model_name"], config["model"])
  for name, kind in (
    ("optimizer", optimizer.Config),
    ("train", train.Config),
    ("parallel", parallel.Config),
  ):
    config_lib.build(kind, config[name], f"config.{name}")


def _check_known(config: Mapping[str, Any], words: Mapping[str, Any]) -> None:
  """Only words that the config holds: another trainer checks nothing here."""
  for word, value in words.items():
    inner, where = config, "config"
    for key in word.split("."):
      if not isinstance(inner, Mapping) or key not in inner:
        raise UserError(f"unknown word {where}.{key}" + suggest(key, inner))
      inner, where = inner[key], f"{where}.{key}"
    if not isinstance(value, type(inner)):
      raise UserError(
        f"{word} must be of type {type(inner).__name__}, got {value!r}"
      )


def rank(scores: Sequence[Sequence[float | None]], metric: str) -> list[int]:
  """Order of the trials, the best first.

  Args:
    scores: Of each trial, its value in each rung that it reached; None or NaN
      where it failed.
    metric: Says whether less is better.

  Returns:
    Indices: by the rung reached, then by the value there, failed ones last,
    equal ones in the order of the trials.

  Example:
    >>> rank([[0.7], [0.6, 0.8], [None], [0.6, 0.9]], "valid/click/auc")
    [3, 1, 0, 2]
  """
  sign = -1 if monitor.is_better(metric, 1.0, 0.0) else 1

  def key(index):
    value = scores[index][-1]
    if value is None or math.isnan(value):
      return (1, 0, 0, index)
    return (0, -len(scores[index]), sign * value, index)

  return sorted(range(len(scores)), key=key)
