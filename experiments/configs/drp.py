"""DRP and DPM (arXiv 2211.15728): the return on investment is learned.

    python -m experiments.run \\
        --config=experiments/configs/drp.py:base \\
        --workdir=runs/drp

Sizes: `tiny` (seconds), `base` (Hillstrom's trial), `paper` (see
`common.trial`). The best checkpoint has the best expected outcome on the
validation part, `valid/trial/eom`.
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.trial("drp", size)
  config.model.update(max_ratio=4.0)
  return config
