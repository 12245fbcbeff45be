"""Rankers on the bundled KuaiRand log, label click.

    python -m experiments.sweep --sweep=experiments/sweeps/kuairand_base.py \\
        --workdir=runs/kuairand_base --num_processes=2 \\
        --results=experiments/results/kuairand_base

Each row gets 3 trials over its learning rate at one seed, and then 5 seeds of
its best; trees get their own rate instead. 88 runs.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

SPACE = {"optimizer.learning_rate": (5e-4, 1e-3, 2e-3)}
TREES_SPACE = {"trees.learning_rate": (0.02, 0.05, 0.1)}


def get_sweep() -> Sweep:
  """All rankers, tuned alike."""

  def model(label, recipe, **words):
    words = {f"model.{key}": value for key, value in words.items()}
    return common.model(label, f"{recipe}:base", words, SPACE)

  return Sweep(
    models=(
      model("dlrm_mlp", "dlrm_mlp"),
      model("dcnv2", "dcnv2"),
      model("wukong", "wukong"),
      model("din", "din"),
      model("rankmixer", "rankmixer"),
      model("rankmixer_gated", "rankmixer", ffn="gated"),
      model("rankmixer_smoe", "rankmixer", ffn="smoe"),
      model("rankmixer_relu_moe", "rankmixer", ffn="relu_moe"),
      model("msn", "msn"),
      model("msn_smoe", "msn", ffn="smoe"),
      common.trees("lightgbm", "rankmixer:base", space=TREES_SPACE),
    ),
    baseline="rankmixer",
    num_trials=3,
    # No seed of the table, which would carry the luck of the chosen trial.
    tuning_seed=100,
  )
