"""DRNet-style levels (arXiv 1902.00981), then allocation.

    python -m experiments.run \\
        --config=experiments/configs/drnet.py:base \\
        --workdir=runs/drnet

Sizes: `tiny` (seconds), `base` (Hillstrom's trial), `paper` (see
`common.trial`). The best checkpoint has the best expected outcome on the
validation part, `valid/trial/eom`.
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.trial("drnet", size)
  config.model.update(num_strata=2)
  return config
