"""Planted histories: what reading them from all features should be good for.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/planted_hyformer.py \\
        --workdir=runs/planted_hyformer --num_processes=2 \\
        --results=experiments/results/planted_hyformer

The same on the control, where nothing is planted and the gain must be gone, is
`planted_hyformer_control.py`. What says where to look are features of the
context. BaseArch's reading starts from the candidate and the user, as its paper
has it; `longer_global`, from all features as well. The other two have the
candidate alone.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

SPACE = {"optimizer.learning_rate": (3e-3, 1e-2, 2e-2)}
TREES_SPACE = {"trees.learning_rate": (0.05, 0.1, 0.2)}
# Narrow, so that a run takes a minute on one core. Rows begin large, so that
# attention tells events apart from the first step. One pass over-fits nothing.
SIZE = {
  "model.num_tokens": 4,
  "model.token_dim": 32,
  "model.num_layers": 2,
  "model.event_dim": 16,
  "model.dropout_rate": 0.0,
  "model.embed_init_scale": 0.3,
  "optimizer.sparse.learning_rate": 0.1,
  "optimizer.weight_decay": 1e-4,
  "train.batch_size": 128,
  "train.num_epochs": 1,
  "train.eval_every_steps": 250,
  "train.early_stop_patience": 0,
}
HEADS = {"num_heads": 2, "encoder_mlp_ratio": 2.0}
GLOBAL = ("target", "cls", "user", "features")


def get_sweep(is_control: bool = False) -> Sweep:
  """The planted data, or its control."""
  data = {
    "data": {
      "name": "synthetic",
      "claim": "where_to_look",
      "control": is_control,
      "num_rows": 200_000,
      "num_users": 512,
      "num_items": 512,
      "rule_strength": 2.5,
    }
  }

  def model(label, recipe, words):
    words = {f"model.{key}": value for key, value in words.items()}
    return common.model(label, f"{recipe}:base", data | SIZE | words, SPACE)

  longer = HEADS | {"recent_len": 32}
  return Sweep(
    models=(
      # At least HyFormer's FLOPs, by wider networks or more layers; the report
      # prints them.
      model("base_arch", "longer", longer),
      model("longer_global", "longer", longer | {"global_tokens": GLOBAL}),
      model("transformer_rankmixer", "transformer_rankmixer", HEADS),
      model("din_rankmixer", "din_rankmixer", {"attention_dims": (72, 36)}),
      model("hyformer", "hyformer", HEADS | {"encoder": "swiglu"}),
      common.trees("lightgbm", "rankmixer:base", data, TREES_SPACE),
    ),
    baseline="base_arch",
    num_trials=3,
    # No seed of the table, which would carry the luck of the chosen trial.
    tuning_seed=100,
    table_metrics=("test/click/auc", "test/click/logloss"),
    control=None if is_control else "planted_hyformer_control",
  )
