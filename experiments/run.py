"""Trains, evaluates and checkpoints one run.

    python -m experiments.run --config=experiments/configs/msn.py:base \\
        --workdir=runs/msn --config.seed=1

The same command again goes on from the last checkpoint.
"""

from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import config_flags

from experiments import door
from recjax import train
from recjax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Recipe and size, as experiments/configs/msn.py:base.",
  # A recipe need not name every option: the library knows them all, and which
  # keys are none.
  lock_config=False,
  accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the other processes of a cluster first."
)


def main(argv: Sequence[str]) -> None:
  """Runs `train_and_evaluate` on the flags."""
  del argv
  if _CONFIG.value is None or not _WORKDIR.value:
    raise UserError(
      "--config and --workdir are needed, for example "
      "--config=experiments/configs/msn.py:base --workdir=runs/msn"
    )
  if _DISTRIBUTED.value:
    jax.distributed.initialize()
  result = train.train_and_evaluate(_CONFIG.value.to_dict(), _WORKDIR.value)
  if result is not None:
    for name, value in sorted(result["metrics"].items()):
      print(f"{name} {value:.5f}")


if __name__ == "__main__":
  door.run(main)
