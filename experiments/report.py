"""Compares finished runs: prints the table, writes report.md and figures.

    python -m experiments.report --runs='runs/msn-*,runs/rankmixer-*' \\
        --baseline=rankmixer --output=runs/report
"""

import sys
from collections.abc import Sequence

import rich.console
from absl import flags

from experiments import door
from recjax import report
from recjax.errors import UserError

_RUNS = flags.DEFINE_list(
  "runs", [], "Workdirs or result.json files, by path or pattern."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for report.md.")
_BASELINE = flags.DEFINE_string(
  "baseline", None, "Model that the others are compared with."
)
_METRICS = flags.DEFINE_list(
  "metrics", [], "Columns such as test/click/auc; by default the main ones."
)
_TITLE = flags.DEFINE_string("title", "Comparison of models", "Headline.")


def main(argv: Sequence[str]) -> None:
  """Writes the report of the runs that the flags name."""
  del argv
  if _OUTPUT.value is None:
    raise UserError("--output is missing; give the report's folder")
  path = report.write_report(
    report.load_runs(_RUNS.value),
    _OUTPUT.value,
    baseline=_BASELINE.value,
    title=_TITLE.value,
    metrics=_METRICS.value or None,
    # A pipe has no width of its own; 80 columns would fold the numbers.
    console=rich.console.Console(width=None if sys.stdout.isatty() else 160),
  )
  print(path)


if __name__ == "__main__":
  door.run(main)
