"""Compares finished runs: prints the table, writes report.md and figures.

    python -m experiments.report --runs='runs/msn-*,runs/rankmixer-*' \\
        --baseline=rankmixer --output=runs/report

    python -m experiments.report --update=README.md

The second writes the published tables: what stands in the file between
`<!-- table: NAME -->` and `<!-- /table -->` becomes the table of
`experiments/results/NAME`.
"""

import pathlib
import sys
from collections.abc import Sequence

import rich.console
from absl import flags

from experiments import door
from recjax import report
from recjax.errors import UserError

RESULTS = pathlib.Path(__file__).parent / "results"

_RUNS = flags.DEFINE_list(
  "runs", [], "Workdirs, folders of results or files, by path or pattern."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for report.md.")
_BASELINE = flags.DEFINE_string(
  "baseline", None, "Model that the others are compared with."
)
_METRICS = flags.DEFINE_list(
  "metrics", [], "Columns such as test/click/auc; by default the main ones."
)
_TITLE = flags.DEFINE_string("title", "Comparison of models", "Headline.")
_UPDATE = flags.DEFINE_string(
  "update", None, "Markdown file whose marked tables are written anew."
)


def main(argv: Sequence[str]) -> None:
  """Writes the report of the runs that the flags name, or marked tables."""
  del argv
  if _UPDATE.value is not None:
    if _RUNS.value or _OUTPUT.value is not None:
      raise UserError("--update goes without --runs and --output; leave it out")
    path = pathlib.Path(_UPDATE.value)
    changed = report.update_tables(path, RESULTS)
    print(f"{path}: {'updated' if changed else 'is up to date'}")
    return
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
