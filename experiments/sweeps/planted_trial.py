"""A planted trial that no linear model fits: where decisions are to be learned.

    python -m experiments.sweep --sweep=experiments/sweeps/planted_trial.py \\
        --workdir=runs/planted_trial --num_processes=2 \\
        --results=experiments/results/planted_trial

All models are linear, so that the form of the network is wrong for all alike;
`regret` is the share of the attainable gain that is missed. Every seed draws
the people, the trial and the held-out parts anew, so that the spread is that
of the method on new data. The same in a world that linear models fit, where
nothing is to be gained, is `planted_trial_control.py`.

Each model has three trials, chosen by the expected outcome of held-out people:
what weighs decisions against predictions where there is such a weight, else
the learning rate. The width of the noise that smooths decisions was set on
data seeds 1 and 2 of both worlds, which no table shows.
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
RATES = {"optimizer.learning_rate": (3e-3, 1e-2, 3e-2)}
WEIGHTS = {"model.alpha": (0.1, 1.0, 10.0)}


def get_sweep(world: str = "misspecified") -> Sweep:
  """The misspecified world, or another."""
  data = {"data": {"name": "synthetic_trial", "world": world}}

  def model(label, recipe, space, **words):
    words = {f"model.{key}": value for key, value in words.items()}
    return common.model(label, f"{recipe}:base", data | WORDS | words, space)

  return Sweep(
    models=(
      model("two_stage", "two_stage", RATES),
      model("e2e_e3", "budget_allocation", WEIGHTS),
      model("dfcl_pl", "dfcl", WEIGHTS, loss="pl"),
    ),
    baseline="two_stage",
    num_trials=3,
    # No seed of the table, which would carry the luck of the chosen trial.
    tuning_seed=100,
    seeds=tuple(range(10, 20)),
    seed_words=("data.seed",),
    metric="valid/trial/eom",
    table_metrics=("test/trial/regret", "test/trial/response_rmse"),
    control=None if world == "well_specified" else "planted_trial_control",
  )
