"""E3IR (arXiv 2408.11623): monotone, smooth responses and an allocation.

    python -m experiments.run \\
        --config=experiments/configs/e3ir.py:base \\
        --workdir=runs/e3ir

Sizes: `tiny` (seconds), `base` (Hillstrom's trial), `paper` (see
`common.trial`). The best checkpoint has the best expected outcome on the
validation part, `valid/trial/eom`.
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.trial("e3ir", size)
  config.model.update(
    learner="monotone",
    alpha=1e-3,
    beta=1.0,
    temperature=0.3,
    budgets=(0.3, 0.6),
  )
  return config
