"""Planted data with rules to remember: what a memory should be good for.

    python -m experiments.sweep --sweep=experiments/sweeps/planted_memory.py \\
        --workdir=runs/planted_memory --num_processes=2 \\
        --results=experiments/results/planted_memory

The same on the control, where nothing is planted and the gain must be gone, is
`planted_memory_control.py`.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

SPACE = {
  "optimizer.learning_rate": (3e-3, 1e-2, 3e-2),
  "optimizer.sparse.learning_rate": (0.03, 0.1),
}
# Rules of pairs take many splits; slow rates would take them for an hour.
TREES_SPACE = {
  "trees.learning_rate": (0.1, 0.2, 0.3),
  "trees.num_leaves": (63, 255),
}
# One narrow layer, so that a run takes a minute on one core.
SIZE = {
  "model.num_tokens": 4,
  "model.token_dim": 32,
  "model.num_layers": 1,
}


def get_sweep(is_control: bool = False) -> Sweep:
  """The planted data, or its control."""
  data = {
    "data": {
      "name": "synthetic",
      "claim": "memory_rules",
      "control": is_control,
    }
  }

  def model(label, recipe, words):
    words = {f"model.{key}": value for key, value in words.items()}
    return common.model(label, f"{recipe}:base", data | SIZE | words, SPACE)

  experts = {"num_experts": 6, "top_k": 2}
  return Sweep(
    models=(
      # What is not MSN gets a wider network, for at least its active
      # parameters and FLOPs; the report prints both.
      model("rankmixer", "rankmixer", {"mlp_ratio": 6.0}),
      model(
        "rankmixer_gated",
        "rankmixer",
        {"ffn": "gated", "mlp_ratio": 4.0, "moe": {"gate_dim": 64}},
      ),
      model(
        "rankmixer_smoe",
        "rankmixer",
        {"ffn": "smoe", "mlp_ratio": 6.0, "moe": experts},
      ),
      model("msn", "msn", {"memory_layers": (0,)}),
      common.trees("lightgbm", "rankmixer:base", data, TREES_SPACE),
    ),
    baseline="rankmixer",
    num_trials=6,
    # No seed of the table, which would carry the luck of the chosen trial.
    tuning_seed=100,
    table_metrics=("test/click/auc", "test/click/logloss"),
    control=None if is_control else "planted_memory_control",
  )
