"""Evaluates a finished run's checkpoint on a part of its data.

    python -m experiments.evaluate --workdir=runs/msn --split=valid

On the test part, with the best checkpoint, the numbers are the run's result.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import door
from recjax import restore
from recjax.errors import UserError
from recjax.writer import write_json

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.")
_SPLIT = flags.DEFINE_string("split", "test", "train, valid or test.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best or last.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the metrics.")
_ONE_DEVICE = flags.DEFINE_bool(
  "one_device", False, "On one device, however many the run had."
)


def main(argv: Sequence[str]) -> None:
  """Prints the metrics and writes them to `--output`."""
  del argv
  if not _WORKDIR.value:
    raise UserError("--workdir is missing; give the folder of a finished run")
  output = _OUTPUT.value and pathlib.Path(_OUTPUT.value).expanduser()
  if output and output.exists():
    raise UserError(f"{output}: exists; give another --output")
  run = restore.open_run(
    _WORKDIR.value, checkpoint=_CHECKPOINT.value, one_device=_ONE_DEVICE.value
  )
  metrics = restore.evaluate_run(run, _SPLIT.value)
  for name, value in sorted(metrics.items()):
    print(f"{name} {value:.5f}")
  if output:
    kept = {key: run.result[key] for key in ("model", "dataset", "seed")}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {**kept, "step": run.step, "metrics": metrics})


if __name__ == "__main__":
  door.run(main)
