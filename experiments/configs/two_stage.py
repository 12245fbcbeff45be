"""Two stages, predict then allocate (S- and T-learner, TARNet).

    python -m experiments.run \\
        --config=experiments/configs/two_stage.py:base \\
        --workdir=runs/two_stage

Sizes: `tiny` (seconds), `base` (Hillstrom's trial), `paper` (see
`common.trial`). The best checkpoint has the best expected outcome on the
validation part, `valid/trial/eom`.
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.trial("two_stage", size)
  return config
