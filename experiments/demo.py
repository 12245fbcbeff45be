"""Trains RankMixer and MSN on the bundled KuaiRand log and compares them.

    python -m experiments.demo --workdir=runs/demo

Runs that are complete are not trained again; stopped ones go on.
"""

import importlib
import pathlib
import sys
from collections.abc import Sequence

import rich.console
from absl import flags

from experiments import door
from recjax import report, train

MODELS = ("rankmixer", "msn")
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
  path = report.write_report(
    report.load_runs(directories),
    workdir,
    baseline=MODELS[0],
    title="RankMixer and MSN on the KuaiRand log",
    metrics=METRICS,
    # A pipe has no width of its own; 80 columns would fold the numbers.
    console=rich.console.Console(width=None if sys.stdout.isatty() else 160),
  )
  print(f"Report with plots: {path}")


if __name__ == "__main__":
  door.run(main)
