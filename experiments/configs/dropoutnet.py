"""DropoutNet (NeurIPS 2017), towers that do without ids, on KuaiRand.

    python -m experiments.run --config=experiments/configs/dropoutnet.py:base \\
        --workdir=runs/dropoutnet

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (PROMO's released
backbone: width 16, 2 blocks, batches of 128).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.cold_start("dropoutnet", size)
  config.model.update(
    id_dropout_rate=0.5,
    popularity="item_positives",
    cold_below=3,
  )
  return config
