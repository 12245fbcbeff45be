"""E2E, reconstructed (arXiv 2302.04477): trained on what a budget earns.

    python -m experiments.run \\
        --config=experiments/configs/budget_allocation.py:base \\
        --workdir=runs/budget_allocation

The plan for a population, from the run:

    python -m experiments.allocate --workdir=runs/budget_allocation \\
        --population=people.parquet --budget=50000 --out=plan.parquet

Sizes: `tiny` (seconds), `base` (Hillstrom's trial), `paper` (see
`common.trial`). The best checkpoint has the best expected outcome on the
validation part, `valid/trial/eom`.
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.trial("budget_allocation", size)
  config.model.update(
    alpha=1.0,
    estimator="softmax",
    num_draws=32,
    smoothing=0.1,
    budgets=(0.15, 0.3, 0.45, 0.6, 0.75, 0.9),
    prices=(),
    center=True,
    warmup_share=0.3,
  )
  return config
