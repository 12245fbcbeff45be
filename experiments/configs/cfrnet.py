"""CFRNet (arXiv 1606.03976), then allocation.

    python -m experiments.run \\
        --config=experiments/configs/cfrnet.py:base \\
        --workdir=runs/cfrnet

Sizes: `tiny` (seconds), `base` (Hillstrom's trial), `paper` (see
`common.trial`). The best checkpoint has the best expected outcome on the
validation part, `valid/trial/eom`.
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.trial("cfrnet", size)
  config.model.update(balance=0.1, ipm="mmd_linear", rbf_sigma=1.0)
  return config
