"""PLATE (SIGIR 2023), prompt vectors of domain and user, on KuaiRand.

    python -m experiments.run --config=experiments/configs/plate.py:base \\
        --workdir=runs/plate

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (PROMO's released
backbone: width 16, 2 blocks, batches of 128).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.cold_start("plate", size)
  config.model.update(
    prompt_init_scale=1e-3,
    popularity="item_positives",
    cold_below=3,
  )
  return config
