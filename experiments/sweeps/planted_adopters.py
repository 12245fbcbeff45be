"""Planted early adopters: what PROMO's prompts should be good for.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/planted_adopters.py \\
        --workdir=runs/planted_adopters --num_processes=2 \\
        --results=experiments/results/planted_adopters

The same on the control, whose lists say nothing, is
`planted_adopters_control.py`. Half of the rows are about cold items. All models
have the same backbone and budget; 6 trials each over both rates.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

SPACE = {
  "optimizer.learning_rate": (3e-3, 1e-2, 3e-2),
  "optimizer.sparse.learning_rate": (0.05, 0.15),
}
TREES_SPACE = {
  "trees.learning_rate": (0.05, 0.1, 0.2),
  "trees.num_leaves": (31, 127),
}
TOWERS = {
  "user_features": ("user_attribute", "hour", "dense_0"),
  "item_features": ("item_attribute", "content"),
  "history": "positive_history",
  "num_blocks": 1,
  "num_heads": 2,
}


def get_sweep(is_control: bool = False) -> Sweep:
  """The planted data, or its control."""
  data = {
    "data": {
      "name": "synthetic",
      "claim": "early_adopters",
      "control": is_control,
    }
  }
  size = {"model.towers": TOWERS, "train.num_epochs": 6}

  def model(label, recipe=None, **words):
    words = {f"model.{key}": value for key, value in words.items()}
    return common.model(
      label, f"{recipe or label}:base", data | size | words, SPACE
    )

  return Sweep(
    models=(
      model("two_towers"),
      model("two_towers_tuned", "two_towers", tune="all"),
      model("dropoutnet"),
      model("cb2cf"),
      model("content_average"),
      model("metaemb"),
      model("plate"),
      model("ppr"),
      model("promo", popular_from=5),
      model("promo_i", "promo", prompt_from="id"),
      model("promo_f", "promo", prompt_from="features"),
      model("promo_if", "promo", prompt_from="id_features"),
      model("promo_m", "promo", network="shared"),
      model("promo_t", "promo", network="none"),
      common.trees("lightgbm", "promo:base", data, TREES_SPACE),
    ),
    baseline="two_towers_tuned",
    num_trials=6,
    # No seed of the table, which would carry the luck of the chosen trial.
    tuning_seed=100,
    table_metrics=("test/click/auc", "test/click/logloss"),
    control=None if is_control else "planted_adopters_control",
  )
