"""MMoE (KDD 2018) on the tabs and labels of the KuaiRand log.

    python -m experiments.run --config=experiments/configs/mmoe.py:base \\
        --workdir=runs/mmoe

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (the width of MSN's and
MDL's rankers: 16 tokens of 1024; compiled for a mesh, not trained here).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand_tabs("mmoe", size)
  config.model.update(num_experts=4, expert_dim=64, scenario_gates=True)
  if size == "tiny":
    config.model.update(expert_dim=8)
  if size == "paper":
    config.model.update(expert_dim=1024)
  return config
