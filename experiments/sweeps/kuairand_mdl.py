"""MDL and its rivals on the tabs and labels of the bundled KuaiRand log.

    python -m experiments.sweep --sweep=experiments/sweeps/kuairand_mdl.py \\
        --workdir=runs/kuairand_mdl --num_processes=2 \\
        --results=experiments/results/kuairand_mdl

Compared is the mean over the cells of tab and binary label with at least 200
test users of both classes. All have at least the dense parameters of MDL.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

SPACE = {"optimizer.learning_rate": (5e-4, 1e-3, 2e-3)}
TREES_SPACE = {"trees.learning_rate": (0.02, 0.05, 0.1)}
MLP_RATIOS = {
  "shared_bottom": 10.0,
  "mmoe": 9.0,
  "ple": 10.0,
  "star": 9.0,
  "hmoe": 9.0,
  "pepnet": 9.0,
}


def get_sweep() -> Sweep:
  """All methods for scenarios and tasks, tuned alike."""

  def model(label, recipe, **words):
    words = {f"model.{key}": value for key, value in words.items()}
    return common.model(label, f"{recipe}:base", words, SPACE)

  def balanced(kind):
    ratio = MLP_RATIOS["mmoe"]
    return model(
      f"mmoe_{kind}", "mmoe", mlp_ratio=ratio, balance={"kind": kind}
    )

  return Sweep(
    models=(
      *(
        model(name, name, mlp_ratio=ratio) for name, ratio in MLP_RATIOS.items()
      ),
      *(balanced(k) for k in ("uncertainty", "gradnorm", "multibalance")),
      model("mdl", "mdl"),
      common.trees("lightgbm", "mmoe:base", space=TREES_SPACE),
    ),
    baseline="mmoe",
    num_trials=3,
    # No seed of the table, which would carry the luck of the chosen trial.
    tuning_seed=100,
    metric="valid/macro_gauc",
    table_metrics=(
      "test/macro_gauc",
      "test/micro_gauc",
      "test/click/macro_gauc",
      "test/long_view/macro_gauc",
    ),
  )
