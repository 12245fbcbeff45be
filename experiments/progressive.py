"""Trains day by day, each day evaluated before it is trained on.

    python -m experiments.progressive \\
        --config=experiments/configs/lemur.py:base --workdir=runs/lemur_days \\
        --num_days=10

A day is an equal share of the rows in the order of time. The same command again
goes on where it was stopped.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from experiments import door
from recjax import progressive
from recjax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Recipe and size, as experiments/configs/lemur.py:base.",
  lock_config=False,
  accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all days.")
_NUM_DAYS = flags.DEFINE_integer("num_days", 10, "Days.", lower_bound=2)


def main(argv: Sequence[str]) -> None:
  """Prints a line for each evaluated day, and then the means."""
  del argv
  if _CONFIG.value is None or not _WORKDIR.value:
    raise UserError(
      "--config and --workdir are needed, for example "
      "--config=experiments/configs/lemur.py:base --workdir=runs/lemur_days"
    )
  summary = progressive.train_by_days(
    _CONFIG.value.to_dict(), _WORKDIR.value, _NUM_DAYS.value
  )
  if summary is None:
    return
  for day in summary["days"]:
    values = [
      f"{name} {value:.5f}"
      for name, value in sorted(day["metrics"].items())
      if name.endswith(("/auc", "/rmse", "/logloss"))
    ]
    print(f"day {day['day']}: {', '.join(values)}")
  for name, value in sorted(summary["metrics"].items()):
    print(f"{name} {value:.5f}")


if __name__ == "__main__":
  door.run(main)
