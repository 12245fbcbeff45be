"""PLE (RecSys 2020) on the tabs and labels of the KuaiRand log.

    python -m experiments.run --config=experiments/configs/ple.py:base \\
        --workdir=runs/ple

Sizes: `tiny` (seconds), `base` (bundled data), `paper` (the width of MSN's and
MDL's rankers: 16 tokens of 1024; compiled for a mesh, not trained here).
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand_tabs("ple", size)
  config.model.update(
    num_levels=2, num_task_experts=1, num_shared_experts=2, expert_dim=32
  )
  if size == "tiny":
    config.model.update(expert_dim=8)
  if size == "paper":
    config.model.update(expert_dim=512)
  return config
