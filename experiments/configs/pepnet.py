"""PEPNet (KDD 2023) on the tabs and labels of the KuaiRand log.

    python -m experiments.run --config=experiments/configs/pepnet.py:base \\
        --workdir=runs/pepnet

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (the width of MSN's and
MDL's rankers: 16 tokens of 1024; compiled for a mesh, not trained here).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand_tabs("pepnet", size)
  config.model.update(tower_dims=(32,), gate_dim=32)
  if size == "tiny":
    config.model.update(tower_dims=(8,), gate_dim=8)
  if size == "paper":
    config.model.update(tower_dims=(256,), gate_dim=256)
  return config
