"""SASRec and two towers (PROMO's backbone) on the KuaiRand log.

    python -m experiments.run --config=experiments/configs/two_towers.py:base \\
        --workdir=runs/two_towers

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (PROMO's released
backbone: width 16, 2 blocks, batches of 128).
`--config.model.tune=all` goes on with all weights in a third stage.
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.cold_start("two_towers", size)
  config.model.tune = "none"
  return config
