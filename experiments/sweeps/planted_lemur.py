"""Planted words that only labels explain: what encoders in training learn.

    python -m experiments.sweep --sweep=experiments/sweeps/planted_lemur.py \\
        --workdir=runs/planted_lemur --num_processes=2 \\
        --results=experiments/results/planted_lemur

The same on the control, whose texts say nothing of the label, is
`planted_lemur_control.py`. In the results of the rankers scenario 1 holds the
items that no training row had (`test/click/scenario_1/auc`).
Each row gets 3 trials over its learning rate, and then 5 seeds. The frozen
encoders get a pass of their own first; the ranker of every row gets one.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

SPACE = {"optimizer.learning_rate": (2e-3, 5e-3, 1e-2)}
TREES_SPACE = {"trees.learning_rate": (0.05, 0.1, 0.2)}
# So that a run takes about a minute on one core.
DATA = {
  "name": "synthetic",
  "claim": "content",
  "num_rows": 150_000,
  "num_users": 512,
  "num_items": 8192,
  "num_user_clusters": 16,
}
SIZE = {
  "model.tasks": ("click",),
  "model.num_tokens": 4,
  "model.token_dim": 32,
  "model.dropout_rate": 0.0,
  "train.batch_size": 256,
  "train.eval_every_steps": 156,
  "train.early_stop_patience": 0,
}
CONTENT = {
  "model.memory_lengths": (10,),
  "model.decoder_layers": 1,
  "model.normalize_vectors": False,
  "model.encoder": {
    "dim": 16,
    "num_heads": 2,
    "mlp_dim": 32,
    "query_layers": 1,
    "document_layers": 1,
  },
  "model.contrast": {"weight": 0.01, "scale": 10.0, "negatives": "positives"},
  # Encoders learn as fast as the ranker.
  "optimizer.scale_rules": (),
}


def get_sweep(is_control: bool = False) -> Sweep:
  """The planted data, or its control."""
  data = {"data": DATA | {"control": is_control}}
  one_pass = {"train.num_epochs": 1}

  def model(label, recipe, words):
    return common.model(label, f"{recipe}:base", data | SIZE | words, SPACE)

  return Sweep(
    models=(
      model("lemur", "lemur", CONTENT | one_pass),
      model(
        "two_stage_content",
        "two_stage_content",
        CONTENT | {"train.num_epochs": 2},
      ),
      model("rankmixer", "rankmixer", one_pass),
      common.trees("lightgbm", "rankmixer:base", data | SIZE, TREES_SPACE),
    ),
    baseline="two_stage_content",
    num_trials=3,
    # No seed of the table, which would carry the luck of the chosen trial.
    tuning_seed=100,
    table_metrics=(
      "test/click/auc",
      "test/click/gauc",
      "test/click/logloss",
    ),
    control=None if is_control else "planted_lemur_control",
  )
