"""Exports a finished run as a folder that scores raw rows without recjax.

python -m experiments.export --workdir=runs/msn --output=exports/msn
python exports/msn/score.py --check
"""

from collections.abc import Sequence

from absl import flags

from experiments import door
from recjax import export
from recjax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")


def main(argv: Sequence[str]) -> None:
  """Writes the export and prints where it is."""
  del argv
  if not _WORKDIR.value or not _OUTPUT.value:
    raise UserError(
      "--workdir and --output are needed, for example --workdir=runs/msn "
      "--output=exports/msn"
    )
  print(export.export_run(_WORKDIR.value, _OUTPUT.value))


if __name__ == "__main__":
  door.run(main)
