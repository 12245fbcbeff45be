"""STAR (CIKM 2021) on the tabs and labels of the KuaiRand log.

    python -m experiments.run --config=experiments/configs/star.py:base \\
        --workdir=runs/star

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (the width of MSN's and
MDL's rankers: 16 tokens of 1024; compiled for a mesh, not trained here).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand_tabs("star", size)
  config.model.update(tower_dims=(32,), auxiliary_dim=16)
  if size == "tiny":
    config.model.update(tower_dims=(8,))
  if size == "paper":
    config.model.update(tower_dims=(256,), auxiliary_dim=64)
  return config
