"""Planted scenarios and tasks: what tokens for them should be good for.

    python -m experiments.sweep --sweep=experiments/sweeps/planted_mdl.py \\
        --workdir=runs/planted_mdl --num_processes=2 \\
        --results=experiments/results/planted_mdl

The same on the control, where scenarios and tasks are all alike and the gain
must be gone, is `planted_mdl_control.py`. Scenario 5 is the rare one, `buy` the
rare task.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

SPACE = {"optimizer.learning_rate": (1e-3, 3e-3, 1e-2)}
TREES_SPACE = {"trees.learning_rate": (0.05, 0.1, 0.2)}
TASKS = {"model.tasks": ("click", "like", "skip", "buy")}
# So that a run takes a minute on one core.
SIZE = {
  "model.num_tokens": 4,
  "model.token_dim": 32,
  "model.num_layers": 2,
  "optimizer.sparse.learning_rate": 0.1,
}
# For at least the dense parameters of MDL; the report prints them and FLOPs.
MLP_RATIOS = {
  "shared_bottom": 12.0,
  "mmoe": 11.0,
  "ple": 11.0,
  "star": 10.0,
  "hmoe": 10.0,
  "pepnet": 11.0,
}


def get_sweep(is_control: bool = False) -> Sweep:
  """The planted data, or its control."""
  data = {
    "data": {
      "name": "synthetic",
      "claim": "scenario_tasks",
      "control": is_control,
      "num_users": 512,
      "num_items": 512,
      # So that the rare scenario has 200 test users of both classes.
      "num_rows": 300_000,
    }
  }
  # The priors of the recipe are columns of another log.
  own = {"model.important_features": (), "model.scenario_priors": ()}

  def model(label, recipe, words):
    return common.model(
      label, f"{recipe}:base", data | TASKS | SIZE | words, SPACE
    )

  return Sweep(
    models=(
      *(
        model(name, name, {"model.mlp_ratio": ratio})
        for name, ratio in MLP_RATIOS.items()
      ),
      model("mdl", "mdl", own),
      # The same first tokens without reading: what the layers add.
      model(
        "mdl_final_tower",
        "mdl",
        own | {"model.mode": "final_tower", "model.head_dim": 32},
      ),
      model("mdl_one_shot", "mdl", own | {"model.mode": "one_shot"}),
      common.trees("lightgbm", "mmoe:base", data | TASKS, TREES_SPACE),
    ),
    baseline="mmoe",
    num_trials=3,
    # No seed of the table, which would carry the luck of the chosen trial.
    tuning_seed=100,
    metric="valid/macro_auc",
    table_metrics=(
      "test/macro_auc",
      "test/click/auc",
      "test/click/scenario_5/auc",
      "test/buy/auc",
    ),
    control=None if is_control else "planted_mdl_control",
  )
