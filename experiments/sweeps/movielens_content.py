"""Titles and genres on the bundled MovieLens ratings: end to end, frozen, none.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/movielens_content.py \\
        --workdir=runs/movielens_content --num_processes=2 \\
        --results=experiments/results/movielens_content

A positive is a rating of at least 4 stars; the split is by time. All rows see
the same features and have the same ranker. `rankmixer` has no content at all;
the rates and counts that all rows see as numbers are a floor, which the trees
show. 3 trials each over the learning rate, then 5 seeds.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

SPACE = {"optimizer.learning_rate": (5e-4, 1e-3, 2e-3)}
TREES_SPACE = {"trees.learning_rate": (0.02, 0.05, 0.1)}
ABLATIONS = {
  "no_ranker_gradient": {"model.ranker_gradient": False},
  "no_bank": {"model.bank": False},
  "no_similarities": {"model.similarities": False},
  "no_sqdc": {"model.contrast": {"weight": 0.0}},
}


def get_sweep() -> Sweep:
  """End to end, its ablations, frozen, without content, and trees."""
  data = {"data": {"name": "movielens", "text": True}}

  def model(label, recipe, words):
    return common.model(label, f"{recipe}:base", data | words, SPACE)

  return Sweep(
    models=(
      model("lemur", "lemur", {}),
      *(
        model(f"lemur_{name}", "lemur", words)
        for name, words in ABLATIONS.items()
      ),
      model("two_stage_content", "two_stage_content", {}),
      model("rankmixer", "rankmixer", {"model.tasks": ("positive",)}),
      common.trees("lightgbm", "lemur:base", data, TREES_SPACE),
    ),
    baseline="rankmixer",
    num_trials=3,
    metric="valid/positive/auc",
    # No seed of the table, which would carry the luck of the chosen trial.
    tuning_seed=100,
    table_metrics=(
      "test/positive/auc",
      "test/positive/gauc",
      "test/positive/logloss",
    ),
  )
