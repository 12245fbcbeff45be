"""CB2CF (arXiv 1611.00384), cold ids from content, on the KuaiRand log.

    python -m experiments.run --config=experiments/configs/cb2cf.py:base \\
        --workdir=runs/cb2cf

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (PROMO's released
backbone: width 16, 2 blocks, batches of 128).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.cold_start("cb2cf", size)
  config.model.update(
    hidden_dim=32,
    popularity="item_positives",
    cold_below=3,
  )
  return config
