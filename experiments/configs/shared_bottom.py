"""Shared bottom on the tabs and labels of the KuaiRand log.

    python -m experiments.run \\
        --config=experiments/configs/shared_bottom.py:base --workdir=runs/bottom

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (the width of MSN's and
MDL's rankers: 16 tokens of 1024; compiled for a mesh, not trained here).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand_tabs("shared_bottom", size)
  return config
