"""Content average, cold ids from items alike, on the KuaiRand log.

    python -m experiments.run \\
        --config=experiments/configs/content_average.py:base \\
        --workdir=runs/content_average

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (PROMO's released
backbone: width 16, 2 blocks, batches of 128).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.cold_start("content_average", size)
  config.model.update(popularity="item_positives", cold_below=3)
  return config
