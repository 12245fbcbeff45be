"""Gradient-boosted trees on the features that the models of a recipe see.

    python -m experiments.lightgbm_baseline \\
        --config=experiments/configs/rankmixer.py:base --workdir=runs/lightgbm

Needs the `dev` extra; see `experiments.trees` for what they see.
"""

import json
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from experiments import door, trees
from recjax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Recipe whose data, tasks and seed are used."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")


def main(argv: Sequence[str]) -> None:
  """Trains on the flags and prints the result."""
  del argv
  if _CONFIG.value is None or not _WORKDIR.value:
    raise UserError("--config and --workdir are needed")
  result = trees.train_and_evaluate(_CONFIG.value.to_dict(), _WORKDIR.value)
  print(json.dumps(result, indent=1))


if __name__ == "__main__":
  door.run(main)
