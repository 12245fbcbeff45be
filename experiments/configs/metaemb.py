"""MetaEmb (arXiv 1904.11547), generated ids with an inner step, on KuaiRand.

    python -m experiments.run --config=experiments/configs/metaemb.py:base \\
        --workdir=runs/metaemb

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (PROMO's released
backbone: width 16, 2 blocks, batches of 128).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.cold_start("metaemb", size)
  config.model.update(
    inner_learning_rate=0.1,
    alpha=0.1,
    popularity="item_positives",
    cold_below=3,
  )
  return config
