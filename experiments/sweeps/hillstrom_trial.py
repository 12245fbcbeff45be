"""All trial methods on Hillstrom's e-mail trial, at the recipes' budgets.

    python -m experiments.sweep --sweep=experiments/sweeps/hillstrom_trial.py \\
        --workdir=runs/hillstrom_trial --num_processes=2 \\
        --results=experiments/results/hillstrom_trial

Expected outcome at six budgets and the area under the cost curve; the same
optimiser, steps and network for all. Cross-fitted: seed k tests on the k-th
fifth of the people, so that everybody is judged once, by a model that has not
seen them; intervals are of a bootstrap over all of them.
"""

from experiments.sweeps import common
from recjax.metrics.trial import SHARES
from recjax.sweep import Sweep

# Of DFCL, in standard units: up to the average return of a treatment, which is
# 0.014 to 0.025 here and 0.066 to 0.078 in the other trial. At its own 0.1 to 1
# nobody is worth the cost.
PRICES = {
  "hillstrom": (0.005, 0.01, 0.02),
  "karlan_list": (0.02, 0.04, 0.07),
}


def get_sweep(dataset: str = "hillstrom") -> Sweep:
  """Every method once; no tuning beyond the choice of the checkpoint."""
  data = {"data": {"name": dataset}}
  # About twenty passes over the training part.
  data |= {"train.num_train_steps": 200, "train.eval_every_steps": 20}

  def model(label, recipe, **words):
    words = {f"model.{key}": value for key, value in words.items()}
    return common.model(label, f"{recipe}:base", data | words)

  return Sweep(
    models=(
      model("two_stage_s", "two_stage", learner="s"),
      model("two_stage_t", "two_stage", learner="t"),
      model("two_stage_shared", "two_stage"),
      model("x_learner", "x_learner"),
      model("cfrnet", "cfrnet"),
      model("drnet", "drnet"),
      model("drp", "drp"),
      model("e3ir", "e3ir"),
      model("dfcl_pl", "dfcl", loss="pl", prices=PRICES[dataset]),
      model("dfcl_mer", "dfcl", loss="mer", prices=PRICES[dataset]),
      model("dfcl_ifd", "dfcl", loss="ifd", prices=PRICES[dataset]),
      model("e2e_e1", "budget_allocation", estimator="nes"),
      model("e2e_e2", "budget_allocation", estimator="row_nes"),
      model("e2e_e3", "budget_allocation"),
    ),
    baseline="two_stage_shared",
    num_trials=0,
    seed_words=("data.fold",),
    metric="valid/trial/eom",
    table_metrics=(
      "test/trial/eom",
      *(f"test/trial/eom@{round(100 * share)}" for share in SHARES),
      "test/trial/cost_curve_area",
    ),
  )
