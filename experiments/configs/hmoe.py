"""HMoE (CIKM 2020) on the tabs and labels of the KuaiRand log.

    python -m experiments.run --config=experiments/configs/hmoe.py:base \\
        --workdir=runs/hmoe

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (the width of MSN's and
MDL's rankers: 16 tokens of 1024; compiled for a mesh, not trained here).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand_tabs("hmoe", size)
  config.model.update(num_experts=4, expert_dim=32)
  if size == "tiny":
    config.model.update(expert_dim=8)
  if size == "paper":
    config.model.update(expert_dim=512)
  return config
