"""A planted trial that no linear model fits: where decisions are to be learned.

    python -m experiments.sweep --sweep=experiments/sweeps/planted_trial.py \\
        --workdir=runs/planted_trial --num_processes=2 \\
        --results=experiments/results/planted_trial

All models are linear, so that the form of the network is wrong for all alike;
`regret` is the share of the attainable gain that is missed. The same in a world
that linear models fit, where nothing is to be gained, is
`planted_trial_control.py`.
"""

from experiments.sweeps import common
from recjax.sweep import Sweep

# Shared by all: a network without hidden layers, and steps to its optimum.
WORDS = {
  "model.mlp_dims": (),
  "model.head_dims": (),
  "optimizer.learning_rate": 1e-2,
  "optimizer.scale_rules": ("log_multiplier=3",),
}
TRIAL_METRICS = ("test/trial/regret", "test/trial/eom")


def get_sweep(world: str = "misspecified") -> Sweep:
  """The misspecified world, or another."""
  data = {"data": {"name": "synthetic_trial", "world": world}}

  def model(label, recipe, words=None):
    return common.model(label, f"{recipe}:base", data | WORDS | (words or {}))

  return Sweep(
    models=(
      model("two_stage", "two_stage"),
      model("dfcl_pl", "dfcl", {"model.loss": "pl"}),
      model("dfcl_ifd", "dfcl", {"model.loss": "ifd"}),
      model("e2e_e3", "budget_allocation", {"model.alpha": 3.0}),
      model(
        "e2e_e2",
        "budget_allocation",
        {"model.alpha": 3.0, "model.estimator": "row_nes"},
      ),
    ),
    baseline="two_stage",
    num_trials=0,
    seeds=tuple(range(10)),
    metric="valid/trial/eom",
    table_metrics=TRIAL_METRICS,
    control=None if world == "well_specified" else "planted_trial_control",
  )
