"""Planted data where a history must be read step by step, by what the row is.

    python -m experiments.sweep --sweep=experiments/sweeps/planted_where.py \\
        --workdir=runs/planted_where --num_processes=2 \\
        --results=experiments/results/planted_where

The same on the control, where nothing is planted and the gain must be gone, is
`planted_where_control.py`.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

SPACE = {
  "optimizer.learning_rate": (3e-3, 1e-2, 3e-2),
  "optimizer.sparse.learning_rate": (0.03, 0.1),
}
# Narrow, so that a run takes about two minutes on one core; no dropout, for
# there is nothing to over-fit in one pass.
SIZE = {
  "model.num_tokens": 4,
  "model.token_dim": 32,
  "model.num_layers": 2,
  "model.event_dim": 32,
  "model.dropout_rate": 0.0,
  "train.num_epochs": 3,
}
TARGET = ("item_id", "item_kind")
# All but HyFormer get wider networks or more layers, for at least its FLOPs;
# the report prints them.
ATTENTION = {"num_heads": 2, "target_features": TARGET, "mlp_ratio": 4.0}


def get_sweep(is_control: bool = False) -> Sweep:
  """The planted data, or its control."""
  data = {
    "data": {
      "name": "synthetic",
      "claim": "where_to_look",
      "control": is_control,
    }
  }

  def model(label, recipe, words):
    words = {f"model.{key}": value for key, value in words.items()}
    return common.model(label, f"{recipe}:base", data | SIZE | words, SPACE)

  longer = ATTENTION | {"recent_len": 64, "encoder_mlp_ratio": 2.0}
  return Sweep(
    models=(
      model("longer", "longer", longer),
      model(
        "longer_global",
        "longer",
        longer | {"global_tokens": ("target", "cls", "user", "features")},
      ),
      model(
        "transformer_rankmixer",
        "transformer_rankmixer",
        ATTENTION | {"num_encoder_layers": 2},
      ),
      model(
        "din_rankmixer",
        "din_rankmixer",
        {
          "target_features": TARGET,
          "attention_dims": (64, 32),
          "mlp_ratio": 4.0,
        },
      ),
      model(
        "hyformer",
        "hyformer",
        {"num_heads": 2, "encoder": "swiglu", "encoder_mlp_ratio": 1.0},
      ),
    ),
    baseline="longer",
    num_trials=6,
    # No seed of the table, which would carry the luck of the chosen trial.
    tuning_seed=100,
    table_metrics=("test/click/auc", "test/click/logloss"),
    control=None if is_control else "planted_where_control",
  )
