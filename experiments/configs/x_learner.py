"""X-learner (arXiv 1706.03461), then allocation.

    python -m experiments.run \\
        --config=experiments/configs/x_learner.py:base \\
        --workdir=runs/x_learner

Sizes: `tiny` (seconds), `base` (Hillstrom's trial), `paper` (see
`common.trial`). The best checkpoint has the best expected outcome on the
validation part, `valid/trial/eom`.
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.trial("x_learner", size)
  config.model.learner = "t"
  return config
