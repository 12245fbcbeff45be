"""Ranks the items of a finished run's test part: HR and NDCG at 5 and 10.

    python -m experiments.rank --workdir=runs/promo \\
        --candidate_features=movie_id,year,genres,item_exposures,\\
item_positives,pinnacle_users,negative_users

Every example with label 1 is a query: its item against all items of the part
(`full`) and against 100 drawn ones (`sampled`), without those that the user
has elsewhere in the data.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import door
from recjax import ranking, restore
from recjax.errors import UserError
from recjax.writer import write_json

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.")
_SPLIT = flags.DEFINE_string("split", "test", "valid or test.")
_CANDIDATE_FEATURES = flags.DEFINE_list(
  "candidate_features", [], "Features of the item; all others are the user's."
)
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples", 100, "Drawn candidates of a query.", lower_bound=1
)
_MAX_QUERIES = flags.DEFINE_integer(
  "max_queries", 1000, "Drawn from all queries.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of both draws.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the metrics.")


def main(argv: Sequence[str]) -> None:
  """Prints the metrics and writes them to `--output`."""
  del argv
  if not _WORKDIR.value or not _CANDIDATE_FEATURES.value:
    raise UserError(
      "--workdir and --candidate_features are needed, for example "
      "--workdir=runs/promo --candidate_features=movie_id,genres"
    )
  if _SPLIT.value not in ("valid", "test"):
    raise UserError(f"--split must be valid or test, got {_SPLIT.value!r}")
  output = _OUTPUT.value and pathlib.Path(_OUTPUT.value).expanduser()
  if output and output.exists():
    raise UserError(f"{output}: exists; give another --output")
  run = restore.open_run(_WORKDIR.value, one_device=True)
  found = ranking.rank_items(
    run.method,
    run.state,
    run.columns,
    _SPLIT.value,
    _CANDIDATE_FEATURES.value,
    num_samples=_NUM_SAMPLES.value,
    max_queries=_MAX_QUERIES.value,
    seed=_SEED.value,
  )
  for name, value in found.metrics.items():
    print(f"{_SPLIT.value}/{name} {value:.5f}")
  if output:
    kept = {key: run.result[key] for key in ("model", "dataset", "seed")}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {**kept, "step": run.step, "metrics": found.metrics})


if __name__ == "__main__":
  door.run(main)
