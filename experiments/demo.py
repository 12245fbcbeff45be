"""Trains RankMixer and MSN on the bundled KuaiRand log and compares them.

    python -m experiments.demo --workdir=runs/demo

Beside them stand rows of the published results, marked as stored: they were
not trained here. Runs that are complete are not trained again; stopped ones go
on.
"""

import dataclasses
import importlib
import pathlib
import sys
from collections.abc import Sequence

import rich.console
from absl import flags

from experiments import door
from recjax import comparison, report, train

MODELS = ("rankmixer", "msn")
STORED = ("dlrm_mlp", "lightgbm")
RESULTS = pathlib.Path(__file__).parent / "results" / "kuairand_recipes"
METRICS = ("test/click/auc", "test/click/gauc", "test/click/logloss")

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the demo.")
_SIZE = flags.DEFINE_string("size", "base", "Size of the recipes.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of both runs.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
  """Trains, prints one table and writes report.md."""
  del argv
  workdir = pathlib.Path(_WORKDIR.value)
  directories = []
  for name in MODELS:
    recipe = importlib.import_module(f"experiments.configs.{name}")
    config = recipe.get_config(_SIZE.value).to_dict()
    config["seed"] = _SEED.value
    directory = workdir / f"{name}-{_SIZE.value}-{_SEED.value}"
    if train.train_and_evaluate(config, str(directory)) is None:
      sys.exit("stopped; run the same command again to go on")
    directories.append(str(directory))
  # The published runs are of the base recipes.
  stored = load_stored() if _SIZE.value == "base" else []
  notes = (
    "(stored): not trained here, but read from experiments/results/"
    f"{RESULTS.name}; other seeds than {_SEED.value} are in the mean, not in Δ."
  )
  path = report.write_report(
    [*report.load_runs(directories), *stored],
    workdir,
    baseline=MODELS[0],
    title="RankMixer and MSN on the KuaiRand log",
    metrics=METRICS,
    notes=(notes,) if stored else (),
    # A pipe has no width of its own; 80 columns would fold the numbers.
    console=rich.console.Console(width=None if sys.stdout.isatty() else 160),
  )
  print(f"Report with plots: {path}")


def load_stored() -> list[comparison.Run]:
  """The published runs of `STORED`, named as what they are."""
  runs = report.load_runs([RESULTS / f"{name}-*.json" for name in STORED])
  return [
    dataclasses.replace(run, model=f"{run.model} (stored)") for run in runs
  ]


if __name__ == "__main__":
  door.run(main)
