"""MSN beside experts that compute no more than it does, on the planted rules.

    python -m experiments.sweep \\
        --sweep=experiments/sweeps/planted_memory_flops.py \\
        --workdir=runs/planted_memory_flops --num_processes=2 \\
        --results=experiments/results/planted_memory_flops

In `planted_memory.py` the sparse experts have MSN's active parameters. Every
expert is computed for every example there, as on most hardware, which is three
times MSN's FLOPs; here their networks are narrow, for 124 thousand against 113.
The control is `planted_memory_flops_control.py`.
"""

import dataclasses

from experiments.sweeps import planted_memory
from recjax.sweep import Sweep, with_words

MLP_RATIO = 2.0


def get_sweep(is_control: bool = False) -> Sweep:
  """MSN and the experts, the experts as the baseline."""
  whole = planted_memory.get_sweep(is_control)
  rows = {model.label: model for model in whole.models}
  experts = rows["rankmixer_smoe"]
  narrow = dataclasses.replace(
    experts,
    label="rankmixer_smoe_narrow",
    config=with_words(experts.config, {"model.mlp_ratio": MLP_RATIO}),
  )
  return dataclasses.replace(
    whole,
    models=(narrow, rows["msn"]),
    baseline=narrow.label,
    control=None if is_control else "planted_memory_flops_control",
  )
