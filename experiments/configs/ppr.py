"""PPR (arXiv 2205.09666), a prefix from the user's profile, on KuaiRand.

    python -m experiments.run --config=experiments/configs/ppr.py:base \\
        --workdir=runs/ppr

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (PROMO's released
backbone: width 16, 2 blocks, batches of 128).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.cold_start("ppr", size)
  config.model.update(num_prefix=1, hidden_dim=32)
  return config
